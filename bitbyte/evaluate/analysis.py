"""Arrays for analyzing a model: where its bits go, and whether its probabilities can be trusted.

From n-gram counts: what a text costs without a model.  From the costs of a text
(`entropy.Surprisals`): bits by position in the window and by class of byte.  From the model's
predictions of a text: calibration and byte confusion.  From the weights alone: a map of the 256
byte embeddings.  `plots.analysis` draws them.

Shapes: n bytes of text, N of them at a time, V = 256 byte values, T positions of a window, C
classes of bytes, Q bins, L layers, H heads, R bytes of a table.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bitbyte import face, ngrams
from bitbyte.device import device_of
from bitbyte.evaluate.entropy import WHITE_SPACE, Surprisals, logits_by_byte, window_logits
from bitbyte.files import BitbyteError
from bitbyte.models import preceding
from bitbyte.scoring import window_and_stride, windows
from bitbyte.vocab import N_BYTES, byte_label

CLASSES = (
    "letter", "digit", "white space", "punctuation", "control", "UTF-8 lead", "UTF-8 byte 2",
    "UTF-8 byte 3", "UTF-8 byte 4", "not UTF-8",
)  # fmt: skip
LEAD, NOT_UTF8 = CLASSES.index("UTF-8 lead"), CLASSES.index("not UTF-8")
CONTINUATION = "UTF-8 continuation"  # class of a byte value alone, outside of any character
BINS = 4  # of probability, per decade
LOGITS = "logits"  # a name of `activations` that no module has
DECADES = 7  # the first bin holds everything below 10^-7


def _ascii_class(byte: int) -> int:
    if byte in WHITE_SPACE:
        return CLASSES.index("white space")
    if byte < 0x20 or byte == 0x7F:
        return CLASSES.index("control")
    name = "digit" if chr(byte).isdigit() else "letter" if chr(byte).isalpha() else "punctuation"
    return CLASSES.index(name)


ASCII_CLASS = np.array([_ascii_class(byte) for byte in range(0x80)])


def byte_classes(data: bytes) -> np.ndarray:
    """class_n (uint8, indices of CLASSES) of each byte.

    Letters, digits and punctuation are ASCII.  C2 to F4 lead a UTF-8 character of 2, 3 or 4 bytes,
    and continuation bytes are classed by their place in it; those without a lead byte, and values
    that never occur in UTF-8, are "not UTF-8".  Whether a character is valid is not checked.
    """
    byte_n = np.frombuffer(data, np.uint8)
    class_n = np.append(ASCII_CLASS, np.full(0x80, NOT_UTF8)).astype(np.uint8)[byte_n]
    class_n[(byte_n >= 0xC2) & (byte_n <= 0xF4)] = LEAD
    length_n = 1 + sum((byte_n >= first).astype(int) for first in (0xC2, 0xE0, 0xF0))
    length_n[byte_n > 0xF4] = 1
    run_n = (byte_n & 0xC0) == 0x80  # place - 1 continuation bytes end here
    for place in (2, 3, 4):  # in the character; the lead byte is 1
        back = place - 1
        here = run_n[back:] & (length_n[:-back] >= place)
        class_n[back:][here] = LEAD + back
        run_n[1:] &= run_n[:-1]
    return class_n


def class_of_value(byte: int) -> str:
    """The class of a byte value alone, for which a continuation byte has no place."""
    if 0x80 <= byte < 0xC0:
        return CONTINUATION
    return CLASSES[int(byte_classes(bytes([byte]))[0])]


def by_class(costs: Surprisals) -> dict:
    """Mean surprisal and entropy by class of byte.

    {"classes": C names, "counts": (C,) bytes, "bits": (C,) mean surprisal, "entropy": (C,) mean
    entropy before such bytes}; NaN for classes that do not occur.
    """
    class_n = byte_classes(costs.data)
    counts_C = np.bincount(class_n, minlength=len(CLASSES))
    with np.errstate(invalid="ignore"):
        bits_C = np.bincount(class_n, costs.bits, len(CLASSES)) / counts_C
        entropy_C = np.bincount(class_n, costs.entropy, len(CLASSES)) / counts_C
    return {"classes": list(CLASSES), "counts": counts_C, "bits": bits_C, "entropy": entropy_C}


def counted(
    read: Callable[[int, int], np.ndarray], n_bytes: int, data: bytes, *, orders: int = 6,
    rows: int = 1 << 16,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Bits (n,) of each byte of ``data`` under n-gram counts of other bytes, without a network.

    The first entry knows nothing, and each further one has seen one more context: "order 1" to
    "order ``orders``", then "word"; see `ngrams.Backoff`.  ``read``, ``n_bytes`` and ``rows`` as in
    `ngrams.count`.
    """
    held_out = ngrams.Backoff(np.frombuffer(data, np.uint8))
    bits = {"nothing": -np.log2(held_out.probs_N)}
    for order in [*range(1, orders + 1), 0]:
        held_out.add(ngrams.count(read, n_bytes, order, rows, folds=1), order)
        bits[f"order {order}" if order else "word"] = -np.log2(held_out.probs_N)
    return bits


