"""Which bytes follow which contexts: counted once, kept as low-rank log-odds.

A context is the last 1..n bytes, or the word so far; its hash chooses a row of a table.  Each row
of counts (256 next bytes) becomes log-odds of the next byte against its overall probability p.  A
row is projected to rank r by a weighted PCA of its log-odds; bytes are weighted by sqrt(p), rows by
frequency.

Counts are cross-fitted: with F folds there are F tables besides the final one, each counted without
one part of the data.  For a byte of part f, a model in training reads the table that never saw part
f.  Otherwise a row would have counted the very byte to be predicted, and on small data the model
would learn to trust it.

Shapes: B batch, T positions, K contexts (orders 1..n, then the word), R rows, r rank, F folds.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitbyte.device import memory
from bitbyte.files import BitbyteError
from bitbyte.kernels.ngram_counts import counter, rows_before
from bitbyte.vocab import N_BYTES, START

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio; odd, so multiplying is invertible
REACH = 12  # bytes that a context may depend on; so also the letters of a word that enter its hash
# The i-th newest term of a hash of n is multiplied by MULTIPLIER^(n - i), i from 0, modulo 2^64.
POWERS = [0] + [(MULTIPLIER**n + 2**63) % 2**64 - 2**63 for n in range(1, REACH + 1)]
SLICE = 1 << 22  # bytes counted at once
COUNTED = 1 << 30  # bytes; longer data is sampled in even slices, so that 32 bits hold any count
SMOOTHING = 4.0  # pseudo-counts added to each row, distributed by overall frequency


def is_letter(ids: Tensor) -> Tensor:
    """A-Z, a-z, and every byte of a multi-byte UTF-8 character."""
    lower = ids | 32
    return ((lower >= ord("a")) & (lower <= ord("z")) & (ids < 128)) | ((ids >= 128) & (ids < 256))


def context_rows(ids_BT: Tensor, orders: int, rows: int) -> tuple[Tensor, Tensor]:
    """(rows_BTK int64, known_BTK bool) of the contexts that end at each position.

    Order k hashes the k newest bytes; the word context hashes the letters at the end (at most 12)
    and the newest byte once more.  ``known`` is False where a context reaches before the first
    position or contains START or MASK.  ``rows`` is a power of two.
    """
    ids_BT = F.pad(ids_BT.long(), (REACH - 1, 0), value=START)
    newest_BTW = ids_BT.unfold(1, REACH, 1).flip(-1)  # the ids up to each position, newest first
    whole_BTW = (newest_BTW < N_BYTES).cumprod(-1).bool()
    terms_BTW = newest_BTW + 1
    by_order = [[POWERS[max(0, k - i)] for i in range(REACH)] for k in range(1, orders + 1)]
    powers_KW = torch.tensor(by_order, device=ids_BT.device)
    hash_BTK = (terms_BTW[..., None, :] * powers_KW).sum(-1)
    letter_BTW = is_letter(ids_BT).unfold(1, REACH, 1).flip(-1).cumprod(-1)
    powers = torch.tensor(POWERS, device=ids_BT.device)
    length_BT1 = letter_BTW.sum(-1, keepdim=True)
    back_BTW = powers[(length_BT1 - torch.arange(REACH, device=ids_BT.device)).clamp(min=0)]
    word_BT = ((terms_BTW * back_BTW).sum(-1) + terms_BTW[..., 0]) * MULTIPLIER
    hash_BTK = torch.cat((hash_BTK, word_BT[..., None]), -1)
    known_BTK = torch.cat((whole_BTW[..., :orders], whole_BTW[..., :1]), -1)
    return hash_BTK >> (65 - rows.bit_length()) & (rows - 1), known_BTK


def count(
    read: Callable[[int, int], np.ndarray], n_bytes: int, order: int, rows: int, folds: int,
    advance: Callable[[int], object] = lambda n: None, fast: bool | None = None,
) -> np.ndarray:  # fmt: skip
    """counts (uint32, folds x rows x 256): how often each byte followed each context.

    ``read(start, stop)`` returns bytes (uint8); ``order`` 0 is the word.  A byte belongs to the
    fold it lies in (see `fold_of`); memory does not depend on n_bytes.  From longer data, about
    COUNTED bytes are counted, evenly spread.  ``advance(n)`` is called when n more
    bytes are counted.  ``fast``: with numba; None means where it works.
    """
    counts = np.zeros((folds, rows, N_BYTES), np.uint32)
    into = counter(fast)
    for start, stop, fold in _pieces(n_bytes, max(1, order), folds):
        first = max(0, start - REACH)
        into(read(first, stop), start - first, order, 65 - rows.bit_length(), counts[fold])
        advance(stop - start)
    return counts


def fold_of(places: Tensor, n_bytes: int, folds: int) -> Tensor:
    """The fold (int64) of the byte at each place; folds are equal parts, in the data's order."""
    return places // -(-n_bytes // folds)


