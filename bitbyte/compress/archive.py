"""Archives: several files and folders as one stream, a table of contents first.

The table is a varint of its size, then for each entry, in the order of their bytes in the stream
and folders before what is in them: kind (1 byte: 0 file, 1 folder, 2 link), varint of the name's
bytes, the name in UTF-8 with ``/`` between folders, varints of the mode's permission bits and of
the time of change in seconds, and for a file the varint of its size, for a link the varint of its
target's bytes and the target.

A table is a stranger's: names that are absolute, climb out of the folder or go through a link, and
links that lead out of it, are refused before anything is written.  Each entry is checked as it is
read, so that a short file that stands for a huge table takes neither memory nor time.
"""

import contextlib
import dataclasses
import os
import posixpath
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bitbyte.compress import segments
from bitbyte.compress.frames import read_varint, varint
from bitbyte.files import BitbyteError, patiently, shown, sync_folder, temporary_beside

FILE, FOLDER, LINK = range(3)
MAX_TABLE = 1 << 28  # bytes
MAX_ENTRIES = 1 << 20  # half a GB in memory
MAX_NAME = 1 << 12
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    device + digit for device in ("com", "lpt") for digit in "123456789\u00b9\u00b2\u00b3"
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    kind: int
    name: str  # relative, with /
    mode: int  # permission bits
    time: int  # of the last change, in seconds
    size: int = 0
    target: str = ""  # of a link

    def pack(self) -> bytes:
        name = os.fsencode(self.name)
        out = bytes([self.kind]) + varint(len(name)) + name + varint(self.mode) + varint(self.time)
        if self.kind == LINK:
            target = os.fsencode(self.target)
            return out + varint(len(target)) + target
        return out + (varint(self.size) if self.kind == FILE else b"")


def collect(paths: Sequence[Path]) -> list[tuple[Entry, Path]]:
    """The entries for files and folders that the user named, with where they are.

    Of a single folder it is what is in it.  Files of one kind (by suffix) come together, because
    they help each other.  Raises BitbyteError for names that do not exist or occur twice, for
    pipes, sockets and devices, and for what `unpack` refuses, such as links that lead out.
    """
    found: dict[str, tuple[Entry, Path]] = {}
    for path in paths:
        top = Path(os.path.abspath(path)).name
        if not os.path.lexists(path):
            raise BitbyteError(f"{shown(path)} does not exist; name files and folders")
        if not top:
            raise BitbyteError(f"{shown(path)} has no name; name the folders in it")
        if len(paths) == 1 and path.is_dir():
            inside = [pair for inner in sorted(path.iterdir()) for pair in _walk(inner, inner.name)]
        else:
            inside = _walk(path, top)
        for name, place in inside:
            if name in found:
                raise BitbyteError(f"two of the files are called {shown(name)}; rename one")
            found[name] = _entry(place, name), place
    order = {FOLDER: 0, LINK: 1, FILE: 2}
    made = sorted(found.values(), key=lambda item: (
        order[item[0].kind], posixpath.splitext(item[0].name)[1] * (item[0].kind == FILE),
        item[0].name,
    ))  # fmt: skip
    # What `unpack` would refuse must not be written: the files could never be restored.
    written = table(entry for entry, _ in made)
    read_table(_Reader([written], "cannot write this archive", "leave that out, or rename it"))
    return made


