"""Figures: the data reach the axes, the same data give the same bytes, files are complete."""

import json
import os
import sys

import numpy as np
import pytest
from support import texts_in

pytest.importorskip("matplotlib")

from bitbyte.evaluate.scaling import curves
from bitbyte.files import BitbyteError
from bitbyte.plots import analysis, figures, style

RNG = np.random.default_rng(0)
ROWS = [{"step": s, "bytes": 512 * s, "seconds": 0.1 * s, "bpb": 8 / s**0.5} for s in range(1, 101)]
for _row in ROWS[9::10]:
    _row["val_bpb"] = _row["bpb"] + 0.1
RECORDS = [
    {"model": "b", "bpb": 1.9, "interval": [1.8, 2.0], "kind": "exact", "data": {"path": "w"}},
    {"model": "a", "bpb": 1.5, "interval": [1.4, 1.7], "kind": "upper_bound",
     "data": {"path": "w"}},
]  # fmt: skip

ODD = b"caf\xe9".decode("utf-8", "surrogateescape")  # the name of a folder

FIGURES = {
    "training": lambda: figures.training_curve({"micro": ROWS, "other $": ROWS[:50]}, floor=0.7),
    "position": lambda: figures.bpb_by_position(np.linspace(6, 2, 64)),
    "bytes": lambda: figures.byte_histogram(np.arange(256)),
    "ternary": lambda: figures.ternary_histogram({"l0": [0.3, 0.4, 0.3], "l1": [0.25, 0.5, 0.25]}),
    "table": lambda: figures.bpb_table_figure(RECORDS),
}


def line(axes, label):
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


