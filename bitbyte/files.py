"""Files that survive a kill: atomic writes, strict JSON, hashes, a folder lock, paths and names.

Everything bitbyte puts on disk goes through this module.  A file appears under its final name
only when its bytes are on the disk (write to a sibling, fsync, rename, fsync the folder).

A path has one of two origins.  A path that the user names (``follow=True``) is written as a shell
would write it: links are followed, and a pipe or a device gets the bytes.  A name that bitbyte
chooses, inside a folder that a stranger may have made, is never reached through a link.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO

from bitbyte.vocab import printable

JSON_LIMIT = 64 * 2**20  # bytes; a manifest of 385,000 shards is smaller
STREAM_LIMIT = 2**28  # bytes read from a pipe or device, which may have no end
NAME_LIMIT = 120  # bytes of a name that become part of a longer one; some file systems allow 143

SEALED = {  # first bytes of files whose raw bytes are not their readable content: what they are
    rb"\x1f\x8b": "compressed with gzip",
    rb"BZh[1-9]1AY&SY": "compressed with bzip2",
    rb"\xfd7zXZ\0": "compressed with xz",
    rb"\x28\xb5\x2f\xfd": "compressed with zstd",
    rb"PK\x03\x04": "a zip archive, as .docx, .xlsx, .epub and .npz are too",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb"(?s:.{257})ustar": "a tar archive",
    rb"PAR1": "a Parquet file",
    rb"%PDF-": "a PDF",
}
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")  # of something that is not on this machine
PACKED = (".gz", ".bz2", ".xz", ".zst")  # suffixes of files that packing data unpacks


class BitbyteError(ValueError):
    """The user's mistake: one line that says what is wrong, where, and what to do about it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class RunError(RuntimeError):
    """A run cannot continue (non-finite loss, a leak, a failed notebook): one line, exit 1."""


def artifacts(*parts: str) -> Path:
    """Path below the artifacts folder: $BITBYTE_ARTIFACTS, else the nearest one going up.

    Notebooks run in ``notebooks/`` and the command line in the root: both find the same folder.
    """
    chosen = os.environ.get("BITBYTE_ARTIFACTS")
    if chosen:
        return user_path(chosen).joinpath(*parts)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "artifacts").is_dir():
            return (folder / "artifacts").joinpath(*parts)
    return (here / "artifacts").joinpath(*parts)


def user_path(text: str | Path) -> Path:
    """The path that a user means: ``~`` and ``~name`` are home folders, as in a shell.

    Raises BitbyteError for an empty text, which would mean the current folder, for a text with a
    zero byte, for an address (s3://...), and for an unknown home.
    """
    text = str(text)
    if not text:
        raise BitbyteError("an empty name is not a file or folder; name one, or drop the option")
    if "\0" in text:
        raise BitbyteError(f"{shown(text)}: a name cannot contain a zero byte")
    if ADDRESS.match(text):
        raise BitbyteError(
            f"{shown(text)} is an address, not a file or folder here; only --data can be one, of "
            "packed data"
        )
    path = Path(text)
    if not text.startswith("~"):  # absolute, as "./~x" would be "~x" to the next caller
        return path.absolute() if str(path).startswith("~") else path
    try:
        return path.expanduser()
    except RuntimeError:
        raise BitbyteError(
            f"{shown(text)}: no home folder is known for {shown(path.parts[0])}; write the whole "
            "path, or ./~ for a name that begins with ~"
        ) from None


