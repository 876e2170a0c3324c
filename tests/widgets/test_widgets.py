"""What all widgets share: the device, loaded models, errors that are seen, the still picture."""

import json
import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import Page, save_run

pytest.importorskip("anywidget", reason="needs bitbyte[workbench]")

from bitbyte import checkpoint, models
from bitbyte.config import preset
from bitbyte.evaluate.listing import list_models
from bitbyte.files import BitbyteError, artifacts
from bitbyte.plots.page import GIVEN, MASKED, columns, static
from bitbyte.widgets.base import Panel
from bitbyte.widgets.byteview import STILL, ByteView
from bitbyte.widgets.infiller import Infiller
from bitbyte.widgets.jobs import Jobs
from bitbyte.widgets.lens import Lens
from bitbyte.widgets.monitor import TrainingMonitor
from bitbyte.widgets.sampler import Sampler

NAME = "base-ar"


def save(name: str = NAME, step: int = 1) -> str:
    """A run of a small model that was never trained, where the widgets look."""
    config = preset("nano", "ar", n_layer=1, d_model=32, linear="dense", seq_len=32)
    save_run(artifacts("checkpoints", name), models.build(config, step), step)
    return name


@pytest.fixture(scope="module", autouse=True)
def run() -> str:
    return save()


# Each of the three with bytes to show, ready; its arguments as keywords.
MAKE = {
    "sampler": lambda **options: Sampler(NAME, "Once", **options),
    "lens": lambda **options: Lens(NAME, "Once upon a time", **options),
    "infiller": lambda **options: Infiller(NAME, "Once \u25a1\u25a1on", **options),
}


def ready(kind: str, **options) -> Panel:
    widget = MAKE[kind](**options)
    act = {"sampler": "generate", "infiller": "fill"}.get(kind)
    if act:
        getattr(widget, act)(wait=True)
    widget.wait()
    return widget


@pytest.mark.parametrize("kind", MAKE)
def test_models_are_loaded_where_asked(kind, monkeypatch):
    asked, real = [], checkpoint.load_model

    def load(path, *, device):
        asked.append(device)
        return real(path, device="cpu")

    list_models()  # loads the packed models once, to check them
    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr("bitbyte.widgets.base.choose_device", lambda name: f"chosen {name}")
    ready(kind)
    ready(kind, device="mps")
    assert asked == ["chosen auto", "chosen mps"]


@pytest.mark.parametrize("kind", MAKE)
def test_an_absent_device_is_refused(kind):
    with pytest.raises(BitbyteError, match="no device 'abacus'"):
        MAKE[kind](device="abacus")


@pytest.mark.parametrize("kind", MAKE)
def test_a_model_is_loaded_once_and_anew_when_its_run_went_on(kind, monkeypatch):
    name = save(f"grows-{kind}")
    loaded, real = [], checkpoint.load_model

    def load(path, **options):
        loaded.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(checkpoint, "load_model", load)
    panel = Panel("cpu")
    first = panel._load([name])
    assert panel._load([name, NAME])[0] is first[0] and loaded == ["step_0000001"] * 2
    panel._load([NAME])
    assert list(panel._models.values()) == panel._load([NAME]) and len(loaded) == 2
    save(name, step=2)
    assert panel._load([name])[0] is not first[0] and loaded[2:] == ["step_0000002"]


def weights(folder: str, seed: int) -> bytes:
    """Other weights each time, in the one step of a run that is written again."""
    shutil.rmtree(artifacts("checkpoints", folder), ignore_errors=True)
    model = models.build(preset("nano", "ar", n_layer=1, d_model=32, seq_len=32), seed)
    save_run(artifacts("checkpoints", folder), model)
    return model.embed.detach().numpy().tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_is_loaded_anew_when_its_file_has_other_weights(packed, tmp_path):
    panel, file = Panel("cpu"), tmp_path / "packed.bbm"
    for seed in (0, 1):
        want = weights("again", seed)
        if packed:
            checkpoint.export_packed(artifacts("checkpoints", "again"), file, overwrite=True)
        (model,) = panel._load([file if packed else "again"])
        assert packed or model.embed.detach().numpy().tobytes() == want
        fresh, _ = checkpoint.load_model(file if packed else "again")
        assert torch.equal(model.embed, fresh.embed) and len(panel._models) == 1
        assert panel._load([file if packed else "again"]) == [model]