def _walk(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of a file, or of a folder and of all that is in it."""
    todo = [(name, path)]
    while todo:
        name, path = todo.pop()
        yield name, path
        if path.is_dir() and not path.is_symlink():
            todo += [(f"{name}/{inner.name}", inner) for inner in sorted(path.iterdir())]


def _entry(path: Path, name: str) -> Entry:
    info = os.lstat(path)
    mode, time = stat.S_IMODE(info.st_mode) & 0o777, max(0, int(info.st_mtime))
    if stat.S_ISDIR(info.st_mode):
        return Entry(FOLDER, name, mode, time)
    if stat.S_ISLNK(info.st_mode):
        return Entry(LINK, name, mode, time, target=os.readlink(path).replace(os.sep, "/"))
    if not stat.S_ISREG(info.st_mode):
        raise BitbyteError(f"{shown(path)} is a pipe, a socket or a device; leave it out")
    return Entry(FILE, name, mode, time, info.st_size)


def table(entries: Iterable[Entry]) -> bytes:
    """The table of contents as it stands before the files."""
    packed = b"".join(entry.pack() for entry in entries)
    return varint(len(packed)) + packed


def pieces(entries: list[tuple[Entry, Path]]) -> Iterator[segments.Piece]:
    """The stream of an archive, in pieces.  Raises BitbyteError if a file changes meanwhile."""
    yield segments.Piece(table(entry for entry, _ in entries), None, False)
    for entry, path in entries:
        if entry.kind != FILE:
            continue
        size = 0
        with open(path, "rb") as file:
            for piece in segments.pieces(file):
                size += len(piece.data)
                if size > entry.size:  # now: it may grow by what is written of it
                    break
                yield piece
        if size != entry.size:
            raise BitbyteError(
                f"{shown(path)} changed while it was being read; compress it again, with the "
                "output elsewhere if it is that"
            )


class _Reader:
    """Takes numbers and bytes from a stream that arrives in blocks."""

    def __init__(self, blocks: Iterable[bytes], name: str, advice: str = "nothing was written"):
        self._blocks, self._left, self.at = iter(blocks), memoryview(b""), 0
        self.name, self.advice = name, advice

    def damaged(self, why: str) -> BitbyteError:
        return BitbyteError(f"{self.name}: its table of contents {why}; {self.advice}")

    def some(self, most: int) -> memoryview:
        """At least one and at most ``most`` bytes; none at the end."""
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        data, self._left = self._left[:most], self._left[most:]  # copies nothing
        self.at += len(data)
        return data

    def read(self, n: int) -> bytes:
        out = bytearray()
        while len(out) < n:
            data = self.some(n - len(out))
            if not data:
                raise self.damaged("is cut off")
            out += data
        return bytes(out)

    def varint(self, most: int) -> int:
        n = read_varint(self.read, most)
        if n is None:
            raise self.damaged("holds a number that is too large")
        return n

    def text(self) -> str:
        """A name or a target, after its size."""
        raw = self.read(self.varint(MAX_NAME))
        try:
            return os.fsdecode(raw)
        except UnicodeDecodeError:  # on Windows; elsewhere a name can be any bytes
            raise self.damaged(f"holds a name that is not UTF-8, {raw[:80]!r}") from None


def _read_entry(reader: _Reader) -> Entry:
    kind = reader.read(1)[0]
    if kind not in (FILE, FOLDER, LINK):
        raise reader.damaged(f"holds an entry of kind {kind}")
    name = reader.text()
    mode, time = reader.varint(0o777), reader.varint(1 << 40)
    if kind == FILE:
        return Entry(kind, name, mode, time, reader.varint(1 << 62))
    return Entry(kind, name, mode, time, target=reader.text() if kind == LINK else "")


def read_table(reader: _Reader) -> list[Entry]:
    """The table of contents.

    Raises BitbyteError for entries that would be written outside of their folder, or over one
    another.
    """
    end = reader.varint(MAX_TABLE)
    end += reader.at
    entries, kinds = [], {"": FOLDER}
    while reader.at < end:
        if len(entries) == MAX_ENTRIES:
            raise reader.damaged(f"has more than {MAX_ENTRIES:,} entries")
        entry = _read_entry(reader)
        if why := _unsafe(entry.name):
            raise reader.damaged(f"names {shown(entry.name) or 'nothing'}, which {why}")
        if entry.name in kinds:
            raise reader.damaged(f"names {shown(entry.name)} twice")
        if kinds.get(entry.name.rpartition("/")[0]) != FOLDER:
            raise reader.damaged(f"puts {shown(entry.name)} into what is not a folder")
        if entry.kind == LINK and not _stays_inside(entry, kinds):
            raise reader.damaged(f"has a link {shown(entry.name)} that may lead out of it")
        kinds[entry.name] = entry.kind
        entries.append(entry)
    if reader.at > end:
        raise reader.damaged("is cut off")
    return entries


def _unsafe(name: str) -> str | None:
    """Why a name must not be written; None if it may."""
    parts = name.split("/")
    if not name or "\0" in name:
        return "is not a plain name"
    if name.startswith("/"):
        return "is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder"
    if os.name == "nt" and any(map(_special, parts)):
        return "means something else to Windows"
    return None


def _special(part: str) -> bool:
    """Whether Windows takes a name for a drive, a stream or a device, or drops its end."""
    stem = part.partition(".")[0].rstrip(" ").lower()
    return bool(set(part) & set("\\:")) or part.endswith((".", " ")) or stem in RESERVED


def _stays_inside(link: Entry, kinds: dict[str, int]) -> bool:
    """Whether following a link never leaves the archive.

    It may climb only out of folders of the archive, by their very names: where case, the form of
    accents or short names do not matter, another spelling could be that of a link.  A step down
    may take a link, as that one stays inside too.
    """
    if link.target.startswith("/") or not link.target or "\0" in link.target:
        return False
    here = link.name.split("/")[:-1]
    for step in link.target.split("/"):
        if step == "..":
            if not here or kinds.get("/".join(here)) != FOLDER:
                return False
            here.pop()
        elif step not in ("", "."):
            if os.name == "nt" and _special(step):
                return False
            here.append(step)
    return True


def unpack(blocks: Iterable[bytes], folder: Path, name: str) -> tuple[int, int]:
    """Write the files of an archive into a new folder; returns `totals`.

    ``folder`` appears only when all of it is written and ``blocks`` ended without an error.  Raises
    BitbyteError for an unsafe table, and if ``folder`` exists.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise BitbyteError(f"{shown(folder)} exists; name a new folder for the archive's files")
    if not folder.absolute().parent.is_dir():
        raise BitbyteError(f"{shown(folder)} is in a folder that does not exist")
    temporary = temporary_beside(folder)
    made = temporary / "made"
    try:
        entries = _write_all(_Reader(blocks, name), made)
        if os.path.lexists(folder):
            raise BitbyteError(f"{shown(folder)} was written by another process meanwhile")
        patiently(os.rename, made, folder)
    finally:
        _remove(temporary)
    sync_folder(folder.absolute().parent)
    return totals(entries)


def totals(entries: Iterable[Entry]) -> tuple[int, int]:
    """(number of files, bytes in them)."""
    files = [entry for entry in entries if entry.kind == FILE]
    return len(files), sum(entry.size for entry in files)


def check(blocks: Iterable[bytes], name: str) -> tuple[int, int]:
    """Check an archive without writing it; returns `totals`.  Raises BitbyteError if it is bad."""
    reader = _Reader(blocks, name)
    entries = read_table(reader)
    left = sum(entry.size for entry in entries)
    while left >= 0 and (data := reader.some(1 << 20)):
        left -= len(data)
    if left:
        raise reader.damaged("does not fit the files")
    return totals(entries)


def _remove(folder: Path) -> None:
    """Delete a folder, however deep, even one whose folders may not be written to."""
    todo, folders = [folder] * folder.is_dir(), []
    with contextlib.suppress(OSError):
        while todo:
            folders.append(todo.pop())
            folders[-1].chmod(0o700)
            for inner in folders[-1].iterdir():
                if inner.is_dir() and not inner.is_symlink():
                    todo.append(inner)
                else:
                    inner.unlink()
        for inner in reversed(folders):
            inner.rmdir()


def _write_all(reader: _Reader, folder: Path) -> list[Entry]:
    entries = read_table(reader)
    need = sum(entry.size for entry in entries)
    if need > shutil.disk_usage(folder.absolute().parents[1]).free:
        raise OSError(28, os.strerror(28), str(folder))
    folder.parent.mkdir(0o700)  # nobody else reads files before they have their modes
    folder.mkdir()
    links = [entry for entry in entries if entry.kind == LINK]
    if links:
        try:
            os.symlink("nothing", folder.parent / "link")
        except OSError as error:
            raise BitbyteError(
                f"{reader.name} holds {len(links):,} symbolic links, which cannot be made here "
                f"({error.strerror}); restore it elsewhere"
            ) from None
    for entry in [*(entry for entry in entries if entry.kind != LINK), *links]:
        path = folder / entry.name
        try:
            if entry.kind == FOLDER:
                path.mkdir()
            elif entry.kind == LINK:  # last: nothing is written through one
                os.symlink(entry.target, path)
            else:
                with open(path, "xb") as file:
                    _copy(reader, file, entry.size)
        except FileExistsError:
            raise BitbyteError(
                f"{reader.name} holds {shown(entry.name)} beside a name that is the same to this "
                "file system; restore it on one that tells them apart"
            ) from None
    if reader.some(1):
        raise reader.damaged("does not cover all files")
    for entry in sorted(entries, key=lambda entry: -entry.name.count("/")):
        if entry.kind != LINK:  # the inner ones first: a folder's mode may forbid writing
            os.utime(folder / entry.name, (entry.time, entry.time))
            os.chmod(folder / entry.name, entry.mode)
    return entries


def _copy(reader: _Reader, file: BinaryIO, size: int) -> None:
    while size:
        data = reader.some(size)
        if not data:
            raise reader.damaged("promises more than there is")
        file.write(data)
        size -= len(data)
    file.flush()
    os.fsync(file.fileno())
