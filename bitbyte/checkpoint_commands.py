"""Commands about one checkpoint: functions whose parameters are the options.

Heavy imports happen inside the command that needs them.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from bitbyte.files import (
    BitbyteError,
    artifacts,
    output,
    output_folder,
    read_input,
    shown,
    to_json,
    user_path,
    write_atomic,
)
from bitbyte.generate import SamplingConfig
from bitbyte.vocab import on_terminal

Flat = functools.partial(tyro.conf.arg, name="")


def evaluate(
    ckpt: Positional[str],
    /,
    data: str,
    split: str = "val",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    kind: tuple[str, ...] = (),
    draws: int | None = None,
    per_pass: int | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    device: str = "auto",
    threads: int | None = None,
    name: str | None = None,
    record: bool = True,
    out: str | None = None,
) -> None:
    """Bits per byte of a checkpoint on a whole split, with interval and result record.

    Causal models (ar, mamba) have an exact cost.  Diffusion models have an upper bound, shown as
    <=, and the lengths of two codes: chain_rule:left_to_right and chain_rule:confidence.

    Args:
        ckpt: run folder, step folder or run name; stories-law is the built-in corpus' own law,
            uniform a model without knowledge.
        data: packed folder, folder or glob of .bin, or one file.
        split: split of a packed folder.
        window: bytes of a window; default: the model's context.
        stride: bytes scored a window, the rest is context; default: the window.
        batch_size: windows at a time; changes the speed, and the number only by rounding (up to
            some 1e-5 bits per byte for ternary models without the int8 kernel).
        limit: score only the first bytes.
        kind: exact, upper_bound, chain_rule:left_to_right, chain_rule:confidence, or several of
            them; default: exact for ar and mamba, upper_bound for diffusion.
        draws: masks a window of the upper bound; default 16.
        per_pass: bytes revealed in one pass of a chain rule, default 1; more is faster and costs
            more bits.
        seed: of the masks.
        dtype: fp32, bf16, fp16 or auto.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
        name: what tables call the model; default: its run folder.
        record: write a result record.
        out: folder of the record; default artifacts/results.
    """
    from bitbyte import evaluate as evaluation
    from bitbyte.dist import choose_device, choose_dtype, prepare_process

    prepare_process(threads, deterministic=False)
    place = choose_device(device)
    folder = output_folder(out) if record and out is not None else None
    model, meta, kernels, run = _load_for_scoring(ckpt, place, window)
    # All kinds are checked before the first is scored, which may take long.
    kinds = [evaluation.kind_of(model, one) for one in kind or (None,)]
    if draws is not None and "upper_bound" not in kinds:
        raise BitbyteError(f"--draws belongs to the upper bound, not to {', '.join(kinds)}")
    if per_pass is not None and not any(one.startswith(evaluation.CHAIN_RULE) for one in kinds):
        raise BitbyteError(f"--per_pass belongs to the chain rules, not to {', '.join(kinds)}")
    draws, per_pass = 16 if draws is None else draws, 1 if per_pass is None else per_pass
    for one in kinds:
        row, _ = evaluation.evaluate(
            model, user_path(data), name=shown(name or run), split=split, window=window,
            stride=stride, batch_size=batch_size, dtype=choose_dtype(dtype, place), limit=limit,
            meta=meta, kernels=kernels, kind=one, draws=draws, per_pass=per_pass, seed=seed,
        )  # fmt: skip
        print(_evaluation_line(row))
        if row["trained_on_it"]:
            print("note: the model was trained on these bytes; the results table leaves this out")
        if record:
            print(shown(evaluation.write_record(row, folder)))


def _evaluation_line(row: dict) -> str:
    interval = "too few bytes for an interval"
    if row["interval"]:
        interval = "95 % interval of these bytes {:.4f} to {:.4f}".format(*row["interval"])
    sign = "<= " if row["kind"] == "upper_bound" else ""
    kind = "" if row["kind"] == "exact" else f", {row['kind']}"
    if row["draws"]:
        kind += f" from {row['draws']['per_window']} draws a window"
    if row["per_pass"]:
        kind += f" with {row['per_pass']} byte{'s' * (row['per_pass'] > 1)} a pass"
    floor = "" if row["floor_bpb"] is None else f", floor {row['floor_bpb']:.4f}"
    return (
        f"{row['model']}: {sign}{row['bpb']:.4f} bits per byte ({interval}){kind}{floor}; "
        f"{row['bytes']:,} bytes, window {row['context']['window']}, stride "
        f"{row['context']['stride']}, {row['dtype']}, {row['seconds']:.1f} s"
    )


def compare(a: Positional[str], b: Positional[str], /) -> None:
    """Say which of two results on the same bytes is better, by a paired bootstrap.

    Its interval covers the choice of bytes, not of the training seed.

    Args:
        a: result record: a file, its name in artifacts/results, or the name of a model that has
            one record there.
        b: another one.
    """
    from bitbyte import evaluate as evaluation

    records = [_record(name) for name in (a, b)]
    found = evaluation.compare(*records)
    interval = "no interval"
    if found["interval"]:
        interval = "95 % interval of these bytes {:+.4f} to {:+.4f}".format(*found["interval"])
    print(
        f"{records[0]['model']} - {records[1]['model']}: {found['difference']:+.4f} bits per byte "
        f"({interval}): {found['verdict']}" + (f" ({found['note']})" if found["note"] else "")
    )


def _record(name: str) -> dict:
    """The result record meant by a file, a file's name in the results, or a model's name."""
    from bitbyte.records import read_record

    path = user_path(name)
    path = path if os.path.isfile(path) else artifacts("results", name)
    path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    if not os.path.isfile(path):  # Path.is_file raises on the name of a model that is too long
        fitting = []
        for other in sorted(artifacts("results").glob("*.json")):
            kind, row = read_record(other)
            named = kind == "evaluation" and row["model"] in (name, shown(name))
            if named and "blocks" in row:
                fitting.append(other)
        if len(fitting) != 1:
            those = ", ".join(other.stem for other in fitting[:5])
            those = f"{name} has several: {those}" if fitting else f"there is no record {name}"
            raise BitbyteError(f"{those}; name a file in {artifacts('results')}")
        (path,) = fitting
    kind, record = read_record(path)
    if kind != "evaluation" or "blocks" not in record:
        raise BitbyteError(
            f"{path} is not a record of bits per byte with sums of blocks, which comparing needs; "
            "bitbyte eval writes one"
        )
    return record


def _load_for_scoring(ckpt: str, device, window: int | None):
    """(model, meta, kernels, run name) of a checkpoint, or of a model that needs none."""
    from bitbyte import checkpoint, models

    if ckpt == "stories-law":
        from bitbyte.stories import StoriesLaw

        return StoriesLaw(), None, {}, ckpt
    if ckpt == "uniform":
        from bitbyte.evaluate import Uniform

        return Uniform(window or 256), None, {}, ckpt
    folder = checkpoint.resolve(ckpt)
    model, meta = checkpoint.load_model(folder, device=device)
    return model, meta, models.use_kernels(model), folder.resolve().parent.name


def _outputs(*names: str | None, overwrite: bool) -> list[Path | None]:
    """Paths to write later, refused before the work; None was not asked for."""
    return [None if name is None else output(name, overwrite=overwrite) for name in names]


def _write(paths: list[Path | None], *contents: bytes, overwrite: bool) -> None:
    for path, data in zip(paths, contents, strict=True):
        if path is not None:
            write_atomic(path, data, follow=True, overwrite=overwrite)


def _display(text: str) -> None:
    sys.stdout.write(on_terminal(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def sample(
    ckpt: Positional[str],
    /,
    config: Annotated[SamplingConfig, Flat()],
    prompt: str = "",
    prompt_file: str | None = None,
    slide: str | None = None,
    order: str | None = None,
    steps: int | None = None,
    out: str | None = None,
    device: str = "auto",
    metrics: bool = False,
    metrics_json: str | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Continue a prompt, byte by byte as the bytes come; a diffusion model block by block.

    Args:
        ckpt: run folder, step folder or run name.
        prompt: text to continue; may be empty.
        prompt_file: file whose bytes are the prompt; - is standard input.
        slide: ar, past the context: exact (default) uses all of it for every byte, block is faster.
        order: diffusion: confidence (default), ancestral or left_to_right.
        steps: diffusion: passes of the network a block; default: one for each byte.
        out: also write the generated bytes, unchanged, to this file.
        device: auto, cpu, cuda, mps.
        metrics: print time to the first byte, bytes/s and peak memory.
        metrics_json: write them to this file.
        allow_overwrite: replace these files if they exist.
    """
    from bitbyte import checkpoint, generate, infill
    from bitbyte.dist import choose_device

    if prompt and prompt_file is not None:
        raise BitbyteError("give --prompt or --prompt_file, not both")
    outputs = _outputs(out, metrics_json, overwrite=allow_overwrite)
    model, _ = checkpoint.load_model(checkpoint.resolve(ckpt), device=choose_device(device))
    start = os.fsencode(prompt) if prompt_file is None else read_input(prompt_file)
    text, waiting = generate.Utf8Stream(), bytearray(start)

    def show(byte: int) -> None:
        """Write a byte; the prompt goes before the first one, when nothing can be refused now."""
        waiting.append(byte)
        _display(text.push(bytes(waiting)))
        waiting.clear()

    diffusion = model.config.family == "diffusion"
    for option, value, fits in (
        ("slide", slide, not diffusion), ("order", order, diffusion), ("steps", steps, diffusion),
    ):  # fmt: skip
        if value is not None and not fits:
            raise BitbyteError(f"{ckpt}: a model of family {model.config.family} has no --{option}")
    if diffusion:
        result = infill.continued(model, start, config, order=order or "confidence", steps=steps)
        _display(text.push(start + result.bytes))
    else:
        result = generate.generate(model, start, config, slide=slide or "exact", on_byte=show)
    _display(text.flush() + "\n")
    _write(outputs, result.bytes, to_json(result.metrics), overwrite=allow_overwrite)
    if metrics:
        print(json.dumps(result.metrics, indent=1), file=sys.stderr)