def shown(name: object) -> str:
    """A path, name or message as one line of valid text, whatever bytes and characters it has."""
    try:
        return printable(str(name).encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a character, which Windows allows in a name
        return printable(str(name).encode("utf-8", "surrogatepass"))


def reason(error: OSError) -> str:
    """The system's reason for an error, with the file if it is known."""
    if error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return error.strerror or str(error)


def safe_name(*words: str) -> str:
    """A file name made of words: ASCII letters, digits and ``_.-``, with room for a suffix."""
    parts = (re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.") for word in words)
    return "-".join(filter(None, parts))[:NAME_LIMIT].rstrip("-.")


def cut_name(name: str) -> str:
    """At most NAME_LIMIT bytes of a name, and only valid characters, which some systems demand."""
    return name.encode("utf-8", "ignore")[:NAME_LIMIT].decode("utf-8", "ignore")


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
    """Create ``path``, write ``data`` and fsync.  Raises FileExistsError if it exists."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_target(target: Path, *, overwrite: bool, follow: bool = True) -> None:
    """Raise BitbyteError now, before any work, for a target that `replacing` would refuse.

    A target that holds no data (a pipe, a terminal, /dev/null) needs no ``overwrite``.
    """
    standing = _standing(target, follow)
    if standing is None:
        if not _final(target, follow).absolute().parent.is_dir():
            raise BitbyteError(
                f"{shown(target)} is in a folder that does not exist; name a file to write"
            )
    elif stat.S_ISDIR(standing.st_mode):
        raise BitbyteError(f"{shown(target)} is a folder; name a file to write")
    elif not follow and not (stat.S_ISREG(standing.st_mode) or stat.S_ISLNK(standing.st_mode)):
        raise BitbyteError(f"{shown(target)} is not a plain file; move it out of the way")
    elif (
        not overwrite
        and (stat.S_ISREG(standing.st_mode) or stat.S_ISBLK(standing.st_mode))
        and _standard_stream(standing) is None
    ):
        raise BitbyteError(f"{shown(target)} exists; choose another name, or --allow_overwrite")


def output(name: str | Path, *, overwrite: bool) -> Path:
    """Path of a file to write later, checked now; makes its folder.  Raises BitbyteError."""
    target = user_path(name)
    output_folder(target.parent)
    check_target(target, overwrite=overwrite)
    return target


def output_folder(name: str | Path) -> Path:
    """Path of a folder to write to later, made now.  Raises BitbyteError if it is a file."""
    folder = user_path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        above = (part for part in (folder, *folder.parents) if part.exists())
        wrong = shown(next((part for part in above if not part.is_dir()), folder))
        raise BitbyteError(f"{wrong} is not a folder; name one to write to") from None
    return folder


def is_stdout(target: Path) -> bool:
    """Whether ``target`` leads to the same place as standard output."""
    standing = _standing(target, True)
    return standing is not None and _standard_stream(standing) == 1


def _standing(target: Path, follow: bool) -> os.stat_result | None:
    """Status of what is at ``target``; None if nothing is, or a link to nothing is followed."""
    try:
        return os.stat(target) if follow else os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _final(target: Path, follow: bool) -> Path:
    """The name to rename to: a link's target, if links are followed."""
    return Path(os.path.realpath(target)) if follow and os.path.islink(target) else Path(target)


def _standard_stream(standing: os.stat_result) -> int | None:
    """1 or 2 if standard output or standard error is connected to this, else None."""
    for number in (1, 2) if os.name != "nt" else ():  # Windows has no /dev/stdout
        with contextlib.suppress(OSError):
            if os.path.samestat(standing, os.fstat(number)):
                return number
    return None


def _open_through(target: Path) -> BinaryIO | None:
    """``target`` opened in place if it is a pipe, a device or a standard stream, else None."""
    standing = _standing(target, True)
    if standing is None:
        return None
    number = _standard_stream(standing)
    if number is not None:  # a second open file would overwrite what is printed
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        return os.fdopen(os.dup(number), "wb")
    if stat.S_ISREG(standing.st_mode):
        return None
    flags = os.O_CREAT | os.O_TRUNC
    return open(target, "wb", opener=lambda path, mode: os.open(path, mode & ~flags))


def temporary_beside(path: Path) -> Path:
    """A hidden name for what becomes ``path``: a process of another machine may have our id."""
    return path.with_name(f".tmp-{cut_name(path.name)}-{os.getpid()}{secrets.randbelow(10**9):09}")


@contextlib.contextmanager
def replacing(
    target: Path, *, overwrite: bool = True, follow: bool = True, need: int = 0, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """A file to write that becomes ``target`` if the block succeeds, and leaves nothing if not.

    A reader sees the old bytes or the new ones, never a mixture.  The new file takes the old one's
    mode and, where permitted, its owner; other hard links keep the old bytes.  One that replaces
    nothing gets ``mode`` less the umask.  Until the end the bytes are in a temporary file, whose
    path is the yielded file's ``name``.

    With ``follow`` the target is the user's: a link is followed, and a pipe, a device or standard
    output gets the bytes as they come.  Without it the name is ours: a link there is replaced, and
    anything that is neither a link nor a plain file is refused.  ``need`` bytes must be free on the
    disk.

    Raises BitbyteError as `check_target` does, and without ``overwrite`` also if another process
    takes the name meanwhile; OSError that names the target if the disk is full.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite, follow=follow)
    through = _open_through(target) if follow else None
    if through is not None:
        with _named(target, target), through:
            yield through
        return
    final = _final(target, follow)
    temporary = temporary_beside(final)
    try:
        with _named(target, temporary, ", nothing was written"):
            with _open_new(temporary, target, follow, mode) as sink:
                _like(temporary, _standing(final, False))
                if need > shutil.disk_usage(final.absolute().parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                yield sink
                sink.flush()
                os.fsync(sink.fileno())
            if overwrite:
                patiently(os.replace, temporary, final)
            else:
                _rename_new(temporary, final)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(final.absolute().parent)


@contextlib.contextmanager
def _named(target: Path, temporary: Path, full: str = "") -> Iterator[None]:
    """Make write errors name the target, not the temporary file; a full disk names neither."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror}{full}", str(target)) from error
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _open_new(temporary: Path, target: Path, follow: bool, mode: int) -> BinaryIO:
    try:
        return open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, mode))
    except OSError as error:
        if not follow or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BitbyteError(f"cannot write {shown(target)}: {error.strerror}") from None


