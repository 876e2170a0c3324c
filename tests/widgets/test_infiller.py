"""The infiller: what is hidden, filled, replayed, forced, kept; all without a browser."""

import hashlib
import json
import math
import threading

import numpy as np
import pytest
import torch
from support import brief_run

pytest.importorskip("anywidget", reason="needs bitbyte[workbench]")

from bitbyte import checkpoint, infill
from bitbyte.config import SamplingConfig
from bitbyte.evaluate import listing
from bitbyte.files import BitbyteError
from bitbyte.plots.page import GIVEN, LOCKED, MASKED
from bitbyte.runs import resolve
from bitbyte.vocab import MASK
from bitbyte.widgets import infiller
from bitbyte.widgets.infiller import Infiller, digest, parse

SIGN = "\u25a1"
TEXT = f"the cat {SIGN * 3} on the m{SIGN * 2}"
HIDDEN = [8, 9, 10, 20, 21]
FAMILIES = ("diffusion", "ar", "mamba")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """A run of two steps for each family, in an artifacts folder of their own."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "bytes.bin").write_bytes(b"the cat sat on the mat. " * 200)
    made = {}
    for family in FAMILIES:
        made[family] = brief_run(
            family, folder / "bytes.bin", folder / "checkpoints" / f"tiny-{family}",
            seq_len=48, batch_size=2, dtype="fp32", linear="dense", threads=1,
        )  # fmt: skip
    return made


@pytest.fixture
def three(runs, monkeypatch, tmp_path) -> Infiller:
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    return Infiller(list(runs.values()), TEXT)


def test_numbers_in_brackets_are_so_many_hidden_bytes():
    assert parse("a\u27e63\u27e7b").tolist() == [97, MASK, MASK, MASK, 98]
    assert parse(f"\u27e60\u27e7{SIGN}\u27e612\u27e7").tolist() == [MASK] * 13
    for plain in ("\u27e6x\u27e7", "\u27e6\u27e7", "\u27e699999\u27e7", "[3]"):
        assert bytes(parse(plain).tolist()) == plain.encode()
    assert parse("").tolist() == [] and parse("").dtype == torch.long


def test_every_family_fills_the_same_hole_and_given_bytes_stay(three, runs):
    assert three.model_choice.value == tuple(runs.values())
    three.fill(wait=True)
    ids_T = parse(TEXT)
    config = SamplingConfig(temperature=0.8, seed=0)
    for run in runs.values():
        result = three.results[run]
        model, _ = checkpoint.load_model(run)
        expected = infill.infill(model, ids_T, config)
        assert result.data == expected.data and result.positions == HIDDEN
        assert result.bits_per_byte == pytest.approx(expected.bits_per_byte, abs=1e-9)
        assert three.views[run].data == result.data
        given = bytes(b for b in ids_T.tolist() if b != MASK)
        name = hashlib.sha256(given).hexdigest()[:8]
        words = three._captions[run].value
        assert f"given bytes unchanged: sha256 {name} before and after" in words
        assert result.method in words
        assert f"{result.bits_per_byte:.2f} bits per filled byte" in words
    flags = np.full(22, GIVEN)
    flags[HIDDEN] = 0
    for view in three.views.values():
        np.testing.assert_array_equal(view.flags, flags)
    assert len(three.results_box.children) == 6


def test_a_changed_given_byte_would_be_told(three, runs):
    three.fill(wait=True)
    result = three.results[runs["ar"]]
    words = infiller.caption("ar", "ar", parse("The" + TEXT[3:]), result)
    assert "CHANGED" in words and "unchanged" not in words
    given = torch.ones(2, dtype=torch.bool)
    assert digest(torch.tensor([1, 2]), given) != digest(torch.tensor([1, 3]), given)


def test_the_trajectory_is_replayed_without_the_model(three, runs, monkeypatch):
    three.order.value = "left_to_right"
    three.steps.value = 2
    three.fill(wait=True)
    trail = three.trajectories[runs["diffusion"]]
    assert three.trajectory == [step[:3] for step in trail]
    assert [step.position for step in trail] == HIDDEN and [s.step for s in trail] == [
        1,
        1,
        1,
        2,
        2,
    ]
    assert three.results[runs["diffusion"]].passes == 2
    mean = math.fsum(step.bits for step in trail) / 5
    assert mean == pytest.approx(three.results[runs["diffusion"]].bits_per_byte)
    assert three.replay.max == three.replay.value == three.play.max == 5
    monkeypatch.setattr(infill, "infill", None)
    three._models.clear()
    for n in (0, 3, 5, 1):
        three.replay.value = n
        for run, view in three.views.items():
            steps = three.trajectories[run]
            shown = {step.position for step in steps[:n]}
            assert set(np.flatnonzero(view.flags & MASKED)) == set(HIDDEN) - shown
            tinted = np.flatnonzero(np.isfinite(view.layers["surprisal"]))
            assert set(tinted) == shown == set(np.flatnonzero(np.isfinite(view.layers["step"])))
            for step in steps[:n]:
                assert view.data[step.position] == step.byte
                assert view.layers["surprisal"][step.position] == pytest.approx(step.bits, rel=1e-6)
                assert view.layers["step"][step.position] == step.step
    assert "byte 8 = " in three.moment.value and f"{trail[0].bits:.2f} bits" in three.moment.value


def test_alternatives_are_those_that_it_decided_among(three, runs):
    three.temperature.value = 0
    three.fill(wait=True)
    for run in runs.values():
        for step in three.trajectories[run]:
            assert step.top_ids[0] == step.byte
            assert -math.log2(step.top_probs[0]) == pytest.approx(step.bits, abs=1e-4)
            assert step.top_probs == sorted(step.top_probs, reverse=True)


def test_whole_texts_are_judged_by_one_causal_model(three, runs):
    three.fill(wait=True)
    model, _ = checkpoint.load_model(runs["ar"])
    for run, bits in three.judged.items():
        with torch.no_grad():
            nats = model(three.results[run].ids_T[None]).mean().item()
        assert bits == pytest.approx(nats / math.log(2), abs=1e-5)
        assert f"{run} {bits:.3f}" in three.status.value
    assert set(three.judged) == set(runs.values())
    three.model_choice.value = (runs["diffusion"],)
    three.fill(wait=True)
    assert three.judged == {} and list(three.results) == [runs["diffusion"]]


def test_selected_bytes_are_masked_and_unmasked(runs):
    box = Infiller(runs["diffusion"], "abcdef")
    with pytest.raises(BitbyteError, match="nothing is masked"):
        box.fill(wait=True)
    assert "nothing is masked" in box.status.value and not box.results_box.children
    box.mask_button.click()
    assert "select bytes" in box.status.value
    box.source.selection = (1, 3)
    box.mask_button.click()
    assert box.ids_T.tolist() == [97, MASK, MASK, 100, 101, 102]
    assert box.source.flags.tolist() == [GIVEN, MASKED, MASKED, GIVEN, GIVEN, GIVEN]
    assert box.source.selection == (0, 0) and "2 of 6" in box.status.value
    box.source.selection = (2, 6)
    box.unmask_button.click()
    assert box.ids_T.tolist() == [97, MASK, *b"cdef"]
    box.fill(wait=True)
    assert box.results[runs["diffusion"]].data[2:] == b"cdef"
    box.views[runs["diffusion"]].selection = (4, 5)  # in a result
    box.mask_button.click()
    assert box.ids_T.tolist() == [97, MASK, 99, 100, MASK, 102] and box.results == {}
    box.unmask_button.click()
    assert bytes(box.ids_T.tolist()) == b"abcdef"
    box.text.value = f"x{SIGN}"
    box.unmask()
    assert box.ids_T.tolist() == [120, MASK]  # there is no byte behind a sign


def test_a_forced_byte_becomes_given_and_the_rest_is_filled_again(three, runs):
    three.fill(wait=True)
    run = runs["diffusion"]
    view = three.views[run]
    view.choice = [9, ord("a"), 1]  # as a click on an alternative does
    three.wait()
    assert three.ids_T[9] == ord("a") and three.forced == {9}
    for result in three.results.values():
        assert result.data[9] == ord("a") and result.positions == [8, 10, 20, 21]
    assert view.flags[9] == GIVEN | LOCKED == three.source.flags[9]
    again = infill.infill(
        checkpoint.load_model(run)[0], three.ids_T, SamplingConfig(temperature=0.8)
    )
    assert three.results[run].data == again.data
    with pytest.raises(BitbyteError, match="byte 9 is not hidden"):
        three.force(9, 1)
    with pytest.raises(BitbyteError, match="byte 0 is not hidden"):
        three.force(0, 1)
    for byte in (-1, 256, 300):
        with pytest.raises(BitbyteError, match=f"byte is {byte}; it must be from 0 to 255"):
            three.force(8, byte)
    assert three.forced == {9} and three.ids_T[8] == MASK
    view.choice = [0, 1, 2]
    assert "byte 0 is not hidden" in three.status.value
    three.mask(9, 10)
    assert three.forced == set() and three.source.flags[9] == MASKED
    three.force(9, ord("b"), wait=True)
    three.unmask(9, 10)
    assert three.ids_T.tolist() == parse(TEXT).tolist() and three.forced == set()
    for position in HIDDEN:
        three.force(position, ord("z"), wait=True)
    assert not (three.ids_T == MASK).any() and three.results == {}


def test_tint_by_step_or_by_sureness(three):
    three.fill(wait=True)
    assert {view.layer for view in three.views.values()} == {"surprisal"}
    three.tint.value = "step"
    assert {view.layer for view in three.views.values()} == {"step"}


class Slow(torch.nn.Module):
    """A diffusion model that says when it was called and waits for leave."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.context = model, model.config, model.context
        self.exact, self.called, self.leave = False, threading.Event(), threading.Semaphore(0)

    def logits(self, ids_BT):
        self.called.set()
        assert self.leave.acquire(timeout=60)
        return self.inner.logits(ids_BT)


