"""The sampler without a browser: bytes, words, Stop, Continue, Undo, branches, bad input."""

import dataclasses
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import save_bold, until

pytest.importorskip("anywidget")

from bitbyte import checkpoint, generate, infill
from bitbyte.config import SamplingConfig, preset
from bitbyte.files import BitbyteError
from bitbyte.plots import prob_bars
from bitbyte.plots.page import GIVEN, MASKED
from bitbyte.widgets import sampler as sampler_module
from bitbyte.widgets.checkpoints import list_runs
from bitbyte.widgets.sample import Sample, sample_command
from bitbyte.widgets.sampler import Sampler


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for age, (name, family) in enumerate([("one", "ar"), ("snake", "mamba"), ("fog", "diffusion")]):
        run = save_bold(folder / name, family)
        when = time.time() - 3600 * (age + 2)
        os.utime(run / "step_0000001" / "meta.json", (when, when))
    return folder


def sampler(runs, run="one", prompt="Once", **settings):
    widget = Sampler(str(runs / run), prompt, str(runs))
    for name, value in settings.items():
        getattr(widget, name).value = value
    widget.wait()
    return widget


class Fixed(torch.nn.Module):
    """Says that byte 97 + i has probability 2^-(i+1), whatever came before; counts its steps."""

    def __init__(self, pause=0.0, broken_after=None):
        super().__init__()
        self.config = preset("nano", "ar")
        self.clock = 0.0  # seconds, if every step took `pause` and nothing else took any
        self.context, self.pause, self.steps, self.broken_after = 1 << 16, pause, 0, broken_after
        self.scores_V = torch.full((256,), -1e9)
        self.scores_V[97:105] = -math.log(2) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 7])

    def init_state(self, batch):
        return 0

    def step(self, ids_B, state):
        time.sleep(self.pause)
        self.clock += self.pause
        self.steps += 1
        broken = self.broken_after is not None and self.steps > self.broken_after
        return (self.scores_V * math.nan if broken else self.scores_V)[None], state


@pytest.fixture
def fixed(runs, monkeypatch):
    """A sampler whose model is a `Fixed` one."""

    def make(*args, prompt="Once", **settings):
        model = Fixed(*args)
        monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: (model, {}))
        return sampler(runs, prompt=prompt, **settings), model

    return make


# --- the bytes


@pytest.mark.parametrize("run", ["one", "snake"])
def test_the_bytes_are_those_of_generate(runs, run):
    widget = sampler(runs, run, "Na\u00efve \u2026", length=50, seed=3, top_p=0.9, top_k=40)
    widget.generate(wait=True)
    model, _ = checkpoint.load_model(runs / run)
    config = SamplingConfig(max_new_tokens=50, seed=3, top_p=0.9, top_k=40)
    wanted = generate.generate(model, "Na\u00efve \u2026".encode(), config)
    assert widget.data == wanted.bytes
    assert widget.text == ("Na\u00efve \u2026".encode() + wanted.bytes).decode("utf-8", "replace")
    view, n = widget.view, len("Na\u00efve \u2026".encode())
    assert view.data == "Na\u00efve \u2026".encode() + wanted.bytes
    assert view.flags.tolist() == [GIVEN] * n + [0] * 50
    bits = view.layers["surprisal"]
    assert np.isnan(bits[:n]).all()
    assert bits[n:].mean() == pytest.approx(wanted.metrics["bits_per_byte"], abs=1e-5)
    assert f"{wanted.metrics['bits_per_byte']:.2f} bits/byte" in widget.status.value
    assert "bytes/s" in widget.message and "first byte after" in widget.message
    assert widget.message.startswith("done: 50 bytes")


