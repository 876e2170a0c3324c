"""Format version 2 of compressed files: a short header, frames with checksums, a hash at the end.

Numbers are little-endian; a varint has 7 bits a byte, lowest first, the top bit set in all but the
last byte.

=======  ======================================================================================
bytes    header
=======  ======================================================================================
8        magic, as in version 1 (see `container`)
2        version, 2
1        flags: 1 archive (see `archive`), 2 with a model, 4 a quarter of a full window is kept
1        bits of the ring of newest bytes
varint   buckets of the hashed table, in units of 1024
16, 16   with a model only: start of its hash, fingerprint of its arithmetic
=======  ======================================================================================

Then the frames:

=======  ======================================================================================
bytes    frame
=======  ======================================================================================
1        kind: 1 general, 2 sound, 3 bitmap, 4 run; 16 more if it is stored
varint   bytes of the original in this frame, at most 2^20; of a run, 2^28
varint   bytes of code; not if it is stored
varints  sound: bytes of a sample, channels; else: bytes of a record (a row), of a second one
...      code, or the original bytes if it is stored; of a run, its byte and nothing else
4        CRC-32 of the file from the previous checksum up to here
=======  ======================================================================================

A frame that coding would not shorten is stored; the mixer learns it all the same, but not a run,
which is one byte over and over.  A byte 0 ends
the frames, and the first 16 bytes of the SHA-256 of the tables and the original end the file.
"""

import dataclasses
import hashlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np

from bitbyte.compress import container
from bitbyte.compress.container import FINGERPRINT_BYTES, MAGIC, NEW_FILE
from bitbyte.compress.mixer import choice, codec, shapes
from bitbyte.compress.mixer.contexts import SOUND
from bitbyte.compress.mixer.tables import tables_hash
from bitbyte.compress.segments import FRAME, MAX_RUN, Run
from bitbyte.files import BitbyteError

