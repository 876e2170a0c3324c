"""What a benchmark compares: sides that do the same work, in pairs and groups."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much work the rows do; the targets are for the defaults."""

    loader_bytes: int = 256_000_000  # file the batches come from, in the page cache
    batches: tuple[tuple[int, int], ...] = ((16, 1024), (64, 1024))  # windows x bytes
    n_layer: int = 6  # the step's model; heads of 64
    d_model: int = 384
    d_ff: int = 1024
    seq_len: int = 512  # bytes
    batch: int = 4  # windows
    pack_bytes: int = 1_000_000_000  # one file
    min_seconds: float = 0.1  # a measurement repeats its call until it lasts this long
    mixed: int = 300_000  # bytes that are compressed by the mixer; a tenth with a model
    decode: tuple[str, ...] = ("micro", "small", "base")  # presets
    device: str = "cpu"  # of the step; the other rows run on the CPU


class Side(NamedTuple):
    """One way to do the work.  With ``before`` (not timed), a measurement is a single call."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


class Pair(NamedTuple):
    """Two sides to compare, by name; ``target`` is the smallest ratio that is good enough."""

    ours: str
    peer: str
    target: float | None = None


class Group(NamedTuple):
    """Sides that are measured in turn, and the pairs that they give."""

    case: str  # what the work is
    sides: dict[str, Side]
    pairs: list[Pair]
    facts: dict  # for the record


def no_package(name: str, extra: str = "bench") -> str | None:
    """Why a package cannot be used; None if it can."""
    why = f'{name} is missing: pip install "bitbyte[{extra}]"'
    return None if importlib.util.find_spec(name) else why
