"""95 % intervals of a BPB and of the difference of two: a bootstrap over blocks of bytes.

A block is a run of neighboring windows, 32 KiB or longer: neighbors are about the same thing, so
only long blocks are nearly independent.  An interval says how much the BPB would vary on other
bytes like these.  It says nothing about other kinds of text, nor about other training seeds.
"""

import math
import statistics

import numpy as np

from bitbyte.evaluate.records import BLOCK_BYTES, MIN_BLOCKS, MIXED
from bitbyte.files import BitbyteError
from bitbyte.scoring import Score, windows

BLOCKS = 100  # maximum number of block sums in a record, and of blocks in a resample
DRAWS = 10_000  # resamples of a bootstrap
ONE_RUN = "one training run each: another seed may reverse this"


def bootstrap_interval(result: Score, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of the BPB; None if there are fewer than `MIN_BLOCKS` blocks."""
    return _bootstrap(_merged(result.block_bits), _merged(result.block_bytes), seed)


def _merged(values, at_most: int = BLOCKS) -> np.ndarray:
    """Sums over up to ``at_most`` runs of neighboring values, about equally many in each."""
    n = len(values)
    count = min(n, at_most)
    return np.add.reduceat(np.asarray(values, float), [i * n // count for i in range(count)])


def _count(sizes: np.ndarray) -> int:
    """The number of blocks of at least BLOCK_BYTES that parts of these sizes can be merged into."""
    count = min(len(sizes), int(sizes.sum()) // BLOCK_BYTES)
    while count and _merged(sizes, count).min() < BLOCK_BYTES:
        count -= 1  # parts do not always divide evenly
    return count


def _bootstrap(bits: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % interval of sum(bits) / sum(sizes), resampling blocks of at least BLOCK_BYTES.

    Quantiles as in the expanded percentile interval (arXiv:1411.5279), because a resample of n
    blocks has (n - 1) / n of the variance and a mean of few blocks has the tails of Student's t.
    """
    n = _count(sizes)
    if n < MIN_BLOCKS:
        return None
    bits, sizes = _merged(bits, n), _merged(sizes, n)
    chosen = np.random.default_rng(seed).integers(n, size=(DRAWS, n))
    means = bits[chosen].sum(1) / sizes[chosen].sum(1)
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))
    return tuple(float(x) for x in np.quantile(means, (tail, 1 - tail)))


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.001 for 9 degrees or more (Cornish-Fisher)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )  # fmt: skip
    return sum(term / freedom**power for power, term in enumerate(terms))


def label(record: dict, other: dict) -> str:
    """The model's name, and where it is needed that it was scored in the mixer."""
    mixed = record["kind"] == MIXED != other["kind"]
    return f"{record['model']} in the mixer" if mixed else record["model"]


def _check_comparable(a: dict, b: dict) -> None:
    """Raise BitbyteError unless both are bits per byte of the same bytes in the same windows."""
    for record in (a, b):
        if record["kind"] == "masked_only":
            raise BitbyteError(
                f"{record['model']} was scored on masked bytes only, which is not bits per byte; "
                "bitbyte eval measures those"
            )
    for what, of in (
        ("the same bytes", lambda r: f"{r['bytes']:,} of {r['data']['sha256'][:8]}"),
        ("the same windows", lambda r: f"{r['context']['window']}/{r['context']['stride']}"),
    ):
        if of(a) != of(b):
            raise BitbyteError(
                f"{a['model']} and {b['model']} were not scored on {what}: {of(a)}, {of(b)}; "
                "score both with the same --data, --split, --limit, --window and --stride"
            )


def _verdict(a: dict, b: dict, interval) -> str:
    """Which is better, by the 95 % interval of a - b, and what bounds leave open."""
    if interval[0] > 0 or interval[1] < 0:
        better, worse = (b, a) if interval[0] > 0 else (a, b)
        bound = worse["kind"] == "upper_bound"
        caveat = f", as far as the bound on {worse['model']} tells" if bound else ""
        return f"{label(better, worse)} is better{caveat}"
    bounds = a["kind"] == b["kind"] == "upper_bound"
    return "not distinguishable" + ", as far as two bounds tell" * bounds