def infill(
    ckpt: Positional[str],
    /,
    text: str = "",
    text_file: str | None = None,
    sign: str | None = None,
    share: float = 0.15,
    order: str | None = None,
    steps: int | None = None,
    candidates: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    out: str | None = None,
    device: str = "auto",
    metrics_json: str | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Fill hidden bytes of a text from both sides; each mask sign is one hidden byte.

    Diffusion models denoise; ar and mamba models search for fills that make what follows likely.

    Args:
        ckpt: run folder, step folder or run name.
        text: text with mask signs; without any, random bytes of it are hidden.
        text_file: file whose bytes are the text; - is standard input.
        sign: what stands for a hidden byte; default: a white square, U+25A1.
        share: share of the bytes to hide where the text has no sign.
        order: diffusion: confidence (default), ancestral or left_to_right.
        steps: diffusion: passes of the network; default: one for each hidden byte.
        candidates: ar, mamba: fills to draw for each hidden span; default 8.
        temperature: divides the logits; 0 = greedy, the same for all seeds.
        top_k: keep this many bytes; 0 = off.
        top_p: keep the fewest bytes that hold this probability; 1 = off.
        min_p: drop bytes below this share of the likeliest one's probability; 0 = off.
        seed: same seed, same hidden bytes and draws.
        out: also write the filled text's bytes, unchanged, to this file.
        device: auto, cpu, cuda, mps.
        metrics_json: write method, cost, passes and time to this file.
        allow_overwrite: replace these files if they exist.
    """
    from bitbyte import checkpoint, infill
    from bitbyte.dist import choose_device

    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    if bool(text) == (text_file is not None):
        raise BitbyteError("give the text to fill as --text or --text_file, one of them")
    outputs = _outputs(out, metrics_json, overwrite=allow_overwrite)
    data = os.fsencode(text) if text_file is None else read_input(text_file)
    # The default is UTF-8 in every locale, as texts are; what was typed is what the terminal sent.
    mark = infill.SIGN if sign is None else os.fsencode(sign)
    ids_T = infill.parse_mask(data, mark)
    if (ids_T != infill.MASK).all():
        ids_T = infill.random_masks(ids_T, share, seed)
        hidden = int((ids_T == infill.MASK).sum())
        word = mark.decode("utf-8", "replace")
        print(f"no {word} in the text: {hidden} random bytes of it are hidden", file=sys.stderr)
    model, _ = checkpoint.load_model(checkpoint.resolve(ckpt), device=choose_device(device))
    diffusion = model.config.family == "diffusion"
    for option, value, fits in (
        ("order", order, diffusion), ("steps", steps, diffusion),
        ("candidates", candidates, not diffusion),
    ):  # fmt: skip
        if value is not None and not fits:
            raise BitbyteError(f"{ckpt}: a model of family {model.config.family} has no --{option}")
    result = infill.infill(
        model, ids_T, config, order=order or "confidence", steps=steps,
        candidates=8 if candidates is None else candidates,
    )  # fmt: skip
    signs = b"".join(mark if i == infill.MASK else bytes([i]) for i in ids_T.tolist())
    for line in (signs, result.data):
        _display(line.decode("utf-8", "replace") + "\n")
    metrics = {
        "method": result.method, "bytes": len(result.data), "hidden_bytes": len(result.positions),
        "bits_per_byte": result.bits_per_byte, "passes": result.passes, "seconds": result.seconds,
    }  # fmt: skip
    print(
        "{hidden_bytes} of {bytes} bytes filled by {method}: {bits_per_byte:.3f} bits a filled "
        "byte under this model's own law, passes {passes}, {seconds:.2f} s".format(**metrics),
        file=sys.stderr,
    )
    _write(outputs, result.data, to_json(metrics), overwrite=allow_overwrite)


def tag(
    path: Positional[str | None] = None,
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
    """Tag or convert .pt checkpoints of earlier scripts; without --apply or --inplace only look.

    Args:
        path: file or folder; default artifacts/checkpoints.
        ckpt: the same, as an option.
        dry_run: only look, whatever else is given.
        apply: write: a file's tagged copy, or in a folder, in place, all that is certain.
        inplace: replace the file itself; needs --allow_overwrite.
        out: file for the tagged copy; default NAME.tagged.pt.
        variant: ar or diffusion, where the file does not tell.
        model_family: bitbyte, mamba or diffusion, where the file does not tell.
        allow_overwrite: replace files and other tags.
        convert: turn the file into a checkpoint of today in this run folder.
        linear: with --convert: ternary or dense; the file's tensors cannot tell.
        n_head: with --convert: attention heads.
        seq_len: with --convert: ids of context.
    """
    from bitbyte import legacy, legacy_convert

    if path is not None and ckpt is not None:
        raise BitbyteError("give PATH or --ckpt, not both")
    given = next((name for name in (path, ckpt) if name is not None), artifacts("checkpoints"))
    place, out, convert = (
        None if name is None else user_path(name) for name in (given, out, convert)
    )
    words = {"variant": variant, "model_family": model_family, "allow_overwrite": allow_overwrite}
    if convert and not dry_run:
        shape = {"linear": linear, "n_head": n_head, "seq_len": seq_len}
        print(legacy_convert.convert(place, convert, **shape, **words))
        return
    write = (apply or inplace) and not dry_run
    for line in legacy.tag_all(place, write=write, inplace=inplace, out=out, **words):
        print(line)


def info(path: Positional[str] = "", /, verify: bool = False) -> None:
    """Say what this machine, a checkpoint or a data set is.

    Args:
        path: run folder, step folder, packed folder or file; empty: this machine.
        verify: hash every file and compare.
    """
    from bitbyte import checkpoint, shards

    if not path:
        print(to_json(checkpoint.environment()).decode(), end="")
        return
    path = user_path(path)
    manifest = shards.manifest_of(path)
    if manifest is not None:
        if verify:
            shards.verify(path)
        print(f"{shown(path)}: {manifest.summary()}" + (", all hashes match" if verify else ""))
        return
    if path.is_file():
        data = shards.open_dataset(path, 1)
        print(f"{shown(path)}: {data.n_bytes:,} bytes, no manifest")
        return
    folder = checkpoint.resolve(path)
    meta = (
        checkpoint.load_step(folder, with_optim=True)[0] if verify else checkpoint.read_meta(folder)
    )
    if sketch := meta["data"].get("sketch"):
        meta["data"] = meta["data"] | {"sketch": f"{len(sketch)} hashes"}
    print(to_json({k: v for k, v in meta.items() if k != "train"}).decode(), end="")


COMMANDS = {
    "eval": evaluate, "compare": compare, "sample": sample, "infill": infill, "tag": tag,
    "info": info,
}  # fmt: skip
