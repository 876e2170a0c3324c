"""The lens: totals of the evaluator, columns by hand, patches, edits, an early stop."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Bytes, sharp

from bitbyte import scoring
from bitbyte.config import DiffusionConfig, MambaConfig, TransformerConfig
from bitbyte.evaluate import entropy
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import build
from bitbyte.vocab import MASK, START

SHAPE = {"n_layer": 2, "d_model": 32, "seq_len": 32}
MODELS = {
    "ar": TransformerConfig(**SHAPE, d_ff=48, n_head=2),
    "mamba": MambaConfig(**SHAPE),
    "diffusion": DiffusionConfig(**SHAPE, d_ff=48, n_head=2),
}
RNG = np.random.default_rng(0)
TEXT = bytes(RNG.integers(0, 256, 1003, dtype=np.uint8).tolist())  # a short last window


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return sharp(MODELS[request.param], seed=1)


def law_of(model, data: bytes, i: int, window: int, stride: int) -> np.ndarray:
    """The law that predicts byte i, from one forward pass of its own."""
    cut = scoring.windows(len(data), window, stride)
    a, b = next((a, b) for a, b, first in cut if first <= i < b)
    if model.config.family == "diffusion":
        ids = torch.tensor([[*data[a:i], *[MASK] * (b - i)]])
        logits_V = model.logits(ids)[0, i - a]
    else:
        logits_V = model.logits(torch.tensor([[START, *data[a:i]]]))[0, -1]
    return logits_V.detach().double().softmax(-1).numpy()


@pytest.mark.parametrize("stride", [32, 20])
def test_totals_agree_with_the_evaluator(model, stride):
    costs = entropy.read(model, TEXT, stride=stride, batch_size=8)
    kind = "chain_rule:left_to_right" if model.config.family == "diffusion" else "exact"
    scored = scoring.score(model, Bytes(TEXT), stride=stride, kind=kind)
    assert costs.kind == kind and costs.data == TEXT
    assert costs.bpb == pytest.approx(scored.bpb, abs=1e-6)
    assert (costs.window, costs.stride) == (32, stride)
    parts = scoring.surprisal(model, Bytes(TEXT), window=32, stride=stride, kind=kind)
    want_n = np.concatenate([bits for _, bits in parts])
    assert np.abs(costs.bits - want_n).max() < 1e-4


def test_every_column_by_hand(model):
    data = TEXT[:45]
    costs = entropy.read(model, data, window=20, stride=7, top=4, batch_size=3)
    for i, byte in enumerate(data):
        law_V = law_of(model, data, i, 20, 7)
        assert costs.bits[i] == pytest.approx(-math.log2(law_V[byte]), abs=1e-4)
        assert costs.entropy[i] == pytest.approx(-(law_V * np.log2(law_V)).sum(), abs=1e-4)
        order = np.argsort(-law_V, kind="stable")
        assert costs.rank[i] == order.tolist().index(byte)
        assert costs.top_ids[i].tolist() == order[:4].tolist()
        assert costs.top_probs[i] == pytest.approx(law_V[order[:4]], rel=1e-4)
    columns = {name: getattr(costs, name).dtype.name for name in entropy.COLUMNS}
    assert list(columns.values()) == ["float64", "float32", "uint8", "uint8", "float32"]


def test_equal_probabilities_rank_by_value():
    data = bytes([0, 255, 7, 7])
    costs = entropy.read(scoring.Uniform(16), data, top=3)
    assert costs.kind == "exact" and costs.bpb == pytest.approx(8, abs=1e-6)
    assert costs.rank.tolist() == [0, 255, 7, 7]
    assert costs.top_ids.tolist() == [[0, 1, 2]] * 4
    assert costs.entropy == pytest.approx(8, abs=1e-5)


def test_a_certain_law_has_entropy_0():
    model = scoring.Uniform(16)
    model.logits = lambda ids_BT: torch.nn.functional.one_hot(ids_BT % 256, 256) * 100.0
    costs = entropy.read(model, b"aaaaaaab")  # says: as the byte before; START is read as 0
    assert costs.bits[1:7] == pytest.approx(0, abs=1e-9)
    assert costs.entropy[1:7] == pytest.approx(0, abs=1e-9)
    assert costs.bits[0] == costs.bits[7] == pytest.approx(100 / math.log(2))
    assert costs.rank.tolist() == [97, 0, 0, 0, 0, 0, 0, 98]  # by value, a before b
    assert entropy.most_surprising(costs, 2) == [0, 7]
    assert entropy.most_surprising(costs, 99) == [0, 7, 1, 2, 3, 4, 5, 6]


def test_parts_are_the_whole_and_a_stop_leaves_a_prefix(model):
    whole = entropy.read(model, TEXT[:400], batch_size=4)
    parts = []
    stopped = entropy.read(
        model, TEXT[:400], batch_size=4, stopped=lambda: len(parts) == 2, on_part=parts.append
    )
    assert [len(part.data) for part in parts] == [128, 128]
    assert stopped.data == TEXT[:256] == b"".join(part.data for part in parts)
    for name in entropy.COLUMNS:
        assert np.array_equal(getattr(stopped, name), getattr(whole, name)[:256])
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(stopped, name))
    none = entropy.read(model, TEXT, stopped=lambda: True, top=2)
    assert none.data == b"" and none.top_ids.shape == (0, 2) and math.isnan(none.bpb)


def test_a_denoiser_hears_a_stop_between_passes():
    model, asked = build(MODELS["diffusion"]), itertools.count()
    passes = []
    logits = model.logits
    model.logits = lambda ids_BT: passes.append(1) or logits(ids_BT)
    costs = entropy.read(model, TEXT[:64], stopped=lambda: next(asked) > 5)
    assert costs.data == b"" and len(passes) == 5


def test_bad_input_is_named():
    model = build(MODELS["ar"])
    for options, words in (
        ({"window": 33}, "window is 33; this model scores windows of 1 to 32"),
        ({"window": 0}, "window is 0"),
        ({"stride": 33}, "stride is 33; it must be between 1 and the window, 32"),
        ({"top": 257}, "top is 257"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(BitbyteError, match=words):
            entropy.read(model, b"abc", **options)
    with pytest.raises(BitbyteError, match="no bytes"):
        entropy.read(model, b"")
    with torch.no_grad():
        model.embed[7] = math.nan
    with pytest.raises(RunError, match="not finite"):
        entropy.read(model, bytes([7, 7]))


@pytest.mark.parametrize("stride", [32, 11])
@pytest.mark.parametrize("position", [0, 40, 98])
def test_an_edit_equals_a_new_reading(model, stride, position):
    data = TEXT[:99]
    costs = entropy.read(model, data, stride=stride, top=3)
    byte = (data[position] + 1) % 256
    edit = entropy.edited(model, costs, position, byte)
    fresh = entropy.read(model, edit.costs.data, stride=stride, top=3)
    assert edit.costs.data == data[:position] + bytes([byte]) + data[position + 1 :]
    for name in entropy.COLUMNS:
        assert getattr(edit.costs, name) == pytest.approx(getattr(fresh, name), abs=1e-4)
    more_n = fresh.bits - costs.bits
    assert edit.here == pytest.approx(more_n[position], abs=1e-4)
    assert edit.after == pytest.approx(more_n[position + 1 :].sum(), abs=1e-3)
    later = [i for i in range(position + 1, 99) if abs(more_n[i]) > 0.1]
    assert edit.changed == later and (position == 98 or later)
    assert np.array_equal(edit.costs.bits[:position], costs.bits[:position])
    assert costs.data == data and not np.shares_memory(edit.costs.bits, costs.bits)


def test_an_edit_runs_only_the_windows_that_hold_the_byte():
    model, rows = build(MODELS["ar"]), []
    costs = entropy.read(model, TEXT[:320], stride=16)
    logits = model.logits
    model.logits = lambda ids_BT: rows.append(len(ids_BT)) or logits(ids_BT)
    edit = entropy.edited(model, costs, 100, TEXT[100])
    assert sum(rows) == 2  # 80..111 and 96..127
    assert edit.here == pytest.approx(0, abs=1e-5) and edit.changed == []
    with pytest.raises(BitbyteError, match="position is 320; this text has bytes 0 to 319"):
        entropy.edited(model, costs, 320, 0)
    with pytest.raises(BitbyteError, match="byte is 256"):
        entropy.edited(model, costs, 0, 256)


def test_boundaries_by_both_rules():
    values = [0.5, 2.0, 2.5, 1.0, 2.1, 2.0]
    assert entropy.boundaries(values, 2.0).tolist() == [1, 0, 1, 0, 1, 0]
    assert entropy.boundaries(values, 1.0, "jump").tolist() == [1, 1, 0, 0, 1, 0]
    assert entropy.boundaries([], 1.0).tolist() == []
    assert entropy.boundaries([9.0], 1.0, "jump").tolist() == [1]
    with pytest.raises(BitbyteError, match="global, jump"):
        entropy.boundaries(values, 1.0, "local")


def test_patch_stats_by_hand():
    data = b"to be  or not"
    starts = [i in (0, 3, 5, 7, 11) for i in range(len(data))]  # to_ be __ or_n ot
    stats = entropy.patch_stats(starts, data)
    assert stats["n_patches"] == 5
    assert stats["lengths"].tolist() == [0, 0, 3, 1, 1]
    assert stats["mean_bytes"] == pytest.approx(13 / 5)
    lengths = np.array([3, 2, 2, 4, 2])
    assert stats["variation"] == pytest.approx(lengths.std() / lengths.mean())
    assert stats["whitespace_agreement"] == pytest.approx(2 / 4)  # 3 and 7; not 5 and 11
    assert stats["whitespace_chance"] == pytest.approx(4 / 12)  # after 2, 5, 6 and 9
    alone = entropy.patch_stats([True, False], b"ab")
    assert alone["n_patches"] == 1 and math.isnan(alone["whitespace_agreement"])
    for starts, text in (([], b""), ([False, True], b"ab"), ([True], b"ab")):
        with pytest.raises(BitbyteError, match="a patch at the first byte"):
            entropy.patch_stats(starts, text)


@given(st.binary(min_size=1, max_size=60), st.floats(0, 8), st.sampled_from(entropy.RULES))
def test_patches_cover_the_text(data, threshold, rule):
    values = np.frombuffer(data, np.uint8) / 32
    starts = entropy.boundaries(values, threshold, rule)
    stats = entropy.patch_stats(starts, data)
    assert stats["n_patches"] == starts.sum() == stats["lengths"].sum()
    assert (stats["lengths"] * np.arange(len(stats["lengths"]))).sum() == len(data)
    assert stats["mean_bytes"] * stats["n_patches"] == pytest.approx(len(data))
    fewer = entropy.boundaries(values, threshold + 0.5, rule)
    assert not (fewer & ~starts).any()
