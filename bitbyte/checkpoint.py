"""Checkpoints: one saved step, complete or absent, and never silently wrong.

A step folder holds ``model.safetensors``, ``optim.safetensors`` and ``meta.json``.  It is written
under a temporary name, flushed to disk and renamed, so a folder with the final name is complete.
``meta.json`` is written last, with size and SHA-256 of the other files and its own hash: a flipped
bit is an error on load.  Nothing is pickled.  The rest of a run folder is the business of `runs`,
whose functions are available here too, for notebooks.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bitbyte import face, models, packed, runs
from bitbyte.config import config_from_dict
from bitbyte.device import environment, memory
from bitbyte.files import (
    BitbyteError,
    parse_json,
    patiently,
    replacing,
    sync_folder,
    to_json,
    write_new,
    wrong_fields,
)
from bitbyte.process import say
from bitbyte.runs import META, step_name

FORMAT = 1
MOVE_AWAY = "move the step folder away to use an earlier one"
MODEL, OPTIM = "model.safetensors", "optim.safetensors"
PATHS = {"data", "val_data", "init", "out", "run", "path"}  # in meta data
MAX_TENSORS = 10_000  # in one file; many tiny entries would cost seconds before any check
MAX_HEADER = 10 * 2**20  # bytes of a safetensors header
FIELDS = {
    "format": (int,),
    "model_family": (str,),
    "variant": (str,),  # kind of model within the family, such as ternary or dense
    "config": (dict,),  # of the model
    "train": (dict,),  # config of the run
    "step": (int,),
    "bytes_seen": (int,),
    "rng": (dict, type(None)),  # what the trainer needs to continue its random draws
    "data": (dict,),  # with its fingerprint
    "commit": (str, type(None)),
    "versions": (dict,),
    "created": (str,),  # UTC
    "files": (dict,),  # name -> bytes, sha256
    "sha256": (str,),  # of this file without this field
    "extra": (dict,),
}
NUMBER, TEXTS = (int, float), (list,)  # lists hold text
DATA: dict = {
    "path": (str,), "train": (str,), "val": (str, type(None)), "bytes": (int,), "files": TEXTS,
    "sketch": TEXTS,
}  # fmt: skip
DATA["init"] = DATA  # of the weights that the training started from
ORIGIN = {
    "run": (str, type(None)), "checkpoint": (str,), "bytes_seen": (int,), "seconds": NUMBER,
    "data": DATA,
}  # fmt: skip
INSIDE = {  # optional entries of these fields that are read, hence checked; others are ignored
    "rng": {"seed": (int,)},
    "data": DATA,
    "extra": {
        "seconds": NUMBER, "val_bpb": (*NUMBER, type(None)), "best": (*NUMBER, type(None)),
        "finished": (bool,), "global_batch": (int,), "world": (int,), "dtype": (str,),
        "kernels": (dict,), "scaler": (dict,), "converted_from": (str,), "by_time": (bool,),
        "device": (str,), "threads": (int,), "val_kind": (str,), "prior_sha256": (str,),
        "init": ORIGIN,
    },
}  # fmt: skip
DEEPEST = 99  # models that began with a model that began with ...


class SaveError(OSError):
    """A step could not be saved; the message names the cause and the last good step."""


def save_step(
    run: Path, step: int, model_tensors: dict[str, Tensor], optim_tensors: dict[str, Tensor],
    meta: dict, *, best: bool = False, keep_last: int | None = None, protect: Iterable[int] = (),
) -> Path:  # fmt: skip
    """Save one step and make it ``latest``, and ``best`` if it is; returns its folder on disk.

    ``meta`` has the fields of `FIELDS` up to ``data``, and optionally ``extra``; the rest is added
    here.  With ``keep_last`` older steps are deleted afterwards, except ``best`` and ``protect``.
    If the disk is full, they are deleted first and the save is tried once more.  Raises SaveError
    (earlier steps are untouched), and BitbyteError if the step exists.
    """
    run = Path(run)
    folder = run / step_name(step)
    if folder.exists():
        raise BitbyteError(f"{folder} exists; a saved step is never overwritten")
    protect = tuple(protect)
    content = {MODEL: model_tensors} | ({OPTIM: optim_tensors} if optim_tensors else {})
    for tensors in content.values():
        _refuse_shared(tensors)
    about = environment()
    meta = meta | {
        "format": FORMAT,
        "step": step,
        "commit": about["commit"],
        "versions": about["versions"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    done = runs.complete_steps(run)
    try:
        if not done:
            _warn_if_tight(run, content)
        try:
            _write_step(run, step, content, meta)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (full and keep_last and runs.prune(run, max(1, keep_last - 1), protect)):
                raise
            say(f"the disk is full: removed older steps of {run}; saving step {step} again")
            _write_step(run, step, content, meta)
        if best:
            runs.set_pointer(run, "best", step)
        runs.set_pointer(run, "latest", step)
    except OSError as error:
        saved = folder.exists()
        what = f"step {step} is saved, but not as latest" if saved else f"cannot save step {step}"
        good = step if saved else done[-1] if done else None
        code = errno.errorcode.get(error.errno or 0, "unknown cause")
        failure = SaveError(
            f"{what}: {error.strerror or error} ({code}); last good: "
            f"{'none' if good is None else f'step {good}'} in {run}"
        )
        failure.errno = error.errno
        raise failure from error
    if keep_last:
        try:
            runs.prune(run, keep_last, protect)
        except OSError as error:
            say(f"step {step} is saved, but older steps cannot be removed: {error}")
    return folder


def mend_best(run: Path, value: float) -> None:
    """Let ``best`` name the step that reached ``value``: a kill may have come before that."""
    for step in runs.complete_steps(run):
        with contextlib.suppress(BitbyteError):  # a damaged step is not the best
            if read_meta(run / step_name(step)).get("extra", {}).get("best") == value:
                return runs.set_pointer(run, "best", step)


def drop_saved_by_time(run: Path, newest: int) -> None:
    """Delete the steps before ``newest`` that only the save timer had saved, except ``best``."""
    best = runs.valid_pointer(run, "best")
    for step in reversed(runs.complete_steps(run)):
        folder, by_time = Path(run) / step_name(step), False
        if step >= newest or step == best:
            continue
        with contextlib.suppress(BitbyteError, OSError):  # what cannot be read stays
            by_time = read_meta(folder).get("extra", {}).get("by_time") is True
        if not by_time:  # nor are those before it: they were looked at when it was saved
            return
        try:
            runs.remove_step(folder)
        except OSError as error:  # the newest step is saved: no reason to stop training
            say(f"{folder} cannot be removed: {error}")


def _refuse_shared(tensors: dict[str, Tensor]) -> None:
    owners: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.numel() and owners.setdefault(place, name) != name:
            raise AssertionError(f"{owners[place]} and {name} share memory: save one of them")


def _warn_if_tight(run: Path, content: dict[str, dict[str, Tensor]]) -> None:
    need = sum(
        t.numel() * t.element_size() for tensors in content.values() for t in tensors.values()
    )
    free = shutil.disk_usage(run).free
    if free < 2 * need:
        say(
            f"warning: {free:,} bytes are free for {run} and one checkpoint takes {need:,}; "
            "free some space or keep fewer steps"
        )


def _write_step(run: Path, step: int, content: dict[str, dict[str, Tensor]], meta: dict) -> None:
    # `files.replacing` for a folder: all its files are on disk before it gets its name.
    temporary = run / f".tmp-{step_name(step)}-{os.getpid()}"
    try:
        if temporary.exists():  # left by a killed process with the same id
            shutil.rmtree(temporary)
        temporary.mkdir()
        files = {}
        for name, tensors in content.items():
            plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            # Not save_file, which neither flushes to disk nor respects the umask.
            data = safetensors.torch.save(plain)
            write_new(temporary / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            del data
        write_new(temporary / META, seal(meta | {"files": files}))
        sync_folder(temporary)
        patiently(os.rename, temporary, run / step_name(step))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(run)


def seal(meta: dict) -> bytes:
    """The bytes of meta.json: ``meta`` with the SHA-256 of its own text as the last field."""
    return to_json(meta | {"sha256": hashlib.sha256(to_json(meta)).hexdigest()})


def read_meta(folder: Path) -> dict:
    """The checked meta data of a step folder or packed model; reads nothing else.

    Raises BitbyteError.
    """
    folder = Path(folder)
    if runs.is_packed(folder):
        path, raw = folder, packed.read_meta(folder)
        meta = parse_json(raw, str(folder))
    else:
        path = folder / META
        raw, meta = runs.read_plain_json(path)
    _check_meta(meta, path)
    try:
        intact = raw == seal({key: value for key, value in meta.items() if key != "sha256"})
    except (ValueError, RecursionError):  # values that to_json would not have written
        intact = False
    if not intact:
        raise BitbyteError(f"{path} is damaged or edited: {MOVE_AWAY}")
    if runs.step_of(path.parent.name) not in (None, meta["step"]):
        raise BitbyteError(f"{path.parent} holds step {meta['step']}: the folder was renamed")
    return {"extra": {}} | meta


def _check_meta(meta: dict, path: Path) -> None:
    number = meta.get("format") if isinstance(meta, dict) else None
    if type(number) is not int or number < 1:
        raise BitbyteError(f"{path} is not the {META} of a checkpoint: it has no format number")
    if number > FORMAT:
        raise BitbyteError(
            f"{path} has format {number}, made by a newer bitbyte; this one reads {FORMAT}: upgrade"
        )
    if wrong := wrong_fields(meta, FIELDS, optional={"extra"}):
        raise BitbyteError(f"{path}: {wrong}")
    for where, value, kinds in _inside(meta, INSIDE):
        good = type(value) in kinds and not (type(value) is int and abs(value) >= 2**63)
        texts = value if isinstance(value, list) else []
        if not good or not all(isinstance(item, str) for item in texts):
            raise BitbyteError(f"{path}: mistyped field '{where}'")
    counts = {"step": meta["step"], "bytes_seen": meta["bytes_seen"]}
    for name, facts in meta["files"].items():
        plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name) and name != META
        if not plain or not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise BitbyteError(f"{path}: bad entry {name!r} in files")
        counts[name] = facts["bytes"]
        if not re.fullmatch(r"[0-9a-f]{64}", str(facts["sha256"])):
            raise BitbyteError(f"{path}: bad sha256 of {name}")
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise BitbyteError(f"{path}: bad number for {name}")
    if MODEL not in meta["files"]:
        raise BitbyteError(f"{path}: {MODEL} is not in files")


def _inside(value: dict, known: dict, where: str = "", depth: int = 0) -> Iterator[tuple]:
    """(name, value, types it may have) of the entries of ``known`` that are there."""
    for name in known.keys() & value.keys():
        item, kinds, at = value[name], known[name], f"{where}{name}"
        if not isinstance(kinds, dict):
            yield at, item, kinds
        elif isinstance(item, dict) and depth < DEEPEST:
            yield from _inside(item, kinds, f"{at}.", depth + 1)
        else:
            yield at, item, (type(None),)


def validation(meta: dict) -> tuple[float | None, str]:
    """(bits per byte of the last validation, or None; the kind of number) of a saved step.

    For a diffusion model it is an upper bound; steps of earlier versions do not record that.
    """
    extra = meta.get("extra", {})
    kind = "upper_bound" if meta["model_family"] == "diffusion" else "exact"
    return extra.get("val_bpb"), extra.get("val_kind", kind)


def load_step(
    folder: Path, *, with_optim: bool = False
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor] | None]:
    """(meta, model tensors, optimizer tensors) of a step folder, on CPU, every byte checked.

    Without ``with_optim`` the optimizer's file is not read and its tensors are None; they are {}
    for a step saved without optimizer state.  All tensors are finite.  Those of a packed model are
    as `packed.pack` has made them.  Raises BitbyteError.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if runs.is_packed(folder):
        return meta, packed.read(folder, meta["files"][MODEL]["sha256"]), {} if with_optim else None
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    extra = names - meta["files"].keys() - {META}
    if extra:
        raise BitbyteError(f"{folder}: {', '.join(map(repr, sorted(extra)))} does not belong there")
    for name, facts in meta["files"].items():
        size = runs.file_size(folder / name)
        if size != facts["bytes"]:
            raise BitbyteError(
                f"{folder / name} has {size} bytes, {META} says {facts['bytes']}: {MOVE_AWAY}"
            )
    tensors = _read_tensors(folder / MODEL, meta["files"][MODEL])
    if not with_optim:
        return meta, tensors, None
    facts = meta["files"].get(OPTIM)
    return meta, tensors, _read_tensors(folder / OPTIM, facts) if facts else {}