def slow(box: Infiller, run: str) -> Slow:
    box._load([run])
    (folder,) = box._models
    box._models[folder] = Slow(box._models[folder])
    return box._models[folder]


def test_stop_keeps_what_was_decided_and_bytes_appear_one_by_one(runs):
    run = runs["diffusion"]
    box = Infiller(run, TEXT)
    model = slow(box, run)
    box.fill()  # does not wait for the model, which waits for us
    assert model.called.wait(60) and not box.stop_button.disabled
    assert set(np.flatnonzero(box.views[run].flags & MASKED)) == set(HIDDEN)
    model.called.clear()
    model.leave.release()
    assert model.called.wait(60)  # the second call: one byte was decided
    assert len(box.trajectory) == 1
    assert (box.views[run].flags & MASKED).astype(bool).sum() == 4
    box.stop_button.click()
    model.leave.release()
    box.wait()
    assert box.message == "stopped" and box.stop_button.disabled
    assert len(box.trajectory) == 1 and box.results == {}


def test_new_text_ends_an_old_fill_without_a_trace(runs):
    run = runs["diffusion"]
    box = Infiller(run, TEXT)
    model = slow(box, run)
    box.fill()
    assert model.called.wait(60)
    box.text.value = f"other {SIGN}"
    model.leave.release(9)
    box.wait()
    assert box.results == {} == box.trajectories and box.results_box.children == ()
    assert "1 of 7 bytes are hidden" in box.status.value
    box.fill(wait=True)
    assert box.results[run].data.startswith(b"other ")


