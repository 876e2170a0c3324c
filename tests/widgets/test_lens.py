"""The lens without a browser: numbers agree with `evaluate`, a newer request stops the older."""

import datetime
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support import Bytes, save_run, sharp, until

pytest.importorskip("anywidget")

from bitbyte import scoring
from bitbyte.config import preset
from bitbyte.evaluate import entropy
from bitbyte.files import BitbyteError, artifacts
from bitbyte.plots import lens_text
from bitbyte.plots.page import CHANGED, START, scale
from bitbyte.vocab import byte_label
from bitbyte.widgets import lens as lens_module
from bitbyte.widgets.lens import Lens

TEXT = "The cat sat on the mat, and the \u732b sat too.\n" * 3
RAW = TEXT.encode()
FAMILIES = {"lens-ar": "ar", "lens-mamba": "mamba", "lens-diffusion": "diffusion"}


@pytest.fixture(scope="module", autouse=True)
def runs():
    """A tiny sharpened model of each family, saved where the lens looks."""
    made = {}
    for seed, (name, family) in enumerate(FAMILIES.items()):
        config = preset("nano", family, n_layer=1, d_model=32, linear="dense", seq_len=32)
        made[name] = sharp(config, seed)
        save_run(artifacts("checkpoints", name), made[name], extra={"val_bpb": 7.5})
    return made


@pytest.fixture
def lens():
    """A lens on the causal model, with TEXT shown."""
    shown = Lens("lens-ar", TEXT)
    shown.wait()
    return shown


@pytest.mark.parametrize("name", FAMILIES)
def test_totals_agree_with_evaluate(name, runs):
    lens = Lens(name, RAW)
    lens.wait()
    kind = "exact" if runs[name].exact else "chain_rule:left_to_right"
    score = scoring.score(runs[name], Bytes(RAW), kind=kind)
    (costs,) = lens.costs
    assert costs.bits.sum() == pytest.approx(score.bits, rel=1e-5)
    assert lens.totals == (
        f"{costs.bpb:.4f} bits/byte over {len(RAW)} bytes, window 32, stride 32, {kind}"
    )
    assert lens.totals in lens.totals_line.value
    assert abs(float(lens.totals.split()[0]) - score.bpb) < 1.01e-4
    assert lens.views[0].data == RAW
    np.testing.assert_allclose(lens.views[0].layers["surprisal"], costs.bits, rtol=1e-6)


def test_more_context_is_what_evaluate_calls_a_smaller_stride(lens, runs):
    apart = lens.costs[0].bpb
    lens.context.value = 2
    lens.wait()
    score = scoring.score(runs["lens-ar"], Bytes(RAW), stride=16)
    assert lens.costs[0].bpb == pytest.approx(score.bpb, rel=1e-5) != apart
    assert "window 32, stride 16" in lens.totals


def test_the_newest_run_is_taken_and_all_are_offered():
    lens = Lens()
    offered = dict(lens.models[0].options[1:])
    assert {*FAMILIES} <= {*offered.values()}
    (label,) = [label for label, name in offered.items() if name == "lens-mamba"]
    assert label.startswith("lens-mamba (mamba ") and "7.50 bits/byte" in label
    lens.wait()
    assert lens.names == [next(iter(offered.values()))]
    assert lens.views[0].data == lens_text.ENGLISH.encode()


@pytest.mark.parametrize("rule", ["global", "jump"])
def test_threshold_moves_patches(lens, rule):
    lens.rule.value = rule
    low, high = np.quantile(np.diff(lens.costs[0].entropy), (0.5, 0.9)) if rule == "jump" else (
        np.quantile(lens.costs[0].entropy, (0.5, 0.9)))  # fmt: skip
    seen = {}
    for threshold in (round(float(low), 3), round(float(high), 3)):
        lens.threshold.value = threshold
        starts_n = entropy.boundaries(lens.costs[0].entropy, lens.threshold.value, rule)
        assert (lens.views[0].flags & START > 0).tolist() == starts_n.tolist()
        mean = len(RAW) / starts_n.sum()
        assert lens.sentence.startswith(f"mean patch {mean:.2f} bytes, {starts_n.sum()} patches, ")
        assert lens.sentence in lens.sentence_line.value
        seen[threshold] = lens.histograms.value
    assert len(seen) == len({*seen.values()}) == 2