def test_refresh_shows_what_the_retrained_model_expects():
    weights("retrained", 0)
    widget = Sampler("retrained", "Once")
    before = widget.probs_html
    widget.refresh()
    widget.wait()
    assert widget.probs_html == before
    weights("retrained", 1)
    widget.refresh()
    widget.wait()
    assert widget.probs_html == Sampler("retrained", "Once").probs_html != before


def test_continue_asks_the_newest_step():
    """Bytes of two models never pass for those of one command."""
    name = save("grows")
    widget = Sampler(name, "Once")
    widget.length.value = 5
    widget.generate(wait=True)
    save(name, step=2)
    widget.resume(wait=True)
    assert "--max_new_tokens 5 " in widget.command  # after the first five, which are its prompt


class Failing(Panel):
    def __init__(self):
        super().__init__("cpu")
        self.box = self.status


def test_errors_in_callbacks_and_threads_reach_the_status_line():
    panel = Failing()
    panel._on_click(panel.stop_button, lambda: 1 / 0)
    panel.stop_button.click()
    assert panel.message == "error: ZeroDivisionError: division by zero"
    panel._on_change(panel.status, lambda text: panel._load(["<b>"]), "placeholder")
    panel.status.placeholder = "changed"
    assert panel.message.startswith("error: no checkpoint '<b>'")
    assert "<b>" not in panel.status.value and "&lt;b&gt;" in panel.status.value
    panel._start(lambda job: {}["key"])
    with pytest.raises(KeyError):
        panel.wait()
    assert panel.message == "error: KeyError: 'key'" and panel.stop_button.disabled


def test_stop_reaches_all_jobs_and_replacing_discards_them():
    heard, ran = [], []
    jobs, began, go = Jobs(heard.append), threading.Event(), threading.Event()

    def first(job):
        began.set()
        go.wait(60)
        ran.append((job.stopped(), job.replaced()))

    jobs.start(first)
    assert began.wait(60)
    jobs.start(lambda job: ran.append((job.stopped(), job.replaced())), replace=False)
    jobs.stop()
    go.set()
    jobs.wait()
    assert ran == [(True, False)] * 2
    began.clear()
    go.clear()
    jobs.start(first)
    assert began.wait(60)
    jobs.start(lambda job: ran.append("never"), replace=False)
    jobs.start(lambda job: 1 / 0)
    go.set()
    with pytest.raises(ZeroDivisionError):
        jobs.wait()
    assert ran[2:] == [(True, True)] and [type(error) for error in heard] == [ZeroDivisionError]
    jobs.start(lambda job: None)
    jobs.wait()  # what went wrong before is no news


def test_jobs_that_are_started_at_once_do_not_run_at_once(monkeypatch):
    """The first thread is held in the middle of `start` until the other has had its chance."""
    jobs, most, here = Jobs(pytest.fail), [], []
    other, never = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def __init__(self, *given, **named):
            if threading.current_thread() is first:
                other.wait(0.2)
            super().__init__(*given, **named)

    def work(job):
        here.append(job)
        most.append(len(here))
        never.wait(0.2)
        here.remove(job)

    def start_other():
        jobs.start(work, replace=False)
        other.set()

    first = threading.Thread(target=jobs.start, args=(work,), kwargs={"replace": False})
    second = threading.Thread(target=start_other)
    monkeypatch.setattr("bitbyte.widgets.jobs.threading", SimpleNamespace(Thread=Slow))
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join()
    jobs.wait()
    assert most == [1, 1]


def test_a_job_may_start_another():
    jobs, ran = Jobs(pytest.fail), []
    jobs.start(lambda job: jobs.start(lambda inner: ran.append(job.stopped()), replace=False))
    jobs.wait()
    jobs.start(lambda job: jobs.start(lambda inner: ran.append(job.stopped())))
    jobs.wait()
    assert ran == [False, True]


