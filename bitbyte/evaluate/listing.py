"""The runs in a folder: what each is, how good and how large, and how one is removed.

The command ``bitbyte runs`` shows this as a table, the widgets as a drop-down.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitbyte import checkpoint
from bitbyte.config import config_from_dict
from bitbyte.files import NAME_LIMIT, BitbyteError, artifacts, folder_lock, user_path
from bitbyte.runs import META, complete_steps, in_use, is_run, step_name, step_of, strangers

TRASH = re.compile(r"\.trash-.+-[0-9]+")  # what `remove` leaves if it is killed


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run is, by its newest step; or one saved step."""

    path: Path  # run folder, or the folder of a step that was named or lies by itself
    family: str = ""
    variant: str = ""  # ternary or dense
    preset: str = ""  # "" if the shape is not that of a preset, or not known to be
    parameters: int | None = None
    data: str = ""  # last part of the path of the training data
    step: int | None = None
    bytes_seen: int | None = None
    bpb: float | None = None  # of the validation split, as training last measured it
    is_bound: bool = False  # whether ``bpb`` is an upper bound
    finished: bool = False
    saved: float | None = None  # seconds since 1970
    problem: str = ""  # why it cannot be used; then only ``path`` is known

    @property
    def name(self) -> str:
        """A run's name; of a step of one, RUN/step_N."""
        inside = step_of(self.path.name) is not None
        return f"{self.path.parent.name}/{self.path.name}" if inside else self.path.name

    @property
    def bpb_text(self) -> str:
        """``bpb`` with the mark of a bound, to four digits; "" if it was not measured."""
        return "" if self.bpb is None else f"{'<= ' * self.is_bound}{self.bpb:.4f}"


def list_runs(folder: str | Path | None = None) -> list[RunFacts]:
    """The runs in ``folder`` (default artifacts/checkpoints), newest first, unusable ones last."""
    folder = (Path(folder) if folder else artifacts("checkpoints")).resolve()
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [describe(run) for run in there if run.is_dir() and not run.name.startswith(".")]
    return sorted(found, key=lambda entry: -(entry.saved or 0))


def describe(path: Path) -> RunFacts:
    """The facts of a run folder's newest step, or of a step folder.

    What cannot be read is an entry too, with the reason.
    """
    path = Path(path)
    try:
        folder = path
        if not (path / META).is_file():
            steps = complete_steps(path)
            if not steps:
                raise BitbyteError("it holds no complete step")
            folder = path / step_name(steps[-1])
        meta = checkpoint.read_meta(folder)
        parameters = config_from_dict(meta["config"]).n_parameters
        saved = (folder / META).stat().st_mtime
    except (BitbyteError, OSError) as error:
        return RunFacts(path=path, problem=str(error).replace(f"{path}{os.sep}", ""))
    extra = meta.get("extra", {})
    return RunFacts(
        path=path, family=meta["model_family"], variant=meta["variant"],
        preset=_preset(meta["train"]), parameters=parameters,
        data=Path(meta["data"].get("path", "")).name, step=meta["step"],
        bytes_seen=meta["bytes_seen"], bpb=extra.get("val_bpb"),
        is_bound=meta["model_family"] == "diffusion", finished=extra.get("finished", False),
        saved=saved,
    )  # fmt: skip


def _preset(train: dict) -> str:
    """The preset that a training config names and does not change."""
    changed = any(train.get(name) is not None for name in ("n_layer", "d_model", "d_ff"))
    return "" if changed else str(train.get("preset", ""))


def age(seconds: float) -> str:
    """A time span in one unit: "3 d", "10 h", "5 min"; "new" below two minutes."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "new"


def disk_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a run may delete a step meanwhile
            total += path.lstat().st_size
    return total


def find_run(name: str | Path) -> Path:
    """The run folder meant by a path or by a name in artifacts/checkpoints, complete or not.

    Raises BitbyteError if there is none, or a different one in each place.
    """
    asked, known = user_path(name), artifacts("checkpoints").absolute()
    found = []
    for place in dict.fromkeys(os.path.abspath(path) for path in (asked, known / asked)):
        place = Path(place)  # noqa: PLW2901 - links are not followed: they are not the run
        ours = place.parent == known and place.is_dir()  # a start may have left an empty folder
        if ours or is_run(place) or (place / META).is_file():
            found.append(place)
    if not found:
        where = "" if asked.is_absolute() else f", neither here nor in {known}"
        raise BitbyteError(f"there is no run {str(name)!r}{where}; bitbyte runs lists them")
    if len(found) > 1:
        raise BitbyteError(f"{name} could be {found[0]} or {found[1]}; write the whole path")
    return found[0]


def check_removable(run: Path) -> None:
    """Raise BitbyteError unless ``run`` can be removed: bitbyte wrote all that is in it."""
    if step_of(run.name) is not None and is_run(run.parent):
        raise BitbyteError(f"{run} is a step of a run; name the run to remove all of it")
    if os.path.islink(run):
        raise BitbyteError(f"{run} is a link; remove what it leads to, and then the link")
    others = [] if (run / META).is_file() else strangers(run)
    if others:
        names = ", ".join(path.name for path in others[:3])
        raise BitbyteError(
            f"{run} holds what no run of bitbyte wrote ({names}); move that away first"
        )
    if in_use(run):
        raise BitbyteError(f"{run} is in use: a process trains there; stop it first")


def remove(runs: Iterable[Path]) -> None:
    """Remove run folders, all or, if one may not be removed, none.

    Each disappears at once, by a rename, and is deleted then: a kill leaves no part of a run.
    Raises BitbyteError, as `check_removable`.
    """
    runs = [Path(run) for run in runs]
    for run in runs:
        check_removable(run)
    for left in artifacts("checkpoints").glob(".trash-*"):  # by one that was killed
        if TRASH.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    for run in runs:
        trash = run.with_name(f".trash-{run.name[:NAME_LIMIT]}-{os.getpid()}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder_lock(run))  # from now on nobody can begin to train there
            if os.name == "nt":
                stack.close()  # Windows moves no folder in which a file is open
            os.rename(run, trash)
        with contextlib.suppress(FileNotFoundError):  # another one tidies up as well
            shutil.rmtree(trash)