def test_the_first_threshold_gives_patches_of_usual_size_and_stays(lens):
    n_starts = (lens.views[0].flags & START > 0).sum()
    assert len(RAW) / n_starts == pytest.approx(lens_text.PATCH, rel=0.15)
    first = lens.threshold.value
    lens.show(b"something else", wait=True)
    assert lens.threshold.value == first
    early = Lens("lens-ar", TEXT)
    early.threshold.value = 0.25
    early.wait()
    assert early.threshold.value == 0.25


def test_patches_in_words():
    stats = {"mean_bytes": 4.3149, "n_patches": 1232, "whitespace_agreement": 0.61,
             "variation": 0.84}  # fmt: skip
    assert lens_text.patch_words(stats) == (
        "mean patch 4.31 bytes, 1,232 patches, 61 % start at or after white space, variation 0.8"
    )
    one = entropy.patch_stats([True, False], b"ab")
    assert lens_text.patch_words(one) == "mean patch 2.00 bytes, 1 patch, variation 0.0"


def test_long_patches_share_a_bar():
    lengths = np.zeros(41, int)
    lengths[[1, 25, 30, 40]] = 5, 1, 2, 4
    drawn = lens_text.histogram(lengths, "bytes")
    told = re.findall(r"<title>(\S+): (\d+)", drawn)
    assert told == [("1", "5"), *((str(i), "0") for i in range(2, 25)), ("25+", "7")]
    assert ">25+</text>" in drawn and "25+: so many or more" in drawn
    assert "so many or more" not in lens_text.histogram(lengths[:26], "bytes")


def test_two_models_and_their_difference():
    lens = Lens(["lens-ar", "lens-mamba"], RAW)
    lens.wait()
    a, b = lens.costs
    for view in lens.views[:2]:
        np.testing.assert_allclose(view.layers["A - B"], a.bits - b.bits, rtol=1e-5, atol=1e-6)
    assert f"A - B: {a.bpb - b.bpb:+.4f} bits/byte, A is cheaper on " in lens.totals
    assert [line[:3] for line in lens.sentence.splitlines()] == ["A: ", "B: "]
    assert [cell.layout.display for cell in lens.cells.children] == ["", "", "none"]
    assert [cell.layout.width for cell in lens.cells.children[:2]] == ["49%", "49%"]
    lens.layer.value = "A - B"
    assert [view.layer for view in lens.views[:2]] == ["A - B"] * 2
    gaps = [abs(a.bits - b.bits)[i] for _, i in lens.places.options[1:]]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] == abs(a.bits - b.bits).max()
    lens.models[1].value = ""
    lens.wait()
    assert lens.layer.options == lens_text.LAYERS and lens.layer.value == "surprisal"
    assert "A - B" not in lens.views[0].layers
    assert [cell.layout.display for cell in lens.cells.children] == ["", "none", "none"]


def test_three_models_are_stacked_and_four_refused():
    lens = Lens([*FAMILIES], b"one two three")
    lens.wait()
    assert len(lens.costs) == 3 and lens.plot.value.count("<polyline") == 3
    assert [cell.layout.width for cell in lens.cells.children] == ["99%"] * 3
    with pytest.raises(BitbyteError, match="4 models; the lens compares up to 3"):
        Lens(["lens-ar"] * 4)


def test_one_cursor_for_all_views_and_the_plot():
    lens = Lens(["lens-ar", "lens-mamba"], RAW)
    lens.wait()
    assert "bb-cursor" not in lens.plot.value
    lens.views[1].cursor = 17
    lens.wait()
    assert lens.views[0].cursor == lens.edit_at.value == 17
    assert "bb-cursor" in lens.plot.value
    lens.views[0].cursor = 18
    lens.wait()
    assert lens.views[1].cursor == 18
    lens.show("another text", wait=True)
    assert lens.views[0].cursor == -1 and "bb-cursor" not in lens.plot.value


def test_the_plot_zooms_to_the_piece_with_the_cursor(lens):
    lens.show(b"abcdefgh" * 60, wait=True)
    lens.views[0].cursor = 250
    lens.zoom.value = 200
    lens.wait()
    ends = [int(x) for x in re.findall(r"<title>byte (\d+)(?:\.\d+)? to", lens.plot.value)]
    assert min(ends) == 200 and max(ends) < 400
    lens.zoom.value = 0
    assert "<title>byte 0 to" in lens.plot.value
    assert "bits, means of 4<" in lens.plot.value  # a byte is narrower than a pixel


