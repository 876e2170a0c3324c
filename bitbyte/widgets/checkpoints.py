"""The runs in a folder, as a drop-down shows them."""

import time
from pathlib import Path
from typing import NamedTuple

from bitbyte import checkpoint, config
from bitbyte.files import BitbyteError, artifacts, shown
from bitbyte.runs import META, complete_steps, resolve, step_name


class RunEntry(NamedTuple):
    """A run, or one step of it, and what a drop-down says about it."""

    path: str
    label: str
    saved: float | None = None  # seconds since 1970; None: it cannot be used
    family: str = ""

    @property
    def name(self) -> str:
        """What `checkpoint.resolve` knows it by, below artifacts/checkpoints."""
        return Path(self.path).name


def list_runs(folder: str | Path | None = None) -> list[RunEntry]:
    """The runs in ``folder`` (default artifacts/checkpoints), newest first, unusable ones last."""
    folder = (Path(folder) if folder else artifacts("checkpoints")).resolve()
    runs = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [describe(run) for run in runs if run.is_dir() and not run.name.startswith(".")]
    return sorted(found, key=lambda entry: -(entry.saved or 0))


def find_run(run: str | Path) -> str:
    """The path in `list_runs` of what `checkpoint.resolve` finds.

    Any step but the newest one is a path of its own.  Raises BitbyteError.
    """
    folder = resolve(run).resolve()
    newest = complete_steps(folder.parent)[-1:]
    is_newest = [folder.name] == [step_name(step) for step in newest]
    return str(folder.parent if is_newest else folder)


def describe(run: Path) -> RunEntry:
    """Family, size, bits per byte and age; what cannot be read is an entry too, with the reason."""
    try:
        folder = run
        if not (run / META).is_file():
            steps = complete_steps(run)
            if not steps:
                raise BitbyteError("it holds no complete step")
            folder = run / step_name(steps[-1])
        meta = checkpoint.read_meta(folder)
        size = config.config_from_dict(meta["config"]).n_parameters
        saved = (folder / META).stat().st_mtime
    except (BitbyteError, OSError) as error:
        reason = str(error).replace(f"{run}/", "")
        reason = reason if len(reason) <= 60 else reason[:57] + "..."
        return RunEntry(str(run), shown(f"{run.name} - unusable: {reason}"))
    bpb, family = meta.get("extra", {}).get("val_bpb"), meta["model_family"]
    bound = "<= " if family == "diffusion" else ""
    facts = [
        f"{family} {meta['variant']}",
        f"{size / 1e6:.2g} M",
        *([f"{bound}{bpb:.2f} bits/byte"] if isinstance(bpb, float) else []),
        _age(time.time() - saved),
    ]
    name = run.name if folder != run else f"{run.parent.name}/{run.name}"
    return RunEntry(str(run), shown(f"{name} ({', '.join(facts)})"), saved, family)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} old"
    return "new"
