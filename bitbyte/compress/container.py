"""The format of compressed files: what their bytes mean, and the checks made when they are read.

All numbers are little-endian.

======  =====  ===========================================================================
offset  bytes  header
======  =====  ===========================================================================
0       8      magic ``89 42 42 5A 0D 0A 1A 0A`` (``\x89BBZ\r\n\x1a\n``)
8       2      version, 1
10      1      mode: 0 float, 1 portable, 2 native, 3 blocks
11      1      bits of the sum of a table's counts, 24
12      4      lanes, 1 to 4096, at most the number of windows of the original
16      4      bytes of a window
20      4      bytes of a block: lanes * window * groups, at most 2^26
24      8      bytes of the original
32      16     start of the SHA-256 of the checkpoint's model.safetensors, or of the weights
48      16     fingerprint of the predictor: weights and numeric path (see `predictors`)
64      4      CPU threads of the encoder if it computes in floats that depend on them, else 0
68      4      CRC-32 of bytes 0 to 67
======  =====  ===========================================================================

Then the blocks of the original, all full except the last:

======  =====  ===========================================================================
offset  bytes  block
======  =====  ===========================================================================
0       4      bytes of the original in this block
4       4      K, coder states (see `rans`), 1 to lanes; 0 if the block is stored
8       4      W, coder words; 0 if the block is stored
12      8 K    states
...     4 W    words
...     4      CRC-32 of the block up to here
======  =====  ===========================================================================

A block that coding would not shorten is stored: its own bytes take the place of states and words.
The last 32 bytes of the file are the SHA-256 of the original.

Symbols of a block go to the coder in the order (group, position in the window, lane), see `codec`;
positions after the end of a window are left out.
"""

import dataclasses
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from bitbyte.compress.rans import TOTAL_BITS
from bitbyte.files import BitbyteError, shown

MAGIC = b"\x89BBZ\r\n\x1a\n"
VERSION, MIXED = 1, 2  # format versions: this one, and that of `frames`
CODED_MODES = (
    "float",
    "portable",
    "native",
    "blocks",
)  # in the order of their numbers in the header
HEADER = struct.Struct("<8sHBBIIIQ16s16sI")
BLOCK = struct.Struct("<III")
CRC = struct.Struct("<I")
HASH_BYTES = 32
MAX_LANES = 4096
MAX_THREADS = 4096
MAX_BLOCK_BYTES = 1 << 26
NEW_FILE = "compress the original again"
FINGERPRINT_BYTES = 16
HEADER_BYTES = HEADER.size + CRC.size
LEAST = HEADER_BYTES + HASH_BYTES  # bytes of the container of an empty file
LEAST_BLOCK = BLOCK.size + 1 + CRC.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a compressed file says about itself."""

    mode: str
    lanes: int
    window: int  # bytes
    block: int  # bytes
    length: int  # bytes of the original
    model: bytes  # 16 bytes: which model it needs
    fingerprint: bytes  # 16 bytes: the model and how it computes
    threads: int = 0  # CPU threads of the encoder; 0 if their number does not matter

    def pack(self) -> bytes:
        mode = CODED_MODES.index(self.mode)
        raw = HEADER.pack(
            MAGIC, VERSION, mode, TOTAL_BITS, self.lanes, self.window, self.block, self.length,
            self.model, self.fingerprint, self.threads,
        )  # fmt: skip
        return raw + CRC.pack(zlib.crc32(raw))

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.block)

    def block_at(self, start: int) -> int:
        """Size in bytes of the block that begins at byte ``start`` of the original."""
        return min(self.block, self.length - start)


def newer(name: str, version: int) -> str:
    """Error message about a file of an unknown format version."""
    return (
        f"{name} has version {version}, made by a newer bitbyte (or damaged); this one reads "
        f"{VERSION} and {MIXED}: upgrade"
    )


def parse_header(raw: bytes, size: int, name: str) -> Header:
    """The checked header of a container of ``size`` bytes.  Raises BitbyteError."""
    if raw[: len(MAGIC)] != MAGIC[: len(raw)] or not raw:
        raise BitbyteError(f"{name} is not a bitbyte-compressed file")
    version = int.from_bytes(raw[8:10], "little") if len(raw) >= 10 else VERSION
    if version == MIXED:
        raise BitbyteError(f"{name} was made by the mixer; bitbyte decompress restores it")
    if version > MIXED:
        raise BitbyteError(newer(name, version))
    if size < LEAST or len(raw) < HEADER_BYTES:
        raise BitbyteError(f"{name} is cut off: {size} bytes, the minimum is {LEAST}")
    if zlib.crc32(raw[: HEADER.size]) != CRC.unpack_from(raw, HEADER.size)[0]:
        raise BitbyteError(f"{name} is damaged: its header does not match its checksum")
    _, version, mode, total, lanes, window, block, length, model, fingerprint, threads = (
        HEADER.unpack_from(raw)
    )
    bad = (
        version != VERSION or mode >= len(CODED_MODES) or total != TOTAL_BITS
        or lanes > max(1, -(-length // max(1, window)))  # an encoder leaves no lane empty
        or not 1 <= lanes <= MAX_LANES or not window or not 1 <= block <= MAX_BLOCK_BYTES
        or block % (lanes * window) or threads > MAX_THREADS
        or (threads and CODED_MODES[mode] not in ("float", "blocks"))
    )  # fmt: skip
    if bad:
        raise BitbyteError(f"{name}: its header holds values that bitbyte never writes")
    header = Header(
        mode=CODED_MODES[mode], lanes=lanes, window=window, block=block, length=length,
        model=model, fingerprint=fingerprint, threads=threads,
    )  # fmt: skip
    if LEAST + header.n_blocks * LEAST_BLOCK > size:
        raise BitbyteError(
            f"{name} is cut off or edited: {size} bytes cannot hold the {header.n_blocks:,} blocks "
            f"of {length:,} bytes"
        )
    return header


def read_header(path: Path) -> Header:
    """The header of a compressed file.  Raises BitbyteError."""
    path = plain_file(path)
    with open(path, "rb") as file:
        return parse_header(file.read(HEADER_BYTES), path.stat().st_size, str(path))


def no_dash(path: Path) -> Path:
    """The path; BitbyteError if it is ``-``, which elsewhere means standard input or output."""
    if str(path) == "-":
        raise BitbyteError("name a file: standard input and output (-) are not supported")
    return Path(path)


def plain_file(path: Path) -> Path:
    """The path; BitbyteError if it is not a regular file."""
    path = no_dash(path)
    if path.is_dir():
        raise BitbyteError(f"{shown(path)} is a folder; name a file")
    if not path.exists():
        raise BitbyteError(f"{shown(path)} does not exist; name a file")
    if not path.is_file():
        raise BitbyteError(
            f"{shown(path)} is a pipe or a device, whose length is unknown; save its bytes to a "
            "file and name that"
        )
    return path


def mode_of(path: str | Path) -> int:
    """The mode for what is made of this: a file's own, as what is private stays so."""
    return os.stat(path).st_mode & 0o777 if os.path.isfile(path) else 0o666