def _like(path: Path, old: os.stat_result | None) -> None:
    """Give ``path`` the owner and mode of the plain file that it will replace."""
    if old is not None and stat.S_ISREG(old.st_mode):
        if hasattr(os, "chown"):
            with contextlib.suppress(OSError):  # only root may give files away
                os.chown(path, old.st_uid, old.st_gid)
        os.chmod(path, stat.S_IMODE(old.st_mode))


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename, failing if the target appeared meanwhile (two concurrent writers)."""
    taken = f"{shown(target)} was written by another process meanwhile"
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise BitbyteError(taken) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise BitbyteError(taken) from None
        patiently(os.replace, temporary, target)


def write_atomic(path: Path, data: bytes, *, follow: bool = False, overwrite: bool = True) -> None:
    """Replace ``path`` by ``data`` through `replacing`; ``follow`` for a path the user named."""
    with replacing(path, follow=follow, overwrite=overwrite) as file:
        file.write(data)


def plain_only(path: str | Path, flags: int) -> int:
    """An ``opener`` for `open`: for a file of ours in a folder that a stranger may have made.

    Raises BitbyteError for a link, which could lead to any file of the user's, and for a pipe,
    which would block.
    """
    if os.path.islink(path):
        raise BitbyteError(f"{shown(path)} is a link; remove it, bitbyte writes a file there")
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags | more, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BitbyteError(f"{shown(path)} is not a plain file; move it out of the way")
    return handle


def read_input(name: str | Path, limit: int = STREAM_LIMIT) -> bytes:
    """All bytes of a file the user named, of a pipe or device, or of standard input (text ``-``).

    Raises BitbyteError if the name is missing or a folder, or if a pipe or device gives more than
    ``limit`` bytes.
    """
    with open_input(name) as (file, size):
        data = file.read(limit + 1 if size is None else -1)
    if size is None and len(data) > limit:
        raise BitbyteError(f"{shown(name)} gave more than {limit:,} bytes; save a part as a file")
    return data


@contextlib.contextmanager
def open_input(name: str | Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """(Open file that `read_input` reads, its size; None for a pipe or device, which cannot seek).

    Raises BitbyteError, OSError.
    """
    if name == "-":
        yield sys.stdin.buffer, None
        return
    path = user_path(name)
    if path.is_dir():
        raise BitbyteError(f"{shown(path)} is a folder; name a file")
    if not path.exists():
        raise BitbyteError(f"there is no file {shown(path)}")
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        yield file, info.st_size if stat.S_ISREG(info.st_mode) else None


def read_text(path: Path) -> str:
    """A UTF-8 text, line ends unchanged.  Raises BitbyteError if missing or not UTF-8."""
    data = read_input(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitbyteError(
            f"{shown(path)} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start:,}; "
            "save it as UTF-8"
        ) from None


def sealed(path: Path) -> str | None:
    """What a file is if its raw bytes are not its content (an archive, say), else None."""
    with open(path, "rb") as file:
        start = file.read(262)
    return next((what for magic, what in SEALED.items() if re.match(magic, start)), None)


def is_packed(path: Path) -> bool:
    """Whether packing data unpacks this file, by its name."""
    return path.suffix.lower() in PACKED


def to_json(value: object) -> bytes:
    """Readable JSON with a final newline; NaN and infinity are refused (ValueError).

    A file name that is not UTF-8 has lone surrogates in Python.  They are written as JSON escapes,
    so that a reader gets the name back.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def parse_json(data: bytes, name: str, constant: Callable | None = None) -> Any:
    """Parse JSON that a stranger may have written: no duplicate keys, no NaN, bounded size.

    ``constant`` reads NaN and Infinity.  Raises BitbyteError, which calls the input ``name``.
    """

    def no_duplicates(pairs: list) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def no_constant(text: str) -> float:
        raise ValueError(f"{text} is not a number")

    def finite(text: str) -> float:  # 1e999 is infinity too
        return float(text) if math.isfinite(float(text)) else no_constant(text)

    if len(data) > JSON_LIMIT:
        raise BitbyteError(f"{name}: {len(data)} bytes of JSON, more than the limit {JSON_LIMIT}")
    try:
        return json.loads(
            data, object_pairs_hook=no_duplicates, parse_float=finite,
            parse_constant=constant or no_constant,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise BitbyteError(f"{name}: not valid JSON ({error})") from None


def read_json(path: Path, *, plain: bool = False) -> Any:
    """Read a JSON file through `parse_json`.  Raises BitbyteError, or OSError if unreadable.

    With ``plain`` it is a file of ours, as in `plain_only`.
    """
    path = Path(path)
    with open(path, "rb", opener=plain_only if plain else None) as file:
        return parse_json(file.read(JSON_LIMIT + 1), str(path))


def wrong_fields(
    value: object, fields: dict[str, tuple], optional: Set[str] = frozenset()
) -> str | None:
    """Why parsed JSON is not an object with these fields of these types; None if it is.

    Types are exact: True is not an int here, nor is what does not fit into 64 bits.
    """
    if not isinstance(value, dict):
        return "not an object"

    def fits(name: str) -> bool:
        item = value[name]
        return type(item) in fields[name] and not (type(item) is int and abs(item) >= 2**63)

    for problem, names in (
        ("unknown", value.keys() - fields.keys()),
        ("missing", fields.keys() - value.keys() - optional),
        ("mistyped", {n for n in value.keys() & fields.keys() if not fits(n)}),
    ):
        if names:
            return f"{problem} field {', '.join(map(repr, sorted(names)))}"
    return None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill halfway never leaves part of it under its own name."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    patiently(os.rename, folder, trash)
    shutil.rmtree(trash)


def patiently(move: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    """``move(source, target)``; on Windows again while a reader or a scanner has a file open."""
    for attempt in range(5):
        try:
            move(source, target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == 4:
                raise
            time.sleep(0.1)


def lock_handle(handle: int) -> None:
    """Lock an open file until it is closed.  Raises OSError if another process holds it."""
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

    Raises BitbyteError that names the pid and host holding it.  The lock file stays: removing it
    would let two processes lock two different files of the same name.
    """
    handle = plain_only(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT)
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
