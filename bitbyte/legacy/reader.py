"""Checkpoints of earlier scripts: ``.pt`` files, read without running what is in them.

A ``.pt`` file is a zip archive with a pickle, and a pickle is a program.  It is inspected before it
is loaded: every name it asks for must match the short list `ALLOWED`; only then does torch's
restricted reader get it.  What the file does not say follows from the names of its parameters, or
the user says it; autoregressive and denoising transformers have the same names, so nothing is
guessed silently.

Earlier scripts tagged files with `TAGS`.  `convert` turns such a file into a current checkpoint.
"""

import contextlib
import dataclasses
import os
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitbyte.files import BitbyteError, replacing, user_path
from bitbyte.vocab import printable

TAGS = {"variant": ("ar", "diffusion"), "model_family": ("bitbyte", "mamba", "diffusion")}
SUFFIXES = (".pt", ".pth", ".ckpt")
SAFE_TORCH = (2, 10)  # before it, weights_only=True could be made to write out of bounds
FILE_LIMIT = 64 * 10**9  # bytes
PICKLE_LIMIT = 16 * 2**20  # bytes of the pickle, which holds no weights
TUPLE_LIMIT = 20_000  # hashing tuples nested 100,000 deep overflows the stack of the process
ALLOWED = re.compile(
    r"collections\.(?:OrderedDict|Counter)|torch\._utils\._rebuild_(?:tensor_v2|parameter)|__builtin__\.set|"
    r"_codecs\.encode|torch\.(?:Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|"
    r"torch\.(?:Size|device|float64|float32|float16|bfloat16|u?int(?:8|16|32|64)|bool)"
)
ADVICE = (
    "; if you trust it, save the weights alone: torch.save({'model': torch.load(OLD, "
    "weights_only=False)['model']}, NEW), with its own key for 'model'"
)
STATES = ("model", "model_state", "model_state_dict", "state_dict")
CONFIGS = ("config", "model_config", "model_args", "args", "hparams", "hyper_parameters")
STEPS = ("step", "global_step", "iter", "iter_num", "iteration")
PREFIX = "module."  # of DistributedDataParallel
WRAPPERS = re.compile(  # of torch.compile, FSDP, recomputed blocks, Fabric: around any module
    r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
AVERAGED = re.compile(r"(?:\w+\.)?(?:\w+_)?ema(?:_\w+)?\.(?:module\.)?(.+)")  # names of a copy
RECOMPUTED = re.compile(  # buffers that a model recomputes
    r"(?:.*\.)?(?:inv_freq|(?:cos|sin)(?:_cached)?|(?:causal_|attn_|attention_)?mask|tril)"
)
MASKS = re.compile(  # buffers too, but only by their shape: weights may have these names
    r"(?:.*\.)?(?:(?:self_)?att(?:n|ention)\.(?:masked_)?bias|attn_bias|causal)"
)


@dataclasses.dataclass(frozen=True)
class Legacy:
    """Content of a file; its tensors are on the CPU, and stay in the file until they are used."""

    path: Path
    layout: str  # "bare", or the key that holds the state dict
    state: dict[str, Tensor] = dataclasses.field(repr=False)  # by name, without prefixes
    config: dict = dataclasses.field(repr=False)  # empty if there is none
    tags: dict[str, str]  # those of TAGS that are at the top level of the file
    step: int | None
    content: dict = dataclasses.field(repr=False)  # everything, as it was saved
    notes: tuple[str, ...] = ()  # what was done to read it


class Guess(NamedTuple):
    """What a file is, in the words of the earlier scripts; None if unknown."""

    variant: str | None
    model_family: str | None
    certainty: str  # tagged (both tags are there), found (no doubt), guessed, ambiguous
    reasons: list[str]


class Row(NamedTuple):
    """One file of a scan; ``problem`` says why it cannot be read."""

    path: Path
    bytes: int
    layout: str = ""
    parameters: int = 0
    guess: Guess | None = None
    problem: str = ""


def shown(path: Path) -> str:
    """A path as text on one line, whatever bytes are in it."""
    return printable(os.fsencode(path))


def read(path: str | Path, *, limit: int = FILE_LIMIT, verify: bool = False) -> Legacy:
    """Read a checkpoint of an earlier script; nothing in it is run.

    ``limit`` is in bytes; ``verify`` compares every byte with the archive's checksums.  Raises
    BitbyteError saying what the file is instead, or which name it asks for.
    """
    path = user_path(path)
    content, size = _load_legacy(path, limit, verify)
    if not isinstance(content, dict):
        raise BitbyteError(f"{shown(path)} holds a {type(content).__name__}, not a state dict")
    top = _plain(content)
    layout, state = _state_of(top, path)
    _refuse_claims(state, size, path)
    state, notes = _without_prefixes(state, path)
    outside = {} if layout == "bare" else top
    state, more = _without_copies(state, layout, outside)
    notes += more
    config = {}
    for key in CONFIGS:
        if isinstance(outside.get(key), dict):
            config = _plain(outside[key]) | config
    tags = {name: outside[name] for name in TAGS if isinstance(outside.get(name), str)}
    steps = [outside.get(key) for key in STEPS]
    step = next((step for step in steps if type(step) is int and 0 <= step < 10**18), None)
    return Legacy(path, layout, state, config, tags, step, content, notes)


def _load_legacy(path: Path, limit: int, verify: bool) -> tuple[object, int]:
    """(content, bytes) of a file that `_check_archive` accepts."""
    name = shown(path)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise BitbyteError(f"torch {torch.__version__} cannot read {name} safely: install 2.10")
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BitbyteError(f"there is no file {name}") from None
    if not stat.S_ISREG(info.st_mode):
        raise BitbyteError(f"{name} is not a plain file")
    if info.st_size > limit:
        raise BitbyteError(f"{name} has {info.st_size:,} bytes, more than the limit of {limit:,}")
    with open(path, "rb") as file:
        start = file.read(512)
    try:
        if not start.startswith(b"PK\x03\x04"):
            raise BitbyteError(f"{name} {_what_else(path, start)}")
        _check_archive(path, info.st_size, verify)
        with warnings.catch_warnings(action="ignore"):
            # A mapped file cannot be replaced on Windows; nor does torch map undecodable names.
            mapped = os.name != "nt" and str(path).isprintable()
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except BitbyteError:
        raise
    except Exception as error:  # a hostile file can make its readers raise anything
        message = re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).strip() or repr(error)
        text = printable(message.splitlines()[0].encode(errors="backslashreplace"))[:200]
        raise BitbyteError(f"{name} is damaged or not a checkpoint: {text}") from None
    return content, info.st_size