@pytest.mark.parametrize("run", ["one", "fog"])
def test_the_command_makes_the_bytes(runs, run, tmp_path):
    """Through all the ways to get at bytes: the line shown makes what is shown."""
    from bitbyte.cli.dispatch import main

    widget = sampler(runs, run, "it's\n-x", length=12, seed=5, top_k=30)

    def check():
        words = shlex.split(widget.command)
        out = tmp_path / "bytes"
        assert words[0] == "bitbyte" and html_holds(widget, widget.command)
        out.unlink(missing_ok=True)
        assert main([*words[1:], "--out", str(out), "--device", "cpu"]) == 0
        start = widget.view.data[: -len(out.read_bytes())].decode()
        assert start == words[words.index("--prompt") + 1]
        assert widget.view.data.endswith(out.read_bytes())

    widget.prompt.value = "it's"
    widget.generate(wait=True)
    check()
    widget.resume(wait=True)
    assert len(widget.data) == 24
    # From here on bytes that the model made are part of the prompt: they must be text.
    widget = sampler(runs, run, "it's", length=6)
    widget.generate(wait=True)
    widget._sample.made[:] = b"a plan"
    widget.temperature.value = 0.5
    widget.resume(wait=True)
    check()
    widget._sample.made[:8] = b"a planet"
    widget.branch(9, ord("e"), wait=True)
    assert widget.data[:6] == b"a plae"
    check()


def html_holds(widget, text):
    import html

    return html.escape(text) in widget.status.value


def test_stop_and_continue_make_the_bytes_of_one_go(fixed):
    widget, _ = fixed(0.002, length=400)
    widget.generate()
    until(lambda: len(widget.data) >= 20)
    widget.stop()
    widget.wait()
    n = len(widget.data)
    assert 20 <= n < 400 and widget.message.startswith("stopped")
    assert f"--max_new_tokens {n} " in widget.command
    widget.length.value = 100
    widget.resume(wait=True)
    assert f"--max_new_tokens {n + 100} " in widget.command and "--prompt Once " in widget.command
    config = SamplingConfig(max_new_tokens=n + 100)
    assert widget.data == generate.generate(Fixed(), b"Once", config).bytes


def test_stop_is_heard_at_once_and_bytes_come_in_slices(fixed, monkeypatch):
    widget, model = fixed(0.004, length=4096)
    monkeypatch.setattr(sampler_module, "time", SimpleNamespace(perf_counter=lambda: model.clock))
    seen, append = [], widget.view.append
    widget.view.append = lambda data, *a, **k: (seen.append(len(data)), append(data, *a, **k))
    assert widget.stop_button.disabled and not widget.generate_button.disabled
    widget.generate_button.click()
    until(lambda: len(widget.data) >= 150)
    assert not widget.stop_button.disabled and widget.generate_button.disabled
    widget.stop_button.click()
    steps = model.steps
    widget.wait()
    assert len(widget.data) <= steps  # nothing was made after the step that was being taken
    assert widget.stop_button.disabled and not widget.continue_button.disabled
    assert seen[0] == 1 and set(seen[1:-1]) <= {10, 11}  # the first byte at once, then every 40 ms
    assert widget.view.data == b"Once" + widget.data
    assert len(widget._sample.bits) == len(widget._sample.logits) == len(widget.data)


def test_one_sampling_at_a_time(fixed):
    widget, _ = fixed(0.004, length=4096)
    widget.generate()
    with pytest.raises(BitbyteError, match="press Stop first"):
        widget.resume(wait=True)
    widget.undo_button.click()  # disabled in the browser; here it must not harm
    assert "press Stop first" in widget.message or widget.message.startswith("sampling")
    widget.stop()
    widget.wait()
    assert widget.message.startswith("stopped")


# --- undo and branches


def test_undo_brings_back_each_state(runs):
    widget = sampler(runs, length=8)
    assert widget.undo_button.disabled
    states = []
    for action in (
        lambda: widget.generate(wait=True),
        lambda: widget.resume(wait=True),
        lambda: widget.branch(6, 65, wait=True),
        lambda: widget.generate(wait=True),
    ):
        states.append((widget.data, widget.view.data, widget.view.layers, widget.command))
        action()
    for data, shown, layers, command in reversed(states[1:]):
        widget.undo()
        assert (widget.data, widget.view.data, widget.command) == (data, shown, command)
        np.testing.assert_allclose(widget.view.layers["surprisal"], layers["surprisal"])
    widget.undo()
    assert widget.data == b"" and widget.undo_button.disabled
    with pytest.raises(BitbyteError, match="nothing to undo"):
        widget.undo()


