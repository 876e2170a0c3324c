"""Filling in hidden bytes of a text, given both sides, with every model family.

Known bytes are 0..255 and never change; a hidden one is MASK (256).

Diffusion models reveal hidden bytes in one of three orders:
    confidence     where the likeliest byte leads the second by most (arXiv:2603.01367)
    ancestral      at random times, the reverse of the masking process (arXiv:2406.07524)
    left_to_right  the leftmost first
Bytes revealed in the same pass are drawn independently of each other; one per pass is exact.

Causal models see only what is left of a byte, so they search: they draw several fills of a span
and keep the one that makes fill and following text together likeliest.

Shapes: B candidates, T bytes of the text, N positions at once, V the 256 byte values.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitbyte.config import SamplingConfig
from bitbyte.device import device_of, peak_memory
from bitbyte.files import BitbyteError
from bitbyte.generate import Generation, Utf8Stream, filtered_probs
from bitbyte.kernels.engine import described
from bitbyte.vocab import MASK, N_BYTES, START, printable

ORDERS = ("confidence", "ancestral", "left_to_right")
SIGN = "\u25a1".encode()  # a white square stands for one hidden byte
OnReveal = Callable[[int, int, float], None]  # position, byte, bits


def parse_mask(data: bytes, sign: bytes = SIGN) -> Tensor:
    """ids_T (long) of ``data`` with MASK for every ``sign``.  BitbyteError if the sign is empty."""
    if not sign:
        raise BitbyteError("the mask sign is empty; give at least one character")
    first, *rest = data.split(sign)
    ids = list(first)
    for part in rest:
        ids += [MASK, *part]
    return torch.tensor(ids, dtype=torch.long)


def show(ids_T: Tensor, sign: bytes = SIGN) -> str:
    """Text for display, with ``sign`` for MASK.  `parse_mask` inverts it if nothing was escaped.

    Newlines are kept; other control characters and bytes that are not UTF-8 are escaped.
    """
    parts = [bytearray()]
    for byte in ids_T.tolist():
        if byte == MASK:
            parts.append(bytearray())
        else:
            parts[-1].append(byte)
    texts = ["\n".join(printable(line) for line in part.split(b"\n")) for part in parts]
    return printable(sign).join(texts)


def random_masks(ids_T: Tensor, share: float, seed: int) -> Tensor:
    """``ids_T`` with round(share * T) random positions hidden, at least one."""
    if not 0 < share <= 1:
        raise BitbyteError(f"share is {share}; it must be above 0 and at most 1")
    if not len(ids_T):
        raise BitbyteError("there is nothing to mask: the text is empty")
    order_T = torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(seed))
    return ids_T.index_fill(0, order_T[: max(1, round(share * len(ids_T)))], MASK)


def _check(model, ids_T: Tensor) -> None:
    if ids_T.dim() != 1 or ids_T.dtype != torch.long:
        raise BitbyteError("the ids must be one row of dtype long; parse_mask makes them")
    wrong = ids_T[(ids_T < 0) | (ids_T > MASK)]
    if len(wrong):
        raise BitbyteError(f"{int(wrong[0])} is not an id: bytes are 0 to 255, {MASK} is MASK")
    if len(ids_T) > model.context:
        raise BitbyteError(
            f"the text has {len(ids_T)} bytes, this model takes at most {model.context} at once; "
            "cut the text around the hidden bytes"
        )


def _generator(config: SamplingConfig) -> torch.Generator:
    """The source of all draws; with temperature 0 the seed must not affect the order either."""
    return torch.Generator().manual_seed(config.seed if config.temperature else 0)


def _probs(logits_NV: Tensor, config: SamplingConfig, lefts: list[Tensor]) -> Tensor:
    """`filtered_probs` of each row; the known bytes of ``lefts``, the ids before it, are its past.

    All rows are computed at once if only the temperature is in effect.
    """
    no_cuts = (config.top_k, config.top_p, config.min_p) == (0, 1, 0) or config.temperature == 0
    if no_cuts and config.repetition_penalty == 1 and logits_NV.isfinite().all():
        if config.temperature == 0:
            return F.one_hot(logits_NV.argmax(1), N_BYTES).double()
        gaps_NV = logits_NV - logits_NV.amax(1, keepdim=True)
        return (gaps_NV / config.temperature).softmax(1)
    rows = []
    for logits_V, left_T in zip(logits_NV, lefts, strict=True):
        recent = b"" if config.repetition_penalty == 1 else bytes(left_T[left_T != MASK].tolist())
        rows.append(filtered_probs(logits_V, config, recent))
    return torch.stack(rows)


def _draws(probs_NV: Tensor, generator: torch.Generator) -> Tensor:
    """One byte per row, by inverting its cumulative distribution."""
    mass_NV = probs_NV.cumsum(1)
    points_N1 = torch.rand(len(probs_NV), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(mass_NV / mass_NV[:, -1:], points_N1, right=True)[:, 0]


def _margins(probs_NV: Tensor) -> list[float]:
    first_N, second_N = probs_NV.topk(2).values.unbind(1)
    return (first_N - second_N).tolist()


def _surest(probs_NV: Tensor, own_NV: Tensor, n: int) -> list[int]:
    """The n rows with the largest margins.

    A sharp filter makes many margins 1, greedy all of them; the unfiltered margins break the tie.
    """
    keys = zip(_margins(probs_NV), _margins(own_NV), strict=True)
    ranked = sorted((-filtered, -own, row) for row, (filtered, own) in enumerate(keys))
    return sorted(row for *_, row in ranked[:n])


def _denoise(
    model, ids_T: Tensor, config: SamplingConfig, generator: torch.Generator, order: str,
    steps: int | None, on_reveal: OnReveal | None,
) -> tuple[Tensor, list[float], int]:  # fmt: skip
    """(ids_T without MASK, bits of each fill, network calls)."""
    if order not in ORDERS:
        raise BitbyteError(f"no order {order!r}; choose from {', '.join(ORDERS)}")
    if steps is not None and steps < 1:
        raise BitbyteError(f"steps is {steps}; it must be at least 1")
    given_T, ids_T, device = ids_T, ids_T.clone(), device_of(model)
    masked = (ids_T == MASK).nonzero().flatten().tolist()
    bits, passes = [], 0
    for left in range(steps or len(masked), 0, -1):
        chosen = masked[: -(-len(masked) // left)]
        if order == "ancestral":  # from time t = left / steps to s = (left - 1) / steps
            points_N = torch.rand(len(masked), dtype=torch.float64, generator=generator)
            chosen = [p for p, x in zip(masked, points_N.tolist(), strict=True) if x * left < 1]
        if not chosen:
            continue  # the text has not changed, so the network's output would not either
        logits_TV = model.logits(ids_T[None].to(device))[0]
        passes += 1
        rows = masked if order == "confidence" else chosen
        logits_NV = logits_TV[rows].cpu().double()
        probs_NV = _probs(logits_NV, config, [ids_T[:p] for p in rows])
        if order == "confidence":
            surest = _surest(probs_NV, logits_NV.softmax(1), len(chosen))
            chosen = [masked[row] for row in surest]
            logits_NV, probs_NV = logits_NV[surest], probs_NV[surest]
        bytes_N = _draws(probs_NV, generator)
        ids_T[chosen] = bytes_N
        nats_N = -logits_NV.log_softmax(1).gather(1, bytes_N[:, None])[:, 0]
        for position, byte, nats in zip(chosen, bytes_N.tolist(), nats_N.tolist(), strict=True):
            bits.append(nats / math.log(2))
            if on_reveal:
                on_reveal(position, byte, bits[-1])
        masked = (ids_T == MASK).nonzero().flatten().tolist()
    assert not masked and ((ids_T == given_T) | (given_T == MASK)).all()
    return ids_T, bits, passes


@torch.no_grad()
def denoise(
    model, ids_T: Tensor, config: SamplingConfig, *, order: str = "confidence",
    steps: int | None = None, on_reveal: OnReveal | None = None,
) -> Tensor:  # fmt: skip
    """Fill every MASK of ``ids_T`` (long, up to ``model.context``) with a diffusion model.

    ``steps`` None reveals one position per pass, or, with order="ancestral", takes as many time
    steps as bytes are hidden.  Fewer steps reveal several positions per pass.  The network runs
    only if bytes were revealed since it last ran.

    Draws are made on the CPU in float64 from ``config.seed``; temperature 0 gives the same answer
    for every seed.  ``config.max_new_tokens`` is not used, and the repetition penalty applies to
    the known bytes left of a position.  ``on_reveal(position, byte, bits)`` is called as bytes are
    decided; bits is the cost -log2 p under the unfiltered model.

    Raises BitbyteError on ids outside 0..256, text that is too long, and non-finite logits.
    """
    _check(model, ids_T)
    return _denoise(model, ids_T, config, _generator(config), order, steps, on_reveal)[0]


def _spans(ids_T: Tensor) -> list[tuple[int, int, int]]:
    """(start, stop, until) of each run of MASK; known bytes follow from stop to until."""
    signs = "".join("?" if byte == MASK else "." for byte in ids_T.tolist())
    return [(run.start(), run.end(1), run.end()) for run in re.finditer(r"(\?+)\.*", signs)]


def _encode(model, ids_BT: Tensor) -> tuple:
    """(logits_BV, state, network calls) after ``ids_BT``."""
    state = model.init_state(len(ids_BT))
    if hasattr(model, "prefill"):
        return *model.prefill(ids_BT, state), 1
    for ids_B in ids_BT.unbind(1):
        logits_BV, state = model.step(ids_B, state)
    return logits_BV, state, ids_BT.shape[1]


def _search(
    model, ids_T: Tensor, config: SamplingConfig, candidates: int, on_reveal: OnReveal | None
) -> tuple[Tensor, list[float], int]:
    """(ids_T without MASK, bits of each fill, network calls), by a causal model.

    Candidate 0 takes the likeliest byte every time.
    """
    ids_T, device, generator = ids_T.clone(), device_of(model), _generator(config)
    bits, passes = [], 0
    for start, stop, until in _spans(ids_T):
        ids_BT = ids_T[:until].repeat(candidates, 1)
        before_BT = F.pad(ids_BT[:, :start], (1, 0), value=START).to(device)
        logits_BV, state, calls = _encode(model, before_BT)
        for t in range(start, stop):
            if t > start:
                logits_BV, state = model.step(ids_BT[:, t - 1].to(device), state)
            probs_BV = _probs(logits_BV.cpu().double(), config, list(ids_BT[:, :t]))
            ids_BT[:, t] = _draws(probs_BV, generator)
            ids_BT[0, t] = probs_BV[0].argmax()
        nats_BT = model(ids_BT.to(device)).cpu().double()
        passes += calls + stop - start  # one step fewer than bytes, plus the scoring pass
        best = int(nats_BT[:, start:].sum(1).argmin())
        ids_T[start:stop] = ids_BT[best, start:stop]
        for t in range(start, stop):
            bits.append(nats_BT[best, t].item() / math.log(2))
            if on_reveal:
                on_reveal(t, int(ids_T[t]), bits[-1])
    return ids_T, bits, passes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Infilled:
    """A filled text, and how it was filled."""

    ids_T: Tensor  # noqa: N815 - (T,) long, bytes only
    data: bytes  # the same
    positions: list[int]  # that were hidden
    bits_per_byte: float  # mean cost of the fills under the unfiltered model, as they were decided
    passes: int  # network calls
    seconds: float
    method: str  # in words


@torch.no_grad()
def infill(
    model, ids_T: Tensor, config: SamplingConfig, *, order: str = "confidence",
    steps: int | None = None, candidates: int = 8, on_reveal: OnReveal | None = None,
) -> Infilled:  # fmt: skip
    """Fill every MASK of ``ids_T`` with a model of any family.

    Diffusion models: `denoise` with ``order`` and ``steps``.  Causal models: for each hidden span,
    left to right, ``candidates`` fills are drawn given everything left of it, the first greedily.
    The fill with the least cost is kept, counting its own bytes and the known bytes up to the next
    hidden span.  ``bits_per_byte`` is then the causal cost of the fills, which does not see what
    follows, so it cannot be compared with that of a diffusion model.

    Raises BitbyteError if nothing is masked, and as `denoise` does.
    """
    _check(model, ids_T)
    positions = (ids_T == MASK).nonzero().flatten().tolist()
    if not positions:
        raise BitbyteError("nothing is masked: put the mask sign where bytes are to be filled in")
    if candidates < 1:
        raise BitbyteError(f"candidates is {candidates}; it must be at least 1")
    begin = time.perf_counter()
    if model.config.family == "diffusion":
        method = f"{order} denoising"
        ids_T, bits, passes = _denoise(
            model, ids_T, config, _generator(config), order, steps, on_reveal
        )
    else:
        candidates = candidates if config.temperature else 1  # greedy fills would all be equal
        method = f"suffix-scored search, {candidates} candidate{'s' * (candidates > 1)}"
        ids_T, bits, passes = _search(model, ids_T, config, candidates, on_reveal)
    return Infilled(
        ids_T=ids_T, data=bytes(ids_T.tolist()), positions=positions,
        bits_per_byte=math.fsum(bits) / len(bits), passes=passes,
        seconds=time.perf_counter() - begin, method=method,
    )  # fmt: skip


@torch.no_grad()
def sample(
    model, prompt: bytes, config: SamplingConfig, *, order: str = "confidence",
    steps: int | None = None, on_reveal: OnReveal | None = None,
) -> bytes:  # fmt: skip
    """``config.max_new_tokens`` bytes that continue ``prompt``, from a diffusion model.

    If they do not fit into one window with the prompt, they are filled block by block: up to half
    of ``model.context`` new bytes at a time, after as much preceding text as fits.  ``steps`` is
    per block; ``on_reveal`` counts positions from the start of the prompt.  Otherwise as `denoise`.
    """
    if model.config.family != "diffusion":
        raise BitbyteError(
            f"this is a model of family {model.config.family}, which generates byte by byte: "
            "bitbyte.generate samples from it"
        )
    if not isinstance(prompt, bytes | bytearray):
        raise BitbyteError("the prompt must be bytes; encode text with .encode()")
    generator, text = _generator(config), bytearray(prompt)
    end = len(prompt) + config.max_new_tokens
    block = end if end <= model.context else max(1, model.context // 2)
    while len(text) < end:
        size = min(block, end - len(text))
        start = max(0, len(text) + size - model.context)
        ids_T = torch.tensor([*text[start:], *[MASK] * size])

        def reveal(position: int, byte: int, bits: float, start: int = start) -> None:
            on_reveal(start + position, byte, bits)  # pyright: ignore

        ids_T, _, _ = _denoise(model, ids_T, config, generator, order, steps, on_reveal and reveal)
        text += bytes(ids_T[-size:].tolist())
    return bytes(text[len(prompt) :])


def continued(
    model, prompt: bytes, config: SamplingConfig, *, order: str = "confidence",
    steps: int | None = None,
) -> Generation:  # fmt: skip
    """Run `sample` and measure it, as `generate.generate` does for causal models.

    Same metrics but first_byte_seconds, as the bytes of a block come in any order.
    """
    device, bits = device_of(model), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    new = sample(
        model, prompt, config, order=order, steps=steps, on_reveal=lambda *r: bits.append(r[2])
    )
    seconds = time.perf_counter() - begin
    metrics = {
        "prompt_bytes": len(prompt),
        "new_bytes": len(new),
        "seconds": seconds,
        "bytes_per_second": len(new) / seconds,
        "peak_memory_bytes": peak_memory(device),
        "bits_per_byte": math.fsum(bits) / len(bits),
    }
    decoder = Utf8Stream()
    decoder.push(prompt)  # the first new bytes may complete a character of the prompt
    text = decoder.push(new) + decoder.flush()
    return Generation(bytes=new, text=text, metrics=metrics, engine=described(model))