def _what_else(path: Path, start: bytes) -> str:
    """What a file is that is not a zip archive, as the end of a sentence."""
    if not start:
        return "is empty"
    if start[257:262] == b"ustar":
        return "is a tar archive, as torch wrote before 0.4; save it again with a newer torch"
    with open(path, "rb") as file, contextlib.suppress(Exception):
        if foreign := _foreign_names(file.read(PICKLE_LIMIT)):
            return f"is a pickle that asks for {foreign[0]}, which is not safe: refused{ADVICE}"
        return "is a plain pickle, or from torch before 1.6; save it again with a newer torch"
    return "is not a checkpoint written by torch"


def _check_archive(path: Path, size: int, verify: bool) -> None:
    """Refuse what torch would not have written, and every name that is not `ALLOWED`."""
    name = shown(path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        inner = {entry.partition("/")[2] for entry in names}
        if "constants.pkl" in inner:
            raise BitbyteError(f"{name} is a TorchScript archive, which is a program: refused")
        if "data.pkl" not in inner:
            raise BitbyteError(f"{name} is a zip archive, but not a checkpoint: no data.pkl")
        # torch matches names without regard to case, and in the folder of the first entry
        distinct, tops = {n.lower() for n in names}, {n.partition("/")[0] for n in names}
        if len(distinct) < len(names) or len(tops) > 1:
            raise BitbyteError(f"{name}: two entries of one name, or two top folders: refused")
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BitbyteError(f"{name}: its entries are compressed or overlap, unlike torch's")
        # Check what torch will run: in two joined archives, zipfile finds the other directory.
        reader = torch._C.PyTorchFileReader(file)
        if reader.get_record_size("data.pkl") > PICKLE_LIMIT:
            raise BitbyteError(f"{name}: its pickle has more than {PICKLE_LIMIT:,} bytes")
        if foreign := _foreign_names(reader.get_record("data.pkl")):
            raise BitbyteError(
                f"{name} asks for {foreign[0]}, more than tensors and text: refused{ADVICE}"
            )
        if bad := archive.testzip() if verify else None:
            raise BitbyteError(f"{name} is damaged: the checksum of {bad!r} is wrong")


def _foreign_names(pickled: bytes) -> list[str]:
    """The names a pickle asks for that are not `ALLOWED`, read without executing it."""
    foreign, texts, tuples = [], [], 0
    for op, value, _ in pickletools.genops(pickled):
        wanted = None
        if op.name in ("GLOBAL", "INST"):
            wanted = value.replace(" ", ".")
        elif op.name == "STACK_GLOBAL":  # takes the last two strings, or what a memo holds
            wanted = ".".join(texts[-2:])
        elif isinstance(value, str):
            texts.append(value)
        tuples += op.name.startswith("TUPLE")
        if wanted and not ALLOWED.fullmatch(wanted):
            foreign.append(printable(wanted.encode(errors="backslashreplace"))[:100])
    if tuples > TUPLE_LIMIT:
        raise ValueError(f"more than {TUPLE_LIMIT:,} tuples")
    return foreign


def _plain(content: dict) -> dict:
    """Only the items: a file may give an OrderedDict attributes that hide its methods."""
    return dict(dict.items(content))


def _called(key: object) -> str:
    return repr(key[:40]) if isinstance(key, str) else f"a {type(key).__name__}"


def _state_of(content: dict, path: Path) -> tuple[str, dict[str, Tensor]]:
    if content and all(isinstance(value, Tensor) for value in content.values()):
        states = {"bare": content}
    else:
        states = {key: _plain(content[key]) for key in STATES if isinstance(content.get(key), dict)}
    names = ", ".join(_called(key) for key in list(content)[:6]) or "nothing"
    if len(states) != 1:
        count = "several state dicts" if states else "no state dict"
        raise BitbyteError(f"{shown(path)} holds {count}; at its top level: {names}")
    ((layout, state),) = states.items()
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{_called(name)}, a {type(value).__name__}"
            raise BitbyteError(f"{shown(path)}: {layout!r} holds {what}, not only named tensors")
    if not state:
        raise BitbyteError(f"{shown(path)}: {layout!r} is empty")
    return layout, state


def _refuse_claims(state: dict[str, Tensor], size: int, path: Path) -> None:
    """Raise BitbyteError if using the tensors would take far more memory than the file has bytes.

    A view may repeat one number a trillion times.  Masks and the like are not used and do not
    count, tensors shared by several blocks count once; twice the size leaves room for a tied head.
    """
    claimed = {
        (tensor.data_ptr(), tensor.shape, tensor.stride()): tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if not recomputed(name, tensor)
    }
    if sum(claimed.values()) > 2 * size:
        raise BitbyteError(f"{shown(path)}: its tensors claim more numbers than the file holds")


def recomputed(name: str, tensor: Tensor) -> bool:
    """Whether a model recomputes this buffer, so that it need not be read.

    GPT-2 and nanoGPT call a causal mask a bias.  A mask is the same for all heads: 1 x 1 x T x T,
    or repeated to more; a bias that was learned has one dimension, or numbers for each head.
    """
    if RECOMPUTED.fullmatch(name):
        return True
    leading = zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True)
    shared = tensor.ndim in (0, 4) and all(n == 1 or not stride for n, stride in leading)
    return shared and bool(MASKS.fullmatch(name))


