"""Packed bytes: shards, their manifest, and data sets of windows over them.

A packed folder holds raw bytes without headers (shard_00000.bin ... for training, val_00000.bin
... for validation) and manifest.json, written last.  Batches are addressed, not streamed: what a
step trains on is a pure function of the data, the seed and the step, so a resumed or differently
divided run sees the same windows.  No text is decoded here; corpora.py says where bytes come from.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bitbyte import __version__
from bitbyte.files import (
    BitbyteError,
    folder_lock,
    read_json,
    sha256_file,
    sync_folder,
    to_json,
    write_atomic,
    write_new,
)

FORMAT = 1
MANIFEST, WORK, VERIFIED = "manifest.json", ".tmp-pack", ".verified.json"
PREFIX = {"train": "shard", "val": "val"}  # split: how its files begin
BLOCK = 1 << 20  # bytes written and hashed at a time
BACKLOG = 32  # blocks that may wait for their hash
AHEAD = 4096  # ordinals whose windows are computed at once
ROUNDS = 8

# --- manifest


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a packed folder; a document counts where its first byte is."""

    name: str
    split: str
    n_bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed folder holds.  Documents are records, whole files, or pieces of a large one."""

    shards: tuple[Shard, ...]
    sep_byte: int | None  # byte after each document; None: nothing between them
    source: dict  # where the bytes came from, as the packer was told
    bitbyte: str = __version__  # version that packed

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
        return ", ".join(
            f"{split} {n['bytes']:,} bytes ({n['documents']:,} documents, {n['shards']} shards)"
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
    def from_dict(cls, value: object, name: str) -> "Manifest":
        """Check what a stranger may have written.  Raises BitbyteError; ``name`` is the file's."""

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
        need(sep is None or (count(sep) and sep < 256), "sep_byte is no byte")
        need(isinstance(value["source"], dict), "source is no object")
        need(isinstance(value["bitbyte"], str), "bitbyte is no version")
        need(isinstance(value["shards"], list), "shards is no list")
        shards = []
        for i, item in enumerate(value["shards"]):
            keys = {"name", "split", "bytes", "documents", "sha256"}
            need(isinstance(item, dict) and set(item) == keys, f"shard {i} has not the keys {keys}")
            file = item["name"]
            plain = isinstance(file, str) and re.fullmatch(
                r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", file
            )
            need(bool(plain), f"the name of shard {i} is no plain file name")
            need(
                item["split"] in PREFIX if isinstance(item["split"], str) else False,
                f"{file}: no such split",
            )
            need(count(item["bytes"], 1), f"{file}: bytes is no count")
            need(count(item["documents"]), f"{file}: documents is no count")
            digest = item["sha256"]
            hexed = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
            need(bool(hexed), f"{file}: sha256 is not 64 hex digits")
            shards.append(
                Shard(
                    name=file,
                    split=item["split"],
                    n_bytes=item["bytes"],
                    documents=item["documents"],
                    sha256=digest,
                )  # fmt: skip
            )
        need(len({shard.name for shard in shards}) == len(shards), "a shard is listed twice")
        manifest = cls(
            shards=tuple(shards), sep_byte=sep, source=value["source"], bitbyte=value["bitbyte"]
        )
        for key, want in manifest.to_dict().items():
            # Equal text, not equal values: True == 1 == 1.0 in Python.
            need(to_json(value[key]) == to_json(want), f"{key} is not what its shards add up to")
        return manifest


def manifest_of(path: str | Path) -> Manifest | None:
    """The manifest of a packed folder; None if ``path`` has none.

    Raises BitbyteError if there is one and it is broken.
    """
    file = Path(path) / MANIFEST
    return Manifest.from_dict(read_json(file), str(file)) if file.is_file() else None


def _check_sizes(folder: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise BitbyteError(f"{path}: {MANIFEST} lists it and it is not there; pack again")
        size = path.stat().st_size
        if size != shard.n_bytes:
            raise BitbyteError(
                f"{path} has {size} bytes, {MANIFEST} says {shard.n_bytes}; pack again"
            )


def _check_hashes(folder: Path, shards: tuple[Shard, ...], known: dict) -> dict:
    """Hash the shards whose file is not ``known``; returns {name: [inode, size, mtime, sha256]}."""
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
                    f"{path} was changed: its sha256 is not {MANIFEST}'s; pack again"
                )
            known = {**known, shard.name: row}
            bar.update(shard.n_bytes)
    return known


