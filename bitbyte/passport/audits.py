"""Audits of a subject: each passes, fails with a place, or is not possible, with the reason.

Whoever gives each id a probability, from the ids before it alone, can be turned into a code whose
length is the sum of the costs.  The audits check just that.  Most look at windows of a sample.
The last resort needs no trust at all: on random bytes of known entropy nobody saves more than 40
bits (probability 2^-40), however a model or a compressor works inside.

Shapes: R windows of T ids, V ids that can be predicted.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from bitbyte.compress import rans
from bitbyte.evaluate.bootstrap import bootstrap_interval
from bitbyte.evaluate.evaluation import LEAK_BITS
from bitbyte.evaluate.leaks import CHUNK, SAME_SHAPE
from bitbyte.evaluate.records import LEAST_BYTES
from bitbyte.evaluate.subject import NotGivenBackError, Subject
from bitbyte.files import BitbyteError, RunError
from bitbyte.passport.scored import FaultError, Scored, check_costs, encoded, pieces, score

PASS, FAIL, OPEN = "pass", "fail", "not possible"
TITLES = {  # in the order of the card
    "denominator": "The denominator is the size of the file",
    "coverage": "Every byte is covered once",
    "normalized": "Probabilities sum to 1",
    "future": "No look at the future",
    "batch": "Batch, padding and window do not matter",
    "cached": "Cached and full computation agree",
    "repeat": "The same number every time",
    "random": "Random bytes cost what they must",
    "coder": "A coder gives the file back",
    "interval": "An interval from honest blocks",
    "training": "Not trained on these bytes",
    "claim": "The number that was claimed",
    "size": "The size of what a receiver needs",
}
ESSENTIAL = ("denominator", "coverage", "normalized", "random")  # without these it is not a code
ROWS = 4  # windows of the sample
ELEMENTS = 1 << 24  # probabilities computed at once, at most
RANDOM_BYTES = 1 << 14
PLAIN = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)) + b"+/"  # 64
CODED = 64  # ids that go through the coder
SUM_LIMIT = 1e-3  # of a sum of probabilities
ASKED = 4096  # largest V whose distribution is asked for id by id
CLAIM = 2e-3  # relative; people print three or four digits


class Audit(NamedTuple):
    name: str
    verdict: str
    text: str


class NotPossibleError(Exception):
    """An audit cannot be made; the text says why."""


@dataclass(kw_only=True)
class Case:
    """What the audits look at."""

    subject: Subject
    read: Callable  # read(start, stop): bytes of the data
    n_bytes: int  # that are scored
    on_disk: int  # bytes of the files, by their size
    whole: bool
    window: int
    stride: int
    scored: Scored | None  # None if that failed
    training: Callable[[], tuple[bool, str]] | None = None  # (was trained on it, in words)
    claim: float | None = None
    seed: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), np.int64))  # of ids, (R, T)

    @functools.cached_property
    def own(self) -> tuple[float, int] | None:
        """(bits, bytes) of the model's own evaluation, if it has one."""
        return self.subject.claimed(self.read, self.n_bytes)

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def run(case: Case, faults: list[FaultError]) -> list[Audit]:
    """All audits, in order; ``faults`` are those that were met while the file was scored."""
    done: dict[str, Audit] = {}
    for fault in faults:
        done[fault.audit] = Audit(fault.audit, FAIL, str(fault))
    try:
        case.rows = sample(case)
    except (FaultError, NotPossibleError) as problem:
        if case.scored is None:
            done.setdefault("coverage", Audit("coverage", FAIL, str(problem)))
    for name in TITLES:
        if name in done:
            continue
        if not case.rows.size and name in NEED_ROWS:
            done[name] = Audit(name, OPEN, "no sample of the bytes could be turned into ids")
            continue
        done[name] = attempt(name, lambda name=name: AUDITS[name](case), done)
    return [done[name] for name in TITLES]