def _without_prefixes(state: dict[str, Tensor], path: Path) -> tuple[dict, tuple[str, ...]]:
    """The state, without what DistributedDataParallel, torch.compile and others put into names."""
    notes = []
    while True:
        wrappers = {found[1] for name in state for found in WRAPPERS.finditer(name)}
        if all(name.startswith(PREFIX) for name in state):
            names = [name.removeprefix(PREFIX) for name in state]
            notes.append(f"removed the prefix {PREFIX!r} from all names")
        elif wrappers:
            names = [WRAPPERS.sub("", name) for name in state]
            notes += [f"removed {wrapper + '.'!r} from the names" for wrapper in sorted(wrappers)]
        else:
            break
        if len(set(names)) < len(names):
            raise BitbyteError(f"{shown(path)}: {', '.join(notes)}; two of them are then the same")
        state = dict(zip(names, state.values(), strict=True))
    return {name: tensor.detach() for name, tensor in state.items()}, tuple(notes)


def _without_copies(state: dict[str, Tensor], layout: str, outside: dict):
    """(state, notes) without averaged weights that were saved among or beside the others."""
    notes = []
    found = {name: match[1] for name in state if (match := AVERAGED.fullmatch(name))}
    own = {name.replace(".", "") for name in state if name not in found}
    own |= {name.partition(".")[2].replace(".", "") for name in state if name not in found}
    again = [name for name, rest in found.items() if rest.replace(".", "") in own]
    if 2 * len(again) > len(found):
        notes.append(f"left out {again[0][:60]!r} and the like: averages of the weights")
        state = {name: tensor for name, tensor in state.items() if name not in found}
    for key, value in outside.items():
        inside = _plain(value) if isinstance(value, dict) and key != layout else {}
        inside = [WRAPPERS.sub("", k).removeprefix(PREFIX) for k in inside if isinstance(k, str)]
        if 2 * sum(name.replace(".", "") in own for name in inside) > len(state):
            notes.append(f"took the weights of {layout!r}, not those of {_called(key)}")
    return state, tuple(notes)


