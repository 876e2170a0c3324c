"""The runs in a folder, as entries of a drop-down."""

import time
from pathlib import Path
from typing import NamedTuple

from bitbyte.evaluate import listing
from bitbyte.files import shown
from bitbyte.runs import complete_steps, is_packed, resolve, short_name, step_name


class RunEntry(NamedTuple):
    """A run, or one step of it, and its label in a drop-down."""

    path: str
    label: str
    saved: float | None = None  # seconds since 1970; None: unusable
    family: str = ""

    @property
    def name(self) -> str:
        """The name by which `runs.resolve` finds it."""
        return short_name(self.path)


def list_runs(folder: str | Path | None = None) -> list[RunEntry]:
    """The runs in ``folder`` (default artifacts/checkpoints), newest first, unusable ones last.

    By default the packed models that are found by name come after them.
    """
    packed = [] if folder else listing.list_models()
    return [_labelled(entry) for entry in (*listing.list_runs(folder), *packed)]


def find_run(run: str | Path) -> str:
    """The path that `list_runs` has for what `runs.resolve` finds.

    For a step other than the newest it is the path of that step.  Raises BitbyteError.
    """
    folder = resolve(run).resolve()
    if is_packed(folder):
        return str(folder)
    newest = complete_steps(folder.parent)[-1:]
    is_newest = [folder.name] == [step_name(step) for step in newest]
    return str(folder.parent if is_newest else folder)


def describe(run: Path) -> RunEntry:
    """The entry of one run or step; if it cannot be read, the label says why."""
    return _labelled(listing.describe(run))


def _labelled(entry: listing.RunFacts) -> RunEntry:
    if entry.problem:
        reason = entry.problem if len(entry.problem) <= 60 else entry.problem[:57] + "..."
        return RunEntry(str(entry.path), shown(f"{entry.name} - unusable: {reason}"))
    facts = [
        f"{entry.family} {entry.variant}",
        f"{entry.parameters / 1e6:.2g} M",
        *([f"{'<= ' * entry.is_bound}{entry.bpb:.2f} bits/byte"] if entry.bpb is not None else []),
        _old(time.time() - entry.saved),
    ]
    label = shown(f"{entry.name} ({', '.join(facts)})")
    return RunEntry(str(entry.path), label, entry.saved, entry.family)


def _old(seconds: float) -> str:
    words = listing.age(seconds)
    return words if words == "new" else f"{words} old"
