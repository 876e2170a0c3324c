"""Plots as text: the data are where they should be, no peak is lost, names stay text."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte.plots import svg
from bitbyte.plots.style import INK

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</title><script>alert("1")</script>&'


def drawn(text: str) -> ET.Element:
    """The plot as parsed XML, so escaping mistakes fail here."""
    return ET.fromstring(text)


def points(text: str) -> list[np.ndarray]:
    return [
        np.array([pair.split(",") for pair in line.get("points").split()], float)
        for line in drawn(text).iter(f"{SVG}polyline")
    ]


def titles(text: str) -> list[str]:
    return [title.text for title in drawn(text).iter(f"{SVG}title")]


def words(text: str) -> list[str]:
    return [one.text for one in drawn(text).iter(f"{SVG}text")]


def test_a_line_goes_through_its_points():
    text = svg.lines({"a": ([0, 5, 10], [1.0, 3.0, 2.0])}, width=460, height=180)
    left, right, top, floor = svg.LEFT, 460 - svg.RIGHT, svg.TOP, 180 - svg.BOTTOM
    expected = [[left, floor], [(left + right) / 2, top], [right, (top + floor) / 2]]
    assert points(text)[0].tolist() == pytest.approx(np.array(expected), abs=0.06)


def test_from_zero_and_levels_widen_the_axis():
    series = {"a": ([0, 1], [2.0, 4.0])}
    floor = 180 - svg.BOTTOM
    assert points(svg.lines(series))[0][0, 1] == floor
    middle = (svg.TOP + floor) / 2
    assert points(svg.lines(series, y_from_zero=True))[0][0, 1] == pytest.approx(middle, abs=0.06)
    levelled = svg.lines(series, levels={"floor 0": 0.0})
    assert points(levelled)[0][0, 1] == pytest.approx(middle, abs=0.06)
    assert "floor 0" in words(levelled)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=400), st.integers(1, 30))
def test_extremes_keep_ends_and_peaks_of_every_piece(values, buckets):
    x_n, y_n = svg.extremes(np.arange(len(values)), values, buckets)
    kept = dict(zip(x_n.astype(int).tolist(), y_n.tolist(), strict=True))
    assert list(kept) == sorted(kept) and all(values[i] == y for i, y in kept.items())
    if len(values) <= 2 * buckets:
        assert len(kept) == len(values)
        return
    assert len(kept) <= 2 * buckets + 2 and {0, len(values) - 1} <= {*kept}
    for start, stop in pairwise(np.linspace(0, len(values), buckets + 1).astype(int).tolist()):
        there = [kept[i] for i in range(start, stop) if i in kept]
        assert (min(there), max(there)) == (min(values[start:stop]), max(values[start:stop]))


def test_a_single_peak_among_many_points_is_drawn():
    y_n = np.zeros(100_000)
    y_n[54_321] = 9.0
    text = svg.lines({"a": (np.arange(100_000), y_n)})
    assert points(text)[0][:, 1].min() == svg.TOP
    assert len(points(text)[0]) <= 2 * svg.BUCKETS + 2
    (told,) = [title for title in titles(text) if "9" in title.splitlines()[1]]
    low, high = (float(n.replace(",", "")) for n in told.splitlines()[0].split(" to "))
    assert low <= 54_321 <= high and told.splitlines()[1] == "a: 0 to 9"
    assert len(text) < 30_000


def test_unknown_values_are_left_out():
    text = svg.lines({"a": ([0, 1, 2], [1.0, math.nan, 3.0]), "b": ([0], [math.inf])})
    assert len(points(text)[0]) == 2
    assert "nan" not in text and "inf" not in text


def test_huge_values_are_left_out_and_names_are_text():
    x, y = [1.0, 2.0, 3.0, 1e308], [1.0, 1e308, -1e308, 2.0]
    text = svg.lines({"caf\udce9": (x, y)}, levels={"\ud83d": 1.0})
    assert text.encode() and "<circle" in text and "caf\\xe9" in text


def test_one_point_is_a_dot_and_nothing_says_so():
    dot = drawn(svg.lines({"a": ([3], [2.0])}))
    (circle,) = dot.iter(f"{SVG}circle")
    assert svg.LEFT < float(circle.get("cx")) < 460 - svg.RIGHT
    for empty in (svg.lines({}), svg.lines({"a": ([], [])}), svg.bars([], [])):
        assert words(empty) == ["nothing yet"] and drawn(empty).get("width") == "460"


def test_the_cursor_stands_at_its_x_or_nowhere():
    def cursor(x):
        text = svg.lines({"a": ([0, 10], [0, 1])}, cursor=x)
        return [line.get("x1") for line in drawn(text).iter() if line.get("class") == "bb-cursor"]

    assert cursor(5) == [f"{(svg.LEFT + 460 - svg.RIGHT) / 2:.1f}"]
    assert cursor(None) == cursor(11) == []


def test_every_text_is_escaped():
    plot = svg.lines(
        {HOSTILE: ([0, 1], [0, 1])}, xlabel=HOSTILE, ylabel=HOSTILE, levels={HOSTILE: 0.5}
    )
    for text in (plot, svg.bars([HOSTILE], [1.0], xlabel=HOSTILE, ylabel=HOSTILE)):
        assert "<script" not in text
        assert words(text).count(HOSTILE) >= 3 and drawn(text).get("aria-label") == HOSTILE
        assert any(HOSTILE in title for title in titles(text))


def test_text_takes_the_color_of_the_page():
    text = svg.lines({"a": ([0, 1], [0, 1])})
    assert f"color:{INK}" in text and 'fill="currentColor"' in text
    strokes = set(re.findall(r'stroke="([^"]+)"', text))
    assert strokes == {"currentColor", svg.COLORS[0]}


def test_lines_differ_in_color_and_dash():
    text = svg.lines({str(i): ([0, 1], [i, i]) for i in range(6)})
    looks = {
        (one.get("stroke"), one.get("stroke-dasharray"))
        for one in drawn(text).iter(f"{SVG}polyline")
    }
    assert len(looks) == len({a for a, _ in looks}) == len({b for _, b in looks}) == 6


def test_bars_have_heights_and_titles():
    text = svg.bars(["1", "2", "3+"], [4, 0, 2], height=120)
    tall = [float(bar.get("height")) for bar in drawn(text).iter(f"{SVG}rect")]
    assert tall == [120 - svg.TOP - svg.BOTTOM, 0, (120 - svg.TOP - svg.BOTTOM) / 2]
    assert titles(text) == ["1: 4", "2: 0", "3+: 2"]
    crowded = svg.bars([str(i) for i in range(1000, 1100)], range(100))
    assert len([word for word in words(crowded) if word.startswith("10")]) < 20
    assert len(titles(crowded)) == 100


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 4, [-2, 0, 2, 4]),
     (900, 2100, [1000, 1500, 2000])],
)  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0003, "0.0003"), (2.5, "2.5"), (1500, "1,500"), (2_500_000, "2.5M"),
     (3e9, "3G"), (-2000, "-2,000")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert svg.number(value) == text