def paired_bootstrap(a: dict, b: dict, seed: int = 0) -> dict:
    """Paired bootstrap of two records on the same bytes and windows.

    Returns {"difference": BPB of a - BPB of b, "interval": 95 % [low, high], or None if there are
    too few bytes, "verdict": text, "note": what the verdict does not cover, or ""}.  Raises
    BitbyteError if the records are not bits per byte of the same bytes in the same windows.
    """
    _check_comparable(a, b)
    cut = windows(a["bytes"], a["context"]["window"], a["context"]["stride"])
    sizes = _merged([stop - first for _, stop, first in cut])
    sums = [_merged(record.get("blocks") or [0.0]) for record in (a, b)]
    for record, kept in zip((a, b), sums, strict=True):
        if len(kept) != len(sizes):
            raise BitbyteError(
                f"the record of {record['model']} lacks the sums of its windows; score it again"
            )
    spread = _bootstrap(sums[0] - sums[1], sizes, seed)
    note = ""
    if spread is None:
        least = MIN_BLOCKS * BLOCK_BYTES
        verdict = f"{a['bytes']:,} bytes are too few to tell; it takes {least:,} or more"
    else:
        verdict = _verdict(a, b, spread)
        checkpoints = {a.get("checkpoint"), b.get("checkpoint")}  # a known distribution has none
        one_each = len(checkpoints - {None}) == 2 and (spread[0] > 0 or spread[1] < 0)
        note = ONE_RUN if one_each else ""
    spread = None if spread is None else list(spread)
    return {
        "difference": a["bpb"] - b["bpb"], "interval": spread, "verdict": verdict, "note": note
    }  # fmt: skip


def paired_seeds(a: list[dict], b: list[dict]) -> dict:
    """Compare two ways of training over seeds: records paired by ``train_seed``.

    Returns {"difference": mean BPB of a - BPB of b, "interval": 95 % [low, high] by Student's t,
    None for one pair, "pairs": their number, "verdict": text}.  The interval covers the choice of
    the seed, and not that of the bytes.  Raises BitbyteError without a pair, for two records of one
    seed, and if the records are not bits per byte of the same bytes in the same windows.
    """
    first, second = _by_seed(a), _by_seed(b)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise BitbyteError("no seed was trained in both ways")
    one, two = first[seeds[0]], second[seeds[0]]
    for seed in seeds:
        _check_comparable(one, first[seed])
        _check_comparable(one, second[seed])
        for same, other in ((one, first[seed]), (two, second[seed])):
            if same["kind"] != other["kind"]:
                raise BitbyteError(
                    f"the records of {same['model']} are {same['kind']} and {other['kind']}; "
                    "compare numbers of one kind"
                )
    gaps = [first[seed]["bpb"] - second[seed]["bpb"] for seed in seeds]
    mean, n, spread = statistics.fmean(gaps), len(gaps), None
    verdict = "one pair cannot tell"
    if n > 1:
        half = _student_of_few(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
        spread = [mean - half, mean + half]
        verdict = _verdict(one, two, spread)
    return {"difference": mean, "interval": spread, "pairs": n, "verdict": verdict}


def _by_seed(records: list[dict]) -> dict[int, dict]:
    """Records by ``train_seed``, without those whose seed is unknown."""
    found: dict[int, dict] = {}
    for record in records:
        seed = record.get("train_seed")
        if seed is not None and found.setdefault(seed, record) is not record:
            raise BitbyteError(
                f"{record['model']} has several records of seed {seed}; pass one of each training"
            )
    return found


def _student_of_few(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, for any degrees of freedom."""
    few = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
    return few[freedom - 1] if freedom <= len(few) else _student(freedom)
