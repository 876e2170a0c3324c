"""Costs in the mixer: a distribution, the length of the code, divided among the experts."""

import itertools
import math
import os

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from support import save_run, words
from test_compress import TERNARY, built, drawn
from test_mixer import Model, samples, table_of_records, wav

from bitbyte.cli.dispatch import main
from bitbyte.compress import costs, frames, mixed, streamed
from bitbyte.compress.mixer import codec, trace
from bitbyte.compress.mixer.shapes import Shape
from bitbyte.compress.mixer.tables import ONE
from bitbyte.config import DiffusionConfig, MambaConfig
from bitbyte.evaluate import bootstrap, tables
from bitbyte.evaluate.records import MIXED, read_record
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.models import build

TEXT = words(400)
PLAIN = Shape()
SIZES = (1 << 12, 12)
DATA = {
    "text": TEXT, "one byte": b"x", "records": table_of_records(200),
    "sound": wav(samples(3000).tobytes()), "zeros": bytes(4000),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return built(TERNARY)


def payload(path) -> tuple[int, int]:
    """Bytes of code in a file, and of kinds and shapes."""
    with open(path, "rb") as file:
        source = frames.Source(file, "x")
        frames.read_header(source)
        found = list(frames._raw_frames(source))
    assert all(code is not None for _, _, code, _ in found)
    told = sum(1 + len(frames.pack_shape(shape)) for shape, *_ in found)
    return sum(len(code) for _, _, code, _ in found), told


@pytest.mark.parametrize("name", DATA)
def test_the_cost_is_the_length_of_the_code(name, tmp_path):
    """To two bytes a frame and a ten-thousandth: the last byte can stand for zeros after it."""
    data = DATA[name] * (40 if name == "one byte" else 1)
    (tmp_path / "s").write_bytes(data)
    done = mixed.compress([tmp_path / "s"], tmp_path / "p")
    code, told = payload(tmp_path / "p")
    bits_T = costs.Mixed().bits(data)
    cost = bits_T.sum() / 8 - told
    frames_in_it = 3 if name == "sound" else 1
    assert len(bits_T) == len(data) and bits_T.min() > 0
    assert cost - 1 <= code <= cost * 1.0001 + 2 * frames_in_it
    assert 0 < done.size - code - told <= 33 + 10 * frames_in_it


def test_with_a_model_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "NAMED", 0)  # a toy model may join for less
    data = drawn(model, 3000)
    (tmp_path / "s").write_bytes(data)
    expert = costs.expert_of(model)
    assert mixed.compress([tmp_path / "s"], tmp_path / "p", expert=expert).with_model
    code, told = payload(tmp_path / "p")
    cost = costs.Mixed(expert).bits(data).sum() / 8 - told
    assert cost - 1 <= code <= cost * 1.0001 + 2
    assert costs.read(data, expert).bits.sum() / 8 == pytest.approx(cost + told, rel=1e-12)


class Fixed:
    """An expert that expects the same at every byte, and may be asked about any number of them."""

    def __init__(self, counts_1V, peeks: bool = False):
        self.counts_1V, self.peeks = counts_1V, peeks

    def known(self, data):
        counts_TV = np.repeat(self.counts_1V, len(data), 0)
        if self.peeks:  # at the byte itself
            counts_TV = np.ones_like(counts_TV)
            counts_TV[np.arange(len(data)), data] = (1 << 24) - 255
        yield counts_TV


def total_of_all_bytes(before: bytes, expert, shape: Shape = PLAIN) -> int:
    """The sum of the probabilities of all 256 bytes after ``before``, times 2^128: an integer.

    The mixer learns ``before``; then each byte in turn is measured as `costs` does it, from the
    same state.  Within the byte it learns its bits, as it does when it codes.
    """
    total = 0
    meter = costs.Meter(*SIZES, expert)
    if before:
        meter.encode(np.frombuffer(before, np.uint8), shape)
    state = [*itertools.chain(*meter._mixer[:-1]), meter._mixer.buckets]
    kept = [part.copy() for part in state]
    for byte in range(256):
        ((_, _, seen),) = meter.measure(np.array([byte], np.uint8), shape)
        product = 1
        for bit, p in enumerate(seen.p_B.tolist()):
            product *= p if byte >> (7 - bit) & 1 else ONE - p
        total += product
        for part, old in zip(state, kept, strict=True):
            if part.flags.writeable:
                part[:] = old
    return total


PLACES = {
    "nothing": (b"", PLAIN), "text": (TEXT[:700], PLAIN), "a match": (b"abcdefghijkl" * 9, PLAIN),
    "records": (table_of_records(40)[:-5], Shape(record=24, record2=8)),
    "a picture": (bytes(range(64)) * 8, Shape(2, 64)), "zeros": (bytes(900), PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "with a model"])