VERSION = container.MIXED
ARCHIVE, WITH_MODEL, QUARTER = 1, 2, 4  # flags
STORED = 16
RUN = 4
HASH_BYTES = 16
CRC_BYTES = 4
Tick = Callable[[int, "Totals"], object]  # bytes coded since it was called last, and all so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a compressed file of version 2 says about itself."""

    archive: bool
    n_buckets: int
    ring_bits: int
    model: bytes = b""  # 16 bytes if it needs a model
    fingerprint: bytes = b""
    kept: int = 2  # see `streamed.Expert`

    def pack(self) -> bytes:
        flags = (ARCHIVE if self.archive else 0) | (WITH_MODEL if self.model else 0)
        flags |= QUARTER if self.kept == 4 else 0
        start = MAGIC + VERSION.to_bytes(2, "little") + bytes([flags, self.ring_bits])
        return start + varint(self.n_buckets // codec.BUCKET_STEP) + self.model + self.fingerprint


@dataclasses.dataclass
class Totals:
    """What was written or read so far."""

    original: int = 0  # bytes
    size: int = 0  # bytes of the compressed file
    stored: int = 0  # bytes of the original that coding would not have shortened
    seconds: float = 0.0


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def read_varint(read: Callable[[int], bytes], most: int) -> int | None:
    """The next number, from a function that reads bytes; None if above ``most`` or endless."""
    n = 0
    for shift in range(0, 64, 7):
        byte = read(1)[0]
        n |= (byte & 127) << shift
        if byte < 128:
            return n if n <= most else None
    return None


class Source:
    """Reads an open file with a running checksum.  Raises BitbyteError where it ends too early."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self.name, self._crc, self.size = file, name, 0, 0

    def read(self, n: int) -> bytes:
        data = self._file.read(n)
        self.size += len(data)
        if len(data) < n:
            raise BitbyteError(f"{self.name} is cut off after {self.size:,} bytes; {NEW_FILE}")
        self._crc = zlib.crc32(data, self._crc)
        return data

    def varint(self, most: int) -> int:
        n = read_varint(self.read, most)
        if n is None:
            raise self.damaged()
        return n

    def check(self) -> None:
        """Compare the checksum with the next four bytes, and begin the next one."""
        crc = self._crc
        if self.read(CRC_BYTES) != crc.to_bytes(CRC_BYTES, "little"):
            raise self.damaged()
        self._crc = 0

    def finish(self) -> None:
        """Make sure that nothing follows."""
        if self._file.read(1):
            raise BitbyteError(f"{self.name} has bytes after its end; {NEW_FILE}")

    def damaged(self) -> BitbyteError:
        return BitbyteError(
            f"{self.name} is damaged before byte {self.size:,} (wrong checksum); {NEW_FILE}"
        )


def read_header(source: Source) -> Header:
    """The header, if the magic and the version fit.  Raises BitbyteError."""
    start = source.read(len(MAGIC))
    if start != MAGIC:
        raise BitbyteError(f"{source.name} is not a bitbyte-compressed file")
    version = int.from_bytes(source.read(2), "little")
    if version == container.VERSION:
        raise BitbyteError(
            f"{source.name} was made by a model alone, and such a file cannot be read from a pipe: "
            "save it and name the file"
        )
    if version != VERSION:
        raise BitbyteError(container.newer(source.name, version))
    flags, ring_bits = source.read(2)
    n_buckets = source.varint(codec.MAX_MEMORY * codec.MB // 64) * codec.BUCKET_STEP
    if (
        flags > (ARCHIVE | WITH_MODEL | QUARTER)
        or not codec.MIN_RING_BITS <= ring_bits <= codec.MAX_RING_BITS
        or not codec.MIN_BUCKETS <= n_buckets <= codec.MAX_MEMORY * codec.MB // 64
    ):
        raise source.damaged()
    model = source.read(FINGERPRINT_BYTES) if flags & WITH_MODEL else b""
    fingerprint = source.read(FINGERPRINT_BYTES) if flags & WITH_MODEL else b""
    return Header(
        archive=bool(flags & ARCHIVE), n_buckets=n_buckets, ring_bits=ring_bits, model=model,
        fingerprint=fingerprint, kept=4 if flags & QUARTER else 2,
    )  # fmt: skip


def pack_shape(shape: shapes.Shape) -> bytes:
    """How a file says which shape a frame has."""
    if shape.kind == SOUND:
        return varint(shape.width) + varint(shape.channels)
    return varint(shape.record) + varint(shape.record2)


def _read_shape(source: Source, kind: int) -> shapes.Shape:
    first, second = source.varint(shapes.MAX_RECORD), source.varint(shapes.MAX_RECORD)
    shape = shapes.sound(first, second) if kind == SOUND else shapes.Shape(kind, first, second)
    if not shape.valid():
        raise source.damaged()
    return shape


def _new_digest():
    return hashlib.sha256(tables_hash())


def write(
    sink: BinaryIO, header: Header, frames: Iterable[tuple[bytes | Run, shapes.Shape | None]],
    tick: Tick = lambda *_: None, *, model=None, fast: bool | None = None,
) -> Totals:  # fmt: skip
    """Write a whole file.  ``tick`` is called with the bytes that were coded since it was last."""
    clock, digest = time.perf_counter(), _new_digest()
    mixer = codec.Codec(header.n_buckets, header.ring_bits, model, fast)
    totals, before = Totals(), header.pack()
    for data, hint in frames:
        if isinstance(data, Run):
            frame = bytes([RUN]) + varint(data.length) + bytes([data.byte])
            for block in repeated(*data):
                digest.update(block)
                tick(len(block), totals)
            totals.original += data.length
        else:
            digest.update(data)
            values = np.frombuffer(data, np.uint8)
            shape = choice.choose(values, hint, fast)
            coded = shapes.to_mixer(values, shape, fast)
            code = mixer.encode(coded, shape, lambda n: tick(n, totals))
            frame = bytes([shape.kind + 1 + (STORED if code is None else 0)]) + varint(len(data))
            frame += b"" if code is None else varint(len(code))
            frame += pack_shape(shape) + (data if code is None else code)
            totals.original += len(data)
            totals.stored += len(data) if code is None else 0
        frame = before + frame
        sink.write(frame + zlib.crc32(frame).to_bytes(CRC_BYTES, "little"))
        before = b""
        totals.size += len(frame) + CRC_BYTES
    end = before + b"\0" + digest.digest()[:HASH_BYTES]
    sink.write(end)
    totals.size += len(end)
    totals.seconds = time.perf_counter() - clock
    return totals


def repeated(byte: int, length: int) -> Iterator[bytes]:
    for start in range(0, length, FRAME):
        yield bytes([byte]) * min(FRAME, length - start)


def _raw_frames(source: Source) -> Iterator[tuple[shapes.Shape | Run, int, bytes | None, bytes]]:
    """(shape or run, bytes of the original, code or None, stored bytes) of each frame, checked."""
    while kind := source.read(1)[0]:
        if kind == RUN:
            n = source.varint(MAX_RUN)
            run = Run(source.read(1)[0], n)
            source.check()
            if not n:
                raise source.damaged()
            yield run, n, None, b""
            continue
        stored, kind = kind & STORED, kind - 1 & ~STORED
        n = source.varint(FRAME)
        size = n if stored else source.varint(FRAME)
        shape = _read_shape(source, kind)
        data = source.read(size)
        source.check()
        unit = max(1, shape.width * shape.channels)
        if not n or n % unit or (not stored and size >= n):
            raise source.damaged()
        yield (shape, n, None, data) if stored else (shape, n, data, b"")


def check(file: BinaryIO, name: str) -> int:
    """Check all checksums of an open file; returns the bytes of the original.

    Decoding must not end with the news that the last frame is damaged.  Raises BitbyteError.
    """
    source = Source(file, name)
    read_header(source)
    n = sum(n for _, n, _, _ in _raw_frames(source))
    source.read(HASH_BYTES)
    source.finish()
    return n


def read(
    source: Source, header: Header, totals: Totals,
    tick: Tick = lambda *_: None, *, model=None, fast: bool | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """The original of a file whose header was read, frame by frame.

    Raises BitbyteError on damage; the hash of all of it is compared at the end.
    """
    clock, digest = time.perf_counter(), _new_digest()
    mixer = codec.Codec(header.n_buckets, header.ring_bits, model, fast)
    for shape, n, code, stored in _raw_frames(source):
        if isinstance(shape, Run):
            totals.size = source.size
            for block in repeated(*shape):
                digest.update(block)
                tick(len(block), totals)
                totals.original += len(block)
                yield block
            continue
        data = np.frombuffer(stored, np.uint8)
        if code is None:
            mixer.learn(shapes.to_mixer(data, shape, fast), shape, lambda n: tick(n, totals))
            totals.stored += n
        else:
            coded = mixer.decode(code, n, shape, lambda n: tick(n, totals))
            if coded is None:
                raise source.damaged()
            data = shapes.from_mixer(coded, shape, fast)
        out = data.tobytes()
        digest.update(out)
        totals.original += n
        totals.size = source.size
        yield out
    if source.read(HASH_BYTES) != digest.digest()[:HASH_BYTES]:
        raise BitbyteError(
            f"{source.name}: the result is not the original (SHA-256 differs); the file is "
            "damaged, or it was made by another version of the mixer"
        )
    source.finish()
    totals.size = source.size
    totals.seconds = time.perf_counter() - clock