def test_a_branch_keeps_what_stood_before_and_goes_on(runs):
    widget = sampler(runs, length=20, seed=4)
    widget.generate(wait=True)
    first = widget.data
    old_bits = widget.view.layers["surprisal"][:9]
    widget.view.choice = [9, 88, 1]  # as a click on an alternative does
    widget.wait()
    assert widget.data[:6] == first[:5] + b"X" and len(widget.data) == 20
    model, _ = checkpoint.load_model(runs / "one")
    config = SamplingConfig(max_new_tokens=14, seed=4)
    after = generate.generate(model, b"Once" + first[:5] + b"X", config).bytes
    assert widget.data[6:] == after
    bits = widget.view.layers["surprisal"]
    np.testing.assert_array_equal(bits[4:9], old_bits[4:9])
    before, _ = generate.next_byte_probs(model, b"Once" + first[:5], config)
    assert bits[9] == pytest.approx(-math.log2(before[88]), abs=1e-4)
    for position in (3, 24, -1):
        with pytest.raises(BitbyteError, match="only generated bytes can, 4 to 23"):
            widget.branch(position, 65, wait=True)
    assert "only generated bytes" in widget.message and widget.data[6:] == after


# --- words and bars


def test_the_sentence_of_a_known_distribution(fixed):
    widget, model = fixed(top_k=2, temperature=1.0)
    steps = model.steps
    # 1.984375 bits = sum of i/2^i for i = 1..7, and 7/2^7; after: 2/3 and 1/3.
    assert widget.sentence == (
        "keeps 2 of 256 bytes, 75.0 % of the probability, entropy 1.98 to 0.92 bits"
    )
    assert widget.sentence in widget.sentence_line.value.replace("&gt;", ">")
    widget.top_k.value, widget.top_p.value = 0, 0.6  # 1/2 + 1/4 is the first sum above it
    assert "keeps 2 of 256 bytes" in widget.sentence
    assert widget.probs_html.count("cut by top-p") == 10 and "66.7 %" in widget.probs_html
    widget.temperature.value = 0
    assert widget.sentence == (
        "greedy, always the likeliest byte: keeps 1 of 256 bytes, 50.0 % of the probability, "
        "entropy 1.98 to 0.00 bits"
    )
    assert "cut by greedy" in widget.probs_html
    assert model.steps == steps  # no slider asked the model


def test_the_cursor_chooses_whose_probabilities_are_shown(fixed):
    widget, model = fixed(length=5)
    assert "after 4 bytes" in widget.probs_html
    widget.generate(wait=True)
    assert "next byte, after 9 bytes" in widget.probs_html
    steps = model.steps
    widget.view.cursor = 6
    assert f"byte 6, {chr(widget.data[2])} {widget.data[2]:02x}, was drawn" in widget.probs_html
    widget.view.cursor = 1
    assert "next byte, after 9 bytes" in widget.probs_html
    assert model.steps == steps
    widget.prompt.value = "other"
    widget.wait()
    assert "next byte, after 5 bytes" in widget.probs_html and len(widget.data) == 5


def test_text_from_strangers_is_escaped(runs, tmp_path):
    widget = sampler(runs, prompt="<script>alert(1)</script>", length=3)
    widget.generate(wait=True)
    for value in (widget.status.value, widget.probs_html, widget.sentence_line.value):
        assert "<script" not in value
    assert "&lt;script&gt;" in widget.status.value
    widget._fail(BitbyteError("<img src=x onerror=y>"))
    assert "<img" not in widget.status.value and "&lt;img" in widget.status.value