def positions(n: int, window: int, stride: int) -> np.ndarray:
    """position_n of each of n bytes, from 0, in the window that scored it."""
    parts = [np.arange(first - a, b - a) for a, b, first in windows(n, window, stride)]
    return np.concatenate([np.arange(0), *parts])


def probs_at(
    model, data: bytes, position: int, *, window: int | None = None, stride: int | None = None
) -> np.ndarray:
    """probs_V (float64) that predicted the byte at ``position``, as in `entropy.read`."""
    if not 0 <= position < len(data):
        raise BitbyteError(f"position is {position}; this text has bytes 0 to {len(data) - 1}")
    cut_n = windows(len(data), *window_and_stride(model, window, stride))
    a, b = next((a, b) for a, b, first in cut_n if first <= position < b)
    ((_, logits_NV),) = window_logits(model, data, [(a, b, position)])
    return logits_NV[0].cpu().double().softmax(-1).numpy()


def calibration(model, data: bytes, **options) -> dict:
    """How often bytes with a given predicted probability occur, over all 256 values at every byte.

    Each of the n predictions gives 256 pairs (probability, whether the byte occurred), binned by
    probability in logarithmic bins, four per decade; the first holds all below 10^-7.
    Probabilities can be trusted where the observed frequency equals the mean predicted probability.

    {"predicted": (Q,), "observed": (Q,), "counts": (Q,) pairs, "hits": (Q,) pairs whose byte
    occurred, "error": sum over bins of |hits - sum of probabilities| / n, the mean misplaced
    probability}.  NaN for empty bins.  ``options`` as in `entropy.logits_by_byte`.
    """
    bins = BINS * DECADES + 1
    counts_Q, sums_Q, hits_Q = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))
    n = 0
    for start, logits_NV in logits_by_byte(model, data, **options):
        logprobs_NV = logits_NV.log_softmax(-1).cpu()
        place_NV = ((logprobs_NV * (BINS / math.log(10))).floor().long() + bins).clamp_(0, bins - 1)
        true_N1 = _ids(data, start, len(logits_NV))[:, None]
        place_M = place_NV.flatten()
        counts_Q += torch.bincount(place_M, minlength=bins)
        sums_Q += torch.bincount(place_M, logprobs_NV.exp().flatten().double(), bins)
        hits_Q += torch.bincount(place_NV.gather(1, true_N1)[:, 0], minlength=bins)
        n += len(logits_NV)
    return {
        "predicted": (sums_Q / counts_Q).numpy(),
        "observed": (hits_Q / counts_Q).numpy(),
        "counts": counts_Q.long().numpy(),
        "hits": hits_Q.long().numpy(),
        "error": float((hits_Q - sums_Q).abs().sum() / n),
    }


def _ids(data: bytes, start: int, n: int) -> Tensor:
    """n bytes of the data from ``start``, as int64 on the CPU."""
    return torch.from_numpy(np.frombuffer(data, np.uint8)[start : start + n].astype(np.int64))


def confusion(model, data: bytes, **options) -> dict:
    """What a model expected where each byte occurred: the mean prediction for each actual byte.

    {"counts": (V,) occurrences of each byte, "mass": (V, V) mean probability of the column's byte
    where the row's occurred}; NaN in the rows of bytes that never did.  ``options`` as in
    `entropy.logits_by_byte`.
    """
    counts_V, mass_VV = None, None
    for start, logits_NV in logits_by_byte(model, data, **options):
        probs_NV = logits_NV.cpu().double().softmax(-1)
        if mass_VV is None:
            counts_V, mass_VV = probs_NV.new_zeros(N_BYTES), probs_NV.new_zeros(N_BYTES, N_BYTES)
        true_N = _ids(data, start, len(logits_NV))
        mass_VV.index_add_(0, true_N, probs_NV)
        counts_V += torch.bincount(true_N, minlength=N_BYTES)
    return {"counts": counts_V.long().numpy(), "mass": (mass_VV / counts_V[:, None]).numpy()}


