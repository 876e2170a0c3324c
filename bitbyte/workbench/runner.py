"""Batch runs: the numbered notebooks in order, without a browser, and resumable.

papermill executes; this module adds what it lacks: parameters checked and typed before anything
starts, a manifest to resume from, progress, one page with all results.  It is not a scheduler: it
runs one kernel at a time, on this machine.

A run is a folder ``artifacts/runs/<id>/``: NN_name.ipynb and .html as executed, manifest.json,
index.html, and whatever notebooks write to $BITBYTE_RUN (``figures/``, ``results/``).
"""

import contextlib
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bitbyte import __version__
from bitbyte.data.corpora import stamp
from bitbyte.evaluate.tables import bpb_table
from bitbyte.files import (
    BitbyteError,
    RunError,
    artifacts,
    folder_lock,
    output_folder,
    read_json,
    shown,
    to_json,
    user_path,
    write_atomic,
    wrong_fields,
)
from bitbyte.workbench.notebooks import (
    KERNEL_ARGUMENTS,
    assign,
    failure,
    find_notebooks,
    kernel_environment,
    load_notebook,
    names_path,
    need_workbench,
    resolve,
)
from bitbyte.workbench.pages import records_of, write_index

FORMAT = 1  # of manifest.json
ENTRY = {  # of a notebook in manifest.json
    "name": (str,), "source": (str,), "key": (str,), "parameters": (dict,), "status": (str,),
    "error": (str, type(None)), "seconds": (int, float, type(None)),
}  # fmt: skip
CELL_TIMEOUT = 24 * 3600  # seconds; a cell may train for hours, but a hang must end eventually
START_TIMEOUT = 120  # seconds a kernel may take to answer, on a busy machine


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from one hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(known, cells, index, done, here, elapsed) -> float | None:
    """Estimated seconds left in notebook ``index`` and those after it; None if unknown.

    ``known``: seconds of each notebook's last run, or None; ``cells``: code cells of each;
    ``done``: finished cells of the current one; ``here``: seconds spent in it; ``elapsed``:
    seconds in all.  A notebook that never ran is estimated from the cells so far.
    """
    finished = sum(cells[:index]) + done
    left = 0.0
    for k in range(index, len(cells)):
        open_cells = cells[k] - (done if k == index else 0)
        if known[k] is not None:
            left += max(0.0, known[k] - (here if k == index else 0.0))
        elif finished:
            left += elapsed / finished * open_cells
        elif open_cells:
            return None
    return left