def test_a_running_mean_is_that_of_the_known_values_around():
    values_n = np.array([1, 2, np.nan, 4, 5], np.float32)
    assert lens_text.running_mean(values_n, 1) is values_n
    assert lens_text.running_mean(values_n, 3).tolist() == [1.5, 1.5, 3, 4.5, 4.5]
    assert np.isnan(lens_text.running_mean(np.array([1, np.nan, np.nan, np.nan]), 3)[2])


def test_surprising_places_lead_there(lens):
    bits_n = lens.costs[0].bits
    (heading, none), *rows = lens.places.options
    assert (heading[:26], none) == ("the 20 most surprising pla", -1)
    assert [i for _, i in rows] == np.argsort(-bits_n, kind="stable")[:20].tolist()
    label, worst = rows[0]
    assert label.startswith(f"{bits_n[worst]:6.2f} bits at {worst}: ")
    assert f"[{byte_label(RAW[worst])}]" in label
    assert lens.views[0].cursor == -1  # nothing was chosen yet
    lens.places.value = worst
    assert lens.views[0].cursor == worst


def test_an_edit_costs_what_reading_the_edited_text_costs(lens, runs):
    before = lens.costs[0].bits.copy()
    lens.edit(40, ord("X"), wait=True)
    changed = RAW[:40] + b"X" + RAW[41:]
    fresh = entropy.read(runs["lens-ar"], changed)
    assert lens.views[0].data == lens.costs[0].data == changed
    np.testing.assert_allclose(lens.costs[0].bits, fresh.bits, atol=1e-4)
    moved = fresh.bits - before
    assert lens.edit_sentence.startswith(
        f"cost of this edit: {moved[40]:+.1f} bits here, {moved[41:].sum():+.1f} after; "
    )
    later = [i for i in range(41, len(RAW)) if abs(moved[i]) > 0.1]
    assert later and np.flatnonzero(lens.views[0].flags & CHANGED).tolist() == later
    assert f"0x{RAW[40]:02x} {byte_label(RAW[40])} to 0x58 X at 40" in lens.edit_line.value
    lens.threshold.value += 1
    assert np.flatnonzero(lens.views[0].flags & CHANGED).tolist() == later  # both flags stay
    lens.edit(41, 0, wait=True)
    assert lens.views[0].data == changed[:41] + b"\0" + changed[42:]
    lens.undo()
    assert lens.views[0].data == RAW and lens.edit_sentence == "" == lens.edit_line.value
    assert lens.costs[0].bits.tolist() == before.tolist()
    with pytest.raises(BitbyteError, match=f"byte 999 is not on this page of {len(RAW)} from 0"):
        lens.edit(999, 0, wait=True)
    assert "byte 999 is not on this page" in lens.status.value


def test_editing_by_hand_and_by_choice(lens):
    lens.edit_at.value, lens.edit_byte.value = 3, "0xe2"
    lens.edit_button.click()
    lens.wait()
    assert lens.views[0].data[3] == 0xE2
    lens.views[0].choice = [5, 90, 1]
    lens.wait()
    assert lens.views[0].data[3:6] == b"\xe2" + RAW[4:5] + b"Z"
    lens.edit_byte.value = "\u732b"
    lens.edit_button.click()
    assert "is 3 bytes; type one ASCII character or hex" in lens.status.value
    lens.undo_button.click()
    assert lens.views[0].data == RAW


@pytest.mark.parametrize(
    ("text", "byte"),
    [("a", 97), (" ", 32), ("7", 55), ("0a", 10), ("0xFF", 255), ("\\x00", 0), (" 1f ", 31)],
)
def test_bytes_as_typed(text, byte):
    assert lens_text.parse_byte(text) == byte


@pytest.mark.parametrize("text", ["", "abc", "0x1", "0x123", "gg", "\u00e9", "\ud800"])
def test_what_is_no_byte_is_refused(text):
    with pytest.raises(BitbyteError, match="type one ASCII character or hex"):
        lens_text.parse_byte(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [("0x1ff", "is above 0xff"), ("0x1", "is not two digits"), ("abc", "is 3 bytes")],
)
def test_refusals_say_why(text, word):
    with pytest.raises(BitbyteError, match=word):
        lens_text.parse_byte(text)