def progress_bar(total: int, word: str, progress: bool) -> tqdm:
    """A bar that counts bytes; only shown with ``progress``, and on a terminal."""
    return tqdm(
        total=total or None, unit="B", unit_scale=True, desc=word, mininterval=0.5,
        disable=None if progress else True,
    )  # fmt: skip


def pack_block(n_bytes: int, n_states: int, payload: bytes) -> bytes:
    """A block as it is written to the file."""
    n_words = (len(payload) - 8 * n_states) // 4 if n_states else 0
    raw = BLOCK.pack(n_bytes, n_states, n_words) + payload
    return raw + CRC.pack(zlib.crc32(raw))


def read_block(file: BinaryIO, start: int, header: Header, name: str) -> tuple[bytes, int]:
    """(payload, number of coder states) of the next block, which codes the bytes from ``start``.

    Sizes are checked before anything is read.  Raises BitbyteError.
    """
    where, expected = f"{name}, byte {start:,} of the original", header.block_at(start)
    raw = file.read(BLOCK.size)
    if len(raw) < BLOCK.size:
        raise BitbyteError(f"{where}: the file is cut off; {NEW_FILE}")
    n_bytes, n_states, n_words = BLOCK.unpack(raw)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if n_bytes != expected or n_states > header.lanes or (n_words and not n_states):
        raise BitbyteError(f"{where}: the block is damaged; {NEW_FILE}")
    size = 8 * n_states + 4 * n_words if n_states else n_bytes
    if size + CRC.size > left:
        raise BitbyteError(f"{where}: the block is cut off or damaged; {NEW_FILE}")
    payload = file.read(size)
    if CRC.unpack(file.read(CRC.size))[0] != zlib.crc32(raw + payload):
        raise BitbyteError(f"{where}: the block is damaged (wrong checksum); {NEW_FILE}")
    return payload, n_states


def check_file(file: BinaryIO, name: str) -> Header:
    """Check all checksums of an open container; returns its header, the file positioned after it.

    Hours of decoding must not end with the news that the last block is damaged.  Raises
    BitbyteError.
    """
    size = os.fstat(file.fileno()).st_size
    header = parse_header(file.read(HEADER_BYTES), size, name)
    for start in range(0, header.length, header.block):
        read_block(file, start, header, name)
    left = size - file.tell()
    if left != HASH_BYTES:
        what = "is cut off" if left < HASH_BYTES else "has bytes after its end"
        raise BitbyteError(f"{name} {what}; {NEW_FILE}")
    file.seek(HEADER_BYTES)
    return header
