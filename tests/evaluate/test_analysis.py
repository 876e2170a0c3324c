"""Analysis arrays against counting by hand, and their figures."""

import itertools
import json
import math
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import sharp, texts_in

from bitbyte import ngrams, scoring
from bitbyte.config import DiffusionConfig, TransformerConfig
from bitbyte.evaluate import analysis, entropy
from bitbyte.evaluate.analysis import CLASSES
from bitbyte.files import BitbyteError
from bitbyte.models import build, preceding

SHAPE = {"n_layer": 2, "d_model": 32, "d_ff": 48, "n_head": 2, "seq_len": 32}
TEXT = ("Tom has 3 figs.\tAnn, 2.\nZo\u00eb: \u20ac 5 \U0001f600 " * 6).encode() + b"\x00\xff\x80"


@pytest.fixture(scope="module")
def model():
    return sharp(TransformerConfig(**SHAPE), seed=1, by=10)


@pytest.fixture(scope="module")
def costs(model):
    return entropy.read(model, TEXT, stride=20)


@pytest.fixture(scope="module")
def probs(model):
    """(n, V) all laws of TEXT with stride 20, one by one."""
    laws = [analysis.probs_at(model, TEXT, i, stride=20) for i in range(len(TEXT))]
    return np.stack(laws)


def names(data: bytes) -> list[str]:
    return [CLASSES[c] for c in analysis.byte_classes(data)]


def test_classes_of_all_kinds():
    assert names(b"aZ5 \n_\x00\x7f") == [
        "letter", "letter", "digit", "white space", "white space", "punctuation", "control",
        "control",
    ]  # fmt: skip
    two, three, four = "\u00eb".encode(), "\u20ac".encode(), "\U0001f600".encode()
    tail = ["UTF-8 byte 2", "UTF-8 byte 3", "UTF-8 byte 4"]
    for character, n in ((two, 2), (three, 3), (four, 4)):
        assert names(character) == ["UTF-8 lead", *tail[: n - 1]]
        assert names(character + b"\x80a") == ["UTF-8 lead", *tail[: n - 1], "not UTF-8", "letter"]
    assert names(b"\x80\x80") == ["not UTF-8"] * 2
    assert names(b"\xc0\x80\xf5\x80\xff") == ["not UTF-8"] * 5
    assert names(four[:2] + two) == ["UTF-8 lead", "UTF-8 byte 2", "UTF-8 lead", "UTF-8 byte 2"]
    assert names(b"") == []


@given(st.text(max_size=12))
def test_classes_of_any_text(text):
    want = []
    for character in text:
        size = len(character.encode())
        if size > 1:
            want += ["UTF-8 lead", *(f"UTF-8 byte {place}" for place in range(2, size + 1))]
        elif character in " \t\n\v\f\r":
            want.append("white space")
        else:
            kind = unicodedata.category(character)[0]
            known = {"L": "letter", "N": "digit", "C": "control"}
            want.append(known.get(kind, "punctuation"))
    assert names(text.encode()) == want


@given(st.binary(max_size=12))
def test_classes_do_not_depend_on_what_follows(data):
    for n in range(len(data)):
        assert names(data)[:n] == names(data[:n])


def test_by_class_counts_by_hand(costs):
    table = analysis.by_class(costs)
    of = np.array(names(TEXT))
    assert table["counts"].sum() == len(TEXT)
    for name, count, bits, entropy_ in zip(*table.values(), strict=True):
        where = of == name
        assert count == where.sum() > 0
        assert bits == pytest.approx(costs.bits[where].mean(), rel=1e-9)
        assert entropy_ == pytest.approx(costs.entropy[where].mean(), rel=1e-5)
    only = entropy.read(scoring.Uniform(), b"a1")
    assert np.isnan(analysis.by_class(only)["bits"][2:]).all()


