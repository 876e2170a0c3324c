"""Make the pictures of the documents anew: python tests/tools/screens.py [NAME ...]

They are taken by Chromium from the bundled models, so they show what the widgets and pages
look like now.  Names are those of the files in artifacts/plots/screens.  Needs what the tests in
tests/browser need.
"""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "browser")]

from harness import (  # noqa: E402
    ARGUMENTS,
    Notebook,
    Watched,
    find_chromium,
    lab_environment,
    start_lab,
    write_notebook,
)
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from bitbyte.cli.dispatch import main as bitbyte  # noqa: E402
from bitbyte.files import write_atomic  # noqa: E402

FOLDER = ROOT / "artifacts" / "plots" / "screens"
TEXT = """\
'''Amsterdam''' is the capital of the [[Netherlands]]. It began in the 12th century as a village \
of fishermen at a dam in the river [[Amstel]], which gave it its name. Its canals, dug in the \
[[17th century]], are lined with narrow houses of brick, and the oldest of them lean a little.

== History ==
In [[1275]] the count of Holland freed the people of the dam from a toll on the bridges. In the \
[[Dutch Golden Age]] ships sailed from here to the [[Baltic Sea]], the [[Caribbean]] and the \
[[Indian Ocean]], and merchants founded the first stock exchange of the world.

== A text of another kind ==
def square(x):
    return x * x

Once upon a time there was a zebra who counted waves. Qvyx zlorb 48151623, said the zebra.
"""
SAMPLER = """
from bitbyte.widgets import Sampler

sampler = Sampler("wiki", prompt="The city of Amsterdam is")
sampler.temperature.value, sampler.seed.value, sampler.length.value = 0.7, 1, 420
sampler.generate(wait=True)
sampler.generate(wait=True)  # the first one compiles
sampler.view.wrap, sampler.view.height = True, 150
sampler.view.cursor = 25
sampler
"""
LENS = f"""
from bitbyte.widgets import Lens

lens = Lens(["wiki", "wiki-small"], {TEXT!r})
lens.wait()
lens.threshold.value = 4
lens
"""


def keep(name: str, png: bytes) -> None:
    """Store a picture with 256 colors, a third of its size."""
    file, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomic(FOLDER / f"{name}.png", file.getvalue())
    print(f"{name}.png: {picture.width} x {picture.height}, {len(file.getvalue()):,} bytes")


def opened(browser, path: Path, width: int, height: int) -> Watched:
    one = Watched(browser, path.as_uri())
    one.page.set_viewport_size({"width": width, "height": height})
    one.page.goto(path.as_uri())
    return one


def model_page(browser, work: Path) -> bytes:
    path, ready = work / "model.html", "#go:not([disabled])"
    bitbyte(["page", "wiki-small", "--out", str(path), "--prompt", "The history of the city of "])
    one = opened(browser, path, 1060, 640)
    page = one.page
    page.wait_for_selector(ready)
    page.fill("#length", "560")
    page.fill("#seed", "3")
    for _ in range(2):  # the first one compiles
        page.click("#go")
        page.wait_for_selector(ready)
    return page.screenshot()


def entropy_page(browser, work: Path) -> bytes:
    source, path = work / "amsterdam.txt", work / "entropy.html"
    source.write_text(TEXT, "utf-8")
    bitbyte(["entropy", "wiki", str(source), "--out", str(path), "--against", "wiki-small"])
    page = opened(browser, path, 1060, 620).page
    row = page.locator(".bv-row", has_text="Amstel").first
    row.locator(".bv-b").nth(row.inner_text().index("Amstel") + 5).hover()
    page.wait_for_timeout(500)
    return page.screenshot()


def widget(cell: str, name: str, first: str, last: str):
    """A picture of a widget in a notebook, from one of its parts to another, by their classes."""

    def take(browser, work: Path) -> bytes:
        (work / "notebooks").mkdir(exist_ok=True)
        write_notebook(work, name, cell.strip())
        server = start_lab(work, lab_environment(work))
        try:
            one = Notebook(browser, server)
            page = one.page
            page.set_viewport_size({"width": 1400, "height": 2000})
            one.open(name)
            one.run_all()
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # views are drawn after the cell is done
            top, end = (page.locator(part).first.bounding_box() for part in (first, last))
            box = page.locator(".jp-OutputArea-output").first.bounding_box()
            clip = {"x": box["x"], "width": box["width"], "y": top["y"] - 6}
            png = page.screenshot(clip=clip | {"height": end["y"] + end["height"] + 6 - clip["y"]})
            one.close()
            return png
        finally:
            server.stop()

    return take


PICTURES = {
    "sampler": widget(SAMPLER, "sampler", ".bb-sampler", ".bb-sampler"),
    "lens": widget(LENS, "lens", ".bb-totals", ".bb-plot"),
    "model_page": model_page,
    "entropy_page": entropy_page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args().names or list(PICTURES)
    if unknown := set(names) - PICTURES.keys():
        parser.error(f"no picture {', '.join(sorted(unknown))}; choose from {', '.join(PICTURES)}")
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium here; on Debian: apt install chromium")
    os.environ.setdefault("BITBYTE_ARTIFACTS", str(ROOT / "artifacts"))  # `wiki` is in it
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for name in names:
            keep(name, PICTURES[name](browser, Path(folder)))
        browser.close()


if __name__ == "__main__":
    main()
