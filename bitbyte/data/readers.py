"""Find the files to read, and stream their bytes, unpacked, in constant memory.

Survives whatever a path may hold: loops of links, FIFOs, devices, unreadable and damaged files,
decompression bombs.  `corpora` decides what the bytes mean.
"""

import bz2
import fnmatch
import functools
import glob
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bitbyte.data.remote import fetch, is_address
from bitbyte.files import BitbyteError, artifacts, is_packed, read_json, shown, user_path
from bitbyte.process import say
from bitbyte.shards import MANIFEST, WORK, absent

CHUNK = 1 << 20  # bytes; no chunk is longer
UNPACK_RATIO = 2000  # gzip cannot reach it (1,032); text stays below 100
UNPACK_EXTRA = 16 << 20  # bytes that any packed file may unpack to, however short it is
LZMA_MEMORY = 256 << 20  # bytes; xz -9 needs 65 MiB
ZSTD_WINDOW = 1 << 27  # bytes; what zstd itself allows by default


def find_data(name: str | Path, split: str | None = None) -> Path:
    """The path of the data called ``name``: here, in artifacts/datasets, or in the project.

    A notebook's relative path may count from the project.  A folder without data, such as one of
    texts that was packed, is skipped; and of a bare name, what is here and not packed gives way to
    the data set of that name, with a note.  Packed data at an address is copied here, see
    `remote.fetch`; with ``split`` only that one.  Raises BitbyteError naming the places searched.
    """
    if is_address(name):
        return fetch(str(name), split)
    asked = user_path(name)
    known, project = artifacts("datasets") / asked, artifacts().absolute().parent / asked
    named = artifacts("datasets") / (set_name(asked.name) if len(asked.parts) == 1 else asked)
    if str(name) == asked.name and asked.exists() and not _packed(asked) and _packed(named):
        _say_once(f"note: {name} is the data set {shown(named)}; ./{name} is what lies here")
        return named
    for place in (asked, known, named, project):
        if place.is_file() or _packed(place) or (place.is_dir() and any(place.glob("*.bin"))):
            return place
    if glob.has_magic(str(name)):
        return asked
    problem = "holds no .bin files" if asked.is_dir() else absent(asked)
    also = "" if known == asked else f", and {known} is not a data set either"
    raise BitbyteError(f"{asked}: {problem}{also}; make one with bitbyte pack")


def _packed(folder: Path) -> bool:
    return any((folder / part).exists() for part in (MANIFEST, WORK))


_say_once = functools.cache(say)  # a command looks several times