def test_counted_is_the_backoff_stage_by_stage():
    training = np.frombuffer(TEXT * 3, np.uint8)

    def read(start, stop):
        return training[start:stop]

    bits = analysis.counted(read, len(training), TEXT, orders=2, rows=1 << 10)
    assert list(bits) == ["nothing", "order 1", "order 2", "word"]
    assert bits["nothing"].tolist() == [8] * len(TEXT)
    after_o = [
        b for a, b in itertools.pairwise(TEXT * 3) if a == ord("o")
    ]  # by hand: "m" after "o"
    seen, kinds = after_o.count(ord("m")), len(set(after_o))
    want = (seen + kinds / 256) / (len(after_o) + kinds)
    assert 2 ** -bits["order 1"][TEXT.index(b"om") + 1] == pytest.approx(want)
    held_out = ngrams.Backoff(np.frombuffer(TEXT, np.uint8))
    for order in (1, 2, 0):
        held_out.add(ngrams.count(read, len(training), order, 1 << 10, 3), order)
    assert bits["word"].mean() == pytest.approx(held_out.bpb)


@given(st.integers(1, 120), st.integers(1, 40), st.data())
def test_positions_are_those_of_the_windows(n, window, data):
    stride = data.draw(st.integers(1, window))
    got = analysis.positions(n, window, stride)
    cut = scoring.windows(n, window, stride)
    assert got.tolist() == [i - a for a, b, first in cut for i in range(first, b)]


def test_the_law_at_a_position_is_the_one_that_was_paid(costs, probs):
    true = np.frombuffer(TEXT, np.uint8)
    np.testing.assert_allclose(-np.log2(probs[np.arange(len(TEXT)), true]), costs.bits, atol=1e-5)
    with pytest.raises(BitbyteError, match="position is 5; this text has bytes 0 to 1"):
        analysis.probs_at(scoring.Uniform(), b"ab", 5)


def test_calibration_counts_by_hand(model, probs):
    table = analysis.calibration(model, TEXT, stride=20, batch_size=3)
    came = np.zeros_like(probs)
    came[np.arange(len(TEXT)), np.frombuffer(TEXT, np.uint8)] = 1
    bin_nV = np.clip(np.floor(4 * np.log10(probs)) + 29, 0, 28).astype(int)
    assert table["counts"].sum() == probs.size and table["hits"].sum() == len(TEXT)
    # A float32 probability on an edge may fall into the next bin.
    for q in range(29):
        where = bin_nV == q
        assert abs(table["counts"][q] - where.sum()) <= 1
        if where.sum() > 100:
            assert table["predicted"][q] == pytest.approx(probs[where].mean(), rel=1e-3)
            assert table["hits"][q] == pytest.approx(came[where].sum(), abs=1)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(table["observed"], table["hits"] / table["counts"])
    sums = [abs(came[bin_nV == q].sum() - probs[bin_nV == q].sum()) for q in range(29)]
    assert table["error"] == pytest.approx(sum(sums) / len(TEXT), abs=1e-2)


def test_a_law_that_tells_the_truth_is_calibrated():
    data = bytes(range(256)) * 2
    table = analysis.calibration(scoring.Uniform(), data)
    (q,) = np.flatnonzero(table["counts"])
    assert table["predicted"][q] == pytest.approx(1 / 256, rel=1e-6)
    assert table["observed"][q] == 1 / 256 and table["counts"][q] == 256 * 512
    assert table["error"] == pytest.approx(0, abs=1e-6)
    sure = scoring.Uniform()
    sure.logits = lambda ids_BT: torch.nn.functional.one_hot(0 * ids_BT, 256) * 60.0
    table = analysis.calibration(sure, b"\0\0\0\1")  # says 0, and is wrong once in four
    assert table["observed"][-1] == 0.75 and table["hits"].tolist() == [1, *[0] * 27, 3]
    assert table["error"] == pytest.approx(0.5)