def guess(legacy: Legacy) -> Guess:
    """Infer what a file is from its tags, its config and the names of its parameters."""
    reasons = list(legacy.notes)
    stated = {k: word for k, word in (legacy.config | legacy.tags).items() if isinstance(word, str)}
    for name, known in TAGS.items():
        if stated.get(name, known[0]) not in known:
            reasons.append(f"its {name} is {stated[name]!r:.40}, not one of {', '.join(known)}")
            return Guess(None, None, "ambiguous", reasons)
        if name in stated:
            reasons.append(f"{name} is stated in {'it' if name in legacy.tags else 'its config'}")
    variant, family = stated.get("variant"), stated.get("model_family")
    body = _body(legacy.state, reasons)
    certainty = "tagged" if len(legacy.tags) == 2 else "found"
    if variant is None:
        variant = "diffusion" if family == "diffusion" else _variant(legacy, body, reasons)
    if variant is None:
        variant, certainty = _likely_variant(legacy, reasons), "guessed"
    if family is None and variant is not None:
        family = "diffusion" if (variant, body) == ("diffusion", "bitbyte") else body
    if variant is None or family is None:
        certainty = "ambiguous"
    if body is not None and (family == "mamba") != (body == "mamba"):
        reasons.append(f"but its names are those of {body}")
        certainty = "tagged" if certainty == "tagged" else "ambiguous"
    return Guess(variant, family, certainty, reasons)