def _pieces(n_bytes: int, first: int, folds: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, fold) of stretches of predicted bytes, at most SLICE long, each in one fold."""
    size, step = -(-n_bytes // folds), max(SLICE, SLICE * n_bytes // COUNTED)
    for fold in range(folds):
        stop = min(n_bytes, (fold + 1) * size)
        for start in range(max(first, fold * size), stop, step):
            yield start, min(stop, start + SLICE), fold


def folds_for(n_bytes: int) -> int:
    """Number of folds for ``n_bytes`` of training data.

    Tables of small data suffer most from leaving a part out, so there the parts are smaller.
    """
    return 8 if n_bytes < 1 << 23 else 4 if n_bytes < 1 << 25 else 2


def check_countable(config, n_bytes: int) -> None:
    """Refuse, before anything is built, what `count_tables` cannot do.  Raises BitbyteError.

    That is data no longer than the longest context, and counts that no memory holds.
    """
    c = config
    if c.prior != "counts":
        return
    if n_bytes <= max(c.prior_orders, REACH):
        raise BitbyteError(
            f"{n_bytes} bytes of training data are too few to count n-grams in; use --prior none"
        )
    folds = folds_for(n_bytes)
    need = 4 * N_BYTES * c.prior_rows * (folds + 8)  # counts, and as large arrays to work with
    need += c.table_bytes * (folds + 2)  # the tables of all folds, and the model's
    if need > memory():
        raise BitbyteError(
            f"counting {c.prior_rows:,} contexts takes {need:,} bytes of memory, this machine has "
            f"{memory():,}; lower --prior_rows, --prior_orders or --prior_rank"
        )


def count_tables(
    read: Callable[[int, int], np.ndarray], n_bytes: int, config, control: "Backoff",
    advance: Callable[[int], object] = lambda n: None, fast: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(codes_FRw, scale_r) of each context a model config asks for: orders 1..n, then the word.

    Of the F + 1 tables of codes (uint8, see `pack`) the last is of all data.  ``control`` gets the
    counts too.  See `check_countable`.
    """
    c, folds = config, folds_for(n_bytes)
    for order in [*range(1, c.prior_orders + 1), 0]:
        counts_FRV = count(read, n_bytes, order, c.prior_rows, folds, advance, fast)
        control.add(counts_FRV, order)
        codes, scale_r = quantize(low_rank(counts_FRV, c.prior_rank), c.prior_bits)
        del counts_FRV  # before the next ones are made
        yield pack(codes, c.prior_bits), scale_r


class Backoff:
    """What the counts alone, without a network, predict of ``bytes_N``: the control for a model.

    Each context is mixed with the estimate from the shorter ones before it by Witten and Bell's
    rule: the context weighs as much as the number of times it was seen, the shorter ones as much as
    the number of different bytes that followed it (IEEE Trans. Inf. Theory 37(4), 1991).  Contexts
    are hashed.  Despite the class's name this is interpolation: shorter contexts always contribute.
    """

    def __init__(self, bytes_N: np.ndarray):
        self.bytes_N = bytes_N
        self.probs_N = np.full(len(bytes_N), 1 / N_BYTES)

    def add(self, counts_FRV: np.ndarray, order: int) -> None:
        """Mix the next context's counts into the estimate."""
        if len(self.bytes_N) <= max(1, order):
            return
        counts_RV, first = counts_FRV.sum(0, dtype=np.int64), max(1, order)
        rows_N = rows_before(self.bytes_N, first, order, 65 - counts_RV.shape[0].bit_length())
        seen_N = counts_RV[rows_N, self.bytes_N[first:]]
        kinds_N, total_N = (counts_RV > 0).sum(1)[rows_N], counts_RV.sum(1)[rows_N]
        lower_N = self.probs_N[first:]
        mixed_N = (seen_N + kinds_N * lower_N) / np.maximum(total_N + kinds_N, 1)
        self.probs_N[first:] = np.where(total_N > 0, mixed_N, lower_N)

    @property
    def bpb(self) -> float:
        """Bits per byte; nan if there are no bytes."""
        return float(-np.log2(self.probs_N).mean()) if len(self.probs_N) else float("nan")