def test_any_prompt(runs):
    for prompt in ("", "\u65e5\u672c", "\ud800 alone", "a" * 500, "\0\n"):
        widget = sampler(runs, prompt=prompt, length=4)
        widget.generate(wait=True)
        assert len(widget.data) == 4
    assert "--prompt_file" in widget.command
    assert "--prompt_file" in sample_command(Sample(start=b"a" * 40_000, config=widget.config))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "prompt", [b"", b"plain", b"it's $HOME `x`", b"\xff\x80\\'\x07", b"two\nlines\t", b"-dash",
               "\u202eodd \u00e9".encode()]
)  # fmt: skip
def test_a_shell_reads_the_prompt_back(prompt):
    line = sample_command(Sample(path="run", start=prompt, config=SamplingConfig()))
    options = line.removeprefix("bitbyte sample run ")
    command = ["bash", "-c", f"printf '%s\\0' {options}"]
    words = subprocess.run(command, check=True, capture_output=True).stdout.split(b"\0")
    joined = b"--prompt=" + prompt == words[0]
    assert joined if prompt.startswith(b"-") else words[:2] == [b"--prompt", prompt]


# --- models


def test_another_model_goes_on_where_the_first_one_ended(runs):
    widget = sampler(runs, length=8)
    widget.generate(wait=True)
    bars, first = widget.probs_html, widget.data
    widget.model_choice.value = str(runs / "snake")
    widget.wait()
    assert widget.prompt.value == "Once" and widget.data == first
    assert not widget.undo_button.disabled and not widget.continue_button.disabled
    assert widget.probs_html != bars and widget.message == "ready"
    assert "/one " in widget.command  # that is what made the bytes
    widget.resume(wait=True)
    model, _ = checkpoint.load_model(runs / "snake")
    config = SamplingConfig(max_new_tokens=8)
    assert widget.data == first + generate.generate(model, b"Once" + first, config).bytes
    assert "/snake " in widget.command
    widget.undo()
    assert widget.data == first and "/one " in widget.command


def test_another_model_stops_the_one_that_runs(fixed, runs):
    widget, _ = fixed(0.004, length=4096)
    widget.generate()
    until(lambda: len(widget.data) >= 10)
    widget.model_choice.value = str(runs / "snake")
    widget.wait()
    assert 10 <= len(widget.data) < 4096 and not widget.generate_button.disabled


