"""The work of a grid's cells: train and score, or execute a notebook; and the worker that does it.

A worker takes cells until none is left.  What a cell prints goes to its ``log.txt``; its run
is in ``run``, or its executed notebook beside ``figures`` and ``results``.  A worker that is asked
to stop (Ctrl-C, SIGTERM, USR1 and USR2 of queues) saves the training, lets the cell wait again,
and ends; the next one to take the cell continues where it stopped.
"""

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from bitbyte import __version__, checkpoint, models, runs
from bitbyte.device import DTYPES, choose_device, environment, prepare_process
from bitbyte.evaluate.evaluation import evaluate
from bitbyte.files import (
    BitbyteError,
    RunError,
    artifacts,
    output_folder,
    shown,
    to_json,
    write_atomic,
)
from bitbyte.process import say, stoppable
from bitbyte.train import train
from bitbyte.workbench import claims
from bitbyte.workbench import grid as grids
from bitbyte.workbench.claims import Claim
from bitbyte.workbench.grid import CELL, Cell, Grid
from bitbyte.workbench.notebooks import failure, kernel_environment, load_notebook
from bitbyte.workbench.recipes import finished
from bitbyte.workbench.runner import CELL_TIMEOUT, execute


def work(snapshot: str | Path, parent: int | None = None) -> int:
    """Work on the cells of a saved grid until none is left; returns how many it has done.

    ``parent``: process that started this one; if it dies, this one stops as on SIGTERM.  A cell
    that fails is noted and left; whatever it raised is in its claim and its log.
    """
    grid, done = grids.read_snapshot(Path(snapshot)), 0
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    with stoppable():
        todo = list(grid.cells)
        while todo:
            cell = todo.pop(0)
            with claims.taken(cell) as claim:
                if claim is None:
                    continue
                say(f"{cell.key}: {cell.label}")
                if not do_cell(grid, cell, claim):
                    return done  # it was asked to stop
                done += claims.is_done(cell)
            todo = list(grid.cells)  # some may wait again
    return done


def _follow(parent: int) -> None:
    """Stop this process once its parent is gone.  Windows does not tell."""
    while hasattr(os, "getppid") and os.getppid() == parent:
        time.sleep(1)
    if os.name != "nt":
        os.kill(os.getpid(), signal.SIGTERM)


def do_cell(grid: Grid, cell: Cell, claim: Claim) -> bool:
    """Do the work of a claimed cell; False if it was asked to stop before it was done."""
    begin = time.monotonic()
    with _log(cell):
        try:
            record = _notebook(grid, cell) if grid.notebook else _training(cell, claim)
        except Exception as error:
            if not isinstance(error, BitbyteError | RunError | OSError):
                traceback.print_exc()
            text = failure(error, CELL_TIMEOUT) if grid.notebook else str(error)
            say(text)
            claim.fail(" ".join(text.split())[:500] or type(error).__name__)
            return True
    if record is None:
        return claim.lost.is_set()
    about = {
        "key": cell.key, "parameters": cell.parameters, "host": socket.gethostname(),
        "seconds": round(time.monotonic() - begin, 3),
    }  # fmt: skip
    with contextlib.suppress(BitbyteError):  # another worker has taken over, and was faster
        path = cell.folder / "record.json"
        write_atomic(path, to_json(record | {"grid": about}), overwrite=False)
    return True


@contextlib.contextmanager
def _log(cell: Cell) -> Iterator[None]:
    """Send what is printed to the cell's log."""
    with (
        open(cell.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        say(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}")
        yield


def _training(cell: Cell, claim: Claim) -> dict | None:
    """Train, or continue, and score: the record; None if it was stopped before the end."""
    config, run = grids.train_config(cell.fields), cell.folder / "run"
    if not (run.is_dir() and finished(run)):
        saved = run.is_dir() and runs.latest_step(run) is not None
        # A run that has saved nothing starts again.
        config = config.replace(out=str(run), resume=saved, allow_overwrite=not saved)
        result = train(config, lambda row: claim.lost.is_set())
        if not result.finished:
            return None
    prepare_process(config.threads, deterministic=False)
    options = dict(cell.eval)
    device, folder = choose_device(config.device), runs.resolve(run)
    model, meta = checkpoint.load_model(folder, device=device)
    record, _ = evaluate(
        model, options.pop("data"), name=cell.label, meta=meta, progress=False,
        kernels=models.use_kernels(model), dtype=DTYPES[options.pop("dtype", "fp32")], **options,
    )  # fmt: skip
    return record


def _notebook(grid: Grid, cell: Cell) -> dict:
    """Execute the grid's notebook into the cell's folder."""
    assert grid.notebook is not None
    book = load_notebook(Path(grid.notebook))
    if hashlib.sha256(book.data).hexdigest() != grid.source:
        raise BitbyteError(f"{shown(grid.notebook)} has changed since; start the grid again")
    root = str(artifacts().absolute())
    output_folder(cell.folder / "results")
    with kernel_environment(BITBYTE_RUN=str(cell.folder), BITBYTE_ARTIFACTS=root):
        execute(book, cell.fields, cell.folder / book.path.name, None, CELL_TIMEOUT)
    return {
        "format": CELL, "notebook": book.path.name, "source": grid.source,
        "parameters": cell.fields, "bitbyte": __version__, "environment": environment(),
    }  # fmt: skip


if (
    __name__ == "__main__"
):  # what engines.Local starts: python -m bitbyte.workbench.cells SNAPSHOT PID
    try:
        work(sys.argv[1], int(sys.argv[2]))
    except (BitbyteError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
