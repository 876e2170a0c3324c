"""Translated functions compute what Python does."""

import math
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite")

from support import ROOT

from bitbyte.compress.mixer import memory
from bitbyte.kernels.native import translate

OFFSETS = (3, -5, 7)
numbers = st.integers(-(2**30), 2**30)


class Pair(NamedTuple):
    small: np.ndarray
    wide: np.ndarray


class Outer(NamedTuple):
    pair: Pair
    loose: np.ndarray


def pair() -> Pair:
    return memory.in_one_block(Pair(np.arange(8, dtype=np.int16), memory.zeros((3, 4), np.int32)))


def both(function, *arguments):
    """What the arrays among the arguments hold after Python and after machine code."""

    def copied(value):
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, tuple):
            parts = type(value)(*(copied(v) for v in value))
            return memory.in_one_block(parts) if isinstance(value, Pair) else parts
        return value

    def arrays(value):
        if isinstance(value, np.ndarray):
            return [value.tolist()]
        return [a for v in value for a in arrays(v)] if isinstance(value, tuple) else []

    one, two = ([copied(v) for v in arguments] for _ in range(2))
    function(*one)
    translate.Compiled(function, "tests")(*two)
    return arrays(tuple(one)), arrays(tuple(two))


def _arithmetic(out, a, b, n):
    out[0], out[1], out[2] = a + b, a - b, a * b
    out[3], out[4] = a // b, a % b
    out[5], out[6], out[7] = a << n, a >> n, ~a
    out[8], out[9], out[10] = a & b, a | b, a ^ b
    out[11], out[12], out[13] = min(a, b, 5), max(a, b), abs(a)
    out[14] = a < b
    out[15] = -100 <= a < b
    out[16] = 1 if a == b or (a > 0 and b == 3) else -1
    out[17] = -a + OFFSETS[1] + (7 - 2) * len(OFFSETS)
    out[18] = int(a) if b is not None else 0


@given(numbers, numbers.filter(bool), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_arithmetic(a, b, n):
    one, two = both(_arithmetic, np.zeros(19, np.int64), a, b, n)
    assert one == two


def _triangle(n):
    total = 0
    for i in range(n):
        for j in range(i, -1, -2):
            if j == 3:
                continue
            if i * j > 60:
                break
            total += j
    while total > 100:
        total -= 7
    return total


def _first_at_least(row, least):
    for i in range(len(row)):
        if row[i] >= least:
            return i
    return -1


def _steps(out, z, text, missing):
    out[0] = _triangle(int(text[0]))
    last = unset = 5
    if missing is None:
        unset = 1
    elif missing > 3:
        out[1] = 1
    else:
        out[1] = 2
    out[2], out[3] = last, unset
    p, loose = z.pair, z.loose
    for k in range(3):
        for i in range(4):
            p.wide[k, i] += int(p.small[k + i]) * 1000 - int(loose[i])
        p.small[k] = int(p.wide[k, 3]) - 9000
        out[4 + k] = _first_at_least(p.wide[k], 2500)
    out[7] = p.wide.shape[1] + len(text)
    last -= 1
    out[8] = last


@pytest.mark.parametrize("missing", [None, 3, 4])
@pytest.mark.parametrize("n", [0, 1, 9, 200])
def test_control_flow_and_arrays(missing, n):
    z = Outer(pair(), np.array([5, 6, -(2**30), 8]))
    one, two = both(_steps, np.zeros(9, np.int64), z, np.array([n, 255], np.uint8), missing)
    assert one == two


def _half(x) -> float:
    return x / 2


def _floats(out, whole, a, b):
    out[0] = _half(float(a)) + 0.25
    out[1] = math.sqrt(abs(a) * 1.0) * b
    whole[0] = math.floor(out[1] - 0.5)
    whole[1] = out[0] == out[0] and out[1] > 1.5
    out[2] = -out[1] - b
    total = 0.0
    for i in range(3):
        total += out[i] * 0.1
    out[3] = total


@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
@settings(max_examples=40, deadline=None)
def test_floats(a, b):
    one, two = both(_floats, np.zeros(4), np.zeros(2, np.int64), a, b)
    assert one == two


def _outside(out, i):
    out[i, 1] = 1


STOPPED = """
import numpy as np
from test_translate import _outside
from bitbyte.kernels.native import translate
translate.Compiled(_outside, "tests", True)(np.zeros((3, 2), np.int64), {index})
"""


@pytest.mark.parametrize(("index", "stopped"), [(2, False), (3, True), (-1, True)])
def test_indices_can_be_checked(index, stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "core"]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))
    command = [sys.executable, "-c", STOPPED.format(index=index)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode != 0) == stopped


def _unknown(out):
    out[0] = [1, 2][0]


def _fresh(out):
    x = out[0]
    x = out
    out[1] = x[0]


@pytest.mark.parametrize("function", [_unknown, _fresh])
def test_what_cannot_be_translated(function):
    with pytest.raises(SyntaxError, match=r"test_translate\.py:\d+: "):
        translate.Compiled(function, "tests")(np.zeros(2, np.int64))


def test_kinds_of_arguments():
    kind, numbers = translate.take_apart(Outer(pair(), np.zeros(3)), "z")
    assert kind[0] == "fields" and [k[0] for k in kind[2]] == ["block", "array"]
    assert len(numbers) == 3 and numbers[2] == 3


def _whole(out):
    out[0] = int(math.sqrt(2.0 + out[0]))


def test_a_float_does_not_become_an_integer_unnoticed():
    with pytest.raises(AssertionError, match="cannot become an integer"):
        translate.Compiled(_whole, "tests")(np.zeros(1, np.int64))


def _defaults(out, n, more=None):
    out[0] = n if more is None else n + more


def test_default_arguments():
    function, out = translate.Compiled(_defaults, "tests"), np.zeros(1, np.int64)
    function(out, 3)
    assert out[0] == 3
    function(out, 3, 4)
    assert out[0] == 7


def test_code_is_kept_per_source_and_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for sources, n_files in (("a", 1), ("a", 1), ("b", 2)):
        translate.Compiled(_defaults, sources)(np.zeros(1, np.int64), 3)
        assert len(list(tmp_path.rglob("*.o"))) == n_files
    translate.Compiled(_defaults, "a")(np.zeros(1, np.int64), 3, 4)
    assert len(list(tmp_path.rglob("*.o"))) == 3
    for path in tmp_path.rglob("*.o"):
        path.write_bytes(b"damaged")
    out = np.zeros(1, np.int64)
    translate.Compiled(_defaults, "a")(out, 3)
    assert out[0] == 3
