"""The lens as a widget: what up to three models expected at every byte of a text.

All numbers come from `entropy`, whose windows are those of `scoring`.  Long input is cut into
pages; a page is read and computed when it is shown, in a thread that a newer request stops.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as W
import numpy as np

from bitbyte import checkpoint
from bitbyte.evaluate import entropy
from bitbyte.files import BitbyteError, shown
from bitbyte.plots import lens_text
from bitbyte.plots.lens_text import CONTEXT_HELP, HELP, LAYERS, LETTERS, Request, html_lines
from bitbyte.plots.page import CHANGED, START
from bitbyte.runs import resolve, short_name
from bitbyte.widgets.byteview import ByteView
from bitbyte.widgets.checkpoints import list_runs
from bitbyte.widgets.jobs import Job, Jobs


def controls(lens, views, known: list[tuple[str, str]], runs: list[str], text: str) -> None:
    """Give the lens its widgets, which hang in ``lens.box``; they do nothing yet.

    ``known``: (label, name) of runs to choose from, ``runs``: those that are chosen.
    """
    import ipywidgets as W  # here, for commands do without widgets

    plain = {"style": {"description_width": "initial"}}
    room = "calc(100% - 4px)"  # of a cell, less the margins of a widget
    wide = {"layout": W.Layout(width="320px", max_width=room), **plain}
    wider = {"layout": W.Layout(width="490px", max_width=room), **plain}
    widest = W.Layout(width="980px", max_width=room)
    wrap = W.Layout(flex_flow="row wrap", width="100%")
    known = known + [(shown(run), run) for run in runs if run not in dict(known).values()]
    lens.models = [
        W.Dropdown(options=[("none", ""), *known], value=run, description=f"model {x}", **wider)
        for x, run in zip(LETTERS, [*runs, "", "", ""], strict=False)
    ]
    lens.context = W.Dropdown(
        options=[("windows apart, as evaluate", 1), ("at least half a window", 2)],
        description="context", tooltip=CONTEXT_HELP, **wider,
    )  # fmt: skip
    lens.text = W.Textarea(
        text, description="text (applies when you leave the field)", continuous_update=False,
        rows=3, layout=widest, **plain,
    )  # fmt: skip
    lens.path = W.Text(
        description="file", placeholder="path, then Enter", continuous_update=False, **wide
    )
    lens.upload = W.FileUpload(description="Upload", multiple=False)
    lens.sample = W.Dropdown(
        options=[("choose one", ""), *((name, name) for name in lens._samples)],
        description="sample", **wide,
    )  # fmt: skip
    lens.layer = W.Dropdown(options=LAYERS, description="layer", **wide)
    lens.hex = W.Checkbox(description="hex", indent=False, layout=W.Layout(width="80px"))
    lens.pages = W.IntSlider(1, min=1, max=1, description="page", continuous_update=False, **wide)
    lens.views = views
    lens.titles = [W.HTML() for _ in LETTERS]
    cells = zip(lens.titles, lens.views, strict=True)
    lens.cells = W.Box([W.VBox(cell) for cell in cells], layout=wrap)
    lens.zoom = W.Dropdown(
        options=[("whole page", 0), ("2,000 bytes at the cursor", 2000),
                 ("200 bytes at the cursor", 200)], description="plot", **wide,
    )  # fmt: skip
    lens.threshold = W.FloatSlider(
        1.5, min=0, max=8, step=0.01, description="patch threshold, bits", **wider
    )
    lens.rule = W.Dropdown(
        options=[("entropy is above it", "global"), ("entropy rises by more", "jump")],
        description="patch where", **wide,
    )  # fmt: skip
    lens.places = W.Select(rows=6, layout=widest)
    lens.edit_at = W.IntText(description="change byte", layout=W.Layout(width="200px"), **plain)
    lens.edit_byte = W.Text(
        description="to", placeholder="x or 0x78", layout=W.Layout(width="140px"), **plain
    )
    lens.stop_button = W.Button(description="Stop", disabled=True)
    lens.again_button = W.Button(
        description="Read again", tooltip="what was stopped or went wrong, else what is shown"
    )
    lens.edit_button = W.Button(description="Change it")
    lens.undo_button = W.Button(description="Take changes back")
    lens.save_button = W.Button(description="Save as page")
    lens.status, lens.plot = W.HTML(layout=W.Layout(flex="1 1 400px")), W.HTML()
    lens.totals_line, lens.sentence_line, lens.histograms = W.HTML(), W.HTML(), W.HTML()
    lens.edit_line, lens.saved = W.HTML(), W.HTML()
    rows = [
        [*lens.models, lens.context], [lens.text], [lens.path, lens.sample, lens.upload],
        [lens.status, lens.stop_button, lens.again_button], [lens.totals_line],
        [lens.layer, lens.pages, lens.hex], [lens.cells], [lens.zoom], [lens.plot],
        [lens.threshold, lens.rule], [lens.sentence_line], [lens.histograms], [lens.places],
        [lens.edit_at, lens.edit_byte, lens.edit_button, lens.undo_button], [lens.edit_line],
        [lens.save_button, lens.saved],
        [W.HTML(f"<small>{HELP} Context, {CONTEXT_HELP}</small>")],
    ]  # fmt: skip
    lens.box = W.VBox(
        [W.Box(row, layout=wrap) for row in rows], layout=W.Layout(max_width="1000px")
    )
    lens.box.add_class("bb-lens")
    for name in ("stop", "again", "edit", "undo", "save"):
        getattr(lens, f"{name}_button").add_class(f"bb-{name}")
    for name in ("text", "path", "layer", "pages", "threshold", "rule", "places", "plot",
                 "status", "totals_line", "sentence_line", "edit_line"):  # fmt: skip
        getattr(lens, name).add_class(f"bb-{name.removesuffix('_line')}")


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

    def __init__(
        self, runs=None, text: str | bytes = lens_text.ENGLISH, path: str | Path | None = None
    ):
        self.costs: list[entropy.Surprisals] = []
        self.names: list[str] = []  # of the models in ``costs``
        self.changed: list[list[int]] = []  # bytes of the page that the last edit moved
        self.totals = self.sentence = self.edit_sentence = ""
        self.source, self.page_number = lens_text.of_bytes(b""), 0
        self._asked: Request | None = None  # what the controls say
        self._held: Request | None = None  # what is shown
        self._missed: Request | None = None  # what was stopped or went wrong
        self._unedited: list[entropy.Surprisals] = []
        self._shown_models: list = []  # those of ``costs``
        self._loaded: dict = {}  # by step folder
        self._lock = threading.RLock()
        self._jobs = Jobs(self._tell)
        self._timer: threading.Timer | None = None
        self._late, self._cursor, self._tuned = False, -1, False
        known = [(run.label, run.name) for run in list_runs() if run.saved]
        runs = [runs] if isinstance(runs, str | Path) else runs or [name for _, name in known[:1]]
        if len(runs) > len(LETTERS):
            raise BitbyteError(f"{len(runs)} models; the lens compares up to {len(LETTERS)}")
        self._samples = lens_text.samples()
        views = [ByteView(controls=False) for _ in LETTERS]
        shown_text = text if isinstance(text, str) else ""
        controls(self, views, known, list(map(short_name, runs)), shown_text)
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
            self._request(lambda: lens_text.of_file(data), wait=wait, path=shown(data))
        else:
            raw = data.encode() if isinstance(data, str) else bytes(data)
            self._request(lambda: lens_text.of_bytes(raw), wait=wait)

    def turn(self, page_number: int, wait: bool = False) -> None:
        """Show another page of the same bytes; the first is 0."""
        self._ask(self._as_chosen()._replace(page=page_number), wait)

    def again(self, wait: bool = False) -> None:
        """Ask once more for what was stopped or went wrong, else for what is shown."""
        self._ask(self._missed or self._as_chosen(), wait)

    def edit(self, position: int, byte: int, wait: bool = False) -> None:
        """Change one byte, ``position`` counted from the start of the input."""
        with self._lock:
            self._put_back()  # a page that is being read gives way
            self._start(lambda job: self._edit(position, byte, job))
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

    def _start(self, work: Callable[[Job], None]) -> None:
        """A job, during which there is something to stop."""

        def run(job: Job) -> None:
            self.stop_button.disabled = False
            try:
                work(job)
            finally:
                self.stop_button.disabled = True

        self._jobs.start(run)

    def _request(self, open_source: Callable, wait: bool = False, path="", sample="") -> None:
        models, share = tuple(choice.value for choice in self.models), self.context.value
        self._ask(Request(open_source, models, share, path=path, sample=sample), wait)

    def _as_chosen(self) -> Request:
        """What was asked last, with the models and windows that are chosen now."""
        models = tuple(choice.value for choice in self.models)
        return self._asked._replace(models=models, share=self.context.value)

    def _ask(self, request: Request, wait: bool) -> None:
        def work(job: Job) -> None:
            done = False
            try:
                done = self._read(request, job)
            finally:
                with self._lock:
                    if not job.replaced():
                        self._missed = None if done else request
                        if self._held is not request:
                            self._put_back()

        with self._lock:
            self._asked = request
            self._set_controls(request)
            self._start(work)
        if wait:
            self.wait()

    def _put_back(self) -> None:
        """The controls say what is shown; what they asked for meanwhile did not come."""
        if self._held and self._asked is not self._held:
            self._asked = self._held
            self._set_controls(self._held)
            self.pages.value = self.page_number + 1

    def _set_controls(self, request: Request) -> None:
        for choice, name in zip(self.models, request.models, strict=True):
            choice.value = name
        self.context.value = request.share
        self.path.value, self.sample.value = request.path, request.sample

    def _load(self, names: list[str]) -> list:
        """The models of these runs; those loaded before are kept while they are asked for."""
        if not names:
            raise BitbyteError("no model is chosen; choose one, or train one first")
        folders = [str(resolve(name)) for name in names]
        self._loaded = {
            folder: self._loaded.get(folder) or checkpoint.load_model(folder)[0]
            for folder in folders
        }
        return [self._loaded[folder] for folder in folders]

    def _read(self, request: Request, job: Job) -> bool:
        """Compute a page with every model and show it; whether all of it is there."""
        source, number = request.open(), request.page
        n_pages = max(1, -(-source.n_bytes // PAGE))
        if not 0 <= number < n_pages:
            raise BitbyteError(f"there is no page {number + 1}; there are {n_pages}")
        self._say(f"reading {source.name}")
        data = source.read(number * PAGE, (number + 1) * PAGE)
        names = [name for name in request.models if name]
        models = self._load(names)
        costs = lens_text.read_all(models, data, request.share, job.stopped, self._say)
        n = min(len(part.data) for part in costs)
        with self._lock:
            if job.replaced():
                return False
            if not n:
                self._say(f"stopped before there was anything to show{self._still()}")
                return False
            self._held, self.names = request, names
            self.source, self.page_number = source, number
            self._shown_models, self._cursor = models, -1
            if not self._tuned:
                self.threshold.value = lens_text.threshold_for(costs[0].entropy)
            self._unedited = [lens_text.first_bytes(part, n) for part in costs]
            for view in self.views:
                view.cursor = -1
            with self.pages.hold_trait_notifications():
                self.pages.max, self.pages.value = n_pages, number + 1
            self._publish(self._unedited)
            missing = f"; stopped {len(data) - n:,} bytes early" if n < len(data) else ""
            start, seconds = number * PAGE, sum(part.seconds for part in costs)
            self._say(
                f"{source.name}: page {number + 1} of {n_pages}, bytes {start:,} to "
                f"{start + n - 1:,} of {source.n_bytes:,}, {seconds:.1f} s{missing}"
            )
        return n == len(data)

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
            what = lens_text.change_words(costs[0].data[local], byte, position)
            self._publish([e.costs for e in edits], [e.changed for e in edits])
            self.edit_sentence = lens_text.by_letter(map(lens_text.edit_words, edits))
            self.edit_line.value = html_lines(f"{what}\n{self.edit_sentence}")
            self._say("one byte changed")
            self.views[0].cursor = local

    # What is drawn; called with the lock held

    def _publish(self, costs: list, changed: list[list[int]] | None = None) -> None:
        self.costs, self.changed = costs, changed or [[] for _ in costs]
        self.edit_sentence = self.edit_line.value = ""
        layers, flags = lens_text.layers_of(costs), self._patches()
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
                view.start = self.page_number * PAGE
                view.set(costs[i].data, layers[i], flags=flags[i], **top)
        self._tint(layers)
        self.totals = lens_text.all_totals(costs)
        self.totals_line.value = html_lines(self.totals)
        self._draw()

    def _tint(self, layers: list[dict[str, np.ndarray]]) -> None:
        low, high = lens_text.shared_scale(layers, self.layer.value)
        for view, _ in zip(self.views, layers, strict=False):
            with view.hold_sync():
                view.layer, view.low, view.high = self.layer.value, low, high

    def _patches(self) -> list[np.ndarray]:
        """The flags of each model's bytes; also shows what is to say about its patches."""
        flags, stats = [], []
        for part, changed in zip(self.costs, self.changed, strict=True):
            starts_n = entropy.boundaries(part.entropy, self.threshold.value, self.rule.value)
            flag_n = starts_n.astype(np.uint8) * START
            flag_n[changed] |= CHANGED
            flags.append(flag_n)
            stats.append(entropy.patch_stats(starts_n, part.data))
        self.sentence = lens_text.by_letter(map(lens_text.patch_words, stats))
        self.sentence_line.value = html_lines(self.sentence)
        self.histograms.value = lens_text.histograms([one["lengths"] for one in stats])
        return flags

    def _draw(self) -> None:
        """The list of places and the plot, which depend on the layer."""
        self.places.options = lens_text.places(
            self.costs, self.layer.value, self.page_number * PAGE
        )
        self._draw_plot()

    def _draw_plot(self) -> None:
        self._late = False
        with self._lock:
            self.plot.value = lens_text.plot(
                self.costs, self.layer.value, start=self.page_number * PAGE, size=self.zoom.value,
                cursor=self._cursor,
                threshold=self.threshold.value if self.rule.value == "global" else None,
            )  # fmt: skip

    def _save(self, i: int) -> Path:
        part, name = self.costs[i], shown(self.names[i])
        facts = {
            "model": name,
            "bytes": f"{self.source.name}, from byte {self.page_number * PAGE:,}",
            "costs": lens_text.totals(part),
            "patches": self.sentence.splitlines()[i],
            "rule": f"{self.rule.value}, threshold {self.threshold.value:g} bits",
            "edited": self.edit_sentence.splitlines()[i] if self.edit_sentence else "no",
        }
        return lens_text.save_page(
            part, lens_text.layers_of(self.costs)[i], title=f"{self.source.name}, seen by {name}",
            facts=facts, flags=self.views[i].flags, layer=self.layer.value,
            stem=f"lens-{Path(self.names[i]).name}", start=self.page_number * PAGE,
        )  # fmt: skip

    def _still(self) -> str:
        """What to add to bad news: what the views show all the same."""
        return f"; still shown: {self.source.name}, page {self.page_number + 1}" * bool(self.costs)

    def _tell(self, error: Exception) -> None:
        self._say((str(error) or repr(error)) + self._still(), wrong=True)

    def _say(self, text: str, wrong: bool = False) -> None:
        colour = "color:var(--jp-error-color0,#c22)" if wrong else ""
        self.status.value = f'<div role="status" style="{colour}">{html_lines(text)}</div>'

    # What a person touches.  Callbacks compare with what is asked: what is set here asks nothing.

    def _connect(self) -> None:
        for i, choice in enumerate(self.models):
            choice.observe(lambda change, i=i: self._on_asking(change.new, "models", i), "value")
        self.context.observe(lambda change: self._on_asking(change.new, "share"), "value")
        self.text.observe(lambda change: self.show(change.new), "value")
        self.path.observe(
            lambda change: change.new not in ("", self._asked.path) and self.show(Path(change.new)),
            "value",
        )
        self.upload.observe(self._on_upload, "value")
        self.sample.observe(self._on_sample, "value")
        self.pages.observe(
            lambda change: change.new - 1 != self._asked.page and self.turn(change.new - 1), "value"
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
        self.again_button.on_click(lambda _: self.again())
        self.undo_button.on_click(lambda _: self.undo())
        self.save_button.on_click(lambda _: threading.Thread(target=self.save, daemon=True).start())
        self.edit_button.on_click(self._on_edit)

    def _on_upload(self, change) -> None:
        for file in change.new:
            data, name = bytes(file["content"]), shown(file["name"])
            self._request(lambda data=data, name=name: lens_text.of_bytes(data, name))

    def _on_sample(self, change) -> None:
        if change.new not in ("", self._asked.sample):
            self._request(self._samples[change.new], sample=change.new)

    def _on_asking(self, value, field: str, i: int | None = None) -> None:
        """A model or the windows were chosen: by hand, unless they are what is asked anyway."""
        asked = getattr(self._asked, field)
        if value != (asked if i is None else asked[i]):
            self.turn(self._asked.page)

    def _on_layer(self, _) -> None:
        with self._lock:
            self._tint(lens_text.layers_of(self.costs))
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
            self.edit(self.edit_at.value, lens_text.parse_byte(self.edit_byte.value))
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
