"""Packed bytes on disk: what a folder of shards holds, and random access to its windows.

A packed folder has manifest.json and shards without headers, so any .bin file is one:
shard_00000.bin ... for training, val_00000.bin ... for validation.  A manifest may come from a
stranger: every field is checked, file sizes always, file contents once.  (`data.pack` packs.)

There is no stream and no state: the windows of a step are a pure function of the data, the seed
and the step, so a run sees the same ones if it is resumed or divided over other processes.  Each
window is seen once per epoch.
"""

import bisect
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bitbyte import __version__
from bitbyte.files import (
    BitbyteError,
    RunError,
    is_packed,
    read_json,
    sealed,
    sha256_file,
    shown,
    to_json,
    user_path,
    write_atomic,
)
from bitbyte.process import say

FORMAT = 1
MANIFEST, VERIFIED = "manifest.json", ".verified.json"
WORK = ".tmp-pack"  # folder that `pack` works in until its shards are complete
PREFIX = {"train": "shard", "val": "val"}  # split: prefix of its file names
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a packed folder; a document belongs to the shard with its first byte."""

    name: str
    split: str
    n_bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed folder holds.  A document is a record, a file, or a piece of a large file."""

    shards: tuple[Shard, ...]
    sep_byte: int | None  # byte after each document; None: nothing between them
    source: dict  # where the bytes came from, according to whoever packed them
    bitbyte: str = __version__  # version that packed them

    def of(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def bytes_of(self, split: str) -> int:
        """Bytes of a split, separators included."""
        return sum(shard.n_bytes for shard in self.of(split))

    def counts(self) -> dict:
        """{split: {bytes, documents, shards}}."""
        return {
            split: {
                "bytes": self.bytes_of(split),
                "documents": sum(shard.documents for shard in self.of(split)),
                "shards": len(self.of(split)),
            }
            for split in PREFIX
        }

    def summary(self) -> str:
        """One line for people."""
        unit = "piece" if self.source.get("kind") in ("files", "stdlib") else "document"
        return ", ".join(
            f"{split} {_count(n['bytes'], 'byte')} "
            f"({_count(n['documents'], unit)}, {_count(n['shards'], 'shard')})"
            for split, n in self.counts().items()
        )

    def to_dict(self) -> dict:
        """The content of manifest.json."""
        counts = self.counts()
        return {
            "format": FORMAT,
            "bitbyte": self.bitbyte,
            "bytes": sum(n["bytes"] for n in counts.values()),
            "documents": sum(n["documents"] for n in counts.values()),
            "sep_byte": self.sep_byte,
            "splits": counts,
            "source": self.source,
            "shards": [
                {
                    "name": shard.name, "split": shard.split, "bytes": shard.n_bytes,
                    "documents": shard.documents, "sha256": shard.sha256,
                }
                for shard in self.shards
            ],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: dict, name: str) -> "Manifest":
        """Check and convert untrusted JSON.  Raises BitbyteError, which names the file ``name``."""

        def need(good: bool, what: str) -> None:
            if not good:
                raise BitbyteError(f"{name}: {what}; pack the data again")

        def count(number: object, low: int = 0) -> bool:
            return type(number) is int and low <= number < 2**63

        need(isinstance(value, dict) and count(value.get("format"), 1), "not a shard manifest")
        if value["format"] > FORMAT:
            raise BitbyteError(
                f"{name}: made by a newer bitbyte (format {value['format']}, this one reads "
                f"{FORMAT}); upgrade bitbyte"
            )
        empty = cls(shards=(), sep_byte=None, source={}).to_dict()
        need(set(value) == set(empty), f"its keys are not {', '.join(empty)}")
        sep = value["sep_byte"]
        need(sep is None or (count(sep) and sep < 256), "sep_byte is not a byte")
        need(isinstance(value["source"], dict), "source is not an object")
        need(isinstance(value["bitbyte"], str), "bitbyte is not a version")
        need(isinstance(value["shards"], list), "shards is not a list")
        shards = []
        for i, item in enumerate(value["shards"]):
            keys = {"name", "split", "bytes", "documents", "sha256"}
            need(
                isinstance(item, dict) and set(item) == keys,
                f"the keys of shard {i} are not {keys}",
            )
            file, split, digest = item["name"], item["split"], item["sha256"]
            plain = isinstance(file, str) and _NAME.fullmatch(file)
            need(bool(plain), f"the name of shard {i} is not a plain file name")
            need(isinstance(split, str) and split in PREFIX, f"{file}: unknown split")
            need(count(item["bytes"], 1), f"{file}: bytes is not a count")
            need(count(item["documents"]), f"{file}: documents is not a count")
            hexed = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
            need(bool(hexed), f"{file}: sha256 is not 64 hex digits")
            n, documents = item["bytes"], item["documents"]
            shards.append(
                Shard(name=file, split=split, n_bytes=n, documents=documents, sha256=digest)
            )
        need(len({shard.name for shard in shards}) == len(shards), "a shard is listed twice")
        manifest = cls(
            shards=tuple(shards), sep_byte=sep, source=value["source"], bitbyte=value["bitbyte"]
        )
        for key, want in manifest.to_dict().items():
            # Equal text, not equal values: True == 1 == 1.0 in Python.
            same = json.dumps(value[key], sort_keys=True) == json.dumps(want, sort_keys=True)
            need(same, f"{key} is not what its shards add up to")
        return manifest


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def manifest_of(path: str | Path) -> Manifest | None:
    """The manifest of a packed folder; None if ``path`` has none.

    Raises BitbyteError if it is invalid.
    """
    file = user_path(path) / MANIFEST
    return Manifest.from_dict(read_json(file), str(file)) if file.is_file() else None


def check_sizes(folder: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise BitbyteError(f"{path} is listed in {MANIFEST} but missing; pack again")
        size = path.stat().st_size
        if size != shard.n_bytes:
            raise BitbyteError(
                f"{path} has {size} bytes but {MANIFEST} says {shard.n_bytes}; pack again"
            )


def _check_hashes(folder: Path, shards: tuple[Shard, ...], known: dict) -> dict:
    """Hash the shards not in ``known``, {name: [inode, size, mtime, sha256]}, and add them."""
    bar = tqdm(
        total=sum(shard.n_bytes for shard in shards), unit="B", unit_scale=True, desc="verify",
        delay=2, disable=None,
    )  # fmt: skip
    with bar:
        for shard in shards:
            path = folder / shard.name
            info = path.stat()
            row = [info.st_ino, info.st_size, info.st_mtime_ns, shard.sha256]
            if known.get(shard.name) != row and sha256_file(path) != shard.sha256:
                raise BitbyteError(
                    f"{path} has changed: its sha256 is not that of {MANIFEST}; pack again"
                )
            known[shard.name] = row
            bar.update(shard.n_bytes)
    return known


def check_once(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Check sizes always, hashes only of files that changed since they were last hashed."""
    check_sizes(folder, shards)
    before: object = {}
    with contextlib.suppress(OSError, BitbyteError):  # no list of hashed files, or a broken one
        before = read_json(folder / VERIFIED, plain=True)
    before = before if isinstance(before, dict) else {}
    after = _check_hashes(folder, shards, before.copy())
    if after != before:
        with contextlib.suppress(OSError):  # a read-only folder is hashed every time
            write_atomic(folder / VERIFIED, to_json(after))


def verify(path: str | Path) -> Manifest:
    """Hash every shard of a packed folder.  Raises BitbyteError naming the bad file."""
    folder, manifest = user_path(path), manifest_of(path)
    if manifest is None:
        raise BitbyteError(f"{path} has no {MANIFEST}: there is nothing to verify it against")
    check_sizes(folder, manifest.shards)
    _check_hashes(folder, manifest.shards, {})
    return manifest


AHEAD = 4096  # ordinals whose windows are computed at once
ROUNDS = 8  # of the permutation
PIECE = 32  # bytes of a piece of a sketch: long enough that unrelated texts rarely share one
PIECES = 4096  # of a sketch, at most
EVERY = 64  # a piece begins at one position in 64
SKETCHED = 1 << 30  # bytes that a sketch looks at, at most
SEEN = 0.3  # `overlap` from which data counts as seen; proper splits have 0 to 0.17 (code)


def shuffled(ordinals_N: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Windows (int64, N) of sample ordinals (int64, N): each window once in every n_windows.

    A keyed permutation in O(1) memory: a Feistel network over the next power of two, applied
    again until the result is below n_windows.  The key is a hash of the seed and the epoch.
    """
    epochs_N, places_N = np.divmod(ordinals_N, n_windows)
    epochs, which_N = np.unique(epochs_N, return_inverse=True)
    digests = (hashlib.blake2b(f"{seed}:{epoch}".encode()).digest() for epoch in epochs.tolist())
    keys_RN = np.frombuffer(b"".join(digests), "<u8").reshape(-1, ROUNDS)[which_N].T
    bits = max(2, (n_windows - 1).bit_length())
    windows_N = places_N.astype(np.uint64)
    todo = np.arange(len(windows_N))
    while todo.size:
        windows_N[todo] = _feistel(windows_N[todo], keys_RN[:, todo], bits)
        todo = todo[windows_N[todo] >= n_windows]
    return windows_N.astype(np.int64)


def _feistel(x_N: np.ndarray, keys_RN: np.ndarray, bits: int) -> np.ndarray:
    """A bijection on ``bits``-bit numbers: the halves are mixed into each other in turn."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64(2**n - 1) for n in (bits // 2, bits - bits // 2))
    low, high = x_N & low_mask, x_N >> low_bits
    for even, odd in zip(keys_RN[::2], keys_RN[1::2], strict=True):
        high = high ^ (_mix(low ^ even) & high_mask)
        low = low ^ (_mix(high ^ odd) & low_mask)
    return (high << low_bits) | low


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: each input bit affects each output bit (Steele et al., 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def ordinals_of(
    step: int, batch_size: int, micro: int = 0, grad_accum: int = 1, rank: int = 0, world: int = 1
) -> range:
    """The sample ordinals of one micro-batch of one process; those of a step are consecutive."""
    assert step >= 0 and 0 <= micro < grad_accum and 0 <= rank < world
    first = (step * grad_accum * world + micro * world + rank) * batch_size
    return range(first, first + batch_size)


def _block(n_windows: int, seed: int, number: int) -> np.ndarray:
    return shuffled(np.arange(number * AHEAD, (number + 1) * AHEAD), n_windows, seed)


def _pieces(bytes_N: np.ndarray, every: int) -> np.ndarray:
    """Hashes (uint64, below 2^48) of pieces; about one position in ``every`` begins one."""
    n = len(bytes_N) - PIECE + 1
    if n < 1:
        return np.empty(0, np.uint64)
    words_N = np.ndarray((len(bytes_N) - 7,), "<u8", bytes_N, strides=(1,))  # at every byte
    odd = np.uint64(0x9E3779B97F4A7C15)
    at = np.flatnonzero(words_N[:n] * odd <= np.uint64((2**64 - 1) // every))
    hashes = np.zeros(len(at), np.uint64)
    for offset in range(0, PIECE, 8):
        hashes = _mix(hashes ^ words_N[at + offset]) + odd
    return hashes >> np.uint64(16)


def overlap(a: list[str], b: list[str]) -> float:
    """Share of the pieces of sketch ``b`` that are in sketch ``a``: how much of b is also in a.

    1 if all of b is in a (even if repacked, split differently or joined with more), 0 if nothing
    is; from `SEEN` on b counts as seen.  A sketch of long data leaves out most pieces, so only
    those pieces of b count that a would have kept: b should have at least a thousandth of a's
    bytes, and 500.  One common piece proves nothing and counts as none.  A sketch covers at most
    1 GiB; of larger data it finds less.  The order matters: overlap(training, scored).
    """
    pieces = comparable(a, b)
    common = len({*pieces} & {*a})
    return common / len(pieces) if common > 1 else 0.0


def comparable(a: list[str], b: list[str]) -> list[str]:
    """The pieces of sketch ``b`` that sketch ``a`` would have kept, had it seen them."""
    return [piece for piece in b if len(a) < PIECES or piece <= a[-1]]


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ByteWindows:
    """The bytes of some files, one after the other, as windows of ``seq_len`` bytes.

    Window w starts at byte w * stride (default: the window length).  The files are mapped, not
    read: memory does not depend on their size.  ``len()`` and ``[w]`` give windows in order,
    `batch` in the shuffled order of training.  Every read first checks that the file has not
    shrunk, which would kill the process, and raises a RunError naming it if it has.
    """

    def __init__(self, paths: list[Path], hashes: list[str] | None, name: str, split: str,
                 seq_len: int, stride: int | None, seed: int):  # fmt: skip
        stride = seq_len if stride is None else stride
        if seq_len < 1 or stride < 1:
            raise BitbyteError(f"seq_len {seq_len} and stride {stride} must be at least 1")
        self.seq_len, self.stride, self.split = seq_len, stride, split
        paths = [path for path in paths if path.stat().st_size]
        self._paths, self._hashes = paths, hashes
        self._maps = [_mapped(path) for path in paths]
        self._parts = [np.frombuffer(part, np.uint8) for part in self._maps]
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]
        self.n_bytes = self._starts[-1]
        if not self.n_bytes:
            raise BitbyteError(f"{name} is empty: it has no bytes to train on or to score")
        if self.n_bytes < seq_len:
            raise BitbyteError(
                f"{name}: its {self.n_bytes} bytes are fewer than one window of {seq_len}; "
                "lower --seq_len or add data"
            )
        self.n_windows = (self.n_bytes - seq_len) // stride + 1
        self._rows = None
        if len(paths) == 1 and stride == seq_len:
            self._rows = self._parts[0][: self.n_windows * seq_len].reshape(-1, seq_len)
        self._windows = functools.lru_cache(4)(functools.partial(_block, self.n_windows, seed))

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, i: int) -> np.ndarray:
        if not -self.n_windows <= i < self.n_windows:
            raise IndexError(f"window {i} of {self.n_windows}")
        start = i % self.n_windows * self.stride
        return self.read(start, start + self.seq_len)

    @functools.cached_property
    def hashes(self) -> list[str]:
        """sha256 hex of each file."""
        return self._hashes or [sha256_file(path) for path in self._paths]

    def on_disk(self) -> int:
        """Bytes of the files by their size now."""
        return sum(path.stat().st_size for path in self._paths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the split, the exact bytes, and how they are divided into files."""
        rows = [[len(part), digest] for part, digest in zip(self._parts, self.hashes, strict=True)]
        return hashlib.sha256(to_json([self.split, rows])).hexdigest()

    @functools.cached_property
    def sketch(self) -> list[str]:
        """`sketch_of` of all bytes."""
        return self.sketch_of(self.n_bytes)

    def sketch_of(self, n_bytes: int) -> list[str]:
        """Hashes (12 hex digits each, sorted) of a few thousand 32-byte pieces, for `overlap`.

        They are taken from the first ``n_bytes`` bytes.  The choice of pieces depends on their
        bytes alone: those whose first 8 bytes hash into one 64th of all values, and of these the
        4,096 distinct ones with the smallest hashes.  So it does not matter how the bytes are
        divided into files, where they begin or what surrounds them.  At most 1 GiB is read (some
        5 seconds), of larger data in evenly spread blocks of 1 MiB; data shorter than a piece has
        an empty sketch.
        """
        block = 1 << 20
        count = min(-(-n_bytes // block), SKETCHED // block)
        starts = np.linspace(0, max(0, n_bytes - block), count).astype(np.int64).tolist()
        for every in (EVERY, 1):  # uniform data, such as all zeros, may have no piece at first
            kept = np.empty(0, np.uint64)
            for start in starts:
                stop = min(start + block + PIECE - 1, n_bytes)
                new = _pieces(self.read(start, stop), every)
                new = new[new < kept[-1]] if len(kept) == PIECES else new
                kept = np.unique(np.concatenate([kept, new]))[:PIECES]
            if len(kept):
                break
        return [f"{number:012x}" for number in kept.tolist()]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``start`` to ``stop`` of the split as a new uint8 array."""
        if not 0 <= start <= stop <= self.n_bytes:
            raise IndexError(f"bytes {start} to {stop} of {self.n_bytes}")
        row = np.empty(stop - start, np.uint8)
        self._copy(start, row)
        return row

    def _copy(self, start: int, row: np.ndarray) -> None:
        part, done = bisect.bisect_right(self._starts, start) - 1, 0
        while done < len(row):
            offset = start + done - self._starts[part]
            self._refuse_shrunk(part)
            piece = self._parts[part][offset : offset + len(row) - done]
            row[done : done + len(piece)] = piece
            done, part = done + len(piece), part + 1

    def _refuse_shrunk(self, part: int) -> None:
        # Reading a map beyond the end of its file is a SIGBUS, without any message.  That can
        # still happen if the file shrinks between this check and the copy (a microsecond), or if
        # the disk fails.
        had, has = len(self._parts[part]), self._maps[part].size()
        if has < had:
            raise RunError(
                f"{self._paths[part]} was cut from {had} to {has} bytes while it was in use; "
                "restore it and start again"
            )

    def batch(
        self, step: int, *, batch_size: int, micro: int = 0, grad_accum: int = 1, rank: int = 0,
        world: int = 1, out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The windows (uint8, B x seq_len) of one micro-batch of one process at a step.

        A step takes the next batch_size * grad_accum * world sample ordinals, however they are
        divided over micro-batches and processes.  ``out``: a buffer to fill instead of a new one.
        """
        ordinals = ordinals_of(step, batch_size, micro, grad_accum, rank, world)
        chosen = self._chosen(ordinals.start, ordinals.stop)
        if out is None:
            out = np.empty((batch_size, self.seq_len), np.uint8)
        if self._rows is not None:
            self._refuse_shrunk(0)
            # No index is out of range, but without mode="clip" numpy fills a copy of out first.
            return self._rows.take(chosen, axis=0, out=out, mode="clip")
        for row, start in zip(out, (chosen * self.stride).tolist(), strict=True):
            self._copy(start, row)
        return out

    def starts(self, step: int, **address) -> np.ndarray:
        """The first byte (int64) of each window of `batch`, by the same address."""
        ordinals = ordinals_of(step, **address)
        return self._chosen(ordinals.start, ordinals.stop) * self.stride

    def _chosen(self, first: int, stop: int) -> np.ndarray:
        numbers = range(first // AHEAD, (stop - 1) // AHEAD + 1)
        blocks = [self._windows(number) for number in numbers]
        base = numbers[0] * AHEAD
        return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks))[
            first - base : stop - base
        ]


class ByteShardDataset(ByteWindows):
    """Windows over one split of a packed folder, or over all of a folder or glob of .bin files.

    With a manifest, files are checked as in `check_once`.  Raises BitbyteError naming the file
    that is missing, truncated or changed.
    """

    def __init__(self, path: str | Path, seq_len: int, *, split: str = "train",
                 stride: int | None = None, seed: int = 0):  # fmt: skip
        folder, manifest = user_path(path), manifest_of(path)
        if manifest is None:
            if (folder / WORK).exists():
                raise BitbyteError(f"{path}: packing has not finished; run bitbyte pack again")
            hits = folder.glob("*.bin") if folder.is_dir() else map(Path, glob.glob(str(path)))
            paths, hashes, split = sorted(hit for hit in hits if hit.is_file()), None, "all"
            packed = next((hit.parent for hit in paths if (hit.parent / MANIFEST).exists()), None)
            if packed:  # a glob would mix validation bytes into training
                raise BitbyteError(f"{path}: these shards are packed; give the folder, {packed}")
            if not paths:
                raise BitbyteError(f"{path}: there are no .bin files; run bitbyte pack first")
        else:
            shards = manifest.of(split)
            if not shards:
                raise BitbyteError(f"{path} has no {split} split; it has: {manifest.summary()}")
            check_once(folder, shards)
            paths = [folder / shard.name for shard in shards]
            hashes = [shard.sha256 for shard in shards]
        super().__init__(paths, hashes, str(path), split, seq_len, stride, seed)


class ByteStreamDataset(ByteWindows):
    """Windows over one file of any bytes."""

    def __init__(self, file: str | Path, seq_len: int, *, stride: int | None = None,
                 seed: int = 0):  # fmt: skip
        super().__init__([Path(file)], None, str(file), "all", seq_len, stride, seed)


def open_dataset(
    path: str | Path, seq_len: int, *, split: str = "train", stride: int | None = None,
    seed: int = 0,
) -> ByteShardDataset | ByteStreamDataset:  # fmt: skip
    """The data set of a packed folder, a folder or glob of .bin files, or one file.

    Only a packed folder has splits; anything else is used whole.  Raises BitbyteError if data is
    missing, too short or not as it was packed, and for a compressed file, which `pack` unpacks.
    """
    path = user_path(path)
    if path.is_file():
        _refuse_packed(path)
        return ByteStreamDataset(path, seq_len, stride=stride, seed=seed)
    if not path.is_dir() and not glob.has_magic(str(path)):
        raise BitbyteError(f"{path}: {absent(path)}; make one with bitbyte pack")
    return ByteShardDataset(path, seq_len, split=split, stride=stride, seed=seed)


def absent(path: Path) -> str:
    """Why there is no data at a path that is neither a file nor a folder."""
    if path.exists():
        return "it is a pipe or a device, not a file; save its bytes to one, or"
    return "no such file or folder"


def _refuse_packed(file: Path) -> None:
    what = sealed(file)
    if what and is_packed(file):
        raise BitbyteError(
            f"{shown(file)} is {what}; bitbyte pack unpacks it, or take {file.suffix} off its name "
            "to use its bytes as they are"
        )
    if what:
        _say_once(f"note: {shown(file)} is {what}; its bytes are used as they are")


_say_once = functools.cache(say)  # a run opens its data several times
