"""Windows over bytes on the disk, mapped and addressed: any batch of any step is one call.

Nothing is streamed and nothing has a state: the windows of a step are a pure function of the data,
the seed and the step, so a resumed or differently divided run sees the same ones.  Each window is
seen once per epoch.  The bytes are those of packed shards, of .bin files, or of any one file.
"""

import bisect
import functools
import glob
import hashlib
import itertools
from pathlib import Path

import numpy as np

from bitbyte.files import BitbyteError, sha256_file, to_json
from bitbyte.manifest import MANIFEST, WORK, check_once, manifest_of

AHEAD = 4096  # ordinals whose windows are computed at once
ROUNDS = 8  # of the permutation


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

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 hex that names the exact bytes, the split, and how they lie in files."""
        rows = [[len(part), digest] for part, digest in zip(self._parts, self.hashes, strict=True)]
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
            packed = next((hit.parent for hit in paths if (hit.parent / MANIFEST).exists()), None)
            if packed:  # a glob would take validation bytes for training
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