def low_rank(counts_FRV: np.ndarray, rank: int) -> Tensor:
    """Tables (float32, (F + 1) x R x rank) of the counts of F folds; the last is of all data.

    Row c is sqrt(p) (ln p(v | c) - ln p(v)), projected on the ``rank`` leading eigenvectors of
    these vectors' covariance over the data, eigenvector i divided by lambda_i^(1/4).  The results
    are scaled to a root mean square of 1 over the data and clamped to +-8.  Rows never seen are 0.
    With a single fold there is no other to learn from, so its table equals the final one.
    """
    total_RV = torch.zeros(counts_FRV.shape[1:])
    for counts_RV in counts_FRV:
        total_RV += torch.from_numpy(counts_RV.astype(np.float32))
    p_V = total_RV.sum(0, dtype=torch.float64) + 1
    p_V = (p_V / p_V.sum()).float()
    n_R = total_RV.sum(1)
    x_RV = _log_odds(total_RV, p_V)
    weight_R1 = (n_R / n_R.sum())[:, None]
    covariance_VV = (x_RV.mT @ (x_RV * weight_R1)).double()
    values_V, vectors_VV = torch.linalg.eigh(covariance_VV)
    values, vectors_Vr = values_V[-rank:].flip(0), vectors_VV[:, -rank:].flip(1)
    largest = vectors_Vr.gather(0, vectors_Vr.abs().argmax(0, keepdim=True))
    vectors_Vr = vectors_Vr * largest.sign() / values.clamp(min=1e-12) ** 0.25
    basis_Vr = vectors_Vr.float()
    final_Rr = x_RV @ basis_Vr
    rms = ((final_Rr**2 * weight_R1).sum() / rank).sqrt().clamp(min=1e-12)
    tables = []
    for counts_RV in counts_FRV if len(counts_FRV) > 1 else ():
        others_RV = total_RV - torch.from_numpy(counts_RV.astype(np.float32))
        tables.append(_log_odds(others_RV, p_V) @ basis_Vr)
    tables = [*(tables or [final_Rr]), final_Rr]
    return torch.stack(tables).div_(rms).clamp_(-8, 8)


def _log_odds(counts_RV: Tensor, p_V: Tensor) -> Tensor:
    """sqrt(p) (ln p(v | row) - ln p(v)), each row smoothed by SMOOTHING counts of p."""
    n_R1 = counts_RV.sum(1, keepdim=True)
    odds_RV = (counts_RV + SMOOTHING * p_V) / ((n_R1 + SMOOTHING) * p_V)
    return odds_RV.log_() * p_V.sqrt()


def quantize(tables: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes int8, scale_r): value = sign(code) (code scale)^2, by column, in 2^bits - 1 steps.

    Steps even in the root reach far into the tail, where confident rows lie, at a small price in
    the middle.  The scale fits the largest value over all tables given.
    """
    scale_r = scale_for(tables.abs().flatten(0, -2).amax(0), bits)
    return codes_of(tables, scale_r, bits), scale_r


def scale_for(largest_r: Tensor, bits: int) -> Tensor:
    """scale_r with which `codes_of` reaches the largest value of each column."""
    return largest_r.sqrt().clamp(min=1e-6) / (2 ** (bits - 1) - 1)


def codes_of(tables: Tensor, scale_r: Tensor, bits: int) -> Tensor:
    """The nearest codes (int8), see `quantize`; larger values are clamped."""
    last = 2 ** (bits - 1) - 1
    return ((tables.abs().sqrt() / scale_r).round().clamp(max=last) * tables.sign()).to(torch.int8)


def dequantize(codes: Tensor, scale_r: Tensor) -> Tensor:
    """The values (float32) of `quantize`'s codes."""
    root = codes.float() * scale_r
    return root * root.abs()


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes as bytes (uint8): with 4 bits, two per byte, the first in the low half."""
    if bits == 8:
        return codes.view(torch.uint8)
    low, high = (codes.to(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes (int8) of `pack`."""
    if bits == 8:
        return packed.view(torch.int8)
    halves = torch.stack((packed << 4, packed), -1).view(torch.int8) >> 4
    return halves.flatten(-2)
