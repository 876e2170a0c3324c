"""Bits of a whole file under any subject, in constant memory.

The file is cut into pieces of 32 to 64 KiB, after a newline where there is one.  Each piece is
turned into ids on its own, and must come back from them, byte for byte; the rule for cutting needs
only bytes that a decoder already has.  The ids of all pieces form one stream, which is cut into
windows as `scoring.windows` does.  So every id is scored once, and the sums of pieces are blocks of
known length for an interval.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from bitbyte.evaluate.records import BLOCK_BYTES
from bitbyte.evaluate.subject import NotGivenBackError, Subject
from bitbyte.files import RunError
from bitbyte.vocab import printable

AROUND = 12  # bytes shown around a place


class FaultError(RunError):
    """An audit that fails: what is wrong, and where."""

    def __init__(self, audit: str, text: str):
        super().__init__(text)
        self.audit = audit


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Result of scoring a file; `bootstrap_interval` reads its blocks."""

    bits: float
    n_bytes: int
    n_ids: int
    block_bits: np.ndarray  # of each piece
    block_bytes: np.ndarray
    seconds: float

    @property
    def bpb(self) -> float:
        return self.bits / self.n_bytes


def pieces(read, n_bytes: int, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The first ``n_bytes`` bytes of ``read(start, stop)`` in pieces; see the module."""
    start = 0
    while start < n_bytes:
        data = read(start, min(n_bytes, start + 2 * size)).tobytes()
        if start + len(data) < n_bytes:
            cut = data.find(b"\n", size - 1) + 1
            data = data[: cut or _character(data)]
        yield data
        start += len(data)


def _character(data: bytes) -> int:
    """Length of ``data`` without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # begins a character of 2 to 4 bytes
            needs = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < needs else len(data)
        if byte < 0x80:
            break
    return len(data)


def encoded(subject: Subject, parts: Iterable[bytes]) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes, ids) of each piece.  Raises FaultError if one does not come back."""
    start = 0
    for part in parts:
        try:
            ids = np.asarray(subject.encode(part))
        except NotGivenBackError as lost:
            raise FaultError("coverage", f"{_place(start, part, lost.at)}: {lost}") from None
        if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
            raise FaultError("coverage", f"the ids of the piece at byte {start:,} are not integers")
        ids = ids.astype(np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < subject.n_ids:
            wrong = ids[(ids < 0) | (ids >= subject.n_ids)][0]
            raise FaultError(
                "coverage",
                f"the piece at byte {start:,} has id {wrong}; the model predicts 0 to "
                f"{subject.n_ids - 1}",
            )
        back = subject.decode(ids)
        if back != part:
            at = first_difference(part, back)
            raise FaultError(
                "coverage",
                f"{_place(start, part, at)}: the ids give back {quoted(back[at : at + AROUND])}, "
                f"the file has {quoted(part[at : at + AROUND])}; {len(part):,} bytes became "
                f"{len(back):,}",
            )
        yield len(part), ids
        start += len(part)


def _place(start: int, part: bytes, at: int) -> str:
    before = part[max(0, at - AROUND) : at]
    return f"byte {start + at:,} of the file" + (f" (after {quoted(before)})" if before else "")


def first_difference(a: bytes, b: bytes) -> int:
    """The first place where two texts differ, or the end of the shorter one."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def quoted(data: bytes) -> str:
    return f'"{printable(data)}"' if data else "nothing"


def id_windows(
    stream: Iterable[np.ndarray], window: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of a window, how many of its last are scored), as `scoring.windows` of the stream."""
    held, done, need = np.empty(0, np.int64), 0, window
    for ids in stream:
        held = np.concatenate((held, ids))
        while len(held) - done >= need:
            done += need
            yield held[max(0, done - window) : done], need
            need = stride
        first = max(0, done - window)
        held, done = held[first:], done - first
    if done < len(held):
        yield held[max(0, len(held) - window) :], len(held) - done


def _batches(windows, size: int) -> Iterator[tuple[np.ndarray, int]]:
    batch, shape = [], None
    for ids, n in windows:
        if batch and (shape != (len(ids), n) or len(batch) == size):
            yield np.stack(batch), shape[1]
            batch = []
        batch.append(ids)
        shape = (len(ids), n)
    if batch:
        yield np.stack(batch), shape[1]


def score(
    subject: Subject, parts: Iterable[bytes], *, window: int, stride: int, batch_size: int = 8,
    total: int | None = None, progress: bool = False,
) -> Scored:  # fmt: skip
    """Score pieces of a file (see `pieces`).  Raises FaultError where something cannot be right."""
    clock, sizes, counts = time.perf_counter(), [], []
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="passport",
               disable=None if progress else True)  # fmt: skip

    def stream() -> Iterator[np.ndarray]:
        for n, ids in encoded(subject, parts):
            sizes.append(n)
            counts.append(len(ids))
            bar.update(n)
            yield ids

    sums, left, done = [0.0], 0, 0  # of each piece; ids of the newest that are not yet in its sum
    with bar:
        for ids_BT, n in _batches(id_windows(stream(), window, stride), batch_size):
            nats_Bn = np.asarray(subject.nats(ids_BT, n), np.float64)
            done += check_costs(nats_Bn, ids_BT, n, done)
            bits = nats_Bn.ravel() / math.log(2)
            while len(bits):
                while not left:
                    left = counts[len(sums) - 1]
                    sums.append(0.0)
                sums[-1] += math.fsum(bits[:left])
                left, bits = max(0, left - len(bits)), bits[left:]
    blocks = np.array(sums[1:] + [0.0] * (len(counts) + 1 - len(sums)))
    return Scored(
        bits=math.fsum(blocks), n_bytes=sum(sizes), n_ids=sum(counts), block_bits=blocks,
        block_bytes=np.array(sizes), seconds=time.perf_counter() - clock,
    )  # fmt: skip


def check_costs(nats_Bn: np.ndarray, ids_BT: np.ndarray, n: int, done: int) -> int:
    """Number of costs, one for each scored id; id ``done`` is the first.  Raises FaultError."""
    if nats_Bn.shape != (len(ids_BT), n):
        raise FaultError(
            "coverage",
            f"from id {done:,} on: {nats_Bn.size} costs for {len(ids_BT) * n} ids, of shape "
            f"{nats_Bn.shape} and not {(len(ids_BT), n)}",
        )
    if not np.isfinite(nats_Bn).all():
        at = int(np.flatnonzero(~np.isfinite(nats_Bn.ravel()))[0])
        value = nats_Bn.ravel()[at]
        what = "probability 0" if value == np.inf else "a cost that is not a number"
        raise FaultError("normalized", f"id {done + at:,} of the file has {what}")
    if nats_Bn.min() < -1e-6:
        at = int(nats_Bn.argmin())
        raise FaultError(
            "normalized",
            f"id {done + at:,} of the file has probability {math.exp(-nats_Bn.ravel()[at]):.3g}",
        )
    return nats_Bn.size