def _body(state: dict[str, Tensor], reasons: list[str]) -> str | None:
    """By parameter names: "mamba", or "bitbyte" for a transformer of either variant."""
    words = {word.lower() for name in state for word in name.split(".")}
    mamba = words & {"a_log", "conv1d", "dt_proj", "x_proj", "ssm", "mixer"}
    attention = [word for word in words if re.search("att|^sa$|^w?qkv|^w?q(_proj)?$", word)]
    if mamba:
        reasons.append(f"a name has {min(mamba)}: mamba")
    elif attention:
        reasons.append(f"a name has {min(attention)}: a transformer")
    else:
        reasons.append("its names are of no known family")
    return "mamba" if mamba else "bitbyte" if attention else None


def _variant(legacy: Legacy, body: str | None, reasons: list[str]) -> str | None:
    """The variant if there is evidence for it."""
    for key, value in legacy.config.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            continue
        if re.search(r"diffusion|mask_prob|mask_(token_)?id", key) and value:
            reasons.append(f"its config has {key[:40]!r}")
            return "diffusion"
        if key in ("causal", "is_causal") and isinstance(value, bool):
            reasons.append(f"its config has {key} {value}")
            return "ar" if value else "diffusion"
    for name in legacy.state:
        if re.search(r"(^|\.)(time(step)?|noise|sigma|t)_?(emb|mlp|proj)", name):
            reasons.append(f"{name[:60]!r} embeds a time")
            return "diffusion"
    return "ar" if body == "mamba" else None


def _likely_variant(legacy: Legacy, reasons: list[str]) -> str | None:
    """A variant for which there is only weak evidence."""
    if "diffusion" in str(legacy.path).lower():
        reasons.append("its path says diffusion")
        return "diffusion"
    if any("emb" in name and len(t) == 256 for name, t in legacy.state.items() if t.ndim == 2):
        reasons.append("256 embedding rows leave none for MASK")
        return "ar"
    reasons.append("these names fit both ar and diffusion")
    return None


