"""The lens as a widget: what up to three models expected at every byte of a text.

All numbers come from `entropy`, whose windows are those of `scoring`.  Long input is cut into
pages; a page is read and scored when it is shown, in a thread that a newer request stops.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as W
import numpy as np

from bitbyte.compress.costs import with_mixed
from bitbyte.evaluate import entropy
from bitbyte.files import BitbyteError, shown
from bitbyte.plots import lens_text
from bitbyte.plots.lens_text import (
    CONTEXT_HELP,
    HELP,
    LAYERS,
    LETTERS,
    MIXED_HELP,
    Request,
    html_lines,
)
from bitbyte.plots.page import CHANGED, START
from bitbyte.runs import short_name
from bitbyte.widgets.base import Panel, button, control, paragraph, wrapped
from bitbyte.widgets.byteview import STILL, ByteView
from bitbyte.widgets.checkpoints import list_runs
from bitbyte.widgets.jobs import Job

PAGE = 65_536  # bytes; a multiple of every usual window, so pages cut text as `evaluate` does
TEXT_HELP = "applies when you leave the field"
REDRAW = 0.05  # seconds between two plots while the cursor moves


class Lens(Panel):
    """A view of every byte of a text as up to three models see it; ``box`` is the widget.

    ``runs`` are names or paths of checkpoints (default: the newest run in the artifacts),
    ``device`` is where they are loaded.  The text, or the file at ``path``, is read at once, in a
    thread; ``wait()`` returns when it is shown.  Everything works without a browser: ``show``,
    ``turn``, ``edit``, ``undo``, ``save``, and the values of ``threshold``, ``rule``, ``layer``.
    ``costs`` are the numbers shown; ``totals``, ``sentence`` (about patches) and ``edit_sentence``
    put them in words.
    """

    def __init__(
        self, runs=None, text: str | bytes = lens_text.ENGLISH, path: str | Path | None = None,
        device: str = "auto",
    ):  # fmt: skip
        super().__init__(device)
        self.costs: list[entropy.Surprisals] = []
        self.names: list[str] = []  # of the models in ``costs``
        self.changed: list[list[int]] = []  # bytes of the page that the last edit moved
        self.totals = self.sentence = self.edit_sentence = ""
        self.source, self.page_number = lens_text.of_bytes(b""), 0
        self._requested: Request | None = None  # what the controls say
        self._shown: Request | None = None  # what the views show
        self._unfinished: Request | None = None  # one that was stopped or failed
        self._unedited: list[entropy.Surprisals] = []
        self._shown_models: list = []  # those of ``costs``
        self._timer: threading.Timer | None = None
        self._late, self._cursor, self._tuned = False, -1, False
        known = [(run.label, run.name) for run in list_runs() if run.saved]
        runs = [runs] if isinstance(runs, str | Path) else runs or [name for _, name in known[:1]]
        if len(runs) > len(LETTERS):
            raise BitbyteError(f"{len(runs)} models; the lens compares up to {len(LETTERS)}")
        self._samples = lens_text.samples()
        shown_text = text if isinstance(text, str) else ""
        self._make_controls(known, list(map(short_name, runs)), shown_text)
        self._connect()
        self._publish([])
        self.show(text if path is None else Path(path))

    def __repr__(self) -> str:
        n = len(self.costs[0].data) if self.costs else 0
        return f"Lens({n:,} bytes, {' and '.join(self.names) or 'no model yet'})"

    def to_html(self) -> str:
        """The beginning of the text, as each model saw it."""
        with self._lock:
            lines = self.totals.splitlines()
            return "".join(
                view.to_html(f"{line}, {shown(name)}", limit=STILL, tips=False)
                for view, name, line in zip(self.views, self.names, lines, strict=False)
            )

    def _make_controls(self, known: list[tuple[str, str]], runs: list[str], text: str) -> None:
        """``known``: (label, name) of the runs to choose from; ``runs``: the names chosen."""
        known = known + [(shown(run), run) for run in runs if run not in dict(known).values()]
        self.models = [
            control(W.Dropdown, 490, f"model {x}", options=[("none", ""), *known], value=run)
            for x, run in zip(LETTERS, [*runs, "", "", ""], strict=False)
        ]
        contexts = [("windows apart, as evaluate", 1), ("at least half a window", 2)]
        self.context = control(W.Dropdown, 490, "context", options=contexts, tooltip=CONTEXT_HELP)
        self.mixed = W.Checkbox(
            description="and in the mixer", indent=False, tooltip=MIXED_HELP,
            layout=W.Layout(width="200px"),
        )  # fmt: skip
        self.text = control(
            W.Textarea, 980, "text", value=text, continuous_update=False, rows=3,
            placeholder=TEXT_HELP, tooltip=TEXT_HELP,
        )  # fmt: skip
        self.path = control(
            W.Text, 320, "file", placeholder="path, then Enter", continuous_update=False
        )
        self.upload = W.FileUpload(description="Upload", multiple=False)
        samples = [("choose one", ""), *((name, name) for name in self._samples)]
        self.sample = control(W.Dropdown, 320, "sample", options=samples)
        self.layer = control(W.Dropdown, 320, "layer", options=LAYERS)
        self.hex = W.Checkbox(description="hex", indent=False, layout=W.Layout(width="80px"))
        self.pages = control(
            W.IntSlider, 320, "page", value=1, min=1, max=1, continuous_update=False
        )
        self.views = [ByteView(controls=False) for _ in LETTERS]
        self.titles = [W.HTML() for _ in LETTERS]
        pairs = zip(self.titles, self.views, strict=True)
        self.cells = wrapped(*(W.VBox(pair) for pair in pairs), width="100%")
        zooms = [("whole page", 0), ("2,000 bytes at the cursor", 2000),
                 ("200 bytes at the cursor", 200)]  # fmt: skip
        self.zoom = control(W.Dropdown, 320, "plot", options=zooms)
        self.threshold = control(
            W.FloatSlider, 490, "patch threshold, bits", value=1.5, min=0, max=8, step=0.01
        )
        rules = [("entropy is above it", "global"), ("entropy rises by more", "jump")]
        self.rule = control(W.Dropdown, 320, "patch where", options=rules)
        self.places = control(W.Select, 980, rows=6)
        self.edit_at = control(W.IntText, 200, "change byte")
        self.edit_byte = control(W.Text, 140, "to", placeholder="x or 0x78")
        again = "the request that was stopped or failed, else the page that is shown"
        self.again_button = button("Read again", "again", tooltip=again)
        self.edit_button = button("Change it", "change")
        self.undo_button = button("Take changes back", "undo")
        self.save_button = button("Save as page", "save")
        self.status.layout.flex = "1 1 400px"
        self.plot, self.totals_line, self.sentence_line = W.HTML(), W.HTML(), W.HTML()
        self.histograms, self.edit_line, self.saved = W.HTML(), W.HTML(), W.HTML()
        rows = [
            [*self.models, self.context, self.mixed], [self.text],
            [self.path, self.sample, self.upload],
            [self.status, self.stop_button, self.again_button], [self.totals_line],
            [self.layer, self.pages, self.hex], [self.cells], [self.zoom], [self.plot],
            [self.threshold, self.rule], [self.sentence_line], [self.histograms], [self.places],
            [self.edit_at, self.edit_byte, self.edit_button, self.undo_button], [self.edit_line],
            [self.save_button, self.saved],
            [W.HTML(paragraph(f"<small>{HELP} Context, {CONTEXT_HELP} In the mixer: "
                              f"{MIXED_HELP}</small>"))],
        ]  # fmt: skip
        self.box = W.VBox(
            [wrapped(*some, width="100%") for some in rows], layout=W.Layout(max_width="1000px")
        )
        self.box.add_class("bb-lens")
        for name in ("text", "path", "layer", "pages", "threshold", "rule", "places", "plot",
                     "totals_line", "sentence_line", "edit_line", "mixed"):  # fmt: skip
            getattr(self, name).add_class(f"bb-{name.removesuffix('_line')}")

    # For users and notebooks

    def show(self, data: bytes | str | Path, wait: bool = False) -> None:
        """Show text, bytes, or the file at a Path; ``wait`` returns only when it is shown."""
        if isinstance(data, Path):
            self._request(lambda: lens_text.of_file(data), wait=wait, path=shown(data))
        else:
            raw = data.encode() if isinstance(data, str) else bytes(data)
            self._request(lambda: lens_text.of_bytes(raw), wait=wait)

    def turn(self, page_number: int, wait: bool = False) -> None:
        """Show another page of the same bytes, counted from 0."""
        self._ask(self._as_chosen()._replace(page=page_number), wait)

    def again(self, wait: bool = False) -> None:
        """Repeat the request that was stopped or failed, else the one that is shown."""
        self._ask(self._unfinished or self._as_chosen(), wait)

    def edit(self, position: int, byte: int, wait: bool = False) -> None:
        """Change one byte, ``position`` counted from the start of the input."""
        with self._lock:
            self._put_back()  # drops a page that is still being read
            self._start(lambda job: self._edit(position, byte, job))
        if wait:
            self.wait()

    def undo(self) -> None:
        """Undo all edits on this page."""
        with self._lock:
            self._publish(self._unedited)
            self._say("changes taken back")

    def wait(self) -> None:
        """Block until everything requested is shown; raises the error of the last request."""
        try:
            super().wait()
        finally:
            if self._timer:
                self._timer.join()

    def save(self) -> list[Path]:
        """Write the page shown as HTML files in artifacts/reports, one per model."""
        with self._lock:
            paths = [self._save(i) for i in range(len(self.costs))]
        names = ", ".join(map(shown, paths))
        what = f"saved {names}" if paths else "there is nothing to save yet"
        self.saved.value = paragraph(html_lines(what))
        return paths

    # Work in the thread

    def _request(self, open_source: Callable, wait: bool = False, path="", sample="") -> None:
        models, share = tuple(choice.value for choice in self.models), self.context.value
        asked = Request(open_source, models, share, 0, path, sample, self.mixed.value)
        self._ask(asked, wait)

    def _as_chosen(self) -> Request:
        """The last request, with the models, windows and mixer chosen now."""
        models = tuple(choice.value for choice in self.models)
        chosen = {"models": models, "share": self.context.value, "mixed": self.mixed.value}
        return self._requested._replace(**chosen)

    def _ask(self, request: Request, wait: bool) -> None:
        def work(job: Job) -> None:
            done = False
            try:
                done = self._read(request, job)
            finally:
                with self._lock:
                    if not job.replaced():
                        self._unfinished = None if done else request
                        if self._shown is not request:
                            self._put_back()

        with self._lock:
            self._requested = request
            self._set_controls(request)
            self._start(work)
        if wait:
            self.wait()

    def _put_back(self) -> None:
        """Reset the controls to what is shown, as what they requested since did not arrive."""
        if self._shown and self._requested is not self._shown:
            self._requested = self._shown
            self._set_controls(self._shown)
            self.pages.value = self.page_number + 1

    def _set_controls(self, request: Request) -> None:
        for choice, name in zip(self.models, request.models, strict=True):
            choice.value = name
        self.context.value, self.mixed.value = request.share, request.mixed
        self.path.value, self.sample.value = request.path, request.sample

    def _read(self, request: Request, job: Job) -> bool:
        """Score a page with every model and show it; returns whether it is complete."""
        source, number = request.open(), request.page
        n_pages = max(1, -(-source.n_bytes // PAGE))
        if not 0 <= number < n_pages:
            raise BitbyteError(f"there is no page {number + 1}; there are {n_pages}")
        self._say(f"reading {source.name}")
        data = source.read(number * PAGE, (number + 1) * PAGE)
        names = [name for name in request.models if name]
        if not names:
            raise BitbyteError("no model is chosen; choose one, or train one first")
        models = self._load(names)
        costs = lens_text.read_all(models, data, request.share, job.stopped, self._say)
        if request.mixed:
            costs = self._mix(models, costs, job)
        n = min(len(part.data) for part in costs)
        with self._lock:
            if job.replaced():
                return False
            if not n:
                self._say(f"stopped before there was anything to show{self._still()}")
                return False
            self._shown, self.names = request, names
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

    def _mix(self, models: list, costs: list, job: Job) -> list:
        """The costs together with those in the mixer; of fewer bytes if the job is stopped."""
        mixed = []
        for letter, model, part in zip(LETTERS, models, costs, strict=False):
            text = f"mixing, model {letter}: {{:,}} of {len(part.data):,} bytes"
            say = lambda done, text=text: self._say(text.format(done))  # noqa: E731
            mixed.append(with_mixed(part, model, stopped=job.stopped, on_part=say))
        return mixed

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
        if self._shown.mixed:
            mixed = self._mix(self._shown_models, [e.costs for e in edits], job)
            if job.stopped():
                self._say(f"stopped, and nothing was changed{self._still()}")
                return
            edits = [replace(e, costs=part) for e, part in zip(edits, mixed, strict=True)]
        with self._lock:
            if job.replaced():
                return
            what = lens_text.change_words(costs[0].data[local], byte, position)
            self._publish([e.costs for e in edits], [e.changed for e in edits])
            self.edit_sentence = lens_text.by_letter(map(lens_text.edit_words, edits))
            self.edit_line.value = paragraph(html_lines(f"{what}\n{self.edit_sentence}"))
            self._say("one byte changed")
            self.views[0].cursor = local

    # Drawing; called with the lock held

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
                self.titles[i].value = _title(LETTERS[i], shown(self.names[i]))
                cell.layout.width = "49%" if len(costs) == 2 else "99%"
                view.height = 240 if len(costs) == 3 else 360
                top = {"top_ids": costs[i].top_ids, "top_probs": costs[i].top_probs}
                view.start = self.page_number * PAGE
                view.set(costs[i].data, layers[i], flags=flags[i], **top)
        self._tint(layers)
        self.totals = lens_text.all_totals(costs)
        self.totals_line.value = paragraph(html_lines(self.totals))
        self._draw()

    def _tint(self, layers: list[dict[str, np.ndarray]]) -> None:
        low, high = lens_text.shared_scale(layers, self.layer.value)
        for view, _ in zip(self.views, layers, strict=False):
            with view.hold_sync():
                view.layer, view.low, view.high = self.layer.value, low, high

    def _patches(self) -> list[np.ndarray]:
        """The flags of each model's bytes; also shows the statistics of its patches."""
        flags, stats = [], []
        for part, changed in zip(self.costs, self.changed, strict=True):
            starts_n = entropy.boundaries(part.entropy, self.threshold.value, self.rule.value)
            flag_n = starts_n.astype(np.uint8) * START
            flag_n[changed] |= CHANGED
            flags.append(flag_n)
            stats.append(entropy.patch_stats(starts_n, part.data))
        self.sentence = lens_text.by_letter(map(lens_text.patch_words, stats))
        self.sentence_line.value = paragraph(html_lines(self.sentence))
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
        """To add to bad news: what the views still show."""
        return f"; still shown: {self.source.name}, page {self.page_number + 1}" * bool(self.costs)

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        self._say(self.message + self._still(), wrong=True)

    # Callbacks of the controls.  They compare with the last request, so that values set by this
    # class do not trigger new ones.

    def _connect(self) -> None:
        for i, choice in enumerate(self.models):
            self._on_change(choice, lambda name, i=i: self._on_asking(name, "models", i))
        self._on_change(self.context, lambda share: self._on_asking(share, "share"))
        self._on_change(self.mixed, lambda mixed: self._on_asking(mixed, "mixed"))
        self._on_change(self.text, self.show)
        self._on_change(self.path, self._on_path)
        self._on_change(self.upload, self._on_upload)
        self._on_change(self.sample, self._on_sample)
        self._on_change(self.pages, self._on_page)
        self._on_change(self.layer, lambda _: self._on_layer())
        self._on_change(self.zoom, lambda _: self._draw_plot())
        for widget in (self.threshold, self.rule):
            self._on_change(widget, lambda _: self._on_patches())
        self._on_change(self.places, self._on_place)
        for view in self.views:
            W.link((self.hex, "value"), (view, "hex"))
            self._on_change(view, self._on_cursor, "cursor")
            self._on_change(view, self._on_choice, "choice")
        self._on_click(self.stop_button, self.stop)
        self._on_click(self.again_button, self.again)
        self._on_click(self.undo_button, self.undo)
        self._on_click(self.save_button, self._on_save)
        self._on_click(self.edit_button, self._on_edit)

    def _on_save(self) -> None:
        """Not as a job: the page shown can be saved while another one is read."""
        threading.Thread(target=self._try, args=(self.save,), daemon=True).start()

    def _on_path(self, path: str) -> None:
        if path not in ("", self._requested.path):
            self.show(Path(path))

    def _on_page(self, number: int) -> None:
        if number - 1 != self._requested.page:
            self.turn(number - 1)

    def _on_upload(self, files) -> None:
        for file in files:
            data, name = bytes(file["content"]), shown(file["name"])
            self._request(lambda data=data, name=name: lens_text.of_bytes(data, name))

    def _on_sample(self, name: str) -> None:
        if name not in ("", self._requested.sample):
            self._request(self._samples[name], sample=name)

    def _on_asking(self, value, name: str, i: int | None = None) -> None:
        """A model or the windows changed: by hand, unless they equal the last request's."""
        requested = getattr(self._requested, name)
        if value != (requested if i is None else requested[i]):
            self.turn(self._requested.page)

    def _on_layer(self) -> None:
        with self._lock:
            self._tint(lens_text.layers_of(self.costs))
            self._draw()

    def _on_patches(self) -> None:
        self._tuned = True
        with self._lock:
            for view, flags in zip(self.views, self._patches(), strict=False):
                view.set_flags(flags)
            self._draw_plot()

    def _on_place(self, position: int | None) -> None:
        if position is not None and position >= 0:
            self.views[0].cursor = position

    def _on_edit(self) -> None:
        self.edit(self.edit_at.value, lens_text.parse_byte(self.edit_byte.value))

    def _on_choice(self, choice: list[int]) -> None:
        """Replace a byte by the alternative that was picked in a view."""
        self.edit(self.page_number * PAGE + choice[0], choice[1])

    def _on_cursor(self, position: int) -> None:
        """Keep one cursor in all views; the plot follows a little later."""
        if position < 0:
            return
        self._cursor = position
        self.edit_at.value = self.page_number * PAGE + position
        for view in self.views[: len(self.costs)]:
            view.cursor = position
        if not self._late:
            self._late = True
            self._timer = threading.Timer(REDRAW, self._draw_plot)
            self._timer.daemon = True
            self._timer.start()


def _title(letter: str, name: str) -> str:
    """HTML of one line: where one name wraps, the texts below would not be side by side."""
    line = "width:0;min-width:100%;white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
    name = escape(name)
    return paragraph(
        f'<div class="bb-title" style="{line}" title="{name}"><b>{letter}</b> {name}</div>'
    )
