"""What the other tokenizations of a text would save: a sum over them, by beam.

A token model gives a probability to each sequence of ids.  The bytes have the sum over all
sequences that spell them, and the sequence that the tokenizer chooses is one of them.  At every
byte the likeliest ways to get there are kept, the tokenizer's own among them, so what is summed up
never costs more than that, and is a bound on the cost of the bytes.

Shapes: V ids.
"""

import math
from dataclasses import dataclass

import numpy as np

from bitbyte.evaluate.subject import Subject
from bitbyte.files import BitbyteError
from bitbyte.passport.scored import pieces

PIECE = 128  # bytes that are spelled on their own, at least
BEAM = 8  # ways to spell the bytes so far


@dataclass(frozen=True)
class Sums:
    """Bits of the same bytes, piece by piece, each from a start of its own."""

    n_bytes: int
    chosen: float  # as the tokenizer spells them
    summed: float  # all ways that the beam has kept

    def __str__(self) -> str:
        saved = self.chosen - self.summed
        return (
            f"other tokens save {saved / self.n_bytes:.4f} bits per byte "
            f"({saved / self.chosen:.2%}) of the first {self.n_bytes:,} bytes, in pieces of "
            f"{PIECE} or more, beam {BEAM}"
        )


def measure(subject: Subject, read, n_bytes: int, beam: int = BEAM) -> Sums:
    """Sum over tokenizations of the first ``n_bytes`` of ``read(start, stop)``.

    Raises BitbyteError for a model whose ids have no bytes of their own.
    """
    table = getattr(getattr(subject, "vocabulary", None), "table", None)
    if not table or getattr(subject, "masked", False):
        raise BitbyteError(
            f"{subject.name} has no table of the bytes of its tokens; only causal models of "
            "transformers with a byte-level tokenizer have"
        )
    spelled: dict[bytes, list[int]] = {}
    for i, text in enumerate(table[: subject.n_ids]):
        if text:
            spelled.setdefault(text, []).append(i)
    longest = max(map(len, spelled))
    chosen = summed = 0.0
    for piece in pieces(read, n_bytes, PIECE):
        ids = np.asarray(subject.encode(piece), np.int64)
        chosen += float(subject.nats(ids[None], len(ids)).sum())
        summed += -_sum(subject, piece, ids.tolist(), spelled, longest, beam)
    return Sums(n_bytes, chosen / math.log(2), summed / math.log(2))


def _sum(subject: Subject, data: bytes, own: list[int], spelled, longest: int, beam: int) -> float:
    """ln of the probability of all kept ways to spell ``data``."""
    ways: list[dict[tuple, float]] = [{} for _ in range(len(data) + 1)]
    ways[0][()] = 0.0
    for at in range(len(data)):
        here = sorted(ways[at], key=ways[at].__getitem__, reverse=True)
        kept = here[:beam] + [ids for ids in here[beam:] if list(ids) == own[: len(ids)]]
        following = [
            (at + n, i)
            for n in range(1, min(longest, len(data) - at) + 1)
            for i in spelled.get(data[at : at + n], ())
        ]
        for ids in kept if following else ():
            inputs = np.array([[*ids, 0]], np.int64)  # the last id is predicted, whatever it is
            logprobs_V = np.asarray(subject.logprobs(inputs), np.float64)[0, -1]
            for stop, i in following:
                ways[stop][*ids, i] = ways[at][ids] + logprobs_V[i]
        ways[at] = {}
    total = np.array([*ways[-1].values()])
    top = total.max()
    return float(top + np.log(np.exp(total - top).sum()))