def find_files(
    inputs: list[str | Path], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Path]:
    """The regular files that ``inputs`` name or contain, folders in order of names, each file once.

    Inside a folder, links that lead out of it or nowhere, FIFOs, sockets, devices and folders of
    packed shards are skipped with a note, hidden files (names that begin with a dot) without one.
    ``include`` and ``exclude`` are patterns, such as ``*.py``, of the names of files inside
    folders, or of their paths there.  Whatever is named directly is taken.  Raises BitbyteError for
    an input that is neither a file nor a folder, for a folder without files, and for an unreadable
    file.
    """
    found: dict[str, Path] = {}
    for item in inputs:
        path = user_path(item)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise BitbyteError(f"{shown(path)}: {error.strerror.lower()}") from None
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise BitbyteError(f"{shown(path)} is neither a file nor a folder; it may have no end")
        files = [path]
        if stat.S_ISDIR(mode):
            files = [file for file in _walk(path) if _chosen(file, path, include, exclude)]
        if not files:
            why = "to read; choose a folder that has some"
            if include or exclude:
                why = "that --include and --exclude leave"
            raise BitbyteError(f"{shown(path)} has no files {why}")
        for file in files:
            if not os.access(file, os.R_OK):
                raise BitbyteError(f"{shown(file)}: cannot be read (permission denied)")
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _chosen(file: Path, folder: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    names = (file.name, file.relative_to(folder).as_posix())

    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return (not include or fits(include)) and not fits(exclude)


def _walk(folder: Path) -> Iterator[Path]:
    seen, todo, home = set(), [folder], folder.resolve()
    while todo:
        path = todo.pop()
        try:
            info = path.stat()
            if path.is_symlink() and home not in (target := path.resolve(), *target.parents):
                say(f"skipped {shown(path)}: a link out of the folder; name it to have it, too")
                continue
            if stat.S_ISDIR(info.st_mode) and (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                if path != folder and _is_shard_folder(path):
                    say(f"skipped {shown(path)}: packed shards")
                    continue
                inside = [child for child in path.iterdir() if not child.name.startswith(".")]
                todo += sorted(inside, key=os.fsencode, reverse=True)
        except OSError as error:
            if not path.is_symlink():
                reason = error.strerror.lower()
                raise BitbyteError(f"{shown(path)}: cannot be read ({reason})") from None
            say(f"skipped {shown(path)}: a link that leads nowhere")
            continue
        if stat.S_ISREG(info.st_mode):
            yield path
        elif not stat.S_ISDIR(info.st_mode):
            say(f"skipped {shown(path)}: not a regular file")


def _is_shard_folder(path: Path) -> bool:
    """Whether it has a manifest.json that looks like one of `bitbyte.shards`, sound or not."""
    file = path / "manifest.json"
    try:
        value = read_json(file) if file.is_file() else None
    except (OSError, BitbyteError):
        return False
    return isinstance(value, dict) and {"format", "bitbyte", "shards"} <= set(value)


def read_chunks(path: Path, size: int = CHUNK, max_unpacked: int | None = None) -> Iterator[bytes]:
    """The bytes of a file in pieces of exactly ``size`` (the last one shorter), unpacked.

    Raises BitbyteError naming the file if it cannot be read, is not a regular file, is damaged, or
    unpacks to more than ``max_unpacked`` bytes (default 2000 times its own size + 16 MiB).
    """
    if path.suffix.lower() in _DECODERS:
        return _reblock(_unpack(path, max_unpacked), size)
    return _read(path, size)


def _read(path: Path, size: int) -> Iterator[bytes]:
    def open_regular(name, flags: int) -> int:
        # Checked again after opening: it may have become a FIFO in between, which blocks.
        handle = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise BitbyteError(f"{shown(path)} is not a regular file")
        return handle

    try:
        with open(path, "rb", opener=open_regular) as file:
            while piece := file.read(size):
                yield piece
    except OSError as error:
        raise BitbyteError(f"{shown(path)}: cannot be read ({error.strerror})") from None


def _reblock(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    held, n = [], 0
    for chunk in chunks:
        held.append(chunk)
        n += len(chunk)
        if n >= size:
            data, full = b"".join(held), n - n % size
            for start in range(0, full, size):
                yield data[start : start + size]
            held, n = [data[full:]], n - full
    if n:
        yield b"".join(held)


class _Gzip:
    """zlib's decoder with the interface of lzma's and bz2's: bounded output, needs_input."""

    def __init__(self):
        self._decoder = zlib.decompressobj(wbits=31)
        self._rest, self.needs_input = b"", True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._decoder.decompress(self._rest + data, max_length)
        self._rest = self._decoder.unconsumed_tail
        self.needs_input = not self._rest and len(out) < max_length
        return out

    eof = property(lambda self: self._decoder.eof)
    unused_data = property(lambda self: self._decoder.unused_data)


class _Zstd:
    """The same for zstandard, whose output is not bounded: it must be fed in small pieces."""

    needs_input = True

    def __init__(self):
        import zstandard

        self._decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(data)

    eof = property(lambda self: self._decoder.eof)
    unused_data = property(lambda self: self._decoder.unused_data)


# suffix: (decoder of one member, bytes to feed it at a time, how a member begins)
_DECODERS: dict[str, tuple[Callable, int, bytes]] = {
    ".gz": (_Gzip, 1 << 16, rb"\x1f\x8b"),
    ".bz2": (bz2.BZ2Decompressor, 1 << 16, rb"BZh"),
    ".xz": (
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY), 1 << 16,
        rb"\xfd7zXZ\0",
    ),
    ".zst": (_Zstd, 1 << 10, rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}  # fmt: skip


def set_name(name: str) -> str:
    """What `pack` makes of a name, so that shells take it without quotes; "" of signs alone."""
    return re.sub(r"[^\w.-]+", "-", name.encode(errors="replace").decode()).strip(".-")


def bare_name(name: str) -> str:
    """A file name without its compression suffix."""
    return name.removesuffix(Path(name).suffix) if is_packed(Path(name)) else name


def _unpack(path: Path, max_unpacked: int | None) -> Iterator[bytes]:
    make, step, magic = _DECODERS[path.suffix.lower()]
    corrupt: tuple = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
    if make is _Zstd:
        try:
            import zstandard
        except ImportError:
            raise BitbyteError(
                f'{shown(path)} needs zstandard: pip install "bitbyte[data]"'
            ) from None
        corrupt += (zstandard.ZstdError,)
    limit = UNPACK_RATIO * path.stat().st_size + UNPACK_EXTRA
    limit = limit if max_unpacked is None else max_unpacked
    packed, total, decoder = _read(path, step), 0, None
    data = _skip_zeros(b"", packed)
    while data:  # one member after the other
        while len(data) < 6 and (piece := next(packed, b"")):
            data += piece
        if not re.match(magic, data):
            if decoder is None:
                raise BitbyteError(
                    f"{shown(path)}: cannot be unpacked (its content is not {path.suffix}); take "
                    f"{path.suffix} off its name to read it unchanged"
                )
            n = len(data) + sum(map(len, packed))
            say(f"warning: {shown(path)}: {n} bytes after the end of the packed data are ignored")
            return
        decoder = make()
        while not decoder.eof:
            if decoder.needs_input and not data:
                data = next(packed, b"")
            try:
                if decoder.needs_input and not data:
                    raise EOFError("it ends in the middle")
                out = decoder.decompress(data, CHUNK)
            except corrupt as error:
                reason = " ".join(str(error).split())
                raise BitbyteError(f"{shown(path)}: cannot be unpacked ({reason})") from None
            data, total = b"", total + len(out)
            if total > limit:
                raise BitbyteError(
                    f"{shown(path)} unpacks to more than {limit} bytes; if it is not a "
                    "decompression bomb, unpack it yourself and name the result"
                )
            if out:
                yield out
        data = _skip_zeros(decoder.unused_data, packed)
    if decoder is None:
        raise BitbyteError(f"{shown(path)}: cannot be unpacked (it is empty)")


def _skip_zeros(data: bytes, packed: Iterator[bytes]) -> bytes:
    """The data after the zero bytes that may pad a member of a packed file; empty at the end."""
    data = data.lstrip(b"\0")
    while not data:
        piece = next(packed, None)
        if piece is None:
            break
        data = piece.lstrip(b"\0")
    return data
