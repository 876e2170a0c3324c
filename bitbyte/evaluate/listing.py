"""The runs in a folder: what each is, how good and how large; removing runs.

The command ``bitbyte runs`` shows them as a table, the widgets as a drop-down.
"""

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from bitbyte import checkpoint
from bitbyte.config import config_from_dict
from bitbyte.evaluate.tables import cell
from bitbyte.files import BitbyteError, artifacts, cut_name, folder_lock, patiently, user_path
from bitbyte.runs import (
    META,
    PACKED,
    complete_steps,
    in_use,
    is_packed,
    is_run,
    step_name,
    step_of,
    strangers,
    zoo,
)

TRASH = re.compile(r"\.trash-.*-[0-9]+")  # left by a `remove` that was killed


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run, taken from its newest step; or about one saved step."""

    path: Path  # run folder, or step folder if a step was named or is outside of a run
    family: str = ""
    variant: str = ""  # ternary or dense
    preset: str = ""  # "" if the shape is not known to be that of a preset
    parameters: int | None = None
    data: str = ""  # last part of the path of the training data
    step: int | None = None
    bytes_seen: int | None = None
    begun_with: str = ""  # the model whose weights it began with, and how many bytes that had seen
    bpb: float | None = None  # last validation during training
    is_bound: bool = False  # whether ``bpb`` is an upper bound
    finished: bool = False
    block: int = 0  # bytes of a block of a diffusion model; 0: it has none
    saved: float | None = None  # seconds since 1970
    problem: str = ""  # why it is unusable; then only ``path`` is known

    @property
    def name(self) -> str:
        """The run's name; for a step, RUN/step_N."""
        if is_packed(self.path):
            return self.path.stem
        inside = step_of(self.path.name) is not None
        return f"{self.path.parent.name}/{self.path.name}" if inside else self.path.name

    @property
    def bpb_text(self) -> str:
        """``bpb`` to four digits, with "<= " if it is a bound; "" if it was not measured."""
        return "" if self.bpb is None else f"{'<= ' * self.is_bound}{self.bpb:.4f}"


def list_runs(folder: str | Path | None = None) -> list[RunFacts]:
    """The runs in ``folder`` (default artifacts/checkpoints), newest first, unusable ones last."""
    folder = (Path(folder) if folder else artifacts("checkpoints")).resolve()
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    runs = [describe(run) for run in paths if run.is_dir() and not run.name.startswith(".")]
    return sorted(runs, key=lambda run: -(run.saved or 0))


def list_models() -> list[RunFacts]:
    """The packed models that `runs.resolve` finds by name, sorted by it."""
    files = [path for z in reversed(zoo()) for path in z.glob(f"*{PACKED}") if path.is_file()]
    found = {path.stem: path for path in files}
    return [describe(path) for _, path in sorted(found.items())]


