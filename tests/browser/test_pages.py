"""What a person sees and does: the widgets of the notebooks in JupyterLab, and the Voila page."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from harness import PATIENCE, Notebook, Server, Watched, free_port, write_notebook
from support import ROOT

from bitbyte import checkpoint
from bitbyte.cli.dispatch import main
from bitbyte.evaluate import entropy
from bitbyte.workbench.pages import write_notebook_page

pytestmark = pytest.mark.browser
# Click Stop and wait until the page shows that nothing runs any more; milliseconds that took.
STOP = """() => new Promise(done => {
  const button = document.querySelector(".bb-stop"), began = performance.now();
  const look = () => {
    if (button.disabled) done(performance.now() - began);
    else requestAnimationFrame(look);
  };
  button.click();
  look();
})"""


def settled(one: Watched) -> None:
    """Nothing went wrong in the page, and nothing left the machine."""
    assert one.abroad == []
    assert one.errors == []


def slide(page, name: str, *keys: str) -> None:
    """Press keys on the handle of the slider with this label."""
    page.locator(".widget-slider", has_text=name).first.locator(".noUi-handle").focus()
    for key in keys:
        page.keyboard.press(key)


def drag(page, name: str, share: float) -> None:
    """Drag the handle of the slider with this label to ``share`` of its way, with the mouse."""
    slider = page.locator(".widget-slider", has_text=name).first
    places, before = None, ()
    while places != before:  # outputs above may still grow and move it
        time.sleep(0.3)
        before, places = places, [
            slider.locator(part).bounding_box() for part in (".noUi-handle", ".noUi-target")
        ]  # fmt: skip
    handle, way = places
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    for part in (0.5, 1.0):  # a hand does not jump
        x = way["x"] + way["width"] * (share * part + (1 - part) * 0.5)
        page.mouse.move(x, handle["y"] + handle["height"] / 2)
    page.mouse.up()


def eventually(read, holds):
    deadline = time.monotonic() + PATIENCE
    while not holds(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(0.05)
    return value


def fits(page) -> bool:
    """No output is wider than its cell."""
    return page.evaluate(
        "() => [...document.querySelectorAll('.jp-OutputArea-output')]"
        ".every(e => e.scrollWidth <= e.clientWidth + 2)"
    )


# Controls that stick out of the cell, where no scrolling reaches them.
OUTSIDE = """all => all.filter(e => {
  if (!e.offsetParent) return false;
  const part = e.getBoundingClientRect();
  const cell = e.closest(".jp-OutputArea-output").getBoundingClientRect();
  return part.left < cell.left - 12 || part.right > cell.right + 12;
}).map(e => e.outerHTML)"""


def works_narrow(notebook: Notebook, widget: str, *widths: int) -> None:
    """In half the window of a laptop buttons and values can be read and nothing is cut off.

    So, too, at a zoom of 150 %, where 1280 pixels hold what 853 held.
    """
    page = notebook.page
    for width in (900, 853, *widths):
        page.set_viewport_size({"width": width, "height": 900})
        parts = page.locator(f"{widget} button, {widget} .widget-readout")
        assert parts.count()
        cut = "e => e.offsetParent && (e.scrollWidth > e.clientWidth + 1 || e.clientWidth < 20)"
        assert parts.evaluate_all(f"all => all.filter({cut}).map(e => e.outerHTML)") == []
        kinds = ("button", "input", "select", "textarea", ".noUi-handle", ".widget-readout")
        controls = page.locator(", ".join(f"{widget} {kind}" for kind in kinds))
        assert controls.evaluate_all(OUTSIDE) == []
        boxes = page.locator(f"{widget}, {widget} .widget-vbox, {widget} .widget-hbox")
        cut = "e => e.offsetParent && e.scrollWidth > e.clientWidth + 8"
        assert boxes.evaluate_all(f"all => all.filter({cut}).map(e => e.innerText)") == []
        assert fits(page)
        page.locator(widget).first.scroll_into_view_if_needed()
        notebook.screen(f"{widget.removeprefix('.bb-')}_{width}")


def shown(notebook: Notebook, name: str, widget: str):
    """Run a notebook; its widget of the class ``widget``, in sight."""
    notebook.open(name)
    notebook.run_all()
    box = notebook.page.locator(widget).first
    box.scroll_into_view_if_needed()
    return box


def test_sampler(notebook: Notebook):
    box, page = shown(notebook, "07_sample", ".bb-sampler"), notebook.page
    drag(page, "temperature", 0.0)
    sentence = box.locator(".bb-sentence")
    eventually(sentence.inner_text, lambda text: "greedy" in text)
    assert "keeps 1 of 256 bytes" in sentence.inner_text()
    value = box.locator(".widget-readout").first.bounding_box()
    assert value["x"] + value["width"] <= box.locator(".bb-bars").bounding_box()["x"]  # not covered
    cut = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
    assert box.locator(".bb-bars td").evaluate_all(cut) == []  # "cut by greedy", too, is not
    notebook.screen("sampler_greedy")
    slide(page, "temperature", "End")
    slide(page, "top-p", "End")  # off; the notebook sets less
    eventually(sentence.inner_text, lambda text: "keeps 256 of 256" in text)
    slide(page, "length", "End")
    box.locator(".bb-generate").click()
    status = box.locator(".bb-status")
    eventually(status.inner_text, lambda text: "bytes/s" in text)
    notebook.screen("sampler_streaming")
    milliseconds = page.evaluate(STOP)
    print(f"stop was heard and shown after {milliseconds:.0f} ms")
    assert "stopped" in status.inner_text()
    assert fits(page)
    works_narrow(notebook, ".bb-sampler")
    settled(notebook)


def test_lens(notebook: Notebook):
    box, page = shown(notebook, "06_visualize_entropy", ".bb-lens"), notebook.page
    sentence = box.locator(".bb-sentence")
    slide(page, "threshold", "Home")  # at 0 every byte starts a patch
    eventually(sentence.inner_text, lambda text: "mean patch 1.00 bytes, 3,000 patches" in text)
    slide(page, "threshold", "End")  # above what 256 values can have
    eventually(sentence.inner_text, lambda text: "mean patch 3000.00 bytes, 1 patch" in text)
    notebook.screen("lens")
    assert fits(page)
    box.locator(".bb-mixed input").click()
    totals = box.locator(".bb-totals")
    eventually(totals.inner_text, lambda text: text.count("in the mixer") == 2)  # two models
    box.locator(".bb-layer select").select_option("mixed")
    eventually(box.locator(".bb-plot").inner_html, lambda text: "mixed A" in text)
    notebook.screen("lens_mixed")
    works_narrow(notebook, ".bb-lens", 800)
    titles = box.locator(".bb-title:visible").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert len(titles) == 2 and max(titles) < 30, titles  # one line: the texts stay side by side
    settled(notebook)


def test_infill(notebook: Notebook):
    box, page = shown(notebook, "08_infill", ".bb-infiller"), notebook.page
    text = box.locator("textarea").first
    text.fill("the cat \u27e63\u27e7 on the mat")
    text.blur()
    box.locator(".bb-fill").click()
    # Three calls for three bytes: the fill that the notebook made took eight.
    words = ("given bytes unchanged", "3 network calls")
    eventually(box.inner_text, lambda said: all(word in said for word in words))
    notebook.screen("infill")
    assert fits(page)
    works_narrow(notebook, ".bb-infiller")
    settled(notebook)


OTHERS = (
    "00_index", "01_prepare_data", "02_train_bitbyte", "03_train_mamba", "04_train_diffusion",
    "05_evaluate_bpb", "11_checkpoints",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_notebooks_run(notebook: Notebook, name):
    notebook.open(name)
    notebook.run_all()
    notebook.screen(name)
    assert fits(notebook.page)
    settled(notebook)


VIEW = "application/vnd.jupyter.widget-view+json"  # beside the still picture in what was executed
STILLS = {"06_visualize_entropy": "mark", "07_sample": "mark", "08_infill": "mark",
          "13_train_grid": "span[title]"}  # fmt: skip


@pytest.mark.parametrize("name", STILLS)
def test_a_page_without_a_kernel_shows_what_its_widgets_showed(browser, tmp_path, name):
    """So does a forge: the stored outputs hold a still picture of each widget."""
    path = tmp_path / f"{name}.ipynb"
    node = json.loads((ROOT / "notebooks" / path.name).read_text("utf-8"))
    for cell in node["cells"]:
        for output in cell.get("outputs", []):
            if "bitbyte-static" in "".join(output.get("data", {}).get("text/html", [])):
                output["data"][VIEW] = {"model_id": "1", "version_major": 2, "version_minor": 0}
    path.write_text(json.dumps(node), "utf-8")
    write_notebook_page(path)
    one = Watched(browser, path.as_uri())
    one.page.goto(path.with_suffix(".html").as_uri())
    tints = f".bitbyte-static {STILLS[name]}"
    seen = "all => all.filter(e => e.offsetWidth && getComputedStyle(e).backgroundImage + "
    seen += "getComputedStyle(e).backgroundColor != 'nonergba(0, 0, 0, 0)').length"
    assert one.page.locator(tints).evaluate_all(seen)
    one.screen(f"still_{name}")
    one.close()


MISTAKE = "from bitbyte.runs import resolve; resolve('nowhere')"  # says one line, no traceback


@pytest.mark.parametrize("wrong", ["1 / 0", MISTAKE])
def test_a_failed_cell_is_noticed(notebook: Notebook, workplace, wrong):
    notebook.open(write_notebook(workplace[0], "wrong", "print('well')", wrong))
    with pytest.raises(AssertionError, match="Error"):
        notebook.run_all()


LIVE = """
from bitbyte.config import TrainConfig
from bitbyte.widgets import TrainingMonitor, launch