def attempt(name: str, audit: Callable[[], str], done: dict[str, Audit]) -> Audit:
    """An audit's result; what a stranger's model raises is a failure, too.

    A fault that another audit is for, as of costs that are not numbers, goes to that one in
    ``done``.
    """
    try:
        return Audit(name, PASS, audit())
    except NotPossibleError as reason:
        return Audit(name, OPEN, str(reason))
    except FaultError as fault:
        if fault.audit == name:
            return Audit(name, FAIL, str(fault))
        if done.get(fault.audit, (None, PASS))[1] != FAIL:
            done[fault.audit] = Audit(fault.audit, FAIL, str(fault))
        return Audit(name, OPEN, f"see: {TITLES[fault.audit]}")
    except (RunError, BitbyteError) as fault:
        return Audit(name, FAIL, str(fault))
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return Audit(name, FAIL, f"it raised {type(error).__name__}: {error}")


def verdict(audits: list[Audit]) -> tuple[str, str]:
    """(pass or fail, why in a sentence)."""
    failed = [a.name for a in audits if a.verdict == FAIL]
    if failed:
        return FAIL, f"{_count(len(failed), 'audit')} failed: {', '.join(failed)}"
    by_name = {a.name: a.verdict for a in audits}
    missing = [name for name in ESSENTIAL if by_name.get(name) != PASS]
    if "normalized" in missing and by_name.get("coder") == PASS:
        missing.remove("normalized")  # a code that is decoded needs no probabilities
    if missing:
        return FAIL, f"not possible, though needed: {', '.join(missing)}"
    still = sum(a.verdict == OPEN for a in audits)
    passed = _count(len(audits) - still, "audit")
    return PASS, f"{passed} passed" + (f", {still} not possible" if still else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def sample(case: Case) -> np.ndarray:
    """rows_RT: windows of ids spread over the scored bytes."""
    subject = case.subject
    T = max(32, ELEMENTS // (ROWS * subject.n_ids))
    T = min(case.window, subject.sample, T)
    starts = np.linspace(0, max(0, case.n_bytes - 16 * T), ROWS).astype(np.int64)
    rows = []
    for start in dict.fromkeys(starts.tolist()):
        data = case.read(start, min(case.n_bytes, start + 16 * T)).tobytes()
        text = data.decode("utf-8", "ignore").encode()  # its ends may cut through characters
        for part in (data, text):
            with contextlib.suppress(NotGivenBackError):  # is reported for the whole file
                ids = np.asarray(subject.encode(part), np.int64)
                rows += [ids[:T]] * (len(ids) > 0)
                break
    if not rows:
        raise NotPossibleError("no part of the file could be turned into ids")
    T = min(map(len, rows))
    return np.resize(np.stack([row[:T] for row in rows]), (ROWS, T))


# --- what is divided by what


def denominator(case: Case) -> str:
    """The bytes divided by are those on the disk; so are those that the model itself reports."""
    if case.whole and case.n_bytes != case.on_disk:
        raise FaultError(
            "denominator", f"scored {case.n_bytes:,} bytes; the file has {case.on_disk:,}"
        )
    if case.scored is not None and case.scored.n_bytes != case.n_bytes:
        raise FaultError(
            "denominator", f"divided by {case.scored.n_bytes:,} bytes, not {case.n_bytes:,}"
        )
    if case.own is not None and case.own[1] != case.n_bytes:
        raise FaultError("denominator", _why_bytes(case, case.own[1]))
    of = "" if case.whole else f" of {case.on_disk:,}: only the first part was asked for"
    return f"{case.n_bytes:,} bytes{of}"


def _why_bytes(case: Case, claimed: int) -> str:
    """A wrong number of bytes, with an explanation where one fits exactly."""
    text = f"the model's own evaluation divides by {claimed:,} bytes, the file has {case.n_bytes:,}"
    s, more = case.scored, claimed - case.n_bytes
    data = case.read(0, min(case.n_bytes, 1 << 26)).tobytes()
    decoded = data.decode("utf-8", "replace")
    known = {
        len(decoded): "that many characters it has",
        len(decoded.encode()): "replacement characters were counted in place of bytes",
    }
    with contextlib.suppress(FaultError):
        known[_replaced(case)] = "each undecodable id was counted as a replacement character"
    if s is not None:
        windows = 1 + -(-max(0, s.n_ids - case.window) // case.stride)
        known |= {
            case.n_bytes + windows: "a start symbol was counted in every window",
            case.n_bytes + 1: "a start symbol was counted as a byte",
            case.n_bytes - 1: "a byte was left out, as by a shift",
            windows * case.window: "windows were padded, and the padding was counted",
            s.n_ids: "that many ids it has",
            case.n_bytes // case.window * case.window: "the last, shorter window was left out",
        }
    why = known.get(claimed)
    return f"{text} ({more:+,}" + (f": {why})" if why else f", {more / case.n_bytes:+.1%})")


def _replaced(case: Case) -> int:
    """Bytes of the text of each id on its own, a character that is cut through as U+FFFD."""
    uses = np.zeros(case.subject.n_ids, np.int64)
    for _, ids in encoded(case.subject, pieces(case.read, case.n_bytes)):
        uses += np.bincount(ids, minlength=len(uses))
    texts = ((n, case.subject.decode(np.array([i]))) for i, n in enumerate(uses.tolist()) if n)
    return sum(n * len(text.decode("utf-8", "replace").encode()) for n, text in texts)


def claim(case: Case) -> str:
    """A claimed number is that of the passport, within rounding."""
    s = case.scored
    claims = []
    if case.claim is not None:
        claims.append(("the claim", case.claim))
    if case.own is not None:
        claims.append(("the model's own evaluation", case.own[0] / max(1, case.own[1])))
    if not claims:
        raise NotPossibleError("no number was claimed")
    if s is None:
        raise NotPossibleError("the file could not be scored")
    for who, value in claims:
        if abs(value - s.bpb) > CLAIM * s.bpb:
            raise FaultError("claim", f"{who} is {value:.4f}; {_why_bpb(case, value)}")
    return f"{claims[0][0]} {claims[0][1]:.4f} is the number measured, within {CLAIM:.1%}"


def _why_bpb(case: Case, value: float) -> str:
    s = case.scored
    chars = len(case.read(0, min(case.n_bytes, 1 << 26)).tobytes().decode("utf-8", "replace"))
    known = {
        "nats per byte": s.bits * math.log(2) / s.n_bytes, "bits per id": s.bits / s.n_ids,
        "nats per id": s.bits * math.log(2) / s.n_ids, "bits per character": s.bits / chars,
    }  # fmt: skip
    why = [name for name, other in known.items() if abs(value - other) <= CLAIM * other]
    why = [name for name in why if abs(known[name] - s.bpb) > CLAIM * s.bpb]
    if why:
        return f"that is its {why[0]}, and not bits per byte"
    return f"that is {value / s.bpb - 1:+.1%} from what was measured"


def coverage(case: Case) -> str:
    s = case.scored
    if s is None:
        raise NotPossibleError("the file could not be scored")
    if s.n_ids == s.n_bytes:
        return f"each of {s.n_bytes:,} bytes is one id and has one cost"
    return (
        f"{s.n_bytes:,} bytes are {s.n_ids:,} ids ({s.n_bytes / s.n_ids:.2f} bytes each) with one "
        "cost each, and the ids give back every byte"
    )


# --- the distribution


def normalized(case: Case) -> str:
    """All probabilities of a context sum to 1, and the costs are those of the distribution."""
    subject, rows_RT = case.subject, case.rows
    if not subject.full:
        return _asked(case)
    logprobs_RTV = np.asarray(subject.logprobs(rows_RT), np.float64)
    if logprobs_RTV.shape != (*rows_RT.shape, subject.n_ids):
        raise FaultError(
            "normalized",
            f"the distributions of {rows_RT.shape} ids have shape {logprobs_RTV.shape}, not "
            f"{(*rows_RT.shape, subject.n_ids)}",
        )
    with np.errstate(over="ignore"):
        sums_RT = np.exp(logprobs_RTV).sum(-1)
    worst = int(np.nanargmax(np.where(np.isnan(sums_RT), np.inf, abs(sums_RT - 1))))
    at = np.unravel_index(worst, sums_RT.shape)
    if not abs(sums_RT[at] - 1) <= SUM_LIMIT:
        raise FaultError(
            "normalized",
            f"at {_where(at)} they sum to {sums_RT[at]:.6g}, on average {sums_RT.mean():.6g}",
        )
    nats_RT = _costs(subject, rows_RT)
    own_RT = -np.take_along_axis(logprobs_RTV, rows_RT[..., None], -1)[..., 0]
    gap_RT = (nats_RT - own_RT) / math.log(2)
    _compare("normalized", "from its own distribution", gap_RT, subject.limits)
    n = sums_RT.size
    return f"within {abs(sums_RT - 1).max():.1g} in {n:,} contexts; costs are the distribution's"


def _asked(case: Case) -> str:
    """The sum of the probabilities of all ids that could stand at a place, asked one by one."""
    subject, V = case.subject, case.subject.n_ids
    if V > ASKED:
        raise NotPossibleError(f"it gives the cost of one id only, and has {V:,}: too many to ask")
    T = case.rows.shape[1]
    places = sorted({0, 1, T // 2, T - 1} & set(range(T)))
    sums = []
    for t in places:
        ids_VT = np.repeat(case.rows[:1, : t + 1], V, 0)
        ids_VT[:, t] = np.arange(V)
        with np.errstate(over="ignore"):
            sums.append(float(np.exp(-np.asarray(subject.nats(ids_VT, 1))).sum()))
        if not abs(sums[-1] - 1) <= SUM_LIMIT:
            raise FaultError(
                "normalized",
                f"the probabilities of all {V} ids at {_where((0, t))} sum to {sums[-1]:.6g}",
            )
    worst = max(abs(total - 1) for total in sums)
    return f"within {worst:.1g} in {len(sums)} contexts, each of {V} ids asked for on its own"


def future(case: Case) -> str:
    """Ids after a place change neither its cost nor what is predicted at the next place."""
    subject, rows_RT, rng = case.subject, case.rows, case.rng
    R, T = rows_RT.shape
    if T < 2:
        raise NotPossibleError("a window has a single id")
    want_RT = _costs(subject, rows_RT)
    base = np.asarray(subject.logprobs(rows_RT)) if subject.full else None
    worst = 0.0
    for cuts_R in _cuts(T, rng, R):
        after_RT = np.arange(T) - cuts_R[:, None]
        changed_RT = np.where(after_RT > 0, _others(rows_RT, subject.n_ids, rng), rows_RT)
        got_RT = _costs(subject, changed_RT)
        again = np.asarray(subject.logprobs(changed_RT)) if subject.full else None
        for r, cut in enumerate(cuts_R.tolist()):
            gap = (got_RT - want_RT)[r : r + 1, : cut + 1] / math.log(2)
            what = f"when id {cut + 1} and those after it change: it sees what it should predict"
            worst = max(worst, _compare("future", what, gap, SAME_SHAPE, row=r))
            if again is not None and cut + 1 < T:
                # Also at the changed id itself: its distribution is from the ids before it.
                old = -base[r, : cut + 2][np.arange(cut + 2), rows_RT[r, : cut + 2]]
                new = -again[r, : cut + 2][np.arange(cut + 2), rows_RT[r, : cut + 2]]
                gap = ((new - old) / math.log(2))[None]
                worst = max(worst, _compare("future", what, gap, SAME_SHAPE, row=r))
    return f"{R} windows, all ids after a place changed; largest difference {worst:.1g} bits"


def batch(case: Case) -> str:
    """A window costs the same alone, beside others, in any order, and when it ends sooner."""
    subject, rows_RT, rng = case.subject, case.rows, case.rng
    T = rows_RT.shape[1]
    want_RT = _costs(subject, rows_RT)
    worst = 0.0
    for kept in (slice(0, None, 2), slice(1, None, 2)):
        changed_RT = _others(rows_RT, subject.n_ids, rng)
        changed_RT[kept] = rows_RT[kept]
        gap = (_costs(subject, changed_RT)[kept] - want_RT[kept]) / math.log(2)
        what = "when other windows of the batch change"
        worst = max(worst, _compare("batch", what, gap, SAME_SHAPE))
    gap = (_costs(subject, rows_RT[:1]) - want_RT[:1]) / math.log(2)
    worst = max(worst, _compare("batch", "when scored alone", gap, subject.limits))
    gap = (_costs(subject, rows_RT[::-1].copy())[::-1] - want_RT) / math.log(2)
    what = "when the order of the batch is reversed"
    worst = max(worst, _compare("batch", what, gap, subject.limits))
    ends = sorted({1, CHUNK, CHUNK + 1, T // 2, T - 1} & set(range(1, T)))
    if subject.kind != "exact":
        return f"alone, beside others and reordered: largest difference {worst:.1g} bits"
    for n in ends:
        gap = (_costs(subject, rows_RT[:, :n].copy()) - want_RT[:, :n]) / math.log(2)
        what = f"when the window ends with id {n - 1}"
        worst = max(worst, _compare("batch", what, gap, subject.limits))
    return f"alone, beside others, reordered and cut short: largest difference {worst:.1g} bits"


def cached(case: Case) -> str:
    """Fed id by id to its cache, the model gives the same costs."""
    ids_T = case.rows[0]
    logprobs_TV = case.subject.steps(ids_T)
    if logprobs_TV is None:
        raise NotPossibleError("it has no cache")
    got_T = -np.asarray(logprobs_TV, np.float64)[np.arange(len(ids_T)), ids_T]
    gap = (got_T - _costs(case.subject, case.rows[:1])[0])[None] / math.log(2)
    worst = _compare("cached", "when fed id by id to its cache", gap, case.subject.limits)
    return f"{len(ids_T)} ids fed one by one; largest difference {worst:.1g} bits"


def repeat(case: Case) -> str:
    """The same windows cost the same again, also with other seeds of the random generators."""
    subject, rows_RT = case.subject, case.rows
    runs = []
    for seed in (0, 1, 0):
        with _seeded(seed):
            runs.append(_costs(subject, rows_RT))
    for got, what in ((runs[2], "when computed again"), (runs[1], "with another random seed")):
        gap = (got - runs[0]) / math.log(2)
        _compare("repeat", f"{what}: something random is left on", gap, SAME_SHAPE)
    if subject.draws:
        return f"bit for bit; draws: {subject.draws}"
    return f"{rows_RT.size:,} ids scored three times under two seeds; nothing is drawn"


# --- known answers


def known_entropy(case: Case) -> str:
    """No model saves more than `LEAK_BITS` on fresh uniform bytes, unless it is not a code."""
    subject = case.subject
    n, lost = min(RANDOM_BYTES, 16 * subject.sample), ""
    for alphabet, each in _alphabets(case):
        try:
            data = [draw(n, alphabet, case.seed)]
            got = score(subject, data, window=case.window, stride=case.stride)
        except FaultError as fault:
            if fault.audit != "coverage":
                raise
            lost = str(fault)  # the tokenizer cannot be given it
            continue
        return judged(got.bits, n, each)
    raise FaultError("random", f"it covers no random text; in one of {n:,} bytes as a file, {lost}")


def _alphabets(case: Case) -> Iterator[tuple[bytes | None, int]]:
    """What random text is made of, and its bits a byte, until a tokenizer gives it back."""
    yield None, 8
    yield PLAIN, 6
    there = {*case.read(0, min(case.n_bytes, RANDOM_BYTES)).tobytes()}
    letters = bytes(byte for byte in PLAIN if byte in there)
    if bits := max(1, len(letters)).bit_length() - 1:
        yield letters[-(1 << bits) :], bits


def draw(n: int, alphabet: bytes | None, seed: int) -> bytes:
    """``n`` uniform bytes, or characters of an alphabet, from a seeded generator."""
    # Not the plain seed, which a model's author may use as well.
    rng = np.random.default_rng([0xB17B17E, seed])
    if alphabet is None:
        return rng.integers(256, size=n, dtype=np.uint8).tobytes()
    return np.frombuffer(alphabet, np.uint8)[rng.integers(len(alphabet), size=n)].tobytes()


SEES = "it sees what it should predict, or its probabilities sum to more than 1"


def judged(bits: float, n: int, each: int, why: str = SEES) -> str:
    """What known_entropy says of a cost.  Raises FaultError."""
    what = "uniform bytes" if each == 8 else f"characters of an alphabet of {1 << each}"
    if bits < each * n - LEAK_BITS:
        raise FaultError(
            "random",
            f"{n:,} random {what} of {each * n:,} bits of entropy cost {bits:,.0f} bits "
            f"({bits / n:.3f} each, and not {each}): {why}",
        )
    return f"{n:,} random {what} cost {bits / n:.3f} bits each, at least {each}"


def coder(case: Case) -> str:
    """Ids coded with the model's distribution come back from the code and the model alone."""
    subject = case.subject
    if not subject.full:
        raise NotPossibleError("it gives no distribution to code with")
    ids_T = case.rows[0][: min(CODED, case.rows.shape[1])]
    T = len(ids_T)

    def counts(known: np.ndarray) -> np.ndarray:
        """Integer table of the id after ``known``; the rest of the window is filled up."""
        filled_1T = np.zeros((1, T), np.int64)
        filled_1T[0, : len(known)] = known
        return table(np.asarray(subject.logprobs(filled_1T), np.float64)[0, len(known)])

    ends = [np.cumsum(counts(ids_T[:t])) for t in range(T)]
    freqs = [int(end[i] - (end[i - 1] if i else 0)) for end, i in zip(ends, ids_T, strict=True)]
    starts = [int(end[i]) - f for end, i, f in zip(ends, ids_T, freqs, strict=True)]
    states, words = rans.encode(np.array(starts), np.array(freqs), [1] * T, 1)
    decoder, back = rans.Decoder(states, words), np.empty(0, np.int64)
    for t in range(T):
        row = np.cumsum(counts(back))
        symbol = decoder.step(row[None].astype(np.int64))
        if symbol[0] != ids_T[t]:
            raise FaultError(
                "coder", f"id {t} of a window came back as {symbol[0]}, not {ids_T[t]}"
            )
        back = np.append(back, symbol)
    decoder.finish()
    size = 32 * len(words) + int(states[0]).bit_length() - 32
    promised = _costs(subject, ids_T[None]).sum() / math.log(2)
    if size > promised * 1.01 + 64 + 0.03 * T:
        raise FaultError(
            "coder", f"{T} ids were promised {promised:.0f} bits and take {size} in a code"
        )
    return f"{T} ids, promised {promised:.0f} bits, took {size} in a code and came back"


def table(logprobs_V: np.ndarray) -> np.ndarray:
    """Counts (int64, at least 1) that sum to `rans.TOTAL`, in proportion to probabilities."""
    if not np.isfinite(logprobs_V.max()):
        raise FaultError("coder", "its probabilities are not numbers")
    weights = np.exp(logprobs_V - logprobs_V.max())
    room = rans.TOTAL - len(weights)
    counts = 1 + (weights * (room / weights.sum())).astype(np.int64)
    counts[counts.argmax()] += rans.TOTAL - counts.sum()
    return counts


# --- what goes with the number


def interval(case: Case) -> str:
    spread = None if case.scored is None else bootstrap_interval(case.scored)
    if spread is None:
        raise NotPossibleError(f"it takes {LEAST_BYTES:,} bytes, ten blocks of 32 KiB")
    return f"95 %: {spread[0]:.4f} to {spread[1]:.4f}, resampling blocks of at least 32 KiB"


def training(case: Case) -> str:
    if case.training is None:
        raise NotPossibleError("what it was trained on is not known; --trained_on names it")
    seen, text = case.training()
    if seen:
        raise FaultError("training", text)
    if not text:
        raise NotPossibleError("whole files only could be compared, and none is the same")
    return text


def size(case: Case) -> str:
    sizes = case.subject.sizes
    if not sizes:
        raise NotPossibleError("the size of the model is not known")
    return "; ".join(f"{what} {n:,} bytes" for what, n in sizes.items())


AUDITS = {
    "denominator": denominator, "coverage": coverage, "normalized": normalized, "future": future,
    "batch": batch, "cached": cached, "repeat": repeat, "random": known_entropy, "coder": coder,
    "interval": interval, "training": training, "claim": claim, "size": size,
}  # fmt: skip
NEED_ROWS = ("normalized", "future", "batch", "cached", "repeat", "coder")


# --- helpers


def _costs(subject: Subject, rows_RT: np.ndarray) -> np.ndarray:
    """nats_RT of all ids of the windows."""
    T = rows_RT.shape[1]
    nats_RT = np.asarray(subject.nats(rows_RT, T), np.float64)
    check_costs(nats_RT, rows_RT, T, 0)
    return nats_RT


def _compare(audit: str, what: str, gap_BN: np.ndarray, limits, row: int = 0) -> float:
    """Largest difference in bits.  Raises FaultError; limits as in `leaks`."""
    n, gap_BN = gap_BN.size, np.where(np.isnan(gap_BN), np.inf, gap_BN)
    at = np.unravel_index(int(abs(gap_BN).argmax()), gap_BN.shape)
    worst, total, absolute = gap_BN[at], gap_BN.sum(), abs(gap_BN).sum()
    if (
        abs(worst) <= limits.largest
        and abs(total) <= limits.largest + limits.drift * n
        and absolute <= limits.largest + limits.mean * n
    ):
        return float(abs(worst))
    where = _where((at[0] + row, at[1]))
    raise FaultError(audit, f"{where} changes its cost by {worst:+.3g} bits {what}")


def _where(at) -> str:
    return f"id {at[1]} of window {at[0]} of the sample"


def _others(ids: np.ndarray, n_ids: int, rng) -> np.ndarray:
    """Random ids, each different from the one it replaces."""
    return (ids + rng.integers(1, n_ids, ids.shape)) % n_ids


def _cuts(T: int, rng, rows: int) -> Iterator[np.ndarray]:
    """Places of the last kept id, (rows,) at a time: powers of two, borders of chunks, others."""
    borders = [c + d for c in range(CHUNK, T, CHUNK) for d in (-1, 0)]
    chosen = {0, T - 2, T // 2, *borders, *((1 << i) - 1 for i in range(T.bit_length()))}
    chosen = sorted({c for c in chosen if 0 <= c < T - 1} | {int(rng.integers(T - 1))})
    for start in range(0, len(chosen), rows):
        yield np.resize(np.array(chosen[start : start + rows]), rows)


@contextlib.contextmanager
def _seeded(seed: int):
    """The global random generators with a seed; as they were afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
