"""Commands about data and checkpoints on disk: pack, corpus, tag, info.

Their options are the parameters of functions, which import heavy modules inside.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from bitbyte.cli.hints import named, next_step
from bitbyte.cli.options import Json, argument, refuse
from bitbyte.files import (
    BitbyteError,
    artifacts,
    is_stdout,
    output,
    replacing,
    shown,
    to_json,
    user_path,
)
from bitbyte.process import say

VAL_FRACTION = 0.05


def pack(
    inputs: argument(tuple[str, ...], "[INPUT ...]"),
    /,
    out: str | None = None,
    val_inputs: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    whole_files: bool = False,
    hf: str | None = None,
    name: str | None = None,
    field: str | None = None,
    shard_size_gb: float = 1.0,
    sep_byte: int | None = None,
    val_fraction: float = VAL_FRACTION,
    max_bytes: int | None = None,
    max_unpacked: int | None = None,
    seed: int = 0,
    workers: int = 1,
    allow_overwrite: bool = False,
) -> None:
    """Pack files, folders or a data set into shards to train on.

    Inputs are files of any kind, folders, TinyStories JSON, a Hugging Face data set (--hf) or a
    built-in corpus.

    Args:
        inputs: files and folders, or the built-in names stories and stdlib.
        out: folder for the shards; default artifacts/datasets/NAME.
        val_inputs: files and folders for the validation split.
        include: patterns of the files inside folders to take, e.g. '*.py' 'docs/*'; default: all.
        exclude: patterns of those to leave out.
        whole_files: hold out whole files instead of pieces of all files.
        hf: Hugging Face data set instead of inputs, e.g. HuggingFaceTB/smollm-corpus.
        name: configuration of the Hugging Face data set, e.g. cosmopedia-v2.
        field: text field of JSON and Hugging Face records; default text, in JSON also story.
        shard_size_gb: size of a shard in units of 10^9 bytes.
        sep_byte: byte after each document; default 0 for records and stories, none for files.
        val_fraction: share of the documents to hold out, chosen by their hash.
        max_bytes: stop after this many bytes.
        max_unpacked: size limit of an unpacked .gz .bz2 .xz .zst; default 2000 times its packed
            size + 16 MiB.
        seed: seed of the built-in stories.
        workers: processes that read, unpack and parse files; the shards are the same.
        allow_overwrite: replace the shards in the folder.
    """
    from bitbyte.data import corpora
    from bitbyte.data.pack import pack as write_shards

    # A Path has no "./", so of all names only those of corpora stay text: ./stories is a file.
    inputs, val_inputs = (
        [name if corpora.is_name(name) else user_path(name) for name in names]
        for names in (inputs, val_inputs)
    )
    if hf is not None and inputs:
        raise BitbyteError("give inputs or --hf, not both")
    source = inputs if hf is None else f"hf:{hf}"
    if not source:
        raise BitbyteError("nothing to pack: name files, folders, stories, stdlib, or --hf SET")
    named_sets = {corpora.name_of(given) for given in (source, val_inputs) if given}
    refuse("without the built-in stories", seed=seed != 0 and "stories" not in named_sets)
    refuse("without files to read", workers=workers > 1 and not {None, "stdlib"} & named_sets,
           max_unpacked=max_unpacked is not None and None not in named_sets)  # fmt: skip
    if inputs and all(isinstance(path, Path) and path.is_file() for path in (*inputs, *val_inputs)):
        refuse("without a folder to look into", include=bool(include), exclude=bool(exclude))
    if val_inputs:
        refuse(
            "with --val_inputs, which are all that is held out", whole_files=whole_files,
            val_fraction=val_fraction not in (0, VAL_FRACTION),
        )  # fmt: skip
    options = {
        "field": field, "name": name, "n_bytes": max_bytes, "seed": seed,
        "max_unpacked": max_unpacked, "include": include, "exclude": exclude,
        "whole_files": whole_files, "workers": workers,
    }  # fmt: skip
    documents, facts = corpora.open_corpus(source, **options)
    if sep_byte is None:
        sep_byte = facts.get("sep_byte")
    held_out = held_out_facts = None
    if val_inputs:
        held_out, held_out_facts = corpora.open_corpus(val_inputs, **options | {"split": "val"})
    folder = artifacts("datasets", facts["name"]) if out is None else user_path(out)
    manifest = write_shards(
        documents, folder, shard_size_gb=shard_size_gb, sep_byte=sep_byte,
        val_fraction=val_fraction, val_documents=held_out, val_source=held_out_facts,
        source=facts, max_bytes=max_bytes, overwrite=allow_overwrite,
    )  # fmt: skip
    print(f"{shown(folder)}: {manifest.summary()}")
    next_step(f"train ar --data {named(folder, 'datasets')} --minutes 5")


def corpus(
    which: argument(str, "stories"),
    /,
    out: str,
    n_bytes: int = 10_000_000,
    seed: int = 0,
    split: str = "train",
    allow_overwrite: bool = False,
) -> None:
    """Write the built-in stories to a file, as TinyStories JSON.

    Args:
        which: stories.
        out: JSON file to write.
        n_bytes: bytes of story text.
        seed: another seed gives other stories.
        split: train or val; by construction of their seeds the two never share a story.
        allow_overwrite: replace the file if it exists.
    """
    from bitbyte.stories import grammar

    if which != "stories":
        raise BitbyteError(f"no built-in corpus {which!r} to write as JSON; there is: stories")
    target = output(out, overwrite=allow_overwrite)
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as folder:
        made = Path(folder, "stories.json")
        grammar.write_json(made, n_bytes=n_bytes, seed=seed, split=split)
        with open(made, "rb") as source, replacing(target, overwrite=allow_overwrite) as sink:
            shutil.copyfileobj(source, sink)
        size = made.stat().st_size
    print(f"{shown(target)}: {size:,} bytes", file=sys.stderr if is_stdout(target) else sys.stdout)


def tag(
    path: argument(str | None, "[PATH]") = None,
    /,
    ckpt: str | None = None,
    dry_run: bool = False,
    apply: bool = False,
    inplace: bool = False,
    out: str | None = None,
    variant: str | None = None,
    model_family: str | None = None,
    allow_overwrite: bool = False,
    convert: str | None = None,
    linear: str | None = None,
    n_head: int | None = None,
    seq_len: int | None = None,
) -> None:
    """Convert or tag .pt checkpoints of the earlier scripts.

    Without --convert, --apply or --inplace it only looks.

    Args:
        path: file or folder; default artifacts/checkpoints.
        ckpt: the same, as an option.
        dry_run: only look, whatever else is given.
        apply: write: for a file, a tagged copy; in a folder, tag in place all files that are
            unambiguous.
        inplace: replace the file itself; needs --allow_overwrite.
        out: file for the tagged copy; default NAME.tagged.pt.
        variant: ar or diffusion, if the file does not say.
        model_family: bitbyte, mamba or diffusion, if the file does not say.
        allow_overwrite: replace files and existing tags.
        convert: convert the file to a current checkpoint in this run folder.
        linear: with --convert: ternary or dense, as the file's tensors do not show it.
        n_head: with --convert: attention heads.
        seq_len: with --convert: ids of context.
    """
    from bitbyte.legacy import reader
    from bitbyte.legacy.convert import convert as convert_file

    if path is not None and ckpt is not None:
        raise BitbyteError("give PATH or --ckpt, not both")
    given = next((name for name in (path, ckpt) if name is not None), artifacts("checkpoints"))
    place, out, convert = (
        None if name is None else user_path(name) for name in (given, out, convert)
    )
    words = {"variant": variant, "model_family": model_family, "allow_overwrite": allow_overwrite}
    if convert is not None and not dry_run:
        shape = {"linear": linear, "n_head": n_head, "seq_len": seq_len}
        print(convert_file(place, convert, **shape, **words))
        return
    write = (apply or inplace) and not dry_run
    for line in reader.tag_all(place, write=write, inplace=inplace, out=out, **words):
        print(line)


def info(
    path: argument(str | None, "[PATH]") = None, /, verify: bool = False, json: Json = False
) -> dict:
    """Describe a model, a data set, a file or this machine.

    Args:
        path: run folder, step folder or run name; packed folder, its name, or a file. Without it,
            this machine.
        verify: check the hash of every file.
    """
    from bitbyte.device import environment

    line = ""
    if path is None:
        document = environment()
    else:
        place, is_data = _found(path)
        line, document = _about_data(place, verify) if is_data else _about_step(place, verify)
    if not json:
        print(line or to_json(document).decode().rstrip("\n"))
    return document


def _found(name: str) -> tuple[Path, bool]:
    """(data or step folder meant by a path or a bare name, whether it is data).

    Data at the path itself comes first, then a run, then a data set by name.  Raises BitbyteError.
    """
    from bitbyte import runs
    from bitbyte.data import readers
    from bitbyte.data.remote import is_address

    if is_address(name):
        return readers.find_data(name), True
    asked, data = user_path(name), None
    if runs.is_packed(asked):
        return asked, False
    with contextlib.suppress(BitbyteError):
        data = readers.find_data(asked)
    if data == asked:
        return data, True
    try:
        step = runs.resolve(asked)
    except BitbyteError as error:
        if data is None:
            where = "" if asked.is_absolute() else f" in {artifacts('datasets')}"
            raise BitbyteError(f"{error}; nor is there a data set of that name{where}") from None
        return data, True
    if data is not None:
        say(f"note: there is a data set of that name too: bitbyte info {data}")
    return step, False


def _about_data(place: Path, verify: bool) -> tuple[str, dict]:
    """(one-line summary, document) of a packed folder, or of data without a manifest."""
    from bitbyte import shards

    manifest = shards.manifest_of(place)
    if manifest is None:
        n_bytes = shards.open_dataset(place, 1).n_bytes
        text, about = f"{n_bytes:,} bytes, no manifest", {"bytes": n_bytes}
    else:
        if verify:
            shards.verify(place)
        text, about = manifest.summary() + ", all hashes match" * verify, manifest.to_dict()
    return f"{shown(place)}: {text}", {"path": str(place)} | about


def _about_step(folder: Path, verify: bool) -> tuple[str, dict]:
    """("", meta data) of a step folder, which has no summary and is printed as JSON."""
    from bitbyte import checkpoint

    if verify:
        meta = checkpoint.load_step(folder, with_optim=True)[0]
        say(f"{shown(folder)}: all hashes match")
    else:
        meta = checkpoint.read_meta(folder)
    if sketch := meta["data"].get("sketch"):
        meta["data"] = meta["data"] | {"sketch": f"{len(sketch)} hashes"}
    return "", {key: value for key, value in meta.items() if key != "train"}