run = launch(TrainConfig(data=DATA, n_layer=1, d_model=64, seq_len=64, batch_size=2,
                         steps=100_000, log_every=1, device="cpu", threads=1))
monitor = TrainingMonitor([run, OTHER])
monitor.follow()
monitor
"""


def test_live_training(notebook: Notebook, workplace):
    folder, _ = workplace
    checkpoints = folder / "artifacts" / "checkpoints"
    before = {*checkpoints.glob("*/latest")}  # what other notebooks trained
    other = min(before).parent.name
    data = folder / "bytes.bin"
    data.write_bytes(bytes(range(256)) * 400)
    live = LIVE.replace("DATA", repr(str(data))).replace("OTHER", repr(other))
    notebook.open(write_notebook(folder, "live", live.strip(), "print('run', run)"))
    notebook.run_all()
    box = notebook.page.locator(".bb-monitor").first
    eventually(box.inner_text, lambda text: "step" in text and "bytes/s" in text)
    notebook.screen("training")
    stop, chosen = box.locator(".bb-stop"), box.locator("select:visible").first
    assert chosen.locator("option:checked").inner_text().replace("\xa0", " ") == "all runs"
    works_narrow(notebook, ".bb-monitor", 700)
    stop.click()
    eventually(box.inner_text, lambda text: "stopped" in text)
    (run,) = {*checkpoints.glob("*/latest")} - before
    assert run.read_text().startswith("step_")
    settled(notebook)


def test_voila(browser, workplace):
    pytest.importorskip("voila", reason="no Voila: pip install 'bitbyte[app]'")
    folder, env = workplace
    port = free_port()
    command = [sys.executable, "-m", "bitbyte", "app", "--port", str(port), "--no_browser"]
    server = Server(command, folder, env, f"http://127.0.0.1:{port}", "")
    one = Watched(browser, server.url)
    try:
        server.wait("/voila/static/")
        said = eventually(server.log.read_text, lambda text: "token=" in text)
        one.page.goto(server.url)
        assert "/login" in one.page.url  # nobody gets in without it
        one.page.goto(re.search(r"http://127\S+token=\w+", said)[0], wait_until="domcontentloaded")
        box = one.page.locator(".bb-sampler").first
        box.wait_for()
        slide(one.page, "temperature", "Home")
        eventually(box.locator(".bb-sentence").inner_text, lambda text: "greedy" in text)
        one.screen("voila")
        assert one.abroad == []
        assert [text for text in one.errors if "Content Security Policy" not in text] == []
    finally:
        one.close()
        server.stop()


def test_a_model_in_a_page(browser, tmp_path):
    """From file://, without a server: it writes, a bar writes its byte, a text has its costs."""
    path = tmp_path / "page.html"
    assert main(["page", "wiki-small", "--out", str(path), "--prompt", "The city of"]) == 0
    one = Watched(browser, path.as_uri())
    page = one.page
    page.goto(path.as_uri())
    ready, text = "#go:not([disabled])", "The old mill. [[Category:Mills]] " * 40
    page.wait_for_selector(ready)
    page.fill("#length", "120")
    page.click("#go")
    page.wait_for_selector(ready)
    assert "120 bytes" in page.inner_text("#status")
    assert page.inner_text("#written").count("The city of") == 1
    assert page.locator("#bars button").count() == 12
    page.locator("#bars button").nth(3).click()
    eventually(page.locator("#written").inner_text, lambda said: "132 bytes" in said)
    one.screen("model_page_write")
    page.click("#tab-read")
    page.fill("#text", text)
    page.click("#measure")
    page.wait_for_selector("#measure:not([disabled])")
    model, _ = checkpoint.load_model("wiki-small")
    want = entropy.read(model, text.encode()).bpb
    assert page.inner_text("#cost").startswith(f"{want:.4f} bits per byte over 1,320 bytes")
    page.set_input_files("#file", path)
    eventually(page.locator("#cost").inner_text, lambda said: "of 1," in said)
    page.click("#tab-write")  # while it reads
    page.click("#stop")
    page.wait_for_selector(ready)
    page.click("#more")
    page.wait_for_selector(ready)
    page.click("#tab-pack")
    source, coded, back = (tmp_path / name for name in ("mill.txt", "coded", "back"))
    source.write_text(text)
    page.set_input_files("#file-pack", source)
    with page.expect_download() as saved:
        page.click("#packed a")
    saved.value.save_as(coded)
    assert saved.value.suggested_filename == "mill.txt.bitbyte"
    one.screen("model_page_pack")
    assert main(["decompress", str(coded), str(back)]) == 0
    assert back.read_text() == text
    page.set_input_files("#file-pack", coded)
    page.wait_for_selector("#packed a[download=restored], #packed a[download=coded]")
    with page.expect_download() as saved:
        page.click("#packed a")
    assert Path(saved.value.path()).read_text() == text
    page.set_input_files("#file-pack", source.with_name("page.html"))
    page.click("#stop")
    eventually(page.locator("#status").inner_text, lambda said: "stopped" in said)
    for width in (1280, 500):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    one.screen("model_page_narrow")
    settled(one)
    one.close()
