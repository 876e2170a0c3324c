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
import mmap
import sys
from pathlib import Path

import numpy as np

from bitbyte.files import BitbyteError, RunError, sha256_file, to_json, user_path
from bitbyte.inputs import is_packed, sealed, shown
from bitbyte.manifest import MANIFEST, WORK, check_once, manifest_of

AHEAD = 4096  # ordinals whose windows are computed at once
ROUNDS = 8  # of the permutation
PIECE = 32  # bytes of a piece of a sketch: long enough that other texts rarely have the same
PIECES = 4096  # of a sketch, at most
EVERY = 64  # one place in so many begins a piece
SKETCHED = 1 << 30  # bytes that a sketch looks at, at most
SEEN = 0.3  # `overlap` from which on data count as seen; proper splits have 0 to 0.17 (code)


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


def ordinals_of(
    step: int, batch_size: int, micro: int = 0, grad_accum: int = 1, rank: int = 0, world: int = 1
) -> range:
    """The sample ordinals of one micro-batch of one process; a step takes consecutive ones."""
    assert step >= 0 and 0 <= micro < grad_accum and 0 <= rank < world
    first = (step * grad_accum * world + micro * world + rank) * batch_size
    return range(first, first + batch_size)


def _block(n_windows: int, seed: int, number: int) -> np.ndarray:
    return shuffled(np.arange(number * AHEAD, (number + 1) * AHEAD), n_windows, seed)


def _pieces(bytes_N: np.ndarray, every: int) -> np.ndarray:
    """Hashes (uint64, below 2^48) of the pieces that begin at one place in ``every``."""
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
    """Share of the pieces of the sketch ``b`` that are in ``a``: how much of b's bytes a has seen.

    1 if all of b is in a (packed anew, split otherwise, joined with more), 0 if nothing is; from
    `SEEN` on b counts as seen.  A sketch of long data leaves out most pieces, so only those of b
    that it would have kept are asked for: b should have a thousandth of a's bytes or more.  One
    common piece is no evidence and counts as none.  Of data beyond 1 GiB a sketch knows only the
    share that it looked at, so the answer is smaller by as much.  The order matters:
    overlap(training, scored).
    """
    asked = comparable(a, b)
    common = len({*asked} & {*a})
    return common / len(asked) if common > 1 else 0.0


def comparable(a: list[str], b: list[str]) -> list[str]:
    """The pieces of the sketch ``b`` that ``a`` would have kept, had it seen them."""
    return [piece for piece in b if len(a) < PIECES or piece <= a[-1]]


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ByteWindows:
    """The bytes of some files, one after the other, as windows of ``seq_len`` bytes.

    Window w starts at byte w * stride (default: the window length).  The files are mapped, not
    read: memory does not depend on their size.  ``len()`` and ``[w]`` give windows in order,
    `batch` in the shuffled order of training.  Whatever reads raises RunError that names the file
    if that has become shorter, which would else kill the process.
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

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 hex that names the exact bytes, the split, and how they lie in files."""
        rows = [[len(part), digest] for part, digest in zip(self._parts, self.hashes, strict=True)]
        return hashlib.sha256(to_json([self.split, rows])).hexdigest()

    @functools.cached_property
    def sketch(self) -> list[str]:
        """`sketch_of` all bytes."""
        return self.sketch_of(self.n_bytes)

    def sketch_of(self, n_bytes: int) -> list[str]:
        """Hashes (12 hex digits each, sorted) of a few thousand pieces of 32 bytes, for `overlap`.

        They are of the first ``n_bytes`` bytes.

        Which pieces are taken depends on their bytes alone: those whose first 8 bytes hash to one
        value in 64, and of these the 4,096 distinct ones with the smallest hashes.  So it does
        not matter how the bytes lie in files, where they begin or what stands around them.  At
        most 1 GiB is looked at (some 5 seconds), of larger data in blocks of 1 MiB evenly spread;
        data shorter than a piece have no sketch.
        """
        block = 1 << 20
        count = min(-(-n_bytes // block), SKETCHED // block)
        starts = np.linspace(0, max(0, n_bytes - block), count).astype(int).tolist()
        for every in (EVERY, 1):  # dull bytes, as nothing but zeros, may have no chosen place
            kept = np.empty(0, np.uint64)
            for start in starts:
                stop = min(start + block + PIECE - 1, n_bytes)
                found = _pieces(self.read(start, stop), every)
                found = found[found < kept[-1]] if len(kept) == PIECES else found
                kept = np.unique(np.concatenate([kept, found]))[:PIECES]
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
        # What is mapped beyond the end of a file cannot be read: SIGBUS, and no message.  Nothing
        # helps if the file shrinks between this look (a microsecond) and the copy, or the disk
        # itself fails.
        had, has = len(self._parts[part]), self._maps[part].size()
        if has < had:
            raise RunError(
                f"{self._paths[part]}: something has cut it from {had} to {has} bytes while it "
                "was in use; restore it and start again"
            )

    def batch(
        self, step: int, *, batch_size: int, micro: int = 0, grad_accum: int = 1, rank: int = 0,
        world: int = 1, out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The windows (uint8, B x seq_len) of one micro-batch of one process at a step.

        A step takes the next batch_size * grad_accum * world sample ordinals, whatever their
        split over micro-batches and processes.  ``out`` is a buffer to fill instead of a new one.
        """
        ordinals = ordinals_of(step, batch_size, micro, grad_accum, rank, world)
        chosen = self._chosen(ordinals.start, ordinals.stop)
        if out is None:
            out = np.empty((batch_size, self.seq_len), np.uint8)
        if self._rows is not None:
            self._refuse_shrunk(0)
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
    BitbyteError if there is nothing, too little, something that is not as it was packed, or a file
    that `pack` would unpack.
    """
    if user_path(path).is_file():
        _refuse_packed(Path(path))
        return ByteStreamDataset(path, seq_len, stride=stride, seed=seed)
    if not Path(path).is_dir() and not glob.has_magic(str(path)):
        raise BitbyteError(f"{path}: no such file or folder; make one with bitbyte pack")
    return ByteShardDataset(path, seq_len, split=split, stride=stride, seed=seed)


def _refuse_packed(file: Path) -> None:
    what = sealed(file)
    if what and is_packed(file):
        raise BitbyteError(
            f"{shown(file)} is {what}; bitbyte pack unpacks it, or take {file.suffix} off its name "
            "to use its bytes as they are"
        )
    if what:
        _note(f"note: {shown(file)} is {what}; its bytes are used as they are")


@functools.cache  # a run opens its data several times
def _note(text: str) -> None:
    print(text, file=sys.stderr)