def test_broken_folders_are_listed_and_harm_nothing(runs, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(runs, folder)
    (folder / "empty").mkdir()
    (folder / "a file").write_text("no run")
    meta = save_bold(folder / "torn <b>") / "step_0000001" / "meta.json"
    meta.write_bytes(meta.read_bytes()[:-40])
    meta = save_bold(folder / "edited") / "step_0000001" / "meta.json"
    meta.write_bytes(meta.read_bytes().replace(b"2.345", b"1.345"))
    weights = save_bold(folder / "flipped") / "step_0000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    when = time.time() - 36000
    os.utime(weights.with_name("meta.json"), (when, when))
    found = list_runs(folder)
    labels = {os.path.basename(entry.path): entry.label for entry in found}
    assert list(labels)[:3] != ["empty"] and list(labels)[-1] in ("empty", "edited", "torn <b>")
    assert {name for name, label in labels.items() if "unusable" in label} == {
        "empty", "edited", "torn <b>"
    }  # fmt: skip
    assert labels["empty"].endswith("unusable: it holds no complete step")
    size = checkpoint.load_model(folder / "one")[0].config.n_parameters / 1e6
    assert labels["flipped"] == f"flipped (ar dense, {size:.2g} M, 2.35 bits/byte, 10 h old)"
    assert "<= 2.35 bits/byte" in labels["fog"]
    widget = Sampler(None, "Once", str(folder))
    assert widget.model_choice.value == str(folder.resolve() / "one")
    for name, reason in (("empty", "no complete"), ("flipped", "damaged"), ("edited", "damaged")):
        widget.model_choice.value = str(folder.resolve() / name)
        with pytest.raises(BitbyteError, match=reason):
            widget.wait()
        assert widget.message.startswith("error") and reason in widget.message
        assert widget.probs_html == widget.sentence == ""
        widget.generate_button.click()
        with pytest.raises(BitbyteError, match=reason):
            widget.wait()
        assert widget.message.startswith("error") and widget.data == b""
        with pytest.raises(BitbyteError, match=reason):
            widget.generate(wait=True)
    widget.model_choice.value = str(folder.resolve() / "one")
    widget.length.value = 3
    widget.wait()
    widget.generate(wait=True)
    assert len(widget.data) == 3


def test_refresh_finds_new_runs_and_keeps_the_choice(runs, tmp_path):
    folder = tmp_path / "some"
    widget = Sampler(None, "Once", str(folder))
    assert "no checkpoint in" in widget.message and widget.model_choice.value is None
    with pytest.raises(BitbyteError, match="no checkpoint in"):
        widget.generate(wait=True)
    shutil.copytree(runs, folder)
    widget.refresh_button.click()
    widget.wait()
    assert widget.model_choice.value == str(folder.resolve() / "one") and widget.message == "ready"
    widget.length.value = 3
    widget.generate(wait=True)
    shutil.copytree(runs / "one", folder / "newer")
    os.utime(folder / "newer" / "step_0000001" / "meta.json")
    widget.refresh_button.click()
    widget.wait()
    assert widget.model_choice.options[0][1].endswith("newer")
    assert widget.model_choice.label.startswith("one (") and len(widget.data) == 3


def test_a_run_or_a_step_by_name(runs, tmp_path):
    run = save_bold(tmp_path / "long")
    save_bold(run, step=2, seed=1)
    latest = Sampler(str(run), folder=str(tmp_path))
    assert latest.model_choice.value == str(run.resolve()) and len(latest.model_choice.options) == 1
    step = Sampler(str(run / "step_0000001"), folder=str(tmp_path))
    assert step.model_choice.label.startswith("long/step_0000001 (")
    assert step.sentence != latest.sentence
    with pytest.raises(BitbyteError, match="no checkpoint 'nothing'"):
        Sampler("nothing", folder=str(tmp_path))


def test_a_failing_model_is_told_in_the_status_line(fixed):
    widget, model = fixed(length=20)
    widget.generate(wait=True)
    model.broken_after, widget.length.value = model.steps + 8, 100
    with pytest.raises(BitbyteError, match="NaN"):
        widget.resume(wait=True)
    assert widget.message.startswith("error: the model gives NaN") and "NaN" in widget.status.value
    assert len(widget.data) == 28 and widget.view.data == b"Once" + widget.data
    assert not widget.generate_button.disabled and widget.stop_button.disabled
    widget.undo_button.click()
    with pytest.raises(BitbyteError, match="NaN"):  # the bars ask this model
        widget.wait()
    assert len(widget.data) == 20
    model.broken_after, model.step = None, lambda *_: 1 / 0
    widget.generate()
    with pytest.raises(ZeroDivisionError):
        widget.wait()
    assert widget.message == "error: ZeroDivisionError: division by zero"


# --- diffusion


def test_diffusion_reveals_bytes_in_place(runs):
    widget = sampler(runs, "fog", length=20, seed=2)
    assert "any order" in widget.sentence and widget.probs_html == ""
    painted = []
    paint = widget.view.paint
    widget.view.paint = lambda p, *a, **k: (painted.extend(p), paint(p, *a, **k))
    widget.generate(wait=True)
    model, _ = checkpoint.load_model(runs / "fog")
    config = SamplingConfig(max_new_tokens=20, seed=2)
    assert widget.data == infill.sample(model, b"Once", config)
    assert sorted(painted) == list(range(4, 24)) and painted != sorted(painted)
    assert widget.view.flags.tolist() == [GIVEN] * 4 + [0] * 20
    bits = widget.view.layers["surprisal"]
    assert np.isnan(bits[:4]).all() and np.isfinite(bits[4:]).all()
    widget.branch(10, 65, wait=True)
    assert widget.data[6] == 65 and len(widget.data) == 20
    assert np.isnan(widget.view.layers["surprisal"][10])
    widget.undo()
    assert widget.data == infill.sample(model, b"Once", config)


def test_a_model_of_blocks_writes_both_ways(tmp_path):
    from bitbyte.cli.dispatch import main

    save_bold(tmp_path / "mist", "diffusion", block=4)
    widget = sampler(tmp_path, "mist", length=12, seed=2)
    model, _ = checkpoint.load_model(tmp_path / "mist")
    config = SamplingConfig(max_new_tokens=12, seed=2)
    wanted = {
        ("confidence", 0): infill.sample(model, b"Once", config),
        ("confidence", 0.3): infill.sample(model, b"Once", config, threshold=0.3),
        ("causal", 0.3): generate.generate(model, b"Once", config).bytes,
    }
    for (order, threshold), made in wanted.items():
        widget.order.value, widget.threshold.value = order, threshold
        widget.wait()
        assert ("any order" in widget.sentence) is (order != "causal")
        widget.generate(wait=True)
        assert widget.data == made
        out = tmp_path / "bytes"
        out.unlink(missing_ok=True)
        assert main([*shlex.split(widget.command)[1:], "--out", str(out), "--device", "cpu"]) == 0
        assert out.read_bytes() == made
    assert "causal" not in sampler(tmp_path, "mist").denoise_options.values()


def test_only_models_of_blocks_have_the_causal_order(runs, tmp_path):
    assert "causal" not in sampler(runs, "fog").order.options
    save_bold(tmp_path / "mist", "diffusion", block=4)
    assert "causal" in sampler(tmp_path, "mist").order.options


def test_a_stopped_diffusion_keeps_the_bytes_before_the_first_gap(runs, monkeypatch):
    widget = sampler(runs, "fog", length=28)
    model = widget._model()
    logits, calls = model.logits, []

    def slow(ids_BT):
        calls.append(1)
        time.sleep(0.02)
        return logits(ids_BT)

    monkeypatch.setattr(model, "logits", slow)
    masked = []
    paint = widget.view.paint
    widget.view.paint = lambda *a, **k: (
        paint(*a, **k), masked.append(int((widget.view.flags & MASKED).astype(bool).sum()))
    )  # fmt: skip
    widget.generate()
    until(lambda: len(calls) >= 10)
    widget.stop()
    made = len(calls)
    widget.wait()
    assert len(calls) <= made + 1  # no more than the pass that is being made
    assert masked == sorted(masked, reverse=True) and 0 < masked[-1] < 28
    assert widget.message.startswith("stopped: ") and len(widget.data) < 28
    assert widget.view.data == b"Once" + widget.data and "--max_new_tokens 28" in widget.command
    whole = infill.sample(model, b"Once", widget._sample.config)
    assert whole.startswith(widget.data)


# --- the box


def test_the_box_fits_and_says_what_it_is(runs):
    widget = sampler(runs, length=3)
    widget.generate(wait=True)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == repr(widget) and repr(widget).startswith("Sampler(one, ")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert widget.box.layout.max_width == "1000px" and "bb-sampler" in widget.box._dom_classes
    seed = widget.seed.value
    widget.seed_button.click()
    assert widget.seed.value != seed
    assert dataclasses.replace(widget.config, seed=0, max_new_tokens=256) == SamplingConfig()


def test_numbers_of_the_bars():
    scores_V = torch.zeros(256)
    scores_V[65] = math.log(256)
    config = SamplingConfig(temperature=1.0, min_p=0.5)
    effect = generate.filter_effect(scores_V, config)
    assert effect.kept == 1 and effect.mass == pytest.approx(256 / 511)
    page = prob_bars.probs_html("<t>", effect)
    assert "50.1 %" in page and "100.0 %" in page and "244 others" in page and "&lt;t&gt;" in page
    assert page.count("cut by min-p") == 11


def test_a_program_may_end_while_bytes_are_made(runs):
    code = (
        "import sys, time; from bitbyte.widgets.sampler import Sampler\n"
        "widget = Sampler(sys.argv[1], 'Once', sys.argv[2]); widget.length.value = 4096\n"
        "widget.generate(); time.sleep(0.3); print(widget.data != b'')"
    )
    command = [sys.executable, "-c", code, str(runs / "one"), str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