def _check_once(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Sizes always, hashes once for each state of a file; what was hashed is remembered."""
    _check_sizes(folder, shards)
    before: object = {}
    with contextlib.suppress(OSError, BitbyteError):  # no memory, or a broken one: hash again
        before = read_json(folder / VERIFIED)
    before = before if isinstance(before, dict) else {}
    after = _check_hashes(folder, shards, before)
    if after != before:
        with contextlib.suppress(OSError):  # a read-only folder is hashed each time
            write_atomic(folder / VERIFIED, to_json(after))


def verify(path: str | Path) -> Manifest:
    """Hash every shard of a packed folder.  Raises BitbyteError that names the bad file."""
    folder, manifest = Path(path), manifest_of(path)
    if manifest is None:
        raise BitbyteError(f"{path} has no {MANIFEST}: there is nothing to verify it against")
    _check_sizes(folder, manifest.shards)
    _check_hashes(folder, manifest.shards, {})
    return manifest


# --- packing


class _Splitter:
    """train or val by the content of a piece, so that equal pieces never straddle.

    A piece is known by its first and last 4 KiB and its length.  The first piece trains and the
    first one that differs from it validates, so two different pieces are enough for two splits;
    all others go by their hash.
    """

    def __init__(self, val_fraction: float):
        self._limit = int(val_fraction * 2**64)
        self._fixed: list[int] = []

    def __call__(self, piece: bytes) -> str:
        if not self._limit:
            return "train"
        ends = piece if len(piece) <= 8192 else piece[:4096] + piece[-4096:]
        key = hashlib.blake2b(ends, digest_size=8, key=len(piece).to_bytes(8, "little")).digest()
        number = int.from_bytes(key, "little")
        if len(self._fixed) < 2 and number not in self._fixed:
            self._fixed.append(number)
        if number in self._fixed:
            return ("train", "val")[self._fixed.index(number)]
        return "val" if number < self._limit else "train"


class _Writer:
    """The shards of one split.  While a block is written, another thread hashes the one before."""

    def __init__(self, folder: Path, split: str, shard_size: int, pool):
        self.folder, self.split, self.size, self.pool = folder, split, shard_size, pool
        self.total, self.shards = 0, []
        self._counts = collections.Counter()  # documents by shard number
        self._parts, self._held = [], 0
        self._file, self._room = None, 0
        self._hashing = collections.deque()

    def write(self, data: bytes, starts: bool) -> None:
        """Append; ``starts`` = a document begins here."""
        self._counts[self.total // self.size] += starts
        self.total += len(data)
        self._parts.append(data)
        self._held += len(data)
        if self._held >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        data = memoryview(b"".join(self._parts) if len(self._parts) > 1 else self._parts[0])
        self._parts, self._held = [], 0
        while data:
            if self._file is None:
                name = f"{PREFIX[self.split]}_{len(self.shards):05d}.bin"
                self._file = open(self.folder / name, "xb", buffering=0)  # noqa: SIM115
                self._digest, self._room = hashlib.sha256(), self.size
            block, data = data[: self._room], data[self._room :]
            self._hashing.append(self.pool.submit(self._digest.update, block))
            while block:
                written = self._file.write(block)
                self._room -= written
                block = block[written:]
            while len(self._hashing) > BACKLOG:
                self._hashing.popleft().result()
            if not self._room:
                self._end_shard()

    def _end_shard(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        while self._hashing:
            self._hashing.popleft().result()
        self.shards.append(
            Shard(
                name=Path(self._file.name).name,
                split=self.split,
                n_bytes=self.size - self._room,
                documents=self._counts[len(self.shards)],
                sha256=self._digest.hexdigest(),
            )  # fmt: skip
        )
        self._file = None

    def close(self) -> None:
        """Write what is held and end the last shard."""
        if self._parts:
            self._flush()
        if self._file is not None:
            self._end_shard()


def _pieces(documents: Iterable, sep: bytes, limit: int) -> Iterator[tuple[bool, bytes]]:
    """(a new unit of the split starts here, bytes) of all documents, up to ``limit`` bytes.

    Whole documents are not cut: the first one that would pass the limit ends the stream.
    """
    for document in documents:
        alone = isinstance(document, bytes)
        whole, began = alone or document.whole, False
        for chunk in (document,) if alone else document.chunks:
            if not chunk:
                continue
            if limit == 0 or (whole and len(chunk) + len(sep) > limit):
                return
            piece = chunk[:limit]
            yield not began or not whole, piece
            began, limit = True, limit - len(piece)
        if began and sep and limit:
            yield False, sep
            limit -= 1


def pack(
    documents: Iterable, out: str | Path, *, shard_size_gb: float = 1.0,
    sep_byte: int | None = None, val_fraction: float = 0.05,
    val_documents: Iterable | None = None, source: dict | None = None,
    max_bytes: int | None = None, progress: bool = True, overwrite: bool = False,
) -> Manifest:  # fmt: skip
    """Write documents as shards and a manifest to the folder ``out``.

    ``documents`` are bytes, or have ``chunks`` (an iterable of bytes) and ``whole`` (all chunks
    belong to one split); empty ones are passed over.  ``sep_byte`` follows each document.  A
    share ``val_fraction`` of them, chosen by content, is the validation split, or exactly
    ``val_documents`` if given.  At most ``max_bytes`` of ``documents`` are packed.

    Memory does not depend on the size.  A kill leaves no manifest and the next call starts
    clean; files that it did not make are never touched.  Raises BitbyteError (nothing to pack,
    folder in use or already packed and not ``overwrite``), OSError (disk full).
    """
    shard_size, limit = round(shard_size_gb * 1e9), 2**63 if max_bytes is None else max_bytes
    if shard_size < 1 or limit < 1:
        raise BitbyteError("shard_size_gb and max_bytes must be at least one byte")
    if not 0 <= val_fraction < 1:
        raise BitbyteError(f"val_fraction is {val_fraction}; it must be 0 or more and below 1")
    if sep_byte is not None and not 0 <= sep_byte < 256:
        raise BitbyteError(f"sep_byte is {sep_byte}; a byte is 0 to 255")
    out, source = Path(out), dict(source or {})
    expected = source.get("size")
    expected = expected if expected is None else min(expected, limit)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        _settle(out)
        old = _refuse(out, overwrite)
        free = shutil.disk_usage(out).free
        if expected and expected > free:
            raise BitbyteError(f"{out}: {expected} bytes to pack, {free} bytes free on that disk")
        work = out / WORK
        work.mkdir()
        bar = tqdm(
            total=expected, unit="B", unit_scale=True, desc="pack", dynamic_ncols=True,
            disable=None if progress else True,
        )  # fmt: skip
        try:
            with bar, concurrent.futures.ThreadPoolExecutor(1) as pool:
                writers = {split: _Writer(work, split, shard_size, pool) for split in PREFIX}
                sep = b"" if sep_byte is None else bytes([sep_byte])
                choose = _Splitter(val_fraction if val_documents is None else 0)
                streams = [(documents, choose, limit)]
                if val_documents is not None:
                    streams.append((val_documents, lambda piece: "val", 2**63))
                for stream, split_of, most in streams:
                    for starts, piece in _pieces(stream, sep, most):
                        split = split_of(piece) if starts else split
                        writers[split].write(piece, starts)
                        bar.update(len(piece))
                for writer in writers.values():
                    writer.close()
            shards = tuple(itertools.chain(*(writer.shards for writer in writers.values())))
            manifest = Manifest(shards=shards, sep_byte=sep_byte, source=source)
            if not manifest.bytes_of("train"):
                what = "no document fits into max_bytes" if max_bytes else "there are no bytes"
                raise BitbyteError(f"nothing to pack into {out}: {what}")
            if val_documents is not None and not manifest.bytes_of("val"):
                raise BitbyteError(f"nothing to pack into {out}: no bytes to validate on")
            _publish(out, manifest, old)
        except BaseException:
            _settle(out)
            raise
    if val_fraction and not manifest.bytes_of("val"):
        print(f"{out}: too little to split, so there is no validation data", file=sys.stderr)
    return manifest


def _refuse(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest that may be replaced.  Raises BitbyteError if something is in the way."""
    old = manifest_of(out)
    if old is not None and not overwrite:
        raise BitbyteError(f"{out} is packed already; choose another --out, or --allow_overwrite")
    ours = {shard.name for shard in old.shards} if old else set()
    for path in sorted(out.iterdir()):
        if re.fullmatch(r"(shard|val)_\d+\.bin", path.name) and path.name not in ours:
            raise BitbyteError(f"{path} is in the way and in no manifest; choose another --out")
    return old


def _publish(out: Path, manifest: Manifest, old: Manifest | None) -> None:
    """Move the finished shards to their place; the manifests in WORK tell `_settle` whose is what."""
    work = out / WORK
    write_new(work / MANIFEST, to_json(manifest.to_dict()))
    sync_folder(work)
    if old:
        os.replace(out / MANIFEST, work / f"old-{MANIFEST}")
        sync_folder(out)
        for shard in old.shards:
            (out / shard.name).unlink(missing_ok=True)
    for shard in manifest.shards:
        os.rename(work / shard.name, out / shard.name)
    sync_folder(out)
    os.replace(work / MANIFEST, out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(work)


def _settle(out: Path) -> None:
    """Remove what a `pack` that did not end left, and nothing else.  The lock must be held."""
    work = out / WORK
    if not (out / MANIFEST).exists():
        for name in (MANIFEST, f"old-{MANIFEST}"):
            if (work / name).exists():
                value = read_json(work / name)
                for shard in Manifest.from_dict(value, str(work / name)).shards:
                    (out / shard.name).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


# --- reading


def shuffled(ordinals_N: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Windows (int64, N) of sample ordinals (int64, N): each window once in every n_windows.

    A keyed permutation in O(1) memory: a Feistel network over the next power of two, walked on
    until it falls below n_windows.  The key is a hash of the seed and the epoch.
    """
    epochs_N, places_N = np.divmod(ordinals_N, n_windows)
    epochs, which_N = np.unique(epochs_N, return_inverse=True)
    digests = (hashlib.blake2b(f"{seed}:{epoch}".encode()).digest() for epoch in epochs.tolist())
    keys_RN = np.frombuffer(b"".join(digests), "<u8").reshape(-1, ROUNDS)[which_N].T
    bits = max(2, (n_windows - 1).bit_length())
    found_N = places_N.astype(np.uint64)
    todo = np.arange(len(found_N))
    while todo.size:
        found_N[todo] = _feistel(found_N[todo], keys_RN[:, todo], bits)
        todo = todo[found_N[todo] >= n_windows]
    return found_N.astype(np.int64)


def _feistel(x_N: np.ndarray, keys_RN: np.ndarray, bits: int) -> np.ndarray:
    """A bijection of the numbers of ``bits`` bits: the halves are mixed into each other in turn."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64(2**n - 1) for n in (bits // 2, bits - bits // 2))
    low, high = x_N & low_mask, x_N >> low_bits
    for even, odd in zip(keys_RN[::2], keys_RN[1::2], strict=True):
        high = high ^ (_mix(low ^ even) & high_mask)
        low = low ^ (_mix(high ^ odd) & low_mask)
    return (high << low_bits) | low


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit in reaches every bit out (Steele et al., 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _block(n_windows: int, seed: int, number: int) -> np.ndarray:
    return shuffled(np.arange(number * AHEAD, (number + 1) * AHEAD), n_windows, seed)


class ByteWindows:
    """The bytes of some files, one after the other, as windows of ``seq_len`` bytes.

    Window w starts at byte w * stride (default: the window length).  The files are mapped, not
    read: memory does not depend on their size.  ``len()`` and ``[w]`` give windows in order,
    `batch` in the shuffled order of training.
    """

    def __init__(self, paths: list[Path], hashes: list[str] | None, name: str, split: str,
                 seq_len: int, stride: int | None, seed: int):  # fmt: skip
        stride = seq_len if stride is None else stride
        if seq_len < 1 or stride < 1:
            raise BitbyteError(f"seq_len {seq_len} and stride {stride} must be at least 1")
        self.seq_len, self.stride, self.split = seq_len, stride, split
        paths = [path for path in paths if path.stat().st_size]
        self._paths, self._hashes = paths, hashes
        self._parts = [np.memmap(path, np.uint8, "r").view(np.ndarray) for path in paths]
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]
        self.n_bytes = self._starts[-1]
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
    def fingerprint(self) -> str:
        """sha256 hex that names the exact bytes, the split, and how they lie in files."""
        hashes = self._hashes or [sha256_file(path) for path in self._paths]
        rows = [[len(part), digest] for part, digest in zip(self._parts, hashes, strict=True)]
        return hashlib.sha256(to_json([self.split, rows])).hexdigest()

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
            piece = self._parts[part][offset : offset + len(row) - done]
            row[done : done + len(piece)] = piece
            done, part = done + len(piece), part + 1

    def batch(
        self, step: int, *, batch_size: int, micro: int = 0, grad_accum: int = 1, rank: int = 0,
        world: int = 1, out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The windows (uint8, B x seq_len) of one micro-batch of one process at a step.

        A step takes the next batch_size * grad_accum * world sample ordinals, whatever their
        split over micro-batches and processes.  ``out`` is a buffer to fill instead of a new one.
        """
        assert step >= 0 and 0 <= micro < grad_accum and 0 <= rank < world
        first = (step * grad_accum * world + micro * world + rank) * batch_size
        chosen = self._chosen(first, first + batch_size)
        if out is None:
            out = np.empty((batch_size, self.seq_len), np.uint8)
        if self._rows is not None:
            # clip: no index is out of range, and without it numpy fills a copy of out first
            return self._rows.take(chosen, axis=0, out=out, mode="clip")
        for row, start in zip(out, (chosen * self.stride).tolist(), strict=True):
            self._copy(start, row)
        return out

    def _chosen(self, first: int, stop: int) -> np.ndarray:
        numbers = range(first // AHEAD, (stop - 1) // AHEAD + 1)
        blocks = [self._windows(number) for number in numbers]
        base = numbers[0] * AHEAD
        return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks))[
            first - base : stop - base
        ]


class ByteShardDataset(ByteWindows):
    """Windows over one split of a packed folder, or over all of a folder or glob of .bin files.

    With a manifest, sizes are checked always and hashes once for each state of a file.  Raises
    BitbyteError naming the file that is missing, truncated or changed.
    """

    def __init__(self, path: str | Path, seq_len: int, *, split: str = "train",
                 stride: int | None = None, seed: int = 0):  # fmt: skip
        folder, manifest = Path(path), manifest_of(path)
        if manifest is None:
            if (folder / WORK).exists():
                raise BitbyteError(f"{path}: packing has not finished; run bitbyte pack again")
            hits = folder.glob("*.bin") if folder.is_dir() else map(Path, glob.glob(str(path)))
            paths, hashes, split = sorted(hit for hit in hits if hit.is_file()), None, "all"
            if not paths:
                raise BitbyteError(f"{path}: there are no .bin files; run bitbyte pack first")
        else:
            shards = manifest.of(split)
            if not shards:
                raise BitbyteError(f"{path} has no {split} split; it has: {manifest.summary()}")
            _check_once(folder, shards)
            paths = [folder / shard.name for shard in shards]
            hashes = [shard.sha256 for shard in shards]
        super().__init__(paths, hashes, str(path), split, seq_len, stride, seed)


class ByteStreamDataset(ByteWindows):
    """Windows over one file, any bytes."""

    def __init__(self, file: str | Path, seq_len: int, *, stride: int | None = None,
                 seed: int = 0):  # fmt: skip
        super().__init__([Path(file)], None, str(file), "all", seq_len, stride, seed)


def open_dataset(
    path: str | Path, seq_len: int, *, split: str = "train", stride: int | None = None,
    seed: int = 0,
) -> ByteShardDataset | ByteStreamDataset:  # fmt: skip
    """The data set of a packed folder, a folder or glob of .bin files, or one file.

    Only a packed folder has splits; of anything else all bytes are the one split.  Raises
    BitbyteError if there is nothing, too little, or something that is not as it was packed.
    """
    if Path(path).is_file():
        return ByteStreamDataset(path, seq_len, stride=stride, seed=seed)
    if not Path(path).is_dir() and not glob.has_magic(str(path)):
        raise BitbyteError(f"{path}: no such file or folder; make one with bitbyte pack")
    return ByteShardDataset(path, seq_len, split=split, stride=stride, seed=seed)