def test_the_probabilities_of_the_256_bytes_sum_to_one(name, with_model, model):
    """To one exactly, in integers.  Published gains of mixing were often errors of this kind."""
    before, shape = PLACES[name]
    expert = None
    if with_model:
        streaming = streamed.Expert(model)
        list(streaming.known(np.frombuffer(before, np.uint8))) if before else None
        expert = Fixed(streaming.next().copy())
    assert total_of_all_bytes(before, expert, shape) == 1 << 128


def test_an_expert_that_peeks_is_found_out():
    assert total_of_all_bytes(TEXT[:300], Fixed(Model().table[:1], peeks=True)) > 1 << 129


def test_looking_changes_nothing():
    """The code, and all that was learnt, are the same with a trace, with groups, or with none."""
    data = np.frombuffer(TEXT, np.uint8)
    coder = codec.Codec(*SIZES, Model())
    code = coder.encode(data, PLAIN)
    for grouped in (False, True):
        meter = costs.Meter(*SIZES, Model())
        bits = [costs._bit_costs(part, seen.p_B).sum()
                for part, _, seen in meter.measure(data, PLAIN, grouped)]  # fmt: skip
        assert sum(bits) / 8 - 1 <= len(code) <= sum(bits) / 8 * 1.0001 + 2
        for mine, theirs in zip(meter._mixer, coder._mixer, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert np.array_equal(a, b)


def test_plain_python_sees_the_same():
    one, two = (costs.read(TEXT[:30], Model2(), fast=fast) for fast in (True, False))
    for name in ("bits", "model_bits", "saved", "weights"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


class Model2(Model):
    def begin(self):
        self.last = 0


@pytest.mark.parametrize("with_model", [False, True])
def test_what_was_saved_is_divided_among_the_experts(with_model):
    seen = costs.read(TEXT, Model2() if with_model else None)
    assert seen.saved.shape == (len(TEXT), len(costs.GROUPS))
    np.testing.assert_allclose(seen.saved.sum(1), 8 - seen.bits, atol=1e-9)
    by = seen.saved_by()
    assert sum(by.values()) == pytest.approx(8 - seen.bpb)
    assert (by["model"] != 0) == with_model
    assert min(by["orders"], by["words"], by["matches"]) > 0
    assert abs(by[costs.FINAL_MAPS]) < 0.6
    assert np.isnan(seen.model_bits).all() != with_model
    assert (seen.weights[:, trace.MODEL] != 0).any() == with_model
    if with_model:
        (counts_TV,) = [np.concatenate(list(Model2().known(np.frombuffer(TEXT, np.uint8))))]
        want = [-math.log2(counts_TV[i, byte] / 2**24) for i, byte in enumerate(TEXT)]
        np.testing.assert_allclose(seen.model_bits, want)


def test_certain_predictions_are_not_counted_twice():
    """Where sets of weights are clipped, no group gets more than came of it."""
    seen = costs.read(bytes(3000))
    assert np.abs(seen.saved[1000:]).max() < 9


def test_stopping():
    done = []
    seen = costs.read(TEXT * 40, stopped=lambda: True, on_part=done.append)
    assert done == [len(seen.data)] and 0 < len(seen.data) < len(TEXT) * 40
    assert len(costs.read(b"").bits) == 0 and math.isnan(costs.read(b"").bpb)


MAMBA = MambaConfig(n_layer=1, d_model=64, seq_len=32, d_state=16)


@pytest.mark.parametrize("cuts", [(700,), (1, 30, 31, 32, 33, 150, 700)], ids=str)
def test_an_expert_in_floats_sees_what_one_of_a_file_sees(cuts, model):
    data = np.frombuffer(drawn(model, 700), np.uint8)
    one, other = streamed.Expert(model), costs.Windowed(model)
    want = np.concatenate(list(one.known(data)))
    made = [counts for start, stop in zip((0, *cuts), cuts, strict=False)
            for counts in other.known(data[start:stop])]  # fmt: skip
    made = np.concatenate(made)
    assert made.shape == want.shape and made.dtype == np.int32
    assert (made.sum(1) == 1 << 24).all()
    np.testing.assert_allclose(made, want, rtol=1e-3, atol=200)
    other.begin()
    assert np.array_equal(next(other.known(data[:9])), made[:9])


def test_which_expert(model):
    assert isinstance(costs.expert_of(model), streamed.Expert)
    engine.choose(model, "torch")
    try:
        assert isinstance(costs.expert_of(model), costs.Windowed)
    finally:
        engine.choose(model, "auto")
    diffusion = build(DiffusionConfig(n_layer=1, d_model=64, d_ff=64, n_head=2, seq_len=32))
    with pytest.raises(BitbyteError, match="no next byte"):
        costs.expert_of(diffusion)


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    """A folder with a model "run" and a file "data"."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "a" / "checkpoints" / "run", model)
    (tmp_path / "data").write_bytes(drawn(model, 2500))
    return tmp_path


def test_the_command(place, capsys):
    assert main(["eval", "run", "--data", "data", "--kind", "exact", "exact:mixed"]) == 0
    assert main(["eval", "none", "--data", "data", "--limit", "2000"]) == 0
    said = capsys.readouterr().out
    assert "exact:mixed; 2,500 bytes, learnt as it goes" in said and "none: " in said
    found = sorted((place / "a" / "results").glob("*.json"))
    assert [path.name.split("-")[-2] for path in found].count("mixed") == 2
    records = [read_record(path)[1] for path in found]
    by = {(r["model"], r["kind"]): r for r in records}
    static, learnt, alone = by["run", "exact"], by["run", MIXED], by["none", MIXED]
    assert learnt["bits"] == pytest.approx(
        costs.Mixed(costs.expert_of(built(TERNARY))).bits((place / "data").read_bytes()).sum()
    )
    assert static["context"]["window"] == learnt["context"]["window"] == TERNARY.seq_len
    assert (alone["family"], alone["parameters"], alone["bytes"]) == ("none", 0, 2000)
    assert learnt["context"]["start"] == "whole stream" and learnt["leaks"]
    text = tables.results_markdown(records)
    row = next(line for line in text.splitlines() if line.startswith("| run |")).split(" | ")
    head = next(line for line in text.splitlines() if "in the mixer" in line and "exact" in line)
    places = head.strip("| ").split(" | ")
    assert f"**{static['bpb']:.4f}**" in row[places.index("exact")]
    assert f"**{learnt['bpb']:.4f}**" in row[places.index("in the mixer")]
    assert "stream" in tables.bpb_table(records)
    assert main(["compare", "run", next(p.stem for p in found if "run" in p.name and "mixed" in
                                        p.name)]) == 0  # fmt: skip
    assert "run - run in the mixer: " in capsys.readouterr().out
    # Windows only group the sums of a stream: those of the model in the mixer to compare with.
    words = ["eval", "none", "--data", "data", "--name", "alone", "--window"]
    assert main([*words, str(TERNARY.seq_len)]) == 0
    a, b = (next(p.stem for p in sorted((place / "a" / "results").glob("*.json"))
                 if p.name.startswith(name) and "mixed" in p.name)
            for name in ("alone", "run"))  # fmt: skip
    assert main(["compare", a, b]) == 0
    assert "alone - run: " in capsys.readouterr().out


def test_mix_alone_and_what_does_not_go_with_it(place, capsys):
    assert main(["eval", "run", "--data", "data", "--mix", "--limit", "300", "--no-record"]) == 0
    assert capsys.readouterr().out.count("bits per byte") == 1
    for more, word in (
        (["run", "--mix", "--window", "16"], "one stream"),
        (["none", "--stride", "16"], "one stream"),
        (["uniform", "--mix"], "can be mixed"), (["stories-law", "--mix"], "can be mixed"),
        (["none", "--kind", "exact"], "has no kind but exact:mixed"),
        (["run", "--mix", "--draws", "2"], "upper bound"),
    ):  # fmt: skip
        assert main(["eval", more[0], "--data", "data", *more[1:]]) == 2, more
        assert word in capsys.readouterr().err
    assert not os.path.exists(place / "a" / "results")


def test_the_page_shows_it_too(place, capsys):
    assert main(["entropy", "run", "data", "--mix", "--out", "page.html", "--limit", "600"]) == 0
    said, page = capsys.readouterr().out, (place / "page.html").read_text()
    bits = costs.Mixed(costs.expert_of(built(TERNARY))).bits((place / "data").read_bytes()[:600])
    assert f"run: {bits.mean():.4f} in the mixer" in said and f"{bits.mean():.4f}" in page
    assert "surprisal - mixed" in page


def test_a_mixed_cost_is_compared_as_such():
    cut = {"window": 1 << 15, "stride": 1 << 15}
    one, two = (
        {"model": "m", "kind": kind, "bytes": 12 << 15, "bpb": bpb, "context": cut,
         "data": {"sha256": "x"}, "blocks": [bpb * (1 << 15)] * 12}
        for kind, bpb in (("exact", 2.0), (MIXED, 1.5))
    )  # fmt: skip
    assert bootstrap.paired_bootstrap(one, two)["verdict"] == "m in the mixer is better"
    assert bootstrap.paired_bootstrap(two, two)["verdict"] == "not distinguishable"
