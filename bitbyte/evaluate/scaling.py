"""How many bits per byte a preset reaches after so many bytes: curves fitted to result records.

The records are those called card-PRESET-LINEAR-PRIOR-STEPS: whole trainings of one preset that
differ in their number of steps, scored on the same bytes.  Each preset, kind of linear layer and
prior has a curve L = E + A D^-b, of D training bytes.  It says nothing of other data, of other
recipes, or of D far beyond its records.
"""

import dataclasses
import re

import numpy as np

from bitbyte.config import PRESETS
from bitbyte.evaluate.records import runs_word

NAME = re.compile(r"card-([a-z]+)-(ternary|dense)-(counts|none)-([0-9]+)")
LEAST_POINTS = 3  # different numbers of bytes that a curve needs
EXPONENTS = np.linspace(0.02, 1.5, 149)  # tried for b
DRAWS = 400  # of the noise, for an interval
NOISE = 0.01  # bits per byte between seeds, where the records do not show it
# The assumed noise counts like this many degrees of freedom: one pair of seeds has one, and often
# differs by next to nothing, which would make intervals far too narrow.
ASSUMED = 4
FAR = 4.0  # times the bytes of its records a curve may be read at without a warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Bits per byte of one preset against bytes it was trained on."""

    preset: str
    linear: str
    prior: str
    floor: float  # E, bits per byte
    scale: float  # A, bits per byte at one byte
    exponent: float  # b
    draws: np.ndarray  # (DRAWS, 3): E, A, b, fitted to records with noise
    noise: float  # its standard deviation, bits per byte
    measured: bool  # whether that comes from seeds, with ASSUMED degrees of freedom or more
    n_bytes: tuple[int, int]  # fewest and most bytes of the records
    points: list[tuple[int, float]]  # (bytes, bits per byte) of each record
    data: str  # what was scored
    records: list[str]  # names of their models

    def at(self, n_bytes: float) -> tuple[float, float, float]:
        """(bits per byte, and its 95 % interval) after this many bytes.

        The interval covers the noise of the trainings in the records, and what that does to the
        curve; it does not cover that the curve may bend.
        """
        E, A, b = self.draws.T
        low, high = np.quantile(E + A * n_bytes**-b, (0.025, 0.975))
        value = self.floor + self.scale * n_bytes**-self.exponent
        return float(value), float(low), float(high)

    def summary(self) -> dict:
        """The fields as JSON, without the draws."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "draws"}

    def is_far(self, n_bytes: float) -> bool:
        """Whether that is far from all records, so that the curve is a guess."""
        low, high = self.n_bytes
        return not low / FAR <= n_bytes <= high * FAR


def curves(records: list[dict]) -> list[Curve]:
    """The curves that these records support; none if there are too few of one kind.

    Records scored on different bytes or in different windows are never mixed: of several sets, the
    one with most records counts.
    """
    groups: dict[tuple, dict[tuple, list[dict]]] = {}
    for r in records:
        match = NAME.fullmatch(r["model"])
        if (
            match
            and match[1] in PRESETS
            and r["kind"] == "exact"
            and r["bytes_seen"]
            and not r["trained_on_it"]
        ):
            context = (r["context"]["window"], r["context"]["stride"])
            scored = (r["data"]["sha256"], *context)
            groups.setdefault(match.groups()[:3], {}).setdefault(scored, []).append(r)
    found = []
    for (preset, linear, prior), sets in sorted(groups.items()):
        chosen = max(sets.values(), key=len)
        if len({r["bytes_seen"] for r in chosen}) >= LEAST_POINTS:
            found.append(_curve(preset, linear, prior, chosen))
    return found


def _curve(preset: str, linear: str, prior: str, records: list[dict]) -> Curve:
    points = sorted((r["bytes_seen"], r["bpb"]) for r in records)
    seen: dict[int, list[dict]] = {}
    for r in records:
        seen.setdefault(r["bytes_seen"], []).append(r)
    groups = [[r["bpb"] for r in seen[n]] for n in sorted(seen)]
    x, y = np.array(sorted(seen), float), np.array([np.mean(group) for group in groups])
    # Trainings behind each mean: records of unknown or equal seeds may be of a single one.
    n = np.array([len(seen[k]) if runs_word(seen[k]) == "seeds" else 1 for k in sorted(seen)])
    freedom = int((n - 1).sum())
    squares = sum(k * np.var(group) for k, group in zip(n, groups, strict=True) if k > 1)
    noise = float(np.sqrt((ASSUMED * NOISE**2 + squares) / (ASSUMED + freedom)))
    rng = np.random.default_rng(0)
    noisy = y + rng.normal(size=(DRAWS, len(y))) * noise / np.sqrt(n)
    E, A, b = fit(x, y)
    first = records[0]
    windows = f"{first['context']['window']}/{first['context']['stride']}"
    return Curve(
        preset=preset, linear=linear, prior=prior, floor=E, scale=A, exponent=b,
        draws=np.array([fit(x, row) for row in noisy]), noise=noise, measured=freedom >= ASSUMED,
        n_bytes=(int(x[0]), int(x[-1])), points=points,
        records=sorted({r["model"] for r in records}),
        data=f"{first['bytes']:,} bytes of {first['data']['path']}, windows {windows}",
    )  # fmt: skip


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(E, A, b) with the least squared error of E + A x^-b, where E and A are not negative.

    For each b the best E and A are those of a line; then the best b of many is taken.
    """
    powers = x[None] ** -EXPONENTS[:, None]
    p, q = powers.mean(1, keepdims=True), y.mean()
    A = ((powers - p) * (y - q)).sum(1) / ((powers - p) ** 2).sum(1)
    E = q - A * p[:, 0]
    through_0 = (powers * y).sum(1) / (powers**2).sum(1)  # the best A where E is 0
    A, E = np.where(E < 0, through_0, A), np.maximum(E, 0)
    A, E = np.where(A < 0, 0, A), np.where(A < 0, q, E)  # it does not fall: flat
    errors = ((E[:, None] + A[:, None] * powers - y) ** 2).sum(1)
    k = int(errors.argmin())
    return float(E[k]), float(A[k]), float(EXPONENTS[k])
