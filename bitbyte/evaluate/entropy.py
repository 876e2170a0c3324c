"""The lens: what a model expected at every byte of a text, where patches begin, what edits change.

Windows are those of `evaluate`, so the bits add up to its numbers.  All values belong to the byte
being predicted: its surprisal -log2 p(byte), the entropy of the distribution that predicted it,
its rank in that distribution, and the likeliest bytes.  A causal model predicts each byte from
those before it in the window.  A masked denoiser gets the same bytes, with the byte and everything
right of it in the window hidden (the left-to-right chain rule, one pass per byte).

Shapes: n bytes of text, B windows, T bytes of a window, S its scored bytes (the last ones), N
bytes of a batch of windows, V byte values, K the likeliest of them.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bitbyte import face
from bitbyte.device import device_of
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import preceding
from bitbyte.scoring import CHAIN_RULE, batches, kind_of, window_and_stride, windows
from bitbyte.vocab import MASK, N_BYTES

LEFT_TO_RIGHT = CHAIN_RULE + "left_to_right"
RULES = ("global", "jump")
WHITE_SPACE = np.frombuffer(b" \t\n\v\f\r", np.uint8)
MOVED = 0.1  # bits; an edit changed a later byte if its cost moved by more
COLUMNS = ("bits", "entropy", "rank", "top_ids", "top_probs")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Surprisals:
    """What each of n bytes cost a model, and what the model expected instead."""

    data: bytes
    kind: str  # "exact" or "chain_rule:left_to_right"
    bits: np.ndarray  # (n,) float64, surprisal
    entropy: np.ndarray  # (n,) float32, bits: the surprisal that the model expected
    rank: np.ndarray  # (n,) uint8, 0 = the byte was the likeliest; ties rank by value
    top_ids: np.ndarray  # (n, K) uint8, the likeliest first
    top_probs: np.ndarray  # (n, K) float32
    window: int
    stride: int
    seconds: float
    mixed: np.ndarray | None = None  # (n,) float64, cost in a mixer, see `compress.costs`

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN if there are no bytes."""
        return math.fsum(self.bits) / len(self.bits) if len(self.bits) else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What changing one byte did to the costs of a text."""

    costs: Surprisals  # of the text as edited
    here: float  # bits that the edited byte costs more than the one before
    after: float  # bits that all later bytes together cost more
    changed: list[int]  # later bytes whose cost moved by more than 0.1 bits


def lens_kind(model) -> str:
    """The kind of number that the lens gives for a model: exact, or the chain rule."""
    return kind_of(model, LEFT_TO_RIGHT if model.exact is False else None)


def _logits_of_windows(model, ids_BT: Tensor, S: int, stopped: Callable[[], bool]) -> Tensor | None:
    """logits_BSV (float32) that predict the last S bytes; None if stopped."""
    if lens_kind(model) == "exact":
        return model.logits(preceding(ids_BT))[:, -S:].float()
    (B, T), masked_BT = ids_BT.shape, ids_BT.clone()
    masked_BT[:, -S:] = MASK
    logits_BSV = None
    for s in range(S):
        if stopped():
            return None
        logits_BV = model.logits(masked_BT)[:, T - S + s].float()
        if logits_BSV is None:
            logits_BSV = logits_BV.new_empty(B, S, logits_BV.shape[-1])
        logits_BSV[:, s] = logits_BV
        masked_BT[:, T - S + s] = ids_BT[:, T - S + s]
    return logits_BSV


# Not inference_mode: a later training step could not use tables cached under it.
@torch.no_grad()
def window_logits(
    model, data: bytes, parts: Iterable[tuple[int, int, int]], *, batch_size: int = 32,
    stopped: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """(first byte, logits_NV) of ``parts``: (start, stop, first scored byte) of windows.

    Neighboring parts must score consecutive bytes, so that the N bytes of a batch are consecutive.
    logits_NV is float32 on the model's device.  Ends early once ``stopped()`` is true, dropping
    the unfinished batch.
    """
    stopped = stopped or (lambda: False)
    array_n = np.frombuffer(data, np.uint8)
    model.eval()
    for batch, ids_BT in batches(
        lambda start, stop: array_n[start:stop], parts, batch_size, device_of(model)
    ):
        _, stop, first = batch[0]
        logits_BSV = None
        if not stopped():
            logits_BSV = _logits_of_windows(model, ids_BT, stop - first, stopped)
        if logits_BSV is None:
            return
        yield first, logits_BSV.flatten(0, 1)


def logits_by_byte(
    model, data: bytes, *, window: int | None = None, stride: int | None = None, **options
) -> Iterator[tuple[int, Tensor]]:
    """The predictions of ``data``: (first byte, logits_NV) of N consecutive bytes at a time.

    Window and stride as in `evaluate`, ``batch_size`` and ``stopped`` as in `window_logits`.
    Raises BitbyteError on empty data and on windows that the model cannot score.
    """
    if not data:
        raise BitbyteError("there are no bytes to score")
    parts = windows(len(data), *window_and_stride(model, window, stride))
    return window_logits(model, data, parts, **options)


def _measured(logits_NV: Tensor, data: bytes, top: int) -> dict[str, np.ndarray]:
    """The columns of `Surprisals` for N bytes, given the logits that predicted them."""
    V, ids_N = logits_NV.shape[-1], torch.tensor(np.frombuffer(data, np.uint8).copy())
    true_N1 = ids_N.to(logits_NV.device, torch.int64)[:, None]
    logprobs_NV = logits_NV.log_softmax(-1)
    nats_N = -logprobs_NV.gather(1, true_N1)[:, 0]
    if not nats_N.isfinite().all():
        raise RunError("the model gives costs that are not finite numbers; its weights are broken")
    probs_NV = logprobs_NV.exp()
    entropy_N = -(probs_NV * logprobs_NV).sum(-1)
    # One integer per byte value, ordered by probability, then by value, so that no two tie.
    order_NV = logprobs_NV.view(torch.int32)
    order_NV = (order_NV ^ ((order_NV >> 31) & 0x7FFFFFFF)).long() * V
    order_NV += torch.arange(V - 1, -1, -1, device=order_NV.device)
    rank_N = (order_NV > order_NV.gather(1, true_N1)).sum(-1)
    top_NK = order_NV.topk(top).indices
    return {
        "bits": nats_N.cpu().double().numpy() / math.log(2),
        "entropy": entropy_N.cpu().numpy() / np.float32(math.log(2)),
        "rank": rank_N.byte().cpu().numpy(),
        "top_ids": top_NK.byte().cpu().numpy(),
        "top_probs": probs_NV.gather(1, top_NK).cpu().numpy(),
    }


def read(
    model, data: bytes, *, window: int | None = None, stride: int | None = None, top: int = 5,
    batch_size: int = 32, stopped: Callable[[], bool] | None = None,
    on_part: Callable[[Surprisals], None] | None = None,
) -> Surprisals:  # fmt: skip
    """Costs of all bytes of ``data``; they add up to `scoring.score` on the same windows.

    The ``top`` likeliest bytes are kept for each byte.  ``on_part`` gets the costs of each batch of
    windows as soon as they are known, with ``seconds`` since the start.  Once ``stopped()`` is true
    the result covers only the bytes before, perhaps none; it is polled once per batch, and for a
    denoiser once per pass.  Raises BitbyteError on empty data and invalid options, RunError on
    broken weights.
    """
    if not 0 <= top <= N_BYTES:
        raise BitbyteError(f"top is {top}; it must be from 0 to {N_BYTES}")
    clock = time.perf_counter()
    window, stride = window_and_stride(model, window, stride)
    fixed = {"kind": lens_kind(model), "window": window, "stride": stride}
    parts = [_measured(torch.zeros(0, N_BYTES), b"", top)]
    done = 0
    options = {"window": window, "stride": stride, "batch_size": batch_size, "stopped": stopped}
    for start, logits_NV in logits_by_byte(model, data, **options):
        done = start + len(logits_NV)
        parts.append(_measured(logits_NV, data[start:done], top))
        if on_part:
            seconds = time.perf_counter() - clock
            on_part(Surprisals(data=data[start:done], seconds=seconds, **fixed, **parts[-1]))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    return Surprisals(data=data[:done], seconds=time.perf_counter() - clock, **fixed, **joined)


def edited(model, costs: Surprisals, position: int, byte: int, *, batch_size: int = 32) -> Edit:
    """`read` of the text with one byte changed; only windows that contain it run again.

    Bytes left of it keep their costs, as no prediction looks right.  ``costs`` must come from this
    model.  Raises BitbyteError if there is no such position or byte.
    """
    n = len(costs.data)
    if not 0 <= position < n:
        raise BitbyteError(f"position is {position}; this text has bytes 0 to {n - 1}")
    if not 0 <= byte < N_BYTES:
        raise BitbyteError(f"byte is {byte}; it must be from 0 to {N_BYTES - 1}")
    clock = time.perf_counter()
    data = b"".join((costs.data[:position], bytes([byte]), costs.data[position + 1 :]))
    cut_n = windows(n, costs.window, costs.stride)
    parts = [(a, b, max(first, position)) for a, b, first in cut_n if a <= position < b]
    columns = {name: getattr(costs, name).copy() for name in COLUMNS}
    top = columns["top_ids"].shape[1]
    for start, logits_NV in window_logits(model, data, parts, batch_size=batch_size):
        stop = start + len(logits_NV)
        for name, values in _measured(logits_NV, data[start:stop], top).items():
            columns[name][start:stop] = values
    seconds = time.perf_counter() - clock
    more_n = columns["bits"] - costs.bits
    later = range(position + 1, n)
    return Edit(
        costs=dataclasses.replace(costs, data=data, seconds=seconds, mixed=None, **columns),
        here=float(more_n[position]),
        after=math.fsum(more_n[position + 1 :]),
        changed=[i for i in later if abs(more_n[i]) > MOVED],
    )


def most_surprising(costs: Surprisals, n: int = 20) -> list[int]:
    """Positions of the n bytes with the largest surprisal, largest first, ties by position."""
    return np.argsort(-costs.bits, kind="stable")[:n].tolist()


def boundaries(values_n, threshold: float, rule: str = "global") -> np.ndarray:
    """start_n (bool): whether a patch starts at each byte, by the entropy of its prediction.

    The two rules of the Byte Latent Transformer (arXiv:2412.09871, section 2.3), with
    ``values_n`` the entropy in bits with which each byte was predicted:

    global  a patch starts where the entropy is above the threshold: H(x_t) > threshold.
    jump    a patch starts where the entropy rises by more than the threshold from the byte
            before: H(x_t) - H(x_t-1) > threshold.  Less sensitive to levels that drift with the
            context, as in repeated text.

    The byte that was hard to predict starts the patch, so the boundary is before it.  The first
    byte always starts one.  Raises BitbyteError on any other rule.
    """
    if rule not in RULES:
        raise BitbyteError(f"no rule {rule!r}; choose from {', '.join(RULES)}")
    values_n = np.asarray(values_n, np.float64)
    rise_n = np.diff(values_n, prepend=values_n[:1])
    start_n = (values_n if rule == "global" else rise_n) > threshold
    start_n[:1] = True
    return start_n


def patch_stats(starts_n, data: bytes) -> dict:
    """Statistics of the patches that start at ``starts_n`` (bool).

    n_patches             number of patches
    mean_bytes            bytes / patches; BLT models run one large step per patch
    variation             standard deviation of the lengths / mean: 0 = all of one length
    whitespace_agreement  share of the starts, except the first byte, right after white space,
                          where BLT's space patching would start one; NaN with one patch
    whitespace_chance     the same share of all bytes but the first: what random starts give
    lengths               lengths[i] = number of patches of i bytes

    Raises BitbyteError on empty data, or if the first byte does not start a patch.
    """
    starts_n = np.asarray(starts_n, bool)
    if len(starts_n) != len(data) or not starts_n[:1].any():
        raise BitbyteError(f"{len(data)} bytes need as many starts, and a patch at the first byte")
    length_P = np.diff(np.flatnonzero(np.append(starts_n, True)))
    after_n = np.isin(np.frombuffer(data, np.uint8), WHITE_SPACE)[:-1]  # of bytes 1, 2, ...
    inner_n = starts_n[1:]
    return {
        "n_patches": len(length_P),
        "mean_bytes": float(length_P.mean()),
        "variation": float(length_P.std() / length_P.mean()),
        "whitespace_agreement": float(after_n[inner_n].mean()) if inner_n.any() else math.nan,
        "whitespace_chance": float(after_n.mean()) if len(after_n) else math.nan,
        "lengths": np.bincount(length_P),
    }


__getattr__ = face(
    __name__,
    {"scoring": "window_and_stride"},
    renamed="ByteCosts:Surprisals laws:logits_by_byte cut:window_and_stride",
)