def test_files_are_read_a_page_at_a_time(lens, tmp_path, monkeypatch, runs):
    monkeypatch.setattr(lens_module, "PAGE", 64)
    file = tmp_path / "data.bin"
    file.write_bytes(RAW)
    pieces, of_file = [], lens_text.of_file

    def watched(path):
        source = of_file(path)

        def read(start, stop):
            pieces.append((start, stop))
            return source.read(start, stop)

        return source._replace(read=read)

    monkeypatch.setattr(lens_text, "of_file", watched)
    lens.path.value = str(file)
    lens.wait()
    assert lens.views[0].data == RAW[:64] and lens.pages.max == -(-len(RAW) // 64)
    lens.pages.value = 2
    lens.wait()
    assert pieces == [(0, 64), (64, 128)] and lens.page_number == 1
    assert lens.views[0].data == RAW[64:128]
    assert f"data.bin: page 2 of 3, bytes 64 to 127 of {len(RAW)}" in lens.status.value
    whole = entropy.read(runs["lens-ar"], RAW)  # pages are cut where windows are
    np.testing.assert_allclose(lens.costs[0].bits, whole.bits[64:128], atol=1e-5)
    lens.views[0].cursor = 5
    assert lens.edit_at.value == 69 and lens.views[0].start == 64
    lens.edit(69, 0, wait=True)
    assert lens.views[0].data[5] == 0
    (saved,) = lens.save()
    assert "byte 69: 0x00" in saved.read_text() and '"start": 64' in saved.read_text()
    with pytest.raises(BitbyteError, match="there is no page 9; there are 3"):
        lens.turn(8, wait=True)
    lens.show(b"short", wait=True)
    assert (lens.pages.value, lens.pages.max, lens.page_number) == (1, 1, 0)
    assert lens.views[0].start == 0 and lens.path.value == ""


def test_a_new_request_stops_the_old_one(lens, monkeypatch):
    real, began, seen = entropy.read, threading.Event(), []

    def slow(model, data, *, stopped, **options):
        if data == b"slow":
            began.set()
            until(stopped)
            seen.append("stopped")
        return real(model, data, stopped=stopped, **options)

    monkeypatch.setattr(entropy, "read", slow)
    lens.show(b"slow")
    assert began.wait(60)
    lens.show(b"never run")
    lens.show(b"quick", wait=True)
    assert seen == ["stopped"] and lens.views[0].data == b"quick"


def test_stop_keeps_what_is_there(lens, monkeypatch):
    real = entropy.read

    def halting(model, data, *, on_part, **options):
        def tell(part):
            on_part(part)
            lens.stop_button.click()

        return real(model, data, on_part=tell, **options | {"batch_size": 1})

    monkeypatch.setattr(entropy, "read", halting)
    lens.show(RAW, wait=True)
    assert lens.views[0].data == RAW[:32] and lens.costs[0].data == RAW[:32]
    assert f"stopped {len(RAW) - 32} bytes early" in lens.status.value


def controls_of(lens) -> tuple:
    """What the controls say is shown."""
    models = [choice.value for choice in lens.models]
    return models, lens.context.value, lens.path.value, lens.sample.value, lens.pages.value


@pytest.fixture
def on_page_two(lens, tmp_path, monkeypatch):
    """The lens on the second page of a file of three."""
    monkeypatch.setattr(lens_module, "PAGE", 64)
    file = tmp_path / "data.bin"
    file.write_bytes(RAW)
    lens.path.value = str(file)
    lens.wait()
    lens.pages.value = 2
    lens.wait()
    return lens


def wait_for_stop(monkeypatch) -> threading.Event:
    """From now on reading sets the event and waits to be stopped."""
    real, began = entropy.read, threading.Event()

    def waiting(model, data, *, stopped, **options):
        began.set()
        until(stopped)
        return real(model, data, stopped=stopped, **options)

    monkeypatch.setattr(entropy, "read", waiting)
    return began


def test_controls_go_back_when_stopped(on_page_two, monkeypatch):
    lens, before = on_page_two, controls_of(on_page_two)
    assert before == (["lens-ar", "", ""], 1, lens.path.value, "", 2) and lens.path.value

    asking = (
        lambda: setattr(lens.pages, "value", 3),
        lambda: setattr(lens.sample, "value", "every byte once"),
        lambda: setattr(lens.context, "value", 2),
        lambda: setattr(lens.models[0], "value", "lens-mamba"),
        lambda: setattr(lens.text, "value", "typed"),
    )
    for ask in asking:
        with monkeypatch.context() as slow:
            began = wait_for_stop(slow)
            ask()
            assert began.wait(60) and not lens.stop_button.disabled
            lens.stop_button.click()
            lens.wait()
        assert controls_of(lens) == before and lens.views[0].data == RAW[64:128]
        assert lens.stop_button.disabled
        assert "stopped before there was anything to show; still shown: data.bin, page 2" in (
            lens.status.value
        )
    lens.again_button.click()  # the text, which was the last thing asked for
    lens.wait()
    assert lens.text.value.encode() == lens.views[0].data == b"typed"
    assert controls_of(lens) == (["lens-ar", "", ""], 1, "", "", 1)
    lens.sample.value = "every byte once"
    lens.wait()
    assert lens.views[0].data == bytes(range(64)) and lens.pages.max == 4


def test_controls_go_back_after_a_mistake(on_page_two, tmp_path):
    lens, before = on_page_two, controls_of(on_page_two)
    empty, gone = tmp_path / "empty", tmp_path / "gone"
    empty.write_bytes(b"")
    for path, word in ((empty, "there are no bytes"), (gone, "there is no file")):
        lens.path.value = str(path)
        with pytest.raises(BitbyteError, match=word):
            lens.wait()
        assert controls_of(lens) == before and lens.stop_button.disabled
        assert f"{word}" in lens.status.value and "still shown: data.bin" in lens.status.value
    gone.write_bytes(b"here now")
    lens.path.value = str(gone)
    lens.wait()
    assert lens.views[0].data == b"here now" and lens.path.value == str(gone)
    gone.write_bytes(b"and new")
    lens.again(wait=True)
    assert lens.views[0].data == b"and new"


def test_an_edit_takes_the_place_of_a_page_that_is_read(on_page_two, monkeypatch):
    lens, before = on_page_two, controls_of(on_page_two)
    began = wait_for_stop(monkeypatch)
    lens.pages.value = 3
    assert began.wait(60)
    lens.edit(64, 0, wait=True)
    assert controls_of(lens) == before and lens.views[0].data == b"\0" + RAW[65:128]


def test_one_scale_for_all_views():
    lens = Lens(["lens-ar", "lens-mamba"], RAW)
    lens.wait()
    for layer in ("surprisal", "rank", "A - B"):
        lens.layer.value = layer
        numbers = np.concatenate([view.layers[layer] for view in lens.views[:2]])
        (wanted,) = {(view.low, view.high) for view in lens.views[:2]}
        assert wanted == pytest.approx(scale(numbers))
        assert [view.layer for view in lens.views[:2]] == [layer] * 2
    lens.models[1].value = ""
    lens.wait()
    assert (lens.views[0].low, lens.views[0].high) == (None, None)


def test_nothing_is_wider_than_its_cell(lens):
    todo, wide = [lens.box], []
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        width = widget.layout.width or ""
        if width.endswith("px") and int(width[:-2]) > 320:
            wide.append(widget)
            assert "100%" in widget.layout.max_width, widget
    assert lens.text in wide and lens.places in wide


def test_mistakes_are_told_and_the_lens_goes_on(lens, tmp_path):
    hostile = tmp_path / "<img src=x>"
    lens.path.value = str(hostile)
    with pytest.raises(BitbyteError, match="there is no file"):
        lens.wait()
    assert "there is no file" in lens.status.value and "<img" not in lens.status.value
    for path, word in ((tmp_path, "is a folder"), (Path("/dev/null"), "is not a regular file")):
        with pytest.raises(BitbyteError, match=word):
            lens.show(path, wait=True)
    with pytest.raises(BitbyteError, match="there are no bytes"):
        lens.show(b"", wait=True)
    assert lens.views[0].data == RAW  # what was shown stays
    lens.show(b"fine", wait=True)
    assert lens.views[0].data == b"fine"
    lens.models[0].value = ""
    with pytest.raises(BitbyteError, match="no model is chosen"):
        lens.wait()
    wrong = Lens("no-such-run", b"x")
    with pytest.raises(BitbyteError, match="no checkpoint 'no-such-run'"):
        wrong.wait()
    assert "no checkpoint" in wrong.status.value


def test_uploads_samples_and_the_text_field(lens):
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    file = {"name": "a.bin", "type": "", "size": 3, "last_modified": when}
    lens.upload.value = ({"content": memoryview(b"\xff\0a"), **file},)
    lens.wait()
    assert lens.views[0].data == b"\xff\0a" and "a.bin" in lens.status.value
    lens.sample.value = "every byte once"
    lens.wait()
    assert lens.views[0].data == bytes(range(256))
    lens.upload.value = ({"content": memoryview(b"more"), **file, "size": 4},)
    lens.wait()
    assert lens.views[0].data == b"more" and lens.sample.value == lens.path.value == ""
    assert "when you leave the field" in lens.text.placeholder
    lens.text.value = "\u732b"
    lens.wait()
    assert lens.views[0].data == "\u732b".encode()


def test_a_character_cut_in_half_is_shown(lens):
    lens.show("\u732b".encode()[:2], wait=True)
    assert lens.views[0].data == b"\xe7\x8c" and len(lens.costs[0].bits) == 2
    assert "[0x8c]" in "".join(label for label, _ in lens.places.options)


def test_saved_pages_stand_alone(lens):
    lens.show("<script>alert(1)</script>", wait=True)
    lens.edit(0, ord("["), wait=True)
    (path,) = lens.save()
    text = path.read_text()
    assert path.parent == artifacts("reports") and path.name.startswith("lens-lens-ar-")
    assert lens.totals in text and lens.sentence in text and "cost of this edit" in text
    assert "<script>alert" not in text and "default-src 'none'" in text
    assert str(path) in lens.saved.value
    assert lens.save() == [path]


def test_shown_in_a_notebook_as_a_widget(lens):
    bundle = lens._repr_mimebundle_()
    assert bundle["text/plain"] == f"Lens({len(RAW)} bytes, lens-ar)"
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == lens.box.model_id
    lens.hex.value = True
    assert all(one.hex for one in lens.views)


def test_a_job_ends_with_the_program():
    code = (
        "import time; from bitbyte.widgets.jobs import Jobs; jobs = Jobs(print)\n"
        "def work(job):\n    while not job.stopped(): time.sleep(0.01)\n    print('ended')\n"
        "jobs.start(work)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


def test_the_cost_in_the_mixer_stands_beside_the_models(lens, runs):
    pytest.importorskip("numba")
    assert "mixed" not in lens.layer.options
    lens.mixed.value = True
    lens.wait()
    (costs,) = lens.costs
    assert len(costs.mixed) == len(RAW) and (costs.mixed > 0).all()
    assert costs.mixed.mean() < costs.bpb  # the text says everything three times
    assert f"; {costs.mixed.mean():.4f} in the mixer, which learns as it goes" in lens.totals
    layers = lens.views[0].layers
    np.testing.assert_allclose(layers["mixed"], costs.mixed, rtol=1e-6)
    np.testing.assert_allclose(layers["surprisal - mixed"], costs.bits - costs.mixed, atol=1e-5)
    lens.layer.value = "mixed"
    assert "mixed" in lens.plot.value and "surprisal" in lens.plot.value
    before = costs.mixed
    lens.edit(40, ord("X"), wait=True)
    (costs,) = lens.costs
    assert np.array_equal(costs.mixed[:40], before[:40]) and costs.mixed[40] != before[40]
    assert (costs.mixed[41:] != before[41:]).any()
    (saved,) = lens.save()
    assert b"surprisal - mixed" in saved.read_bytes()
    lens.undo()
    assert np.array_equal(lens.costs[0].mixed, before)
    lens.mixed.value = False
    lens.wait()
    assert lens.costs[0].mixed is None and lens.layer.value == "surprisal"


def test_a_denoiser_cannot_be_mixed(lens):
    lens.mixed.value = True
    lens.wait()
    lens.models[0].value = "lens-diffusion"
    with pytest.raises(BitbyteError, match="no next byte"):
        lens.wait()
    assert lens.names == ["lens-ar"] and lens.models[0].value == "lens-ar" and lens.mixed.value


def test_mixing_stops_with_the_bytes_that_are_done(lens, monkeypatch):
    """What is shown has both costs."""
    pytest.importorskip("numba")
    real = lens_module.with_mixed

    def stopping(seen, model, *, stopped, on_part):
        return real(seen, model, stopped=lambda: True, on_part=on_part)

    monkeypatch.setattr(lens_module, "with_mixed", stopping)
    lens.mixed.value = True
    lens.wait()
    (costs,) = lens.costs
    assert len(costs.data) == len(costs.mixed) == len(costs.bits) > 0
