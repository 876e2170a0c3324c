"""Cuts a stream of files into frames whose bytes are of one kind."""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from bitbyte.compress.mixer import shapes

FRAME = 1 << 20  # bytes of a frame, at most
OWN_FRAME = 1 << 15  # files this long begin a frame of their own
LEAST_RUN, MAX_RUN = 1 << 16, 1 << 28  # bytes of one value that are not coded one by one
BLOCK = 1 << 12  # bytes in which runs are found
HEAD = 1 << 12  # bytes in which the header of a sound file must end


class Run(NamedTuple):
    """One byte, many times."""

    byte: int
    length: int


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


def _runs(data: bytes) -> list[tuple[int, int]]:
    """(first byte, end) of stretches of one byte value, in whole blocks."""
    blocks = np.frombuffer(data, np.uint8)[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    if not len(blocks):
        return []
    same = (blocks == blocks[:, :1]).all(1)
    # Where a stretch begins: at blocks that are not like the one before.
    goes_on = same[1:] & same[:-1] & (blocks[1:, 0] == blocks[:-1, 0])
    starts = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    ends = np.append(starts[1:], len(blocks))
    return [
        (int(start) * BLOCK, int(end) * BLOCK)
        for start, end in zip(starts, ends, strict=True)
        if same[start] and end - start >= LEAST_RUN // BLOCK
    ]


def _with_runs(parts: Iterable[Piece]) -> Iterator[Piece | Run]:
    """The same bytes, runs cut out; a run that goes on in the next piece is one."""
    run = None
    for part in parts:
        at = 0
        for start, end in _runs(part.data):
            full = run and run.length > MAX_RUN - FRAME
            if run and (full or start > at or part.data[start] != run.byte):
                yield run
                run = None
            if start > at:
                yield _without_hint(part, at, start)
            run = Run(part.data[start], (run.length if run else 0) + end - start)
            at = end
        if at < len(part.data):
            if run:
                yield run
                run = None
            yield part if not at else _without_hint(part, at, len(part.data))
    if run:
        yield run


def _without_hint(part: Piece, start: int, end: int) -> Piece:
    """Some bytes of a piece, as which they may be no whole samples."""
    return Piece(part.data[start:end], None, part.new and not start)


def frames(parts: Iterable[Piece]) -> Iterator[tuple[bytes | Run, shapes.Shape | None]]:
    """(bytes or a run, hint) of the frames that pieces of one or more files make up."""
    waiting = bytearray()
    for part in _with_runs(parts):
        if waiting and (isinstance(part, Run) or (part.new and part.data)):
            yield bytes(waiting), None
            waiting.clear()
        if isinstance(part, Run):
            yield part, None
            continue
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