def read_tables(path: Path, sha256: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables that a run with a prior reads in training.

    Raises BitbyteError if they are damaged, or not of the shapes of ``expected``.
    """
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise BitbyteError(f"{path} is damaged; delete it, and its tables are counted again")
    tensors = _read_tensors(path, {"sha256": sha256})
    _check_names(expected, tensors, path)
    return tensors


def _read_tensors(path: Path, facts: dict) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose size was checked.  What is parsed is what was hashed."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise BitbyteError(f"{path} is damaged: {MOVE_AWAY}")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise BitbyteError(f"{path}: a header of {length} bytes does not fit or is over the limit")
    header = parse_json(data[8 : 8 + length], str(path))
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise BitbyteError(f"{path}: no header, or one with more than {MAX_TENSORS} tensors")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise BitbyteError(f"{path}: not a valid safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BitbyteError(f"{path}: NaN or infinity in {name!r}: {MOVE_AWAY}")
    return tensors


def load_model(
    path: str | Path, *, family: str | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, dict]:
    """(model in eval mode on ``device``, meta) of the checkpoint that `resolve` finds.

    ``family``: the one family to accept.  Tensors that obviously do not fit the config are refused
    before the model is allocated, others by name, shape and dtype.  Raises BitbyteError.
    """
    folder = runs.resolve(path)
    meta = read_meta(folder)
    saved = meta["model_family"]
    if family is not None and saved != family:
        raise BitbyteError(f"{folder}: a checkpoint of family {saved}, wanted {family}")
    if meta["config"].get("family") != saved:
        raise BitbyteError(f"{folder}: the config is not of family {saved!r}")
    config = config_from_dict(meta["config"])
    _refuse_wide(config, folder)
    meta, tensors, _ = load_step(folder)
    held, file = packed.numbers(tensors), folder / MODEL
    if runs.is_packed(folder):
        file = folder
    if config.n_parameters > held or config.n_layer > len(tensors):
        raise BitbyteError(
            f"{file} holds {held:,} numbers in {len(tensors)} tensors; the config needs "
            f"{config.n_parameters:,} for {config.n_layer} layers"
        )
    model = models.build(config)  # not on "meta", which takes 2 s to import torch._dynamo
    if runs.is_packed(folder):
        tensors = packed.unpack(tensors, model, folder)
    _check_names(model.state_dict(), tensors, file)
    model.load_state_dict(tensors)
    return model.to(device).eval(), meta


def take_weights(model: nn.Module, path: str | Path) -> dict:
    """Copy into ``model`` the weights of the checkpoint that `resolve` finds; returns its meta.

    Its model must have the shape of ``model`` and compute the same next bytes, so a causal
    transformer can become one that also fills blocks.  Of a prior, the tables are copied too.
    Raises BitbyteError naming what differs.
    """
    given, meta = load_model(path)
    ours, theirs = (
        {"family": config.computes_as} | vars(config)  # pyright: ignore
        for config in (model.config, given.config)
    )
    shape = {"family", "n_layer", "d_model", "d_ff", "n_head", "rope_theta", "ssm", "d_state"}
    shape |= {name for name in ours if name.startswith("prior")} | {"expand", "d_conv", "dt_rank"}
    shape |= {"block"} if getattr(given, "block", 0) else set()
    for name in (name for name in ours if name in shape):
        if ours[name] != theirs.get(name):
            raise BitbyteError(
                f"{path} has {name} {theirs.get(name)}, this run {ours[name]}: it cannot start "
                "from those weights"
            )
    model.load_state_dict(given.state_dict(), strict=False)
    return meta


def export_packed(path: str | Path, target: Path, *, overwrite: bool = False) -> int:
    """Write the model that `resolve` finds as a packed file; returns its size in bytes.

    ``extra.packed_from`` of its meta data is the SHA-256 of the model's file.  Such files are given
    away, so of paths in the meta data only the last part is kept.  Raises BitbyteError.
    """
    model, meta = load_model(path)
    extra = {"packed_from": meta["files"][MODEL]["sha256"]} | meta.get("extra", {})
    plain = {key: value for key, value in meta.items() if key != "sha256"}
    plain, extra = without_folders(plain), without_folders(extra)

    def sealed(size: int, sha256: str) -> bytes:
        return seal(plain | {"extra": extra, "files": {MODEL: {"bytes": size, "sha256": sha256}}})

    with replacing(target, overwrite=overwrite) as file:
        return file.write(packed.content(packed.pack(model), sealed))


def without_folders(meta: dict) -> dict:
    """``meta`` with the last part of each path in it, of a run's step with the run's name."""
    return {
        key: without_folders(value) if isinstance(value, dict)
        else _last_part(value) if key in PATHS and isinstance(value, str)
        else value
        for key, value in meta.items()
    }  # fmt: skip


def _last_part(path: str) -> str:
    place = PurePath(path.replace("\\", "/"))
    inside = runs.step_of(place.name) is not None or place.name in runs.POINTERS
    return f"{place.parent.name}/{place.name}".lstrip("/") if inside else place.name


def _refuse_wide(config, folder: Path) -> None:
    """Raise BitbyteError if not even one window of the model, or its tables, fit into memory.

    The parameters depend on neither, so no other check catches an absurd one.
    """
    kept = 2 * config.n_layer if config.family == "ar" else 1  # keys and values of each layer
    need = 4 * config.seq_len * config.d_model * kept + config.table_bytes
    tables = " and the tables of n-grams" if config.table_bytes else ""
    if need > memory():
        raise BitbyteError(
            f"{folder}: a window of {config.seq_len:,} bytes{tables}, as in its config, needs "
            f"{need:,} bytes of memory, this machine has {memory():,}"
        )


def _check_names(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BitbyteError(
                f"{path} {problem} {', '.join(map(repr, sorted(names)[:3]))}{more}: "
                "it does not fit the config"
            )
    for name, want in expected.items():
        have = tensors[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            raise BitbyteError(
                f"{path}: {name} is {tuple(have.shape)} {have.dtype}, "
                f"the config needs {tuple(want.shape)} {want.dtype}"
            )


__getattr__ = face(__name__, {"runs": "read_metrics resolve"})  # for notebooks