def among_commonest(table: Mapping, top: int = 24) -> dict:
    """A `confusion` of the ``top`` commonest bytes, ordered by value, with the rest as one column.

    {"rows": R labels, "columns": R labels and "rest", "counts": (R,), "mass": (R, R + 1)}.
    """
    counts_V = np.asarray(table["counts"])
    commonest = np.argsort(-counts_V, kind="stable")[:top]
    byte_R = np.sort(commonest[counts_V[commonest] > 0])
    mass_RV = np.asarray(table["mass"])[byte_R]
    mass_RR = mass_RV[:, byte_R]
    labels = [byte_label(byte) for byte in byte_R.tolist()]
    rest_R1 = np.clip(mass_RV.sum(1, keepdims=True) - mass_RR.sum(1, keepdims=True), 0, 1)
    mass = np.concatenate([mass_RR, rest_R1], 1)
    return {"rows": labels, "columns": [*labels, "rest"], "counts": counts_V[byte_R], "mass": mass}


def among_classes(table: Mapping) -> dict:
    """A `confusion` summed over classes of byte values; classes that never occur have no row.

    {"rows": labels, "columns": labels, "counts", "mass"}: as `among_commonest`, without "rest".
    """
    of_value = [class_of_value(byte) for byte in range(N_BYTES)]
    names = list(dict.fromkeys([*CLASSES[: LEAD + 1], CONTINUATION, CLASSES[NOT_UTF8]]))
    member_CV = np.array([[name == other for other in of_value] for name in names], float)
    counts_V = np.asarray(table["counts"], float)
    given_VV = counts_V[:, None] * np.where(counts_V[:, None] > 0, table["mass"], 0)
    counts_C = member_CV @ counts_V
    seen = counts_C > 0
    mass_CC = (member_CV @ given_VV @ member_CV.T)[seen] / counts_C[seen, None]
    rows = [name for name, occurs in zip(names, seen, strict=True) if occurs]
    return {"rows": rows, "columns": names, "counts": counts_C[seen].astype(int), "mass": mass_CC}


def embedding_map(model) -> dict:
    """The 256 byte embeddings on their first two principal components (by SVD).

    {"points": (V, 2), "explained": (2,) shares of the variance, "classes": V names}.  Each axis
    points towards its farthest byte.  Id 256 is left out.
    """
    rows_VD = model.embed[:N_BYTES].detach().cpu().double()
    rows_VD = rows_VD - rows_VD.mean(0)
    U_VK, S_K, _ = torch.linalg.svd(rows_VD, full_matrices=False)
    points_V2 = (U_VK * S_K)[:, :2].numpy()
    farthest = np.abs(points_V2).argmax(0)
    points_V2 = points_V2 * np.sign(points_V2[farthest, [0, 1]])
    shares_K = (S_K**2 / S_K.square().sum()).numpy()
    classes = [class_of_value(byte) for byte in range(N_BYTES)]
    return {"points": points_V2, "explained": shares_K[:2], "classes": classes}


def activations(model, data: bytes, *patterns: str) -> dict[str, Tensor]:
    """What modules return on a text, by module name: (T, ...) each, float32, on the CPU.

    ``patterns`` are names of ``model.named_modules()``, with ``*`` for any part of one, or
    ``"logits"``, those of the 256 byte values.  The T bytes of ``data`` are one window: position t
    has seen START and the bytes before t, and predicts byte t (a diffusion model sees them all).
    Raises BitbyteError if a pattern fits nothing, or the text no window.
    """
    known = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if pattern != LOGITS and not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, [LOGITS, *known], n=3, cutoff=0.3)
            raise BitbyteError(f"no module {pattern!r}; there are {', '.join(near or known[:3])}")
    if not 0 < len(data) <= model.config.seq_len:
        raise BitbyteError(
            f"{len(data)} bytes; a window of this model has 1 to {model.config.seq_len}"
        )
    found: dict[str, Tensor] = {}

    def keep(name: str, output) -> None:
        value = output[0] if isinstance(output, tuple) else output
        found[name] = value[0].float().cpu()

    names = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: keep(name, output)
        )
        for name in sorted(names)
    ]
    before = getattr(model, "engine", None)
    try:
        model.engine = "torch"  # the native engine has no modules
        ids_1T = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None].to(device_of(model))
        with torch.no_grad():
            logits = model.logits(preceding(ids_1T.long()) if model.exact else ids_1T)
    finally:
        model.engine = before
        for hook in hooks:
            hook.remove()
    if LOGITS in patterns:
        keep(LOGITS, logits)
    return found


__getattr__ = face(__name__, {}, renamed="law_at:probs_at")
