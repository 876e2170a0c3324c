"""Archives: several files and folders as one stream, a table of contents first.

The table is a varint of its size, then for each entry, in the order of their bytes in the stream:
kind (1 byte: 0 file, 1 folder, 2 link), varint of the name's bytes, the name in UTF-8 with ``/``
between folders, varints of the mode's permission bits and of the time of change in seconds, and
for a file the varint of its size, for a link the varint of its target's bytes and the target.

A table is a stranger's: names that are absolute, climb out of the folder or go through a link, and
links that lead out of it, are refused before anything is written.
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
from bitbyte.compress.frames import varint
from bitbyte.files import BitbyteError, shown, sync_folder

FILE, FOLDER, LINK = range(3)
MAX_TABLE = 1 << 28  # bytes
MAX_NAME = 1 << 12
RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}


@dataclasses.dataclass(frozen=True)
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
    they help each other.  Raises BitbyteError for names that do not exist or occur twice, and for
    pipes, sockets and devices.
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
    return sorted(found.values(), key=lambda item: (
        order[item[0].kind], posixpath.splitext(item[0].name)[1] * (item[0].kind == FILE),
        item[0].name,
    ))  # fmt: skip


def _walk(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of a file, or of a folder and of all that is in it."""
    yield name, path
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _walk(inner, f"{name}/{inner.name}")


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
                yield piece
        if size != entry.size:
            raise BitbyteError(f"{shown(path)} changed while it was being read; compress it again")


class _Reader:
    """Takes numbers and bytes from a stream that arrives in blocks."""

    def __init__(self, blocks: Iterable[bytes], name: str):
        self._blocks, self._left, self.name = iter(blocks), b"", name

    def damaged(self, why: str) -> BitbyteError:
        return BitbyteError(f"{self.name}: its table of contents {why}; nothing was written")

    def some(self, most: int) -> bytes:
        """At least one and at most ``most`` bytes; none at the end."""
        if not self._left:
            self._left = next(self._blocks, b"")
        data, self._left = self._left[:most], self._left[most:]
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
        n = 0
        for shift in range(0, 64, 7):
            byte = self.read(1)[0]
            n |= (byte & 127) << shift
            if byte < 128:
                break
        if n > most:
            raise self.damaged("holds a number that is too large")
        return n


def _read_entry(reader: _Reader) -> Entry:
    kind = reader.read(1)[0]
    if kind not in (FILE, FOLDER, LINK):
        raise reader.damaged(f"holds an entry of kind {kind}")
    name = os.fsdecode(reader.read(reader.varint(MAX_NAME)))
    mode, time = reader.varint(0o777), reader.varint(1 << 40)
    if kind == FILE:
        return Entry(kind, name, mode, time, reader.varint(1 << 62))
    target = os.fsdecode(reader.read(reader.varint(MAX_NAME))) if kind == LINK else ""
    return Entry(kind, name, mode, time, target=target)


def read_table(reader: _Reader) -> list[Entry]:
    """The table of contents, checked.  Raises BitbyteError."""
    left = reader.varint(MAX_TABLE)
    inner, entries = _Reader([reader.read(left)], reader.name), []
    while inner._left or (not entries and left):
        entries.append(_read_entry(inner))
        if not inner._left:
            inner._left = inner.some(MAX_TABLE)
    _check(entries, reader)
    return entries


def _unsafe(name: str) -> str | None:
    """Why a name must not be written; None if it may."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name:
        return "is not a plain name"
    if name.startswith("/") or ":" in parts[0]:
        return "is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder"
    if os.name == "nt" and any(part.partition(".")[0].lower() in RESERVED for part in parts):
        return "is reserved by Windows"
    return None


def _check(entries: list[Entry], reader: _Reader) -> None:
    """Refuse entries that would write outside of their folder, or over one another."""
    kinds: dict[str, int] = {}
    for entry in entries:
        if why := _unsafe(entry.name):
            raise reader.damaged(f"names {shown(entry.name)}, which {why}")
        if entry.name in kinds:
            raise reader.damaged(f"names {shown(entry.name)} twice")
        kinds[entry.name] = entry.kind
    for entry in entries:
        for above in _parents(entry.name):
            if kinds.get(above, FOLDER) != FOLDER:
                raise reader.damaged(f"puts {shown(entry.name)} into what is not a folder")
        if entry.kind == LINK and not _stays_inside(entry, kinds):
            raise reader.damaged(f"has a link {shown(entry.name)} that may lead out of it")


def _stays_inside(link: Entry, kinds: dict[str, int]) -> bool:
    """Whether following a link step by step never leaves the archive, nor takes another link."""
    if link.target.startswith("/") or not link.target or set("\0\\:") & set(link.target):
        return False
    here = link.name.split("/")[:-1]
    for step in link.target.split("/"):
        if kinds.get("/".join(here)) == LINK:
            return False
        if step == ".." and not here:
            return False
        if step == "..":
            here.pop()
        elif step not in ("", "."):
            here.append(step)
    return True


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def unpack(blocks: Iterable[bytes], folder: Path, name: str) -> int:
    """Write the files of an archive into a new folder; returns how many there are.

    ``folder`` appears only when all of it is written and ``blocks`` ended without an error.  Raises
    BitbyteError for an unsafe table, and if ``folder`` exists.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise BitbyteError(f"{shown(folder)} exists; name a new folder for the archive's files")
    if not folder.absolute().parent.is_dir():
        raise BitbyteError(f"{shown(folder)} is in a folder that does not exist")
    temporary = folder.with_name(f".tmp-{folder.name[:100]}-{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)  # left by a killed process of the same id
        entries = _write_all(_Reader(blocks, name), temporary)
        if os.path.lexists(folder):
            raise BitbyteError(f"{shown(folder)} was written by another process meanwhile")
        os.rename(temporary, folder)
    finally:
        _remove(temporary)
    sync_folder(folder.absolute().parent)
    return sum(entry.kind == FILE for entry in entries)


def count(blocks: Iterable[bytes], name: str) -> int:
    """Check an archive without writing it; returns how many files it has.  BitbyteError if bad."""
    reader = _Reader(blocks, name)
    entries = read_table(reader)
    left = sum(entry.size for entry in entries)
    while data := reader.some(1 << 20):
        left -= len(data)
    if left:
        raise reader.damaged("does not fit the files")
    return sum(entry.kind == FILE for entry in entries)


def _remove(folder: Path) -> None:
    """Delete a folder, even one whose folders may not be written to."""
    if folder.is_dir():
        for inner, _, _ in os.walk(folder):
            with contextlib.suppress(OSError):
                os.chmod(inner, 0o700)
        shutil.rmtree(folder, ignore_errors=True)


def _write_all(reader: _Reader, folder: Path) -> list[Entry]:
    entries = read_table(reader)
    need = sum(entry.size for entry in entries)
    if need > shutil.disk_usage(folder.absolute().parent).free:
        raise OSError(28, os.strerror(28), str(folder))
    folder.mkdir()
    for entry in entries:
        path = folder / entry.name
        if entry.kind == FOLDER:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == FILE:
            with open(path, "xb") as file:
                _copy(reader, file, entry.size)
    if reader.some(1):
        raise reader.damaged("does not cover all files")
    for entry in entries:  # links last: nothing is written through one
        if entry.kind == LINK:
            os.symlink(entry.target, folder / entry.name)
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