@pytest.mark.parametrize("name", FIGURES)
def test_same_data_same_png_without_pyplot(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    first, second = style.png_bytes(FIGURES[name]()), style.png_bytes(FIGURES[name]())
    assert first == second and first.startswith(b"\x89PNG")
    figure = FIGURES[name]()
    assert style.png_bytes(figure) == style.png_bytes(figure) == first
    assert b"matplotlib" not in first.lower()  # no version, no date
    (axes,) = figure.axes
    assert axes.get_xlabel()
    assert axes.get_facecolor() == figure.get_facecolor() == (1, 1, 1, 1)


def test_user_settings_change_nothing():
    import matplotlib

    before = style.png_bytes(FIGURES["position"]())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert style.png_bytes(FIGURES["position"]()) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("x", ["step", "bytes", "seconds"])
def test_training_curve_draws_the_rows(x):
    figure = figures.training_curve({"micro": ROWS}, floor=0.75, x=x)
    axes = figure.axes[0]
    val_x, val_y = line(axes, "micro val")
    assert val_x.tolist() == [row[x] for row in ROWS if "val_bpb" in row]
    assert val_y.tolist() == [row["val_bpb"] for row in ROWS if "val_bpb" in row]
    train_x, train_y = line(axes, "micro train")
    bpb = np.array([row["bpb"] for row in ROWS])
    assert train_x.tolist() == [row[x] for row in ROWS]
    assert train_y[0] == bpb[0]
    assert train_y[50] == pytest.approx(bpb[48:53].mean())
    assert train_y[-1] == pytest.approx(bpb[-3:].mean())
    assert any(np.allclose(one.get_ydata(), 0.75) for one in axes.lines)
    assert "entropy floor 0.750" in texts_in(figure) and "bits per byte" in texts_in(figure)
    assert axes.get_ylim()[0] < 0.75 and axes.get_xlabel() == style.X_AXES[x]


def test_training_curve_skips_rows_that_hold_no_number():
    rows = [{"bytes": 1, "bpb": 3.0}, {"bytes": 2, "bpb": float("nan")}, {"bytes": 3, "lr": 0.1}]
    for foreign in ({"a": 1}, [1], "1", True, None, float("inf"), 1e308, 10**400):
        rows += [{"bytes": foreign, "bpb": 1.0}, {"bytes": 4, "bpb": foreign}]
    axes = figures.training_curve({"one": rows + [{"bytes": 5, "val_bpb": 1e308}] * 2}).axes[0]
    assert line(axes, "one train")[1].tolist() == [3.0] and len(axes.lines) == 1
    with pytest.raises(BitbyteError, match="no row has bytes"):
        figures.training_curve({"one": rows[1:]})
    with pytest.raises(BitbyteError, match="step, bytes, seconds"):
        figures.training_curve({"one": rows}, x="epochs")


def test_a_masked_run_is_dashed_and_its_bound_hollow():
    rows = [{"bytes": 1, "masked_bpb": 5.0}, {"bytes": 2, "masked_bpb": 4.0, "val_bound": 4.5}]
    figure = figures.training_curve({"ar": ROWS, "diffusion": rows})
    axes = figure.axes[0]
    looks = {one.get_label(): one for one in axes.lines}
    assert looks["diffusion train"].get_ydata().tolist() == [5.0, 4.5]  # smoothed
    assert looks["diffusion train"].get_linestyle() == "--" != looks["ar train"].get_linestyle()
    assert looks["diffusion val"].get_ydata().tolist() == [4.5]
    assert looks["diffusion val"].get_markerfacecolor() == "white"
    assert looks["ar val"].get_markerfacecolor() == looks["ar val"].get_color()
    assert "hollow: a bound" in axes.get_legend().get_title().get_text()


def test_a_run_in_blocks_is_dashed_and_its_validation_exact():
    rows = [{"bytes": 1, "masked_bpb": 5.0}, {"bytes": 2, "masked_bpb": 4.0, "val_bpb": 4.5}]
    axes = figures.training_curve({"blocks": rows}).axes[0]
    looks = {one.get_label(): one for one in axes.lines}
    assert looks["blocks train"].get_linestyle() == "--"
    assert looks["blocks val"].get_ydata().tolist() == [4.5]
    assert looks["blocks val"].get_markerfacecolor() == looks["blocks val"].get_color()
    title = axes.get_legend().get_title().get_text()
    assert "dashed: masked bytes" in title and "a bound" not in title


def test_ways_of_writing_are_points():
    rows = [{"way": "a|b$", "bytes_per_cpu_second": 10.0, "bpb": 3.0},
            {"way": "c", "bytes_per_cpu_second": 1000.0, "bpb": 4.0}]  # fmt: skip
    axes = figures.writing_figure(rows, truth=2.0).axes[0]
    points = [(*one.get_xdata(), *one.get_ydata()) for one in axes.lines[:2]]
    assert points == [(10, 3), (1000, 4)] and axes.get_xscale() == "log"
    assert "true text 2.000" in [text.get_text() for text in axes.texts]
    with pytest.raises(BitbyteError, match="no ways"):
        figures.writing_figure([])


@pytest.mark.parametrize("n", [4, 8])
def test_many_runs_have_a_legend_beside_the_axes(n):
    figure = figures.training_curve({f"run {i}": ROWS for i in range(n)})
    assert len(figure.legends) == 1
    assert {f"run {i}" for i in range(n)} <= set(texts_in(figure))


def test_names_that_are_not_text_are_shown_escaped():
    """Of runs, whose folders have any name, and in the records of others."""
    curve = {"predicted": [0.1, 0.5], "observed": [0.2, 0.4], "hits": [9, 9], "error": 0.1}
    for figure in (
        figures.training_curve({ODD: ROWS}), figures.bpb_by_position({ODD: [1.0, 2.0]}),
        figures.bpb_table_figure([RECORDS[0] | {"model": ODD}]),
        analysis.calibration_curve({ODD: curve}), analysis.staircase({ODD: 1.0, "b": 2.0}),
        analysis.costs_by_byte(b"ab", {ODD: [1.0, 2.0]}),
    ):  # fmt: skip
        assert style.png_bytes(figure)
        assert any("caf\\xe9" in text for text in texts_in(figure))


def test_bpb_by_position():
    bits = RNG.uniform(1, 3, 300)
    bits[7] = np.nan
    figure = figures.bpb_by_position({"dense": bits, "ternary": bits + 1}, reference=1.25)
    axes = figure.axes[0]
    raw_x, raw_y = axes.lines[0].get_data()
    assert raw_x.tolist() == [p for p in range(1, 301) if p != 8]
    assert raw_y.tolist() == np.delete(bits, 7).tolist()
    bin_x, bin_y = line(axes, "dense")
    assert (bin_x[0], bin_y[0]) == (1, bits[0]) and len(bin_x) < 40
    assert axes.get_xscale() == "log" and "reference 1.250" in texts_in(figure)
    single = figures.bpb_by_position(bits)
    assert f"mean of the window {np.nanmean(bits):.3f}" in texts_in(single)
    for bad in (np.full(4, np.nan), [], np.ones((2, 2))):
        with pytest.raises(BitbyteError):
            figures.bpb_by_position(bad)


def test_byte_histogram():
    counts = np.zeros(256, int)
    counts[[0x00, 0x0A, 0x20, 0x24, 0x65, 0xC3]] = [1, 5, 60, 4, 20, 10]
    figure = figures.byte_histogram(counts)
    axes = figure.axes[0]
    bars = [patch.get_height() for patch in axes.containers[0]]
    np.testing.assert_allclose(bars, counts.astype(float))  # counts sum to 100: shares in %
    shown = texts_in(figure)
    for label in ("00", "\u23ce", "\u2423", "$", "e", "C3", "control", "ASCII", "UTF-8 lead"):
        assert label in shown
    assert axes.get_yscale() == "log"
    assert "e" not in [t.get_text() for t in figures.byte_histogram(counts, top=1).axes[0].texts]
    for bad in (np.zeros(256), np.ones(255), -np.ones(256)):
        with pytest.raises(BitbyteError):
            figures.byte_histogram(bad)


def test_ternary_histogram():
    fractions = {"block 0 out": (0.3, 0.4, 0.3), "block 1 out": (0.125, 0.625, 0.25)}
    figure = figures.ternary_histogram(fractions)
    axes = figure.axes[0]
    widths = np.array([[bar.get_width() for bar in group] for group in axes.containers]).T
    np.testing.assert_allclose(widths, 100 * np.array(list(fractions.values())))
    assert {"\u22121", "0", "+1", "62.5 %", "block 0 out"} <= set(texts_in(figure))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # first layer on top
    for bad in ({"x": (0.5, 0.5, 0.5)}, {"x": (1.2, -0.2, 0)}, {"x": (0.5, 0.5)}, {}):
        with pytest.raises(BitbyteError):
            figures.ternary_histogram(bad)


def test_bpb_table_figure_is_sorted_and_marks_bounds():
    figure = figures.bpb_table_figure(RECORDS)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    bars, dots = axes.lines[0::2], axes.lines[1::2]
    assert [list(bar.get_xdata()) for bar in bars] == [[1.4, 1.7], [1.8, 2.0]]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [1.5, 1.9]
    assert dots[0].get_markerfacecolor() == "white" != dots[1].get_markerfacecolor()
    assert {"\u2264 1.500", "1.900"} <= set(texts_in(figure))
    code = RECORDS[0] | {"kind": "chain_rule:left_to_right"}
    axes = figures.bpb_table_figure([code]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b, left to right"]
    assert axes.lines[1].get_marker() == "s"
    for other, labels in (
        ({"data": {"path": "v"}}, ["b on v", "a on w", "b on w"]),
        ({"bytes": 7000}, ["a on w, 0 bytes", "b on w, 0 bytes", "b on w, 7,000 bytes"]),
        ({"data": {"path": "w", "split": "train"}}, ["a on w, ", "b on w, ", "b on w, train"]),
    ):
        axes = figures.bpb_table_figure([*RECORDS, RECORDS[0] | other]).axes[0]
        assert [t.get_text() for t in axes.get_yticklabels()] == labels
    with pytest.raises(BitbyteError, match="no result records"):
        figures.bpb_table_figure([])


def test_save_writes_figure_and_data(tmp_path):
    data = {"bits": np.array([1.5, np.nan]), "n": np.int64(3), "rows": [{"a": (1, 2)}], "t": "x"}
    stem = tmp_path / "new" / "curve.v1"
    paths = style.save(FIGURES["position"](), stem, data)
    assert [p.name for p in paths] == ["curve.v1.pdf", "curve.v1.png", "curve.v1.json"]
    assert sorted(stem.parent.iterdir()) == sorted(paths)
    first = [p.read_bytes() for p in paths]
    assert first[0].startswith(b"%PDF") and b"CreationDate" not in first[0]
    assert first[1] == style.png_bytes(FIGURES["position"]())
    expected = {"bits": [1.5, None], "n": 3, "rows": [{"a": [1, 2]}], "t": "x"}
    assert json.loads(first[2]) == expected
    assert [p.read_bytes() for p in style.save(FIGURES["position"](), stem, data)] == first


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("follow", [True, False])
def test_a_link_of_the_user_is_followed(tmp_path, follow):
    (tmp_path / "curve.png").symlink_to(tmp_path / "far")
    style.save(FIGURES["position"](), tmp_path / "curve", {}, follow=follow)
    assert (tmp_path / "curve.png").is_symlink() == follow == (tmp_path / "far").exists()


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BitbyteError, match=r"bitbyte\[workbench\]"):
        figures.byte_histogram(np.ones(256))


@pytest.mark.parametrize("name", FIGURES)
def test_every_glyph_is_in_the_font(name, recwarn):
    style.png_bytes(FIGURES[name]())
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_every_byte_can_be_named(recwarn):
    figure = figures.byte_histogram(np.ones(256), top=256)
    assert {"A", "0B", "\u2423", "7F", "FF"} <= set(texts_in(figure))
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_old_names_warn_and_work():
    from bitbyte import plots
    from bitbyte.plots import analysis

    for home, old, new in (
        (plots, "COLOURS", style.COLORS), (plots, "byte_laws", figures.byte_probs),
        (figures, "byte_laws", figures.byte_probs), (analysis, "law_at", analysis.probs_at),
    ):  # fmt: skip
        with pytest.warns(DeprecationWarning, match=old):
            assert getattr(home, old) is new


def test_the_figure_of_a_grid():
    def cell(linear, steps, seed, bpb):
        return {
            "bpb": bpb, "bytes_seen": steps * 1e6, "packed_bytes": 5e5, "train_seconds": 60.0,
            "model": linear, "kind": "upper_bound" if linear == "ternary" else "exact",
            "grid": {"parameters": {"linear": linear, "steps": steps, "seed": seed}},
        }  # fmt: skip

    records = [
        cell(linear, steps, seed, 3.0 - steps + seed / 10)
        for linear in ("dense", "ternary") for steps in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    (axes,) = figures.grid_figure(records).axes
    x, y = line(axes, "dense")
    assert list(x) == [1, 1, 2, 2] and list(y) == pytest.approx([2.0, 2.1, 1.0, 1.1])
    faces = [one.get_markerfacecolor() for one in axes.lines if one.get_marker() == "o"]
    assert faces[0] != "white" == faces[1]  # a bound
    means = [one for one in axes.lines if one.get_linestyle() == "-"]
    assert [list(one.get_ydata()) for one in means] == [pytest.approx([2.05, 1.05])] * 2
    (axes,) = figures.grid_figure(records, "size").axes
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "dense steps 1", "dense steps 2", "ternary steps 1", "ternary steps 2"
    }  # fmt: skip
    with pytest.raises(BitbyteError, match="no axis 'time'"):
        figures.grid_figure(records, "time")
    with pytest.raises(BitbyteError, match="no records"):
        figures.grid_figure([])


def test_the_scaling_card():
    def record(linear, prior, n_bytes, bpb):
        return {
            "model": f"card-nano-{linear}-{prior}-{n_bytes}", "kind": "exact", "bpb": bpb,
            "bytes_seen": n_bytes, "bytes": 1000, "trained_on_it": False, "train_seed": 0,
            "context": {"window": 256, "stride": 128}, "data": {"sha256": "0", "path": "x"},
        }  # fmt: skip

    made = curves([
        record(linear, prior, n_bytes, bpb - (prior == "counts"))
        for linear in ("dense", "ternary") for prior in ("none", "counts")
        for n_bytes, bpb in ((1000, 4.0), (4000, 3.0), (16000, 2.5))
    ])  # fmt: skip
    dense, ternary = figures.scaling_card(made).axes
    assert [axes.get_title() for axes in (dense, ternary)] == ["dense", "ternary"]
    hollow = [one for one in dense.lines if one.get_markerfacecolor() == "white"]
    assert [list(one.get_ydata()) for one in hollow] == [[4.0, 3.0, 2.5]]
    fits = [one for one in dense.lines if one.get_linestyle() != "None"]
    assert sorted(round(float(one.get_ydata()[-1]), 2) for one in fits) == [1.5, 2.5]
    more = curves([record("dense", "none", n, 4.0) for n in (1000, 1500, 2000, 4500)])
    (dense,) = figures.scaling_card(more).axes
    assert dense.get_xticks().tolist() == [1000, 2000, 4500]
    with pytest.raises(BitbyteError, match="no curves to draw"):
        figures.scaling_card([])
