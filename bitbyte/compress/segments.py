"""Cuts a stream of files into frames whose bytes are of one kind."""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from bitbyte.compress.mixer import shapes

FRAME = 1 << 20  # bytes of a frame, at most
OWN_FRAME = 1 << 15  # files this long begin a frame of their own
HEAD = 1 << 12  # bytes in which the header of a sound file must end


class Piece(NamedTuple):
    data: bytes
    hint: shapes.Shape | None  # what a header says of it
    new: bool  # whether a frame must begin here


def sound_in(head: bytes) -> tuple[int, int, shapes.Shape] | None:
    """(first byte, bytes, shape) of the samples in a WAV file that begins so; None if it does not.

    Only PCM of 8, 16 or 24 bits in one or two channels.
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at, found = 12, None
    while at + 8 <= len(head):
        name, size = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if name == b"fmt " and size >= 16 and at + 24 <= len(head):
            form, channels, _, _, unit, bits = struct.unpack_from("<HHIIHH", head, at + 8)
            good = form in (1, 0xFFFE) and channels in (1, 2) and bits in (8, 16, 24)
            found = (
                shapes.sound(bits // 8, channels) if good and unit == channels * bits // 8 else None
            )
        if name == b"data":
            return (at + 8, size, found) if found else None
        at += 8 + size + size % 2
    return None


def _reader(head: bytes, file: BinaryIO) -> Callable[[int], bytes]:
    """Reads ``head``, then the file."""

    def read(n: int) -> bytes:
        nonlocal head
        data, head = head[:n], head[n:]
        return data + file.read(n - len(data)) if len(data) < n else data

    return read


def pieces(file: BinaryIO) -> Iterator[Piece]:
    """The bytes of one file, in order.  Those of sound are whole samples of all channels."""
    head = file.read(HEAD)
    sound, read = sound_in(head), _reader(head, file)
    if sound is None:
        new = True
        while data := read(FRAME):
            yield Piece(data, None, new and len(data) >= OWN_FRAME)
            new = False
        return
    start, size, shape = sound
    yield Piece(read(start), None, False)
    unit = shape.width * shape.channels
    left = size // unit * unit
    while left and (data := read(min(left, FRAME // unit * unit))):
        whole = len(data) // unit * unit
        yield Piece(data[:whole], shape, True)
        yield Piece(data[whole:], None, True)
        left -= len(data)
    while data := read(FRAME):
        yield Piece(data, None, True)


def frames(parts: Iterable[Piece]) -> Iterator[tuple[bytes, shapes.Shape | None]]:
    """(bytes, hint) of the frames that pieces of one or more files make up."""
    waiting = bytearray()
    for part in parts:
        if waiting and part.new and part.data:
            yield bytes(waiting), None
            waiting.clear()
        if part.hint is not None:
            if part.data:
                yield part.data, part.hint
            continue
        waiting += part.data
        while len(waiting) >= FRAME:
            yield bytes(waiting[:FRAME]), None
            del waiting[:FRAME]
    if waiting:
        yield bytes(waiting), None