# --- the still picture


HOSTILE = "<script>alert(1)</script><img src=x onerror=y>"


@pytest.mark.parametrize("kind", MAKE)
def test_the_bundle_has_a_still_picture_without_scripts(kind):
    widget = ready(kind)
    bundle = widget._repr_mimebundle_()
    assert bundle["text/plain"] == repr(widget)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    seen = Page(bundle["text/html"])
    assert set(seen.tags) <= {"div", "strong", "small", "pre", "span", "mark"}
    assert {name for _, given in seen.attributes for name in given} <= {"class", "style"}
    assert "Once" in seen.text and NAME in seen.text
    json.dumps(bundle)


def test_strangers_text_is_escaped_in_the_still_picture():
    sampler, lens = Sampler(NAME, HOSTILE), Lens(NAME, HOSTILE)
    infiller = Infiller(NAME, HOSTILE + "\u25a1")
    lens.wait()
    for widget in (sampler, lens, infiller, lens.views[0]):
        bundle = widget._repr_mimebundle_()
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle  # a view of its own has two
        assert "<script" not in bundle["text/html"] and "<img" not in bundle["text/html"]
        assert HOSTILE in Page(bundle["text/html"]).text


def test_a_still_picture_is_small_and_stays_the_same():
    data = np.random.default_rng(0).integers(32, 127, 5000, np.uint8).tobytes()
    lens = Lens(NAME, data)
    lens.wait()
    still = lens.to_html()
    assert len(still) < 100 * STILL and f"only the first {STILL} are shown" in still
    assert data[:STILL].decode() in Page(still).text
    again = Lens(NAME, data)
    again.wait()
    assert again.to_html() == still  # no times, no model ids: stored outputs stay the same


def test_neighbors_of_one_look_share_an_element_and_strong_tints_are_marks():
    bits = np.array([0, 0, 4, 4, 8, 8, 8, 1], np.float32)
    flags = [GIVEN, GIVEN, 0, 0, 0, 0, MASKED, 0]
    shown = columns(b"ab<d\n\xffg ", {"bits": bits}, flags=flags)
    text = static(shown, layer="bits", low=0, high=8, tips=False)
    assert 'title="' not in text and text.count("<span") == 3 and text.count("<mark") == 2
    assert re.search(r"<mark style=[^>]*0\.38\)[^>]*>&lt;d</mark>", text)
    assert re.search(r"<mark style=[^>]*0\.75\)[^>]*>\u240a?\u23ce?\nff</mark>", text)
    assert ">ab</span>" in text and ">\u25a1</span>" in text
    assert text.count("8 bytes") == 1


def test_the_page_of_a_run_shows_the_tinted_text(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbconvert")
    from bitbyte.workbench.pages import write_notebook_page

    new, lens = nbformat.v4, ready("lens")
    bundle = lens._repr_mimebundle_()
    bundle["text/html"] += '<span style="position:fixed;color:red" onclick="x()">over</span>'
    cell = new.new_code_cell("lens", outputs=[new.new_output("display_data", bundle)])
    nbformat.write(new.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    write_notebook_page(tmp_path / "a.ipynb")
    page = (tmp_path / "a.html").read_text()
    assert "<mark style=" in page and "background:rgba(213,94,0" in page and lens.totals in page
    assert '<span style="color:red;">over</span>' in page  # no more than the color


def test_a_view_by_itself_has_a_still_picture_too():
    data, _ = ByteView(b"abc", {"surprisal": [1, 2, 3]})._repr_mimebundle_()
    assert "abc" in Page(data["text/html"]).text
    assert "application/vnd.jupyter.widget-view+json" in data


def test_a_monitor_says_in_it_how_its_runs_are(tmp_path):
    (tmp_path / "<run>").mkdir()
    still = TrainingMonitor(tmp_path / "<run>")._repr_mimebundle_()["text/html"]
    assert "<run>" in Page(still).text and "empty" in still