def tag(
    path: str | Path, variant: str, model_family: str, *, inplace: bool = False,
    out: str | Path | None = None, allow_overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a file with the same content and both tags; returns its path.

    The new file is ``path`` itself with ``inplace``, else ``out`` or NAME.tagged.pt beside it.  It
    appears whole or not at all, and only after it was read back.  A file or a different tag is
    replaced only with ``allow_overwrite``.  Raises BitbyteError.
    """
    target = _target(Path(path), inplace, out, allow_overwrite)
    _tag(Path(path), _tags(variant, model_family), target, allow_overwrite)
    return target


def _target(path: Path, inplace: bool, out: str | Path | None, allow_overwrite: bool) -> Path:
    if inplace and out:
        raise BitbyteError("give --inplace or --out, not both")
    target = path.resolve() if inplace else Path(out or path.with_suffix(".tagged.pt"))
    if target.exists() and not target.is_file():
        raise BitbyteError(f"{shown(target)} is not a plain file, to be read again; name another")
    if target.exists() and not allow_overwrite:
        raise BitbyteError(f"{shown(target)} exists; --allow_overwrite replaces it")
    return target


def _tags(variant: str, model_family: str) -> dict[str, str]:
    tags = {"variant": variant, "model_family": model_family}
    for name, known in TAGS.items():
        if tags[name] not in known:
            raise BitbyteError(f"no {name} {tags[name]!r}; choose from {', '.join(known)}")
    return tags


def _tag(path: Path, tags: dict, target: Path, allow_overwrite: bool, write: bool = True) -> None:
    legacy = read(path, verify=write)
    have = ", ".join(f"{name} {v!r:.40}" for name, v in legacy.tags.items() if v != tags[name])
    if have and not allow_overwrite:
        raise BitbyteError(f"{shown(path)} is tagged {have}; --allow_overwrite changes that")
    itself = target == path.resolve()
    if not write or (itself and legacy.tags == tags):
        return
    content = {"model": legacy.content} if legacy.layout == "bare" else _plain(legacy.content)
    try:
        with replacing(target, overwrite=allow_overwrite or itself) as file:
            torch.save(content | tags, file)
            file.flush()
            read(Path(file.name))  # what cannot be read again replaces nothing
    except (RecursionError, TypeError):  # endless nesting, methods hidden by attributes
        raise BitbyteError(f"{shown(path)} cannot be saved again unchanged") from None


def scan(folder: str | Path) -> list[Row]:
    """A row for every regular .pt, .pth or .ckpt file below ``folder``, or for that one file."""
    folder = user_path(folder)
    if folder.is_file():
        return [_row(folder)]
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    paths = (path for path in paths if path.suffix.lower() in SUFFIXES)
    return [_row(path) for path in sorted(paths) if stat.S_ISREG(path.lstat().st_mode)]


def _row(path: Path) -> Row:
    try:
        legacy = read(path)
    except (BitbyteError, OSError) as error:
        return Row(path, path.lstat().st_size, problem=str(error))
    sizes = {  # tied tensors count once
        tensor.data_ptr(): min(
            tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()
        )
        for tensor in legacy.state.values()
    }
    return Row(path, path.stat().st_size, legacy.layout, sum(sizes.values()), guess(legacy))


def table(rows: list[Row]) -> str:
    """Aligned plain text, a line a row."""
    lines = [("path", "layout", "MB", "parameters", *TAGS, "certainty", "why")]
    for row in rows:
        found = row.guess or Guess(None, None, "refused", [row.problem])
        told = [word or "?" for word in found[:3]]
        size, count = f"{row.bytes / 1e6:.1f}", f"{row.parameters:,}"
        lines.append((shown(row.path), row.layout, size, count, *told, "; ".join(found.reasons)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def tag_all(
    place: str | Path, variant: str | None = None, model_family: str | None = None, *,
    write: bool = False, inplace: bool = False, out: str | Path | None = None,
    allow_overwrite: bool = False,
) -> Iterator[str]:  # fmt: skip
    """Tag one file as `tag` does, or the files in a folder in place; yields lines to show.

    Without ``write`` the lines say what would be done.  Guessed or ambiguous files are left alone
    unless both tags are given.  Raises BitbyteError, for a folder only if nothing can be done.
    """
    place = user_path(place)
    one, done = not place.is_dir(), 0
    if out and not one:
        raise BitbyteError("--out is for one file: name one, or use --inplace --allow_overwrite")
    if inplace and not allow_overwrite:
        raise BitbyteError("--inplace replaces what it tags: it needs --allow_overwrite")
    if (variant is None) != (model_family is None):
        raise BitbyteError("give --variant and --model_family together")
    if variant is not None:
        _tags(variant, model_family)
    rows = scan(place)
    if not rows:
        raise BitbyteError(f"no {', '.join(SUFFIXES)} file at {shown(place)}")
    if one and rows[0].problem:
        raise BitbyteError(rows[0].problem)
    yield table(rows)
    for path, guessed in ((row.path, row.guess) for row in rows if row.guess):
        words, sure = guessed[:2], guessed.certainty in ("tagged", "found")
        if variant and (one or not sure):
            words = variant, model_family
        elif not sure:
            yield f"left alone, {guessed.certainty}: {shown(path)}"
            continue
        done += 1
        if guessed.certainty == "tagged" and words == guessed[:2] and not out:
            yield f"already tagged: {shown(path)}"
            continue
        what = "variant {}, model_family {}".format(*words)
        try:
            target = _target(path, inplace, out, allow_overwrite) if one else path.resolve()
            _tag(path, _tags(*words), target, allow_overwrite, write)
            yield f"{'tagged' if write else 'would tag'} {what}: {shown(target)}"
        except BitbyteError as error:
            if one and write:
                raise
            done -= 1
            yield f"left alone: {error}"
    if write and not done:
        raise BitbyteError(f"nothing is certain at {shown(place)}: give --variant, --model_family")