def test_confusion_by_hand(model, probs):
    table = analysis.confusion(model, TEXT, stride=20)
    true = np.frombuffer(TEXT, np.uint8)
    assert table["counts"].tolist() == np.bincount(true, minlength=256).tolist()
    for byte in range(256):
        if byte in TEXT:
            want = probs[true == byte].mean(0)
            np.testing.assert_allclose(table["mass"][byte], want, atol=1e-6)
        else:
            assert np.isnan(table["mass"][byte]).all()
    few = analysis.among_commonest(table, 5)
    kept = sorted(sorted(range(256), key=lambda b: (-TEXT.count(b), b))[:5])
    assert few["counts"].tolist() == [TEXT.count(byte) for byte in kept]
    assert few["columns"] == [*few["rows"], "rest"] and "\u2423" in few["rows"]
    np.testing.assert_allclose(few["mass"][:, :5], table["mass"][np.ix_(kept, kept)])
    np.testing.assert_allclose(few["mass"].sum(1), 1)
    classes = analysis.among_classes(table)
    np.testing.assert_allclose(classes["mass"].sum(1), 1)
    assert classes["counts"].sum() == len(TEXT)
    digits = [byte for byte in TEXT if chr(byte) in "0123456789"]
    row, column = classes["rows"].index("digit"), classes["columns"].index("letter")
    letters = [ord(c) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    want = probs[np.isin(true, digits)][:, letters].sum(1).mean()
    assert classes["mass"][row, column] == pytest.approx(want, abs=1e-6)
    assert len(analysis.among_commonest(table, 256)["rows"]) == len(set(TEXT))


def test_the_embedding_map_finds_planted_axes(model):
    planted = build(model.config)
    rows_VD = torch.zeros(257, 32)
    rows_VD[:256, 3] = torch.linspace(-4, 4, 256) ** 3
    rows_VD[:256, 7] = torch.tensor([1.0, -1.0]).repeat(128)
    rows_VD[256] = 1e6  # START must not matter
    with torch.no_grad():
        planted.embed.copy_(rows_VD)
    table = analysis.embedding_map(planted)
    along = np.linspace(-4, 4, 256) ** 3
    assert abs(np.corrcoef(table["points"][:, 0], along)[0, 1]) == pytest.approx(1, abs=1e-3)
    assert abs(np.corrcoef(table["points"][:, 1], rows_VD[:256, 7])[0, 1]) > 0.99
    assert table["explained"].sum() == pytest.approx(1)
    assert (table["points"].max(0) >= -table["points"].min(0) - 1e-9).all()
    assert table["classes"][0x41] == "letter" and table["classes"][0x90] == "UTF-8 continuation"
    assert table["classes"][0xE2] == "UTF-8 lead" and table["classes"][0xFF] == "not UTF-8"


@pytest.fixture(scope="module")
def figures(model, costs):
    """name -> (function that draws, its data)."""
    pytest.importorskip("matplotlib")
    from bitbyte.plots import analysis as ap

    table = analysis.confusion(model, TEXT)
    law = analysis.probs_at(model, TEXT, 40)
    data = {
        "calibration_curve": analysis.calibration(model, TEXT),
        "class_costs": analysis.by_class(costs),
        "confusion_map": analysis.among_commonest(table),
        "embedding_map": analysis.embedding_map(model),
        "probs_at": {"probs": law, "actual": TEXT[40]},
    }
    drawn = {name: (getattr(ap, name), {"": content}) for name, content in data.items()}
    classes = analysis.among_classes(table)
    drawn["confusion_classes"] = (ap.confusion_map, {"": classes})
    drawn["probs_at"] = (ap.probs_at, data["probs_at"])
    two = {"a $": data["calibration_curve"], "b": data["calibration_curve"]}
    drawn["calibration_curve"] = (ap.calibration_curve, {"": two})
    drawn["staircase"] = (ap.staircase, {"stages": {"nothing": 8, "a $": 2.5}, "floor": 0.5})
    strip = {"data": list(TEXT[:30]), "costs": {"a $": costs.bits[:30], "b": np.full(30, 8.0)}}
    drawn["costs_by_byte"] = (ap.costs_by_byte, strip)
    return drawn


def test_figures_are_drawn_and_saved_with_their_data(figures, tmp_path, monkeypatch):
    from bitbyte.plots import style

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    for name, (draw, data) in figures.items():
        figure = draw(*data.values())
        assert figure.axes[0].get_xlabel()
        paths = style.save(figure, tmp_path / name, data)
        assert [path.suffix for path in paths] == [".pdf", ".png", ".json"]
        assert json.loads(paths[2].read_text()).keys() == data.keys()


def test_figures_say_their_numbers(figures, costs):
    from bitbyte.plots import analysis as ap

    table = analysis.by_class(costs)
    bars = ap.class_costs(table)
    assert [bar.get_width() for bar in bars.axes[0].patches] == table["bits"].tolist()
    share = 100 * costs.bits[np.array(names(TEXT)) == "letter"].sum() / costs.bits.sum()
    assert f"{table['counts'][0]} bytes, {share:.1f} % of the bits" in texts_in(bars)
    law = np.full(256, 0.5 / 255)
    law[65] = 0.5
    text = "\n".join(texts_in(ap.probs_at(law, 0x42)))
    assert f"entropy {1 + 0.5 * math.log2(255):.2f} bits; B came: number 67" in text
    assert "\nB\n" in text  # the last bar, though not among the likeliest
    with pytest.raises(BitbyteError, match="probabilities has shape"):
        ap.probs_at(law[:9])
    steps = ap.staircase({"nothing": 8, "order 1": 3.25, "worse": 3.5}, floor=0.5)
    assert {"8.000", "3.250  (-4.750)", "3.500  (+0.250)"} <= set(texts_in(steps))
    strip = ap.costs_by_byte(b"Ab", {"counts": [7.6, 0.4], "model": [0.6, 0.2]})
    assert [text.get_text() for text in strip.axes[0].texts] == ["8", "", "1", ""]
    assert {"A", "b", "counts", "model"} <= set(texts_in(strip))
    with pytest.raises(BitbyteError, match="bits has shape"):
        ap.costs_by_byte(b"Abc", {"counts": [7.6, 0.4]})
    empty = {**figures["calibration_curve"][1][""]["b"], "hits": np.zeros(29)}
    with pytest.raises(BitbyteError, match="no hits"):
        ap.calibration_curve(empty)


@pytest.mark.parametrize("config", [TransformerConfig(**SHAPE), DiffusionConfig(**SHAPE)], ids=str)
def test_activations(config):
    """What a module returned; the logits from them; nothing is left behind."""
    model = sharp(config, seed=1, by=10)
    data = TEXT[:20]
    found = analysis.activations(model, data, "*.mlp", "norm", "logits")
    blocks = [f"transformer.blocks.{layer}.mlp" for layer in range(2)]
    assert list(found) == [*blocks, "norm", "logits"]  # in the order of computing
    assert {v.shape for k, v in found.items() if k != "logits"} == {(20, 32)}
    assert torch.equal(found["norm"] @ model.embed[:256].T, found["logits"])
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None].long()
    model.engine = "torch"
    with torch.no_grad():
        want = model.logits(preceding(ids) if model.exact else ids)[0]
    assert torch.equal(found["logits"], want)
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_that_are_not_there(model):
    before = model.engine
    with pytest.raises(BitbyteError, match=r"no module 'transformer.block.0'; there are tr"):
        analysis.activations(model, TEXT[:8], "transformer.block.0")
    for data in (b"", bytes(33)):
        with pytest.raises(BitbyteError, match=r"has 1 to 32"):
            analysis.activations(model, data, "norm")
    assert model.engine == before
