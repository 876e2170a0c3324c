"""Files that survive a kill: atomic writes, strict JSON, hashes, a folder lock, artifact paths.

Everything bitbyte puts on disk goes through this module.  A file appears under its final name
only when its bytes are on the disk (write to a sibling, fsync, rename, fsync the folder).
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

JSON_LIMIT = 64 * 2**20  # bytes; a manifest of a million shards is smaller


class BitbyteError(ValueError):
    """The user's mistake: one line that says what, where, and what to do about it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class RunError(RuntimeError):
    """A run cannot go on (loss not finite, a leak, a notebook that failed): one line, exit 1."""


def artifacts(*parts: str) -> Path:
    """Path below the artifacts folder: $BITBYTE_ARTIFACTS, else the nearest one upwards.

    Notebooks run in ``notebooks/`` and the command line in the root: both find the same folder.
    """
    chosen = os.environ.get("BITBYTE_ARTIFACTS")
    if chosen:
        return Path(chosen).expanduser().joinpath(*parts)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "artifacts").is_dir():
            return (folder / "artifacts").joinpath(*parts)
    return (here / "artifacts").joinpath(*parts)


def named(path: str | Path) -> Path:
    """A path that somebody gave.  An empty one is refused: pathlib takes it for the folder here."""
    if not os.fspath(path):
        raise BitbyteError("an empty path was given, as of a variable that is not set")
    return Path(path)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new(path: Path, data: bytes) -> None:
    """Create ``path`` (refused if it exists), write ``data`` and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader sees the old bytes or the new ones, never a part."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process of the same id
        write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def to_json(value: object) -> bytes:
    """Readable JSON with a final newline; NaN and infinity are refused (ValueError)."""
    return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def parse_json(data: bytes, name: str) -> object:
    """Parse JSON that a stranger may have written: no duplicate keys, no NaN, bounded size.

    ``name`` is what an error calls the input.  Raises BitbyteError.
    """

    def no_duplicates(pairs: list) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not a number")

    if len(data) > JSON_LIMIT:
        raise BitbyteError(f"{name}: {len(data)} bytes of JSON, more than the limit {JSON_LIMIT}")
    try:
        return json.loads(data, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise BitbyteError(f"{name}: not valid JSON ({error})") from None


def read_json(path: Path) -> object:
    """Read a JSON file through `parse_json`.  Raises BitbyteError, or OSError if unreadable."""
    path = Path(path)
    with open(path, "rb") as file:
        return parse_json(file.read(JSON_LIMIT + 1), str(path))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill half-way never leaves a part of it under its own name."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    os.rename(folder, trash)
    shutil.rmtree(trash)


def lock_handle(handle: int) -> None:
    """Lock an open file until it is closed; OSError if another process holds it."""
    if os.name == "nt":
        import msvcrt

        # Windows locks are mandatory: lock a byte past the text, so that others can read it.
        os.lseek(handle, 1 << 20, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def folder_lock(folder: Path):
    """Hold ``folder`` for this process; the system frees it however the process ends.

    Raises BitbyteError that names the pid and host that hold it.  The lock file stays: removing
    it would let two processes lock two different files of one name.
    """
    path = Path(folder) / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_handle(handle)
        except OSError:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            raise BitbyteError(
                f"{folder} is in use by {holder}; wait or choose another folder"
            ) from None
        os.ftruncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield
    finally:
        os.close(handle)