class Progress:
    """One progress line: redrawn on a terminal, elsewhere printed again every 20 seconds."""

    def __init__(self, names: list[str], cells: list[int], known: list[float | None]):
        self.names, self.cells, self.known = names, cells, known
        self.index = self.cell = 0  # notebook, from 0; its running code cell, from 1
        self.begin = self.begin_here = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def _tick(self) -> None:
        while not self.stop.wait(0.5 if self.terminal else 20):
            self.draw()

    def start(self, index: int) -> None:
        self.index, self.cell, self.begin_here = index, 0, time.monotonic()
        self.draw()

    def on_cell_start(self, cell, cell_index) -> None:
        """Called by the notebook client before every cell; papermill's own cell is not counted."""
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            self.cell += 1

    def text(self) -> str:
        now = time.monotonic()
        left = time_left(
            self.known, self.cells, self.index, max(0, self.cell - 1),
            now - self.begin_here, now - self.begin,
        )  # fmt: skip
        return (
            f"[{self.index + 1}/{len(self.names)}] {self.names[self.index]}  "
            f"cell {self.cell}/{self.cells[self.index]}  {clock(now - self.begin)} elapsed, "
            + ("time left not known yet" if left is None else f"about {clock(left)} left")
        )

    def draw(self) -> None:
        if self.terminal:
            line = self.text()[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(self.text(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays above the progress line."""
        print(("\r\x1b[2K" if self.terminal else "") + line, file=sys.stderr, flush=True)


def _code_hash() -> str:
    """SHA-256 of the package's own files, so that changed code invalidates earlier results.

    Scripts, styles and the packed models shape what notebooks show, too.
    """
    digest, package = hashlib.sha256(__version__.encode()), Path(__file__).parents[1]
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.parent.name != "__pycache__":
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _keys(books: list, values: list[dict]) -> list[str]:
    """Hashes of what each executed copy depends on: code, its source, parameters, all before it.

    Of files and folders that parameters name, the stamp belongs to it.
    """
    keys, last = [], _code_hash()
    for book, parameters in zip(books, values, strict=True):
        named = [v for name, v in parameters.items() if names_path(books, name)]
        paths = [Path(v) for v in named if isinstance(v, str) and Path(v).is_absolute()]
        stamps = {str(path): stamp(path) for path in paths if path.exists()}
        text = json.dumps([parameters, stamps], sort_keys=True)
        last = hashlib.sha256(last.encode() + book.data + text.encode()).hexdigest()
        keys.append(last)
    return keys


def _read_manifest(run: Path) -> dict:
    manifest = read_json(run / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BitbyteError(f"{run}: its manifest.json has another format; start a new run")
    settings, entries = manifest.get("settings"), manifest.get("notebooks")
    good = isinstance(settings, dict) and all(isinstance(v, str) for v in settings.values())
    good = good and type(manifest.get("began")) in (int, float) and isinstance(entries, list)
    if not good or any(wrong_fields(entry, ENTRY) for entry in entries):
        raise BitbyteError(f"{run}: its manifest.json is not that of a run; choose another folder")
    return manifest


def _refuse_links(run: Path) -> None:
    """Raise BitbyteError for a link in a run folder: an untrusted one could lead anywhere."""
    for path in run.iterdir():
        if path.is_symlink():
            raise BitbyteError(f"{path} is a link; a run writes only to its own folder")


def _open(out, resume) -> tuple[Path | None, dict]:
    """The folder to run in (None: make one), and its manifest or {}."""
    runs = artifacts("runs").absolute()
    if resume not in (None, False):
        if out is not None:
            raise BitbyteError("give --out or --resume, not both")
        if resume is True or resume == "latest":
            found = sorted(runs.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
            run = found[-1].parent if found else runs / "latest"
        else:
            place = user_path(resume)
            run = place.absolute() if place.is_dir() else runs / place
        if not (run / "manifest.json").is_file():
            raise BitbyteError(f"{run}: no run to resume; start one without --resume")
        return run, _read_manifest(run)
    if out is None:
        return None, {}
    run = user_path(out).absolute()
    if (run / "manifest.json").is_file():
        return run, _read_manifest(run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise BitbyteError(f"{run} exists and is not a run; choose another --out")
    return run, {}


def _new_folder() -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{k}" for k in range(2, 100))):
        run = artifacts("runs", name + suffix).absolute()
        with contextlib.suppress(FileExistsError):
            run.mkdir(parents=True)
            return run
    raise BitbyteError(f"there are a hundred runs named {name}; choose a name with --out")


def run_notebooks(
    notebooks=None, *, out=None, settings: dict[str, str] | None = None,
    resume: str | bool | None = None, cell_timeout: int = CELL_TIMEOUT,
) -> Path:  # fmt: skip
    """Execute notebooks in order and return the run's folder.

    ``settings`` are parameters as text (``--set name=value``).  ``resume`` continues a run (its
    id or folder, or True / "latest" for the newest) with its notebooks and settings; notebooks
    that are done and unchanged are skipped.  So does an ``out`` that already holds a run.
    ``cell_timeout`` is in seconds.  Raises BitbyteError before anything runs, RunError if a
    notebook fails; after Ctrl-C the run can be resumed.
    """
    need_workbench("papermill", "nbconvert")
    run, manifest = _open(out, resume)
    if notebooks is None and manifest:
        notebooks = [entry["source"] for entry in manifest["notebooks"]]
    books = [load_notebook(path) for path in find_notebooks(notebooks)]
    settings = resolve(books, {**manifest.get("settings", {}), **(settings or {})})
    values = assign(books, settings)
    run = output_folder(run or _new_folder())
    _refuse_links(run)
    root = artifacts().absolute()
    with (
        folder_lock(run),
        kernel_environment(BITBYTE_RUN=str(run), BITBYTE_ARTIFACTS=str(root)),
    ):
        manifest = _manifest(manifest, run, books, values, settings)
        try:
            _run_all(run, manifest, books, values, cell_timeout)
        except BaseException:
            with contextlib.suppress(BitbyteError, OSError):  # keep the original exception
                write_index(run, manifest)
            raise
        write_index(run, manifest)
    _summary(run, manifest)
    return run


def _manifest(old: dict, run: Path, books, values, settings) -> dict:
    """A new manifest that keeps entries of ``old`` that are done and unchanged."""
    done = {
        entry["name"]: entry
        for entry in old.get("notebooks", [])
        if entry["status"] == "done" and (run / entry["name"]).is_file()
    }
    entries = []
    for book, parameters, key in zip(books, values, _keys(books, values), strict=True):
        name = book.path.name
        entry = {
            "name": name, "source": str(book.path), "key": key, "parameters": parameters,
            "status": "waiting", "error": None, "seconds": None,
        }  # fmt: skip
        kept = done.get(name, {})
        entries.append(kept if kept.get("key") == key else entry)
    began = old.get("began", time.time())  # seconds since 1970
    return {
        "format": FORMAT, "id": run.name, "bitbyte": __version__, "began": began,
        "settings": settings, "notebooks": entries,
    }  # fmt: skip


def _run_all(run: Path, manifest: dict, books, values, cell_timeout: int) -> None:
    entries = manifest["notebooks"]
    names = [f"{entry['name']} {json.dumps(entry['parameters'])}" for entry in entries]
    times_path = artifacts("runs", "times.json")
    times_path.parent.mkdir(parents=True, exist_ok=True)
    times: object = {}
    with contextlib.suppress(BitbyteError, FileNotFoundError):  # only for estimates
        times = read_json(times_path)
    times = times if isinstance(times, dict) else {}
    times = {name: t for name, t in times.items() if isinstance(t, int | float)}
    todo = [entry["status"] != "done" for entry in entries]
    progress = Progress(
        [entry["name"] for entry in entries],
        [book.n_cells * to_do for book, to_do in zip(books, todo, strict=True)],
        [times.get(name) if to_do else 0.0 for name, to_do in zip(names, todo, strict=True)],
    )

    def mark(entry: dict, **changes) -> None:
        entry.update(changes)
        write_atomic(run / "manifest.json", to_json(manifest))

    with progress:
        for k, entry in enumerate(entries):
            if not todo[k]:
                progress.say(f"{entry['name']}: done before, skipped")
                continue
            mark(entry, status="running")
            progress.start(k)
            begin = time.monotonic()
            try:
                execute(
                    books[k], values[k], run / entry["name"], progress.on_cell_start, cell_timeout
                )
            except KeyboardInterrupt:
                mark(entry, status="interrupted")
                progress.say(f"stopped; continue with: bitbyte run --resume {_handle(run)}")
                raise
            except Exception as error:
                reason = failure(error, cell_timeout)
                where = f"{entry['name']}, code cell {progress.cell} of {books[k].n_cells}"
                mark(entry, status="failed", error=f"{where}: {reason}")
                raise RunError(
                    f"{where}: {reason}; finished notebooks stay in {run}; continue with: "
                    f"bitbyte run --resume {_handle(run)}"
                ) from error
            seconds = round(time.monotonic() - begin, 1)
            mark(entry, status="done", seconds=seconds)
            progress.say(f"{entry['name']}: done in {clock(seconds)}")
            times[names[k]] = seconds
            write_atomic(times_path, to_json(times))


class _Copies:
    """Lets papermill save to a run folder atomically and without following links.

    Its own handler reopens the copy for writing after every cell.
    """

    @staticmethod
    def write(text: str, path: str) -> None:
        write_atomic(Path(path), text.encode("utf-8", "backslashreplace"))  # as `to_json` does

    @staticmethod
    def pretty_path(path: str) -> str:
        return path


def execute(
    book, parameters: dict, target: Path, on_cell_start: Callable | None, timeout: int
) -> None:
    """Execute one notebook to ``target``; raises what papermill and nbclient raise.

    After a dead kernel or a time-out trust papermill's exceptions, not its files, which call all
    cells "completed".  It treats paths as format strings, so braces in them are doubled.
    """
    import papermill
    from jupyter_core.utils import ensure_event_loop
    from papermill.iorw import papermill_io

    papermill_io.register(str(target), _Copies)  # for all paths with this prefix
    try:
        papermill.execute_notebook(
            book.node,
            str(target).replace("{", "{{").replace("}", "}}"),
            parameters=parameters,
            cwd=str(book.path.parent),
            kernel_name="python3",
            progress_bar=False,
            start_timeout=START_TIMEOUT,
            execution_timeout=timeout,
            extra_arguments=KERNEL_ARGUMENTS,
            coalesce_streams=True,  # text printed byte by byte becomes one output, not hundreds
            on_cell_start=on_cell_start,
        )
    except KeyboardInterrupt:
        # The interrupted cell fails with nobody waiting for it; asyncio would report it at length.
        loop = ensure_event_loop()
        if not loop.is_running():  # a running loop is the caller's own
            loop.set_exception_handler(lambda loop, context: None)
        raise


def _handle(run: Path) -> str:
    """The value of --resume for this run: its id, or its path if it is elsewhere."""
    return run.name if run.parent == artifacts("runs").absolute() else str(run)


def _summary(run: Path, manifest: dict) -> None:
    print(bpb_table(records_of(run, manifest["began"])))
    figures = sorted((run / "figures").glob("*"))
    where = shown(run / "figures")
    print(f"\nnotebooks  {shown(run)}\nfigures    {where} ({len(figures)} files)")
    print(f"all linked {shown(run / 'index.html')}")