def models_markdown(records: list[dict], certificates: list[dict]) -> str:
    """The packed models found by name as a Markdown table, with all records of each.

    A row is a model.  Scores say on which bytes, and in windows of which length and stride, they
    were made; certificates, what the model paid for a file that it compressed and restored, and how
    much more that is than its costs promised.
    """
    head = "| name | where | file | weights | trained on | bits per byte, scored on | paid for |"
    lines = [head, "|---|---|--:|--:|--:|---|---|"]
    for facts in list_models():
        if facts.problem:
            continue
        mine = [r for r in records if r["model"] == facts.name and not r["trained_on_it"]]
        scores = [
            f"{cell(r['data']['path'])} {cell(r['data']['split'])}, {r['bytes']:,} bytes: "
            f"{'<= ' * (r['kind'] == 'upper_bound')}**{r['bpb']:.4f}** ({cell(r['kind'])}, "
            f"{r['context']['window']}/{r['context']['stride']})"
            for r in sorted(mine, key=lambda r: (-r["bytes"], r["bpb"]))
        ]
        proofs = [
            f"{cell(c['file'])}: {c['payload_bits'] / c['bytes']:.4f} ({c['gap_percent']:+.2f} %)"
            for c in sorted(certificates, key=lambda c: c["file"])
            if c["model"] == facts.name and c["bytes"] and not c["stored_bytes"]
        ]
        where = "`bitbyte/zoo/`, in the package" if _packaged(facts.path) else "`artifacts/models/`"
        block = f", blocks of {facts.block}" if facts.block else ""
        cells = (
            f"`{cell(facts.name)}`", where, f"{facts.path.stat().st_size / 1e6:.2f} MB",
            f"{facts.parameters or 0:,}, {facts.family} {cell(facts.variant)}{block}",
            f"{(facts.bytes_seen or 0) / 1e6:,.1f} MB of {cell(facts.data + facts.begun_with)}",
            "<br>".join(scores) or "no record", "<br>".join(proofs) or "no certificate",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _packaged(path: Path) -> bool:
    return path.parent.resolve() == zoo()[-1].resolve()


def describe(path: Path) -> RunFacts:
    """Facts about a run folder, from its newest step, a step folder, or a packed model.

    For one that cannot be read, ``problem`` is the reason.  Of a step only the meta data is read; a
    packed model, which came from elsewhere, is read whole.
    """
    path = Path(path)
    try:
        folder = path
        if not is_packed(path) and not (path / META).is_file():
            steps = complete_steps(path)
            if not steps:
                raise BitbyteError("it holds no complete step")
            folder = path / step_name(steps[-1])
        meta = checkpoint.read_meta(folder)
        parameters = config_from_dict(meta["config"]).n_parameters
        info = (folder if is_packed(folder) else folder / META).stat()
        saved = info.st_mtime
        if is_packed(folder) and (damage := _damage(folder, info.st_mtime_ns, info.st_size)):
            raise BitbyteError(damage)
    except (BitbyteError, OSError) as error:
        return RunFacts(path=path, problem=str(error).replace(f"{path}{os.sep}", ""))
    extra = meta.get("extra", {})
    return RunFacts(
        path=path, family=meta["model_family"], variant=meta["variant"],
        preset=_preset(meta["train"]), parameters=parameters,
        data=Path(meta["data"].get("path", "")).name, step=meta["step"],
        bytes_seen=meta["bytes_seen"], begun_with=begun_with(extra), bpb=extra.get("val_bpb"),
        is_bound=checkpoint.validation(meta)[1] == "upper_bound",
        finished=extra.get("finished", False), block=meta["config"].get("block", 0), saved=saved,
    )  # fmt: skip


def begun_with(extra: dict) -> str:
    """ ", begun with NAME (bytes it had seen)" of a model that began with another's weights."""
    origin = extra.get("init") or {}
    if not origin.get("bytes_seen"):
        return ""
    name = PurePath(origin["run"]).name if origin.get("run") else "another model"
    return f", begun with {name} ({origin['bytes_seen'] / 1e6:,.1f} MB)"


@functools.lru_cache(maxsize=64)
def _damage(path: Path, changed: int, size: int) -> str:
    """Why a packed model cannot be used, or "".  ``changed`` and ``size`` are only for the cache.

    A flipped bit in its weights is found by their hash, one in their names as they do not fit.
    """
    try:
        checkpoint.load_model(path)
    except BitbyteError as error:
        return str(error)
    return ""


def _preset(train: dict) -> str:
    """The preset of a training config, "" if its shape was changed."""
    changed = any(train.get(name) is not None for name in ("n_layer", "d_model", "d_ff"))
    return "" if changed else str(train.get("preset", ""))


def age(seconds: float) -> str:
    """A time span in one unit: "3 d", "10 h", "5 min"; "new" below two minutes."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "new"


def disk_bytes(folder: Path) -> int:
    """Total size of all files in a folder, in bytes."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a running process may be deleting a step
            total += path.lstat().st_size
    return total


def find_run(name: str | Path) -> Path:
    """The run folder meant by a path or by a name in artifacts/checkpoints, complete or not.

    Raises BitbyteError if there is none, or if path and name mean different runs.
    """
    asked, known = user_path(name), artifacts("checkpoints").absolute()
    found = []
    for place in dict.fromkeys(os.path.abspath(path) for path in (asked, known / asked)):
        place = Path(place)  # noqa: PLW2901 - links are not resolved: a link is not the run
        ours = place.parent == known and place.is_dir()  # a failed start may leave an empty folder
        if ours or is_run(place) or (place / META).is_file():
            found.append(place)
    if not found:
        where = "" if asked.is_absolute() else f", neither here nor in {known}"
        raise BitbyteError(f"there is no run {str(name)!r}{where}; bitbyte runs lists them")
    if len(found) > 1:
        raise BitbyteError(f"{name} could be {found[0]} or {found[1]}; give the full path")
    return found[0]


def check_removable(run: Path) -> None:
    """Raise BitbyteError unless ``run`` can be removed: not in use, and all written by bitbyte."""
    if step_of(run.name) is not None and is_run(run.parent):
        raise BitbyteError(f"{run} is one step of a run; name the run to remove all of it")
    if os.path.islink(run):
        raise BitbyteError(f"{run} is a link; remove its target, then the link")
    others = [] if (run / META).is_file() else strangers(run)
    if others:
        names = ", ".join(path.name for path in others[:3])
        raise BitbyteError(
            f"{run} holds files that no bitbyte run wrote ({names}); move them away first"
        )
    if in_use(run):
        raise BitbyteError(f"{run} is in use: a process is training there; stop it first")


def remove(runs: Iterable[Path]) -> None:
    """Remove run folders: all of them, or none if one may not be removed.

    Each is renamed before it is deleted, so a kill never leaves part of a run under its name.
    Raises BitbyteError as `check_removable` does.
    """
    runs = [Path(run) for run in runs]
    for run in runs:
        check_removable(run)
    for old in artifacts("checkpoints").glob(".trash-*"):  # left by a `remove` that was killed
        if TRASH.fullmatch(old.name) and old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
    for run in runs:
        trash = run.with_name(f".trash-{cut_name(run.name)}-{os.getpid()}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder_lock(run))  # from now on nothing can start training there
            if os.name == "nt":
                stack.close()  # Windows cannot rename a folder that contains an open file
            patiently(os.rename, run, trash)
        with contextlib.suppress(FileNotFoundError):  # another process may be deleting it too
            shutil.rmtree(trash)