def test_what_goes_wrong_is_said(runs, monkeypatch, tmp_path):
    with pytest.raises(BitbyteError, match="no checkpoint"):
        Infiller("nowhere")
    box = Infiller(runs["diffusion"], "<b>" + SIGN * 60)
    with pytest.raises(BitbyteError, match=r"diffusion.*: .*at most 48"):  # which one
        box.fill(wait=True)
    assert "at most 48" in box.status.value
    box = Infiller(())
    with pytest.raises(BitbyteError, match="choose a model"):
        box.fill(wait=True)


def test_default_is_the_newest_run_of_each_family(runs, monkeypatch):
    folder = resolve(runs["ar"]).parents[1]
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(folder.parent))
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "step_0000001").mkdir(exist_ok=True)
    (folder / "broken" / "step_0000001" / "meta.json").write_text("{}")
    monkeypatch.setattr(listing, "list_models", list)
    box = Infiller()
    assert box.model_choice.value == ("tiny-diffusion", "tiny-ar", "tiny-mamba")
    assert len(box.model_choice.options) == 3
    box.fill(wait=True)
    assert list(box.results) == ["tiny-diffusion", "tiny-ar", "tiny-mamba"]


def test_names_are_escaped_and_it_shows_itself(three, runs):
    words = infiller.caption("<i>x", "ar", parse(TEXT), filled(three, runs["ar"]))
    assert "<i>" not in words and "&lt;i&gt;x" in words
    assert repr(three) == "Infiller(22 bytes, 5 hidden, 1 fills)"
    assert json.dumps(three._repr_mimebundle_()["text/plain"]) == json.dumps(repr(three))


def filled(box: Infiller, run: str) -> infill.Infilled:
    box.model_choice.value = (run,)
    box.fill(wait=True)
    return box.results[run]
