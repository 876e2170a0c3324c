"""Filling in hidden bytes of a text, given both sides, with every model family.

Known bytes are 0..255 and never change; a hidden one is MASK (256).

Diffusion models reveal hidden bytes in one of three orders:
    confidence     where the likeliest byte leads the second by most (arXiv:2603.01367)
    ancestral      at random times, the reverse of the masking process (arXiv:2406.07524)
    left_to_right  the leftmost first
Bytes revealed in the same pass are drawn independently of each other; one per pass is exact.
Models with a ``block`` fill one block after the other, given all before it and what is known of
the block itself, but not what follows it.

Causal models see only what is left of a byte, so they search: they draw several fills of a span
and keep the one that makes fill and following text together likeliest.

Shapes: B candidates, T bytes of the text, N positions at once, V the 256 byte values.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator

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
Network = Callable[[Tensor], Tensor]  # ids_T -> logits_TV


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


def _probs(logits_NV: Tensor, config: SamplingConfig, lefts: Iterable[Tensor]) -> Tensor:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """In which order hidden bytes are revealed, and how many in a pass.  Raises BitbyteError."""

    order: str = "confidence"
    steps: int | None = None  # passes in all (per block); None: one byte a pass
    per_pass: int | None = None  # bytes a pass, instead of steps
    threshold: float | None = None  # confidence: also reveal where the likeliest byte has this much

    def __post_init__(self):
        if self.order not in ORDERS:
            raise BitbyteError(
                f"no order {self.order!r}; choose from {', '.join(ORDERS)}, or, for a model "
                "trained in blocks, causal"
            )
        for name in ("steps", "per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BitbyteError(f"{name} is {value}; it must be at least 1")
        if self.steps and self.per_pass:
            raise BitbyteError("give steps or per_pass, not both")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise BitbyteError(f"threshold is {self.threshold}; it must be above 0 and at most 1")
        if self.threshold is not None and self.order != "confidence":
            raise BitbyteError("a threshold belongs to the order confidence")

    def passes(self, hidden: int) -> int:
        """The most passes for so many hidden bytes."""
        return self.steps or -(-hidden // (self.per_pass or 1))


def _denoise(
    network: Network, ids_T: Tensor, config: SamplingConfig, generator: torch.Generator,
    schedule: Schedule, on_reveal: OnReveal | None, past_P: Tensor | None = None,
) -> tuple[Tensor, list[float], int]:  # fmt: skip
    """(ids_T without MASK, bits of each fill, network calls).

    ``past_P`` are known bytes before ids_T, for the repetition penalty.
    """
    given_T, ids_T, order = ids_T, ids_T.clone(), schedule.order
    past_P = ids_T[:0] if past_P is None else past_P
    masked = (ids_T == MASK).nonzero().flatten().tolist()
    bits, passes = [], 0
    for left in range(schedule.passes(len(masked)), 0, -1):
        chosen = masked[: -(-len(masked) // left)]
        if order == "ancestral":  # from time t = left / steps to s = (left - 1) / steps
            points_N = torch.rand(len(masked), dtype=torch.float64, generator=generator)
            chosen = [p for p, x in zip(masked, points_N.tolist(), strict=True) if x * left < 1]
        if not chosen:
            continue  # the text has not changed, so the network's output would not either
        logits_TV = network(ids_T)
        passes += 1
        rows = masked if order == "confidence" else chosen
        logits_NV = logits_TV[rows].cpu().double()
        lefts = (torch.cat((past_P, ids_T[:p])) for p in rows)
        probs_NV = _probs(logits_NV, config, lefts)
        if order == "confidence":
            own_NV = logits_NV.softmax(1)
            surest = _surest(probs_NV, own_NV, len(chosen))
            if schedule.threshold is not None:
                sure = (own_NV.amax(1) >= schedule.threshold).nonzero().flatten().tolist()
                surest = sorted({*surest, *sure})
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


def _whole(model) -> Network:
    device = device_of(model)
    return lambda ids_T: model.logits(ids_T[None].to(device))[0]


class _Blocks:
    """A text that grows by blocks, with the cached state of the blocks before the current one.

    ``window`` is where the blocks begin to be counted, the first byte that the model sees.
    """

    def __init__(self, model, text: bytes | bytearray, window: int, stop: int):
        """Blocks of the text from byte ``window`` on; whole ones before byte ``stop`` are fed."""
        self.model, self.text, self.window = model, text, window
        self.state = model.empty_state(1)
        self.before = START
        self._feed((stop - window) // model.block * model.block)

    @property
    def start(self) -> int:
        """Where in the text the current block begins."""
        return self.window + self.state.position

    def _feed(self, n: int) -> None:
        if n:
            ids = [self.before, *self.text[self.start : self.start + n - 1]]
            _, self.state = self.model.prefill(self._row(ids), self.state)
            self.before = self.text[self.start - 1]

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=device_of(self.model))

    def __call__(self, ids_N: Tensor) -> Tensor:
        """logits_NV of the current block, of which ids_N is known; it may be cut short."""
        N = self.model.block
        past = self.text[max(self.window, self.start - N) : self.start] or [START] * N
        ids = [*past, *ids_N.tolist(), *[MASK] * (N - len(ids_N))]
        return self.model.fill(self._row(ids), self.state)[0, : len(ids_N)]

    def advance(self) -> bool:
        """Feed the current block, which is in the text by now; False if no other would fit."""
        if self.state.position + 2 * self.model.block > self.model.context:
            return False
        self._feed(self.model.block)
        return True


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
    schedule = Schedule(order=order, steps=steps)
    return _filled(model, ids_T, config, schedule, on_reveal)[0]


def _filled(
    model, ids_T: Tensor, config: SamplingConfig, schedule: Schedule, on_reveal: OnReveal | None
) -> tuple[Tensor, list[float], int]:
    """As `_denoise`, with a model of whole windows or of blocks.

    Blocks are counted so that a hidden stretch begins with one: it sees as much as possible of what
    follows.
    """
    generator = _generator(config)
    if not (N := getattr(model, "block", 0)):
        return _denoise(_whole(model), ids_T, config, generator, schedule, on_reveal)
    ids_T, bits, passes = ids_T.clone(), [], 0
    while len(masked := (ids_T == MASK).nonzero()):
        start = int(masked[0])
        text = bytes(ids_T[:start].tolist())
        blocks = _Blocks(model, text, start - min(start // N, model.context // N - 1) * N, start)
        part = slice(start, start + N)
        reveal = on_reveal and _shifted(on_reveal, start)
        ids_T[part], paid, calls = _denoise(
            blocks, ids_T[part], config, generator, schedule, reveal, ids_T[:start]
        )
        bits, passes = bits + paid, passes + calls + (len(text) > 0)
    return ids_T, bits, passes


def _best(
    model, ids_T: Tensor, config: SamplingConfig, schedule: Schedule, candidates: int | None,
    on_reveal: OnReveal | None,
) -> tuple[Tensor, list[float], int]:  # fmt: skip
    """As `_filled`, the fill of least causal cost of so many; the first of them is greedy."""
    found, passes = [], 1
    for i in range(candidates or 1):
        changes = {"temperature": 0.0} if i == 0 else {"seed": (config.seed + i) % 2**63}
        shown: list[tuple[int, int, float]] = []
        one = dataclasses.replace(config, **changes)
        filled_T, bits, calls = _filled(model, ids_T, one, schedule, lambda *r: shown.append(r))  # noqa: B023
        found.append((filled_T, bits, shown))
        passes += calls
    nats_BT = model(torch.stack([filled_T for filled_T, *_ in found]).to(device_of(model)))
    filled_T, bits, shown = found[int(nats_BT.cpu().double().sum(1).argmin())]
    for reveal in shown if on_reveal else ():
        on_reveal(*reveal)  # pyright: ignore
    return filled_T, bits, passes


def _shifted(on_reveal: OnReveal, start: int) -> OnReveal:
    return lambda position, byte, bits: on_reveal(start + position, byte, bits)


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
    steps: int | None = None, per_pass: int | None = None, threshold: float | None = None,
    candidates: int | None = None, on_reveal: OnReveal | None = None,
) -> Infilled:  # fmt: skip
    """Fill every MASK of ``ids_T`` with a model of any family.

    Diffusion models denoise in the way of the `Schedule` that the four options make.  Causal
    models: for each hidden span, left to right, ``candidates`` fills (default 8) are drawn given
    everything left of it, the first greedily.  The fill with the least cost is kept, counting its
    own bytes and the known bytes up to the next hidden span.  ``bits_per_byte`` is then the causal
    cost of the fills, which does not see what follows, so it cannot be compared with that of a
    diffusion model.  A model of blocks does the same with ``order`` "causal", and with any other
    chooses the fill with the least causal cost from ``candidates`` (default 1) that it denoised.

    Raises BitbyteError if nothing is masked, and as `denoise` does.
    """
    _check(model, ids_T)
    positions = (ids_T == MASK).nonzero().flatten().tolist()
    if not positions:
        raise BitbyteError("nothing is masked: put the mask sign where bytes are to be filled in")
    if candidates is not None and candidates < 1:
        raise BitbyteError(f"candidates is {candidates}; it must be at least 1")
    begin, block = time.perf_counter(), getattr(model, "block", 0)
    if model.config.family == "diffusion" and not (block and order == "causal"):
        schedule = Schedule(order=order, steps=steps, per_pass=per_pass, threshold=threshold)
        method = f"{order} denoising" + (f" in blocks of {block}" if block else "")
        if block and config.temperature and (candidates or 1) > 1:
            method += f", best of {candidates}"
            ids_T, bits, passes = _best(model, ids_T, config, schedule, candidates, on_reveal)
        else:
            ids_T, bits, passes = _filled(model, ids_T, config, schedule, on_reveal)
    else:
        # Greedy fills would all be equal.
        candidates = (8 if candidates is None else candidates) if config.temperature else 1
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
    steps: int | None = None, per_pass: int | None = None, threshold: float | None = None,
    on_reveal: OnReveal | None = None,
) -> bytes:  # fmt: skip
    """``config.max_new_tokens`` bytes that continue ``prompt``, from a diffusion model.

    A model of whole windows fills them at once if they fit into one with the prompt, else up to
    half of ``model.context`` at a time, after as much preceding text as fits.  A model of blocks
    fills one block after the other, with a cached state of those before; where the context ends, it
    begins anew with the newer half.  ``steps`` is per piece; ``on_reveal`` counts positions from
    the start of the prompt.  Otherwise as `infill`.
    """
    if model.config.family != "diffusion":
        raise BitbyteError(
            f"this is a model of family {model.config.family}, which generates byte by byte: "
            "bitbyte.generate samples from it"
        )
    if not isinstance(prompt, bytes | bytearray):
        raise BitbyteError("the prompt must be bytes; encode text with .encode()")
    schedule = Schedule(order=order, steps=steps, per_pass=per_pass, threshold=threshold)
    generator, text = _generator(config), bytearray(prompt)
    pieces = _by_blocks if getattr(model, "block", 0) else _by_windows
    for network, start, stop in pieces(model, text, len(prompt) + config.max_new_tokens):
        ids_T = torch.tensor([*text[start:], *[MASK] * (stop - len(text))])
        reveal = on_reveal and _shifted(on_reveal, start)
        past_P = torch.tensor(
            list(text[max(0, start - config.repetition_window) : start]), dtype=torch.long
        )
        ids_T, _, _ = _denoise(network, ids_T, config, generator, schedule, reveal, past_P)
        text += bytes(ids_T[len(text) - start :].tolist())
    return bytes(text[len(prompt) :])


def _by_windows(model, text: bytearray, end: int) -> Iterator[tuple[Network, int, int]]:
    """(network, start, stop): the caller fills the text from its end to ``stop``, seeing ``start``
    and after.
    """
    size = end if end <= model.context else max(1, model.context // 2)
    while len(text) < end:
        stop = min(len(text) + size, end)
        yield _whole(model), max(0, stop - model.context), stop


def _by_blocks(model, text: bytearray, end: int) -> Iterator[tuple[Network, int, int]]:
    """As `_by_windows`, for a model of blocks."""
    room = model.context - model.block
    while len(text) < end:
        blocks = _Blocks(model, text, max(0, len(text) - room), len(text))
        while len(text) < end:
            yield blocks, blocks.start, min(blocks.start + model.block, end)
            if len(text) < end and not blocks.advance():
                break
        room = min(room, model.context // 2)


def continued(
    model, prompt: bytes, config: SamplingConfig, **schedule
) -> Generation:  # fmt: skip
    """Run `sample` with the options of a `Schedule`, and measure it as `generate.generate` does.

    Same metrics but first_byte_seconds, as the bytes of a block come in any order.
    """
    device, bits = device_of(model), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    new = sample(model, prompt, config, on_reveal=lambda *r: bits.append(r[2]), **schedule)
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
    return Generation(
        bytes=new,
        text=text,
        metrics=metrics,
        engine="torch (blocks)" if getattr(model, "block", 0) else described(model),
    )
