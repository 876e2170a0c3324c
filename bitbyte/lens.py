"""The lens as a widget: what up to three models expected at every byte of a text.

All numbers come from `entropy`, whose windows are those of `evaluate`.  Long input is cut into
pages; a page is read and computed when it is shown, in a thread that a newer request stops.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as W
import numpy as np

from bitbyte import checkpoint, entropy
from bitbyte.byteview import CHANGED, START, ByteView
from bitbyte.files import BitbyteError
from bitbyte.inputs import shown
from bitbyte.jobs import Job, Jobs
from bitbyte.lens_parts import (
    ENGLISH,
    HELP,
    LAYERS,
    LETTERS,
    Source,
    all_totals,
    by_letter,
    edit_words,
    first_bytes,
    histogram,
    html_lines,
    layers_of,
    of_bytes,
    of_file,
    parse_byte,
    patch_words,
    places,
    plot,
    samples,
    save_page,
    threshold_for,
    totals,
)  # fmt: skip
from bitbyte.listing import find_checkpoints
from bitbyte.runs import short_name
from bitbyte.vocab import byte_label

PAGE = 65_536  # bytes; a multiple of every usual window, so pages cut text as `evaluate` does
REDRAW = 0.05  # seconds between two plots while the cursor moves


class Lens:
    """A view of every byte of a text as up to three models see it; ``box`` is the widget.

    ``runs`` are names or paths of checkpoints (default: the newest under the artifacts).  The
    text, or the file at ``path``, is read at once, in a thread; ``wait()`` returns when it is
    shown.  All works without a browser: ``show``, ``turn``, ``edit``, ``undo``, ``save``, and the
    values of ``threshold``, ``rule``, ``layer``.  ``costs`` are the numbers shown; ``totals``,
    ``sentence`` (about patches) and ``edit_sentence`` say them in words.
    """

    def __init__(self, runs=None, text: str | bytes = ENGLISH, path: str | Path | None = None):
        self.costs: list[entropy.ByteCosts] = []
        self.names: list[str] = []  # of the models in ``costs``
        self.changed: list[list[int]] = []  # bytes of the page that the last edit moved
        self.totals = self.sentence = self.edit_sentence = ""
        self.source, self.page_number = of_bytes(b""), 0
        self._unedited: list[entropy.ByteCosts] = []
        self._shown_models: list = []  # those of ``costs``
        self._loaded: dict = {}  # by step folder
        self._lock = threading.RLock()
        self._jobs = Jobs(lambda error: self._say(str(error) or repr(error), wrong=True))
        self._timer: threading.Timer | None = None
        self._late, self._cursor, self._tuned = False, -1, False
        known = [(run.label, run.name) for run in find_checkpoints() if run.saved]
        runs = [runs] if isinstance(runs, str | Path) else runs or [name for _, name in known[:1]]
        if len(runs) > len(LETTERS):
            raise BitbyteError(f"{len(runs)} models; the lens compares up to {len(LETTERS)}")
        self._samples = samples()
        self._build(known, list(map(short_name, runs)), text if isinstance(text, str) else "")
        self._connect()
        self._publish([])
        self.show(text if path is None else Path(path))

    def __repr__(self) -> str:
        n = len(self.costs[0].data) if self.costs else 0
        return f"Lens({n:,} bytes, {' and '.join(self.names) or 'no model yet'})"

    def _repr_mimebundle_(self, **options) -> dict:
        return self.box._repr_mimebundle_(**options) | {"text/plain": repr(self)}

    # What a person or a notebook asks for

    def show(self, data: bytes | str | Path, wait: bool = False) -> None:
        """Look at text, bytes, or the file at a Path; with ``wait`` return when it is shown."""
        if isinstance(data, Path):
            self._request(lambda: of_file(data), wait=wait)
        else:
            raw = data.encode() if isinstance(data, str) else bytes(data)
            self._request(lambda: of_bytes(raw), wait=wait)

    def turn(self, page_number: int, wait: bool = False) -> None:
        """Show another page of the same bytes; the first is 0."""
        self._request(self._open, page_number, wait=wait)

    def edit(self, position: int, byte: int, wait: bool = False) -> None:
        """Change one byte, ``position`` counted from the start of the input."""
        self._jobs.start(lambda job: self._edit(position, byte, job))
        if wait:
            self.wait()

    def undo(self) -> None:
        """Take all edits of this page back."""
        with self._lock:
            self._publish(self._unedited)
            self._say("changes taken back")

    def stop(self) -> None:
        """End the computation; what is there by then is shown."""
        self._jobs.stop()

    def wait(self) -> None:
        """Return when everything asked for is shown; raises what went wrong."""
        error = self._jobs.wait()
        if self._timer:
            self._timer.join()
        if error:
            raise error

    def save(self) -> list[Path]:
        """Write what is shown as HTML pages under artifacts/reports, one a model."""
        with self._lock:
            paths = [self._save(i) for i in range(len(self.costs))]
        told = ", ".join(map(shown, paths))
        self.saved.value = html_lines(f"saved {told}" if paths else "there is nothing to save yet")
        return paths

    # Work in the thread

    def _request(self, open_source: Callable, page_number: int = 0, wait: bool = False) -> None:
        self._open = open_source
        names = [choice.value for choice in self.models if choice.value]
        share = self.context.value

        self._jobs.start(lambda job: self._read(names, open_source(), page_number, share, job))
        if wait:
            self.wait()

    def _load(self, names: list[str]) -> list:
        """The models of these runs; those loaded before are kept while they are asked for."""
        if not names:
            raise BitbyteError("no model is chosen; choose one, or train one first")
        folders = [str(checkpoint.resolve(name)) for name in names]
        self._loaded = {
            folder: self._loaded.get(folder) or checkpoint.load_model(folder)[0]
            for folder in folders
        }
        return [self._loaded[folder] for folder in folders]

    def _read(self, names, source: Source, page_number: int, share: int, job: Job) -> None:
        """Compute a page with every model; windows advance by 1/``share`` of their length."""
        n_pages = max(1, -(-source.n_bytes // PAGE))
        if not 0 <= page_number < n_pages:
            raise BitbyteError(f"there is no page {page_number + 1}; there are {n_pages}")
        self._say(f"reading {source.name}")
        data = source.read(page_number * PAGE, (page_number + 1) * PAGE)
        models, costs = self._load(names), []
        for letter, model in zip(LETTERS, models, strict=False):
            done = 0

            def tell(part: entropy.ByteCosts, letter=letter) -> None:
                nonlocal done
                done += len(part.data)
                self._say(f"model {letter}: {done:,} of {len(data):,} bytes")

            options = {
                "stride": max(1, model.config.seq_len // share),
                "batch_size": 32 if model.exact else 1,  # a denoiser takes seconds a window
            }
            costs.append(entropy.read(model, data, stopped=job.stopped, on_part=tell, **options))
        n = min(len(part.data) for part in costs)
        with self._lock:
            if job.replaced():
                return
            if not n:
                self._say("stopped before there was anything to show")
                return
            self.names, self.source, self.page_number = names, source, page_number
            self._shown_models, self._cursor = models, -1
            if not self._tuned:
                self.threshold.value = threshold_for(costs[0].entropy)
            self._unedited = [first_bytes(part, n) for part in costs]
            for view in self.views:
                view.cursor = -1
            with self.pages.hold_trait_notifications():
                self.pages.max, self.pages.value = n_pages, page_number + 1
            self._publish(self._unedited)
            missing = f"; stopped {len(data) - n:,} bytes early" if n < len(data) else ""
            start, seconds = page_number * PAGE, sum(part.seconds for part in costs)
            self._say(
                f"{source.name}: page {page_number + 1} of {n_pages}, bytes {start:,} to "
                f"{start + n - 1:,} of {source.n_bytes:,}, {seconds:.1f} s{missing}"
            )

    def _edit(self, position: int, byte: int, job: Job) -> None:
        costs, start = self.costs, self.page_number * PAGE
        n = len(costs[0].data) if costs else 0
        local = position - start
        if not 0 <= local < n:
            raise BitbyteError(f"byte {position:,} is not on this page of {n:,} from {start:,}")
        edits = [
            entropy.edited(model, part, local, byte)
            for model, part in zip(self._shown_models, costs, strict=True)
        ]
        with self._lock:
            if job.replaced():
                return
            what = f"{byte_label(costs[0].data[local])} to {byte_label(byte)} at {position:,}"
            self._publish([e.costs for e in edits], [e.changed for e in edits])
            self.edit_sentence = by_letter(map(edit_words, edits))
            self.edit_line.value = html_lines(f"{what}\n{self.edit_sentence}")
            self._say("one byte changed")
            self.views[0].cursor = local

    # What is drawn; called with the lock held

    def _publish(self, costs: list, changed: list[list[int]] | None = None) -> None:
        self.costs, self.changed = costs, changed or [[] for _ in costs]
        self.edit_sentence = self.edit_line.value = ""
        layers, flags = layers_of(costs), self._patches()
        if layers and list(self.layer.options) != list(layers[0]):
            kept = self.layer.value
            self.layer.options = list(layers[0])
            self.layer.value = kept if kept in layers[0] else LAYERS[0]
        for i, view in enumerate(self.views):
            cell = self.cells.children[i]
            cell.layout.display = "" if i < len(costs) else "none"
            if i < len(costs):
                self.titles[i].value = f"<b>{LETTERS[i]}</b> {html_lines(shown(self.names[i]))}"
                cell.layout.width = "49%" if len(costs) == 2 else "99%"
                view.height = 240 if len(costs) == 3 else 360
                top = {"top_ids": costs[i].top_ids, "top_probs": costs[i].top_probs}
                view.set(costs[i].data, layers[i], flags=flags[i], **top)
                view.layer = self.layer.value
        self.totals = all_totals(costs)
        self.totals_line.value = html_lines(self.totals)
        self._draw()

    def _patches(self) -> list[np.ndarray]:
        """The flags of each model's bytes; also shows what is to say about its patches."""
        flags, stats = [], []
        for part, changed in zip(self.costs, self.changed, strict=True):
            starts_n = entropy.boundaries(part.entropy, self.threshold.value, self.rule.value)
            flag_n = starts_n.astype(np.uint8) * START
            flag_n[changed] |= CHANGED
            flags.append(flag_n)
            stats.append(entropy.patch_stats(starts_n, part.data))
        self.sentence = by_letter(map(patch_words, stats))
        self.sentence_line.value = html_lines(self.sentence)
        letters = [f", {letter}" * (len(stats) > 1) for letter in LETTERS]
        drawn = [
            histogram(one["lengths"], f"bytes in a patch{letter}")
            for one, letter in zip(stats, letters, strict=False)
        ]
        self.histograms.value = f'<div style="display:flex">{"".join(drawn)}</div>'
        return flags

    def _draw(self) -> None:
        """The list of places and the plot, which depend on the layer."""
        self.places.options = places(self.costs, self.layer.value, self.page_number * PAGE)
        self._draw_plot()

    def _draw_plot(self) -> None:
        self._late = False
        with self._lock:
            self.plot.value = plot(
                self.costs, self.layer.value, start=self.page_number * PAGE, size=self.zoom.value,
                cursor=self._cursor,
                threshold=self.threshold.value if self.rule.value == "global" else None,
            )  # fmt: skip

    def _save(self, i: int) -> Path:
        part, name = self.costs[i], shown(self.names[i])
        facts = {
            "model": name,
            "bytes": f"{self.source.name}, from byte {self.page_number * PAGE:,}",
            "costs": totals(part),
            "patches": self.sentence.splitlines()[i],
            "rule": f"{self.rule.value}, threshold {self.threshold.value:g} bits",
            "edited": self.edit_sentence.splitlines()[i] if self.edit_sentence else "no",
        }
        return save_page(
            part, layers_of(self.costs)[i], title=f"{self.source.name}, seen by {name}",
            facts=facts, flags=self.views[i].flags, layer=self.layer.value,
            stem=f"lens-{Path(self.names[i]).name}",
        )  # fmt: skip

    def _say(self, text: str, wrong: bool = False) -> None:
        colour = "color:var(--jp-error-color0,#c22)" if wrong else ""
        self.status.value = f'<div role="status" style="{colour}">{html_lines(text)}</div>'

    # What a person touches.  Callbacks compare with what is shown: what is set here asks nothing.

    def _build(self, known: list[tuple[str, str]], runs: list[str], text: str) -> None:
        plain = {"style": {"description_width": "initial"}}
        wide = {"layout": W.Layout(width="320px"), **plain}
        wider = {"layout": W.Layout(width="490px"), **plain}
        wrap = W.Layout(flex_flow="row wrap", width="100%")
        known = known + [(shown(run), run) for run in runs if run not in dict(known).values()]
        self.models = [
            W.Dropdown(options=[("none", ""), *known], value=run, description=f"model {x}", **wider)
            for x, run in zip(LETTERS, [*runs, "", "", ""], strict=False)
        ]
        self.context = W.Dropdown(
            options=[("windows apart, as evaluate", 1), ("at least half a window", 2)],
            description="context", **wider,
        )  # fmt: skip
        self.text = W.Textarea(
            text, description="text", continuous_update=False, rows=3,
            layout=W.Layout(width="980px"), **plain,
        )  # fmt: skip
        self.path = W.Text(
            description="file", placeholder="path, then Enter", continuous_update=False, **wide
        )
        self.upload = W.FileUpload(description="Upload", multiple=False)
        self.sample = W.Dropdown(
            options=[("choose one", ""), *((name, name) for name in self._samples)],
            description="sample", **wide,
        )  # fmt: skip
        self.layer = W.Dropdown(options=LAYERS, description="layer", **wide)
        self.hex = W.Checkbox(description="hex", indent=False, layout=W.Layout(width="80px"))
        self.pages = W.IntSlider(
            1, min=1, max=1, description="page", continuous_update=False, **wide
        )
        self.views = [ByteView(controls=False) for _ in LETTERS]
        self.titles = [W.HTML() for _ in LETTERS]
        cells = zip(self.titles, self.views, strict=True)
        self.cells = W.Box([W.VBox(cell) for cell in cells], layout=wrap)
        self.zoom = W.Dropdown(
            options=[("whole page", 0), ("2,000 bytes at the cursor", 2000),
                     ("200 bytes at the cursor", 200)], description="plot", **wide,
        )  # fmt: skip
        self.threshold = W.FloatSlider(
            1.5, min=0, max=8, step=0.01, description="patch threshold, bits", **wider
        )
        self.rule = W.Dropdown(
            options=[("entropy is above it", "global"), ("entropy rises by more", "jump")],
            description="patch where", **wide,
        )  # fmt: skip
        self.places = W.Select(rows=6, layout=W.Layout(width="980px"))
        self.edit_at = W.IntText(description="change byte", layout=W.Layout(width="200px"), **plain)
        self.edit_byte = W.Text(
            description="to", placeholder="x or 0x78", layout=W.Layout(width="140px"), **plain
        )
        self.stop_button = W.Button(description="Stop")
        self.edit_button = W.Button(description="Change it")
        self.undo_button = W.Button(description="Take changes back")
        self.save_button = W.Button(description="Save as page")
        self.status, self.plot = W.HTML(layout=W.Layout(width="830px")), W.HTML()
        self.totals_line, self.sentence_line, self.histograms = W.HTML(), W.HTML(), W.HTML()
        self.edit_line, self.saved = W.HTML(), W.HTML()
        rows = [
            [*self.models, self.context], [self.text], [self.path, self.sample, self.upload],
            [self.status, self.stop_button], [self.totals_line],
            [self.layer, self.pages, self.hex], [self.cells], [self.zoom], [self.plot],
            [self.threshold, self.rule], [self.sentence_line], [self.histograms], [self.places],
            [self.edit_at, self.edit_byte, self.edit_button, self.undo_button], [self.edit_line],
            [self.save_button, self.saved], [W.HTML(f"<small>{HELP}</small>")],
        ]  # fmt: skip
        self.box = W.VBox(
            [W.Box(row, layout=wrap) for row in rows], layout=W.Layout(max_width="1000px")
        )
        self.box.add_class("bb-lens")
        for name in ("stop", "edit", "undo", "save"):
            getattr(self, f"{name}_button").add_class(f"bb-{name}")
        for name in ("text", "path", "layer", "pages", "threshold", "rule", "places", "plot",
                     "status", "totals_line", "sentence_line", "edit_line"):  # fmt: skip
            getattr(self, name).add_class(f"bb-{name.removesuffix('_line')}")

    def _connect(self) -> None:
        for widget in (*self.models, self.context):
            widget.observe(lambda _: self.turn(self.page_number), "value")
        self.text.observe(lambda change: self.show(change.new), "value")
        self.path.observe(lambda change: change.new and self.show(Path(change.new)), "value")
        self.upload.observe(self._on_upload, "value")
        self.sample.observe(
            lambda change: change.new and self._request(self._samples[change.new]), "value"
        )
        self.pages.observe(
            lambda change: change.new - 1 != self.page_number and self.turn(change.new - 1), "value"
        )
        self.layer.observe(self._on_layer, "value")
        self.zoom.observe(lambda _: self._draw_plot(), "value")
        for widget in (self.threshold, self.rule):
            widget.observe(self._on_patches, "value")
        self.places.observe(self._on_place, "value")
        for view in self.views:
            W.link((self.hex, "value"), (view, "hex"))
            view.observe(self._on_cursor, "cursor")
            view.observe(self._on_choice, "choice")
        self.stop_button.on_click(lambda _: self.stop())
        self.undo_button.on_click(lambda _: self.undo())
        self.save_button.on_click(lambda _: threading.Thread(target=self.save, daemon=True).start())
        self.edit_button.on_click(self._on_edit)

    def _on_upload(self, change) -> None:
        for file in change.new:
            self._request(lambda file=file: of_bytes(bytes(file["content"]), shown(file["name"])))

    def _on_layer(self, change) -> None:
        with self._lock:
            for view in self.views[: len(self.costs)]:
                view.layer = change.new
            self._draw()

    def _on_patches(self, _) -> None:
        self._tuned = True
        with self._lock:
            for view, flags in zip(self.views, self._patches(), strict=False):
                view.set_flags(flags)
            self._draw_plot()

    def _on_place(self, change) -> None:
        if change.new is not None and change.new >= 0:
            self.views[0].cursor = change.new

    def _on_edit(self, _) -> None:
        try:
            self.edit(self.edit_at.value, parse_byte(self.edit_byte.value))
        except BitbyteError as error:
            self._say(str(error), wrong=True)

    def _on_choice(self, change) -> None:
        """An alternative that was picked in a view takes the byte's place."""
        position, byte, _ = change.new
        self.edit(self.page_number * PAGE + position, byte)

    def _on_cursor(self, change) -> None:
        """One cursor for all views; the plot follows at its own pace."""
        if change.new < 0:
            return
        self._cursor = change.new
        self.edit_at.value = self.page_number * PAGE + change.new
        for view in self.views[: len(self.costs)]:
            view.cursor = change.new
        if not self._late:
            self._late = True
            self._timer = threading.Timer(REDRAW, self._draw_plot)
            self._timer.daemon = True
            self._timer.start()
