"""The lens without its widgets: where bytes come from, sentences, lists, plots."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitbyte.evaluate import entropy
from bitbyte.evaluate.entropy import Surprisals
from bitbyte.files import BitbyteError, artifacts, safe_name, shown, user_path, write_atomic
from bitbyte.plots import svg
from bitbyte.plots.page import in_words, label, page, scale
from bitbyte.shards import open_dataset
from bitbyte.vocab import printable

LETTERS = "ABC"  # names of the models being compared
LAYERS = ("surprisal", "entropy", "surprisal - entropy", "rank")
DIFFERENCE = "A - B"
MIXED, LEARNT = "mixed", "surprisal - mixed"  # layers of a model in the mixer
PATCH = 4.5  # bytes; the mean patch size that the Byte Latent Transformer was trained with
LONGEST_BAR = 25  # bytes; longer patches share a bar
HELP = (
    "Surprisal and entropy stand on the byte that was predicted, a patch boundary before the byte "
    "that starts the patch. Rank: how many byte values the model found likelier than the one that "
    "came, 0 for the likeliest. Variation of patches: the standard deviation of their lengths over "
    "the mean, 0 if all have one length. Arrow keys move the cursor in a view; click a byte, then "
    "one of the likeliest, to put it there."
)
CONTEXT_HELP = (
    "windows apart, as evaluate: the text is cut into windows as long as the model's context, each "
    "is read without those before it, and the total is that of bitbyte eval. At least half a "
    "window: windows overlap, so every byte but the first ones has half a window before it."
)
MIXED_HELP = (
    "what each byte costs in the mixer of bitbyte compress, which has the model as one of its "
    "experts and learns from the page as it goes. Takes about ten seconds for a page."
)
ENGLISH = (
    "Once upon a time, in a small village by the sea, there lived a girl who counted waves. "
    "Every morning she counted to a hundred, and every evening she counted back to one."
)
TEXTS = {
    "English": ENGLISH.encode(),
    "Python": b"def square(x):\n    return x * x\n\nfor i in range(10):\n    print(square(i))\n",
    "UTF-8": "Gr\u00fc\u00dfe, \u4f60\u597d, \u043c\u0438\u0440 \u2192 \U0001f600\n".encode(),
    "every byte once": bytes(range(256)),
}


class Source(NamedTuple):
    """Bytes to look at: their name, their number, and ``read(start, stop)``."""

    name: str
    n_bytes: int
    read: Callable[[int, int], bytes]


class Request(NamedTuple):
    """What the user asked to see, according to the controls."""

    open: Callable[[], Source]
    models: tuple[str, ...]  # a name for each letter, "" for no model
    share: int  # windows advance by 1/share of their length
    page: int = 0
    path: str = ""
    sample: str = ""
    mixed: bool = False  # whether the cost in the mixer is wanted too


def of_bytes(data: bytes, name: str = "text") -> Source:
    """Bytes in memory."""
    return Source(name, len(data), lambda start, stop: data[start:stop])


def of_file(path: str | Path) -> Source:
    """A file, read only as far as it is shown.  Raises BitbyteError if it is not a file."""
    path = user_path(path)
    if path.is_dir():
        raise BitbyteError(f"{shown(path)} is a folder; give the path of a file")
    if path.exists() and not path.is_file():
        raise BitbyteError(f"{shown(path)} is not a regular file; give the path of one")
    if not path.is_file():
        raise BitbyteError(f"there is no file {shown(path)}; give the path of one")

    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    return Source(shown(path.name), path.stat().st_size, read)


def of_dataset(folder: Path) -> Source:
    """The validation split of a packed data set."""
    data = open_dataset(folder, 1, split="val")
    return Source(
        f"{shown(folder.name)}, validation split", data.n_bytes,
        lambda start, stop: data.read(start, min(stop, data.n_bytes)).tobytes(),
    )  # fmt: skip


def samples() -> dict[str, Callable[[], Source]]:
    """Bytes to start with: a few texts, and the data sets in the artifacts."""
    sources = {name: lambda n=name: of_bytes(TEXTS[n], n) for name in TEXTS}
    root = artifacts("datasets")
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if (folder / "manifest.json").is_file():
            sources[f"data set {shown(folder.name)}"] = lambda f=folder: of_dataset(f)
    return sources


def parse_byte(text: str) -> int:
    """A byte as typed: one ASCII character, or hex such as 0a, 0x0a or \\x0a."""
    if len(text) == 1 and text.isascii():
        return ord(text)
    match = re.fullmatch(r"(0x|\\x)?([0-9a-fA-F]+)", text.strip())
    if match and len(match[2]) == 2:
        return int(match[2], 16)
    n = len(text.encode("utf-8", "replace"))
    what = f"{n} byte" + "s" * (n != 1)
    if match and match[1]:
        what = "above 0xff" if int(match[2], 16) > 0xFF else "not two digits of hex"
    raise BitbyteError(f"{text!r} is {what}; type one ASCII character or hex, as 0x0a")


def layers_of(costs: list[Surprisals]) -> list[dict[str, np.ndarray]]:
    """The layers of each model's view; with two or more models also the bits of A - B.

    Costs in the mixer have layers if they are known: "surprisal - mixed" is what learning saved.
    """
    views = [
        dict(zip(LAYERS, (c.bits, c.entropy, c.bits - c.entropy, c.rank), strict=True))
        for c in costs
    ]
    for view, c in zip(views, costs, strict=True):
        if c.mixed is not None:
            view |= {MIXED: c.mixed, LEARNT: c.bits - c.mixed}
    if len(costs) > 1:
        for view in views:
            view[DIFFERENCE] = costs[0].bits - costs[1].bits
    return views


def shared_scale(layers: list[dict[str, np.ndarray]], name: str) -> tuple:
    """(low, high) of one layer's tint in all views, so that equal numbers look equal.

    (None, None) if each view's own scale will do.
    """
    if len(layers) < 2 or any(name not in view for view in layers):
        return None, None
    return scale(np.concatenate([view[name] for view in layers]))


def read_all(models: list, data: bytes, share: int, stopped, say) -> list[Surprisals]:
    """The costs under every model; ``say`` gets the progress; ``share`` is as in `Request`."""
    costs = []
    for letter, model in zip(LETTERS, models, strict=False):
        done = 0

        def report(part: Surprisals, letter=letter) -> None:
            nonlocal done
            done += len(part.data)
            say(f"model {letter}: {done:,} of {len(data):,} bytes")

        options = {
            "stride": max(1, model.config.seq_len // share),
            "batch_size": 32 if model.exact else 1,  # a denoiser takes seconds per window
        }
        costs.append(entropy.read(model, data, stopped=stopped, on_part=report, **options))
    return costs


def first_bytes(costs: Surprisals, n: int) -> Surprisals:
    """The costs of the first n bytes."""
    columns = {name: getattr(costs, name)[:n] for name in (*entropy.COLUMNS, "data")}
    columns["mixed"] = None if costs.mixed is None else costs.mixed[:n]
    return dataclasses.replace(costs, **columns)


def by_letter(sentences: Iterable[str]) -> str:
    """One line per model, with its letter if there are several."""
    lines = list(sentences)
    if len(lines) == 1:
        return lines[0]
    return "\n".join(f"{letter}: {line}" for letter, line in zip(LETTERS, lines, strict=False))


def totals(costs: Surprisals) -> str:
    """The total cost in a line; the numbers agree with `evaluate`."""
    mixed = ""
    if costs.mixed is not None and len(costs.mixed):
        mixed = f"; {costs.mixed.mean():.4f} in the mixer, which learns as it goes"
    return (
        f"{costs.bpb:.4f} bits/byte over {len(costs.data):,} bytes, window {costs.window}, "
        f"stride {costs.stride}, {costs.kind}{mixed}"
    )


def html_lines(text: str) -> str:
    """Text as HTML, with its line breaks."""
    return escape(text).replace("\n", "<br>")


def all_totals(costs: list[Surprisals]) -> str:
    """`totals` of every model, and the difference of A and B."""
    words = by_letter(map(totals, costs))
    if len(costs) > 1:
        gap_n = costs[0].bits - costs[1].bits
        words += (
            f"\nA - B: {gap_n.mean():+.4f} bits/byte, A is cheaper on "
            f"{100 * (gap_n < 0).mean():.0f} % of the bytes"
        )
    return words


def change_words(old: int, new: int, position: int) -> str:
    """Which byte was changed to which, in words."""
    return f"{in_words(old)} to {in_words(new)} at {position:,}"


def edit_words(edit: entropy.Edit) -> str:
    """What changing a byte did, in words."""
    return (
        f"cost of this edit: {edit.here:+.1f} bits here, {edit.after:+.1f} after; "
        f"{len(edit.changed):,} later bytes moved by more than {entropy.MOVED} bits"
    )


def threshold_for(entropy_n: np.ndarray) -> float:
    """An initial threshold, whose patches have about 4.5 bytes, as BLT's do."""
    return round(float(np.quantile(entropy_n, 1 - 1 / PATCH)), 2)


def patch_words(stats: dict) -> str:
    """`entropy.patch_stats` in words."""
    share = stats["whitespace_agreement"]
    agree = "" if math.isnan(share) else f"{100 * share:.0f} % start at or after white space, "
    patches = "patch" if stats["n_patches"] == 1 else "patches"
    return (
        f"mean patch {stats['mean_bytes']:.2f} bytes, {stats['n_patches']:,} {patches}, {agree}"
        f"variation {stats['variation']:.1f}"
    )


def histograms(lengths: list) -> str:
    """HTML with a `histogram` for each model."""
    letters = [f", {letter}" * (len(lengths) > 1) for letter in LETTERS]
    drawn = [
        histogram(one, f"bytes in a patch{letter}")
        for one, letter in zip(lengths, letters, strict=False)
    ]
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(drawn)}</div>'


def histogram(lengths, xlabel: str) -> str:
    """SVG of the number of patches of each length: ``lengths[i]`` patches have i bytes."""
    counts = np.asarray(lengths)[1:]
    labels = [str(i + 1) for i in range(len(counts))]
    if len(counts) > LONGEST_BAR:
        rest = counts[LONGEST_BAR - 1 :].sum()
        counts = [*counts[: LONGEST_BAR - 1], rest]
        labels = [*labels[: LONGEST_BAR - 1], f"{LONGEST_BAR}+"]
        xlabel += f" ({LONGEST_BAR}+: so many or more)"
    return svg.bars(labels, counts, width=320, xlabel=xlabel, ylabel="patches")


def save_page(
    costs: Surprisals, layers: dict[str, np.ndarray], *, title: str, facts: dict[str, str],
    flags: np.ndarray, layer: str, stem: str, start: int = 0,
) -> Path:  # fmt: skip
    """Write a self-contained page to artifacts/reports, named by ``stem`` and a content hash."""
    text = page(
        costs.data, layers, title=title, top_ids=costs.top_ids, top_probs=costs.top_probs,
        flags=flags, facts=facts, layer=layer, start=start,
    ).encode()  # fmt: skip
    folder = artifacts("reports")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{safe_name(stem)}-{hashlib.sha256(text).hexdigest()[:8]}.html"
    write_atomic(path, text)
    return path


def places(costs: list[Surprisals], layer: str, start: int) -> list[tuple[str, int]]:
    """(line of text, position) of the 20 most surprising bytes of A, after a heading at -1.

    On the layer A - B, of the bytes where A and B differ most.  ``start``: offset of the page.
    """
    if not costs:
        return []
    data, bits_n, what = costs[0].data, costs[0].bits, "most surprising places"
    where = entropy.most_surprising(costs[0])
    if layer == DIFFERENCE:
        bits_n, what = bits_n - costs[1].bits, "largest differences A - B"
        where = np.argsort(-np.abs(bits_n), kind="stable")[:20].tolist()
    rows = [(f"the {len(where)} {what}; choose one to jump there", -1)]
    for i in where:
        left, right = printable(data[max(0, i - 24) : i]), printable(data[i + 1 : i + 25])
        byte = label(data[i]) if data[i] < 0x80 else in_words(data[i])
        rows.append((f"{bits_n[i]:6.2f} bits at {start + i:,}: {left} [{byte}] {right}", i))
    return rows


def plot(
    costs: list[Surprisals], layer: str, *, start: int, size: int, cursor: int,
    threshold: float | None,
) -> str:  # fmt: skip
    """SVG line plot of a layer: surprisal with entropy for one model, one line each for several.

    Shows the whole page, as means over hundredths of it, or the piece of ``size`` bytes that
    contains ``cursor`` (-1: none), byte by byte; there ``threshold`` is drawn if entropy is.
    ``start`` is the offset of the page.
    """
    n = len(costs[0].data) if costs else 0
    first = max(0, cursor) // size * size if size else 0
    here = slice(first, min(n, first + size) if size else n)
    layers = layers_of(costs)
    if layer == DIFFERENCE:
        drawn = {layer: layers[0][layer]}
    elif len(costs) == 1:
        names = LAYERS[:2] if layer in LAYERS[:2] else (layer,)
        names = (LAYERS[0], MIXED) if layer == MIXED else names
        drawn = {name: layers[0][name] for name in names}
    else:
        drawn = {f"{layer} {x}": view[layer] for x, view in zip(LETTERS, layers, strict=False)}
    span = 1 if size else max(1, n // 100)
    level = threshold is not None and any(name.startswith("entropy") for name in drawn) and span < 2
    shown_n = {name: running_mean(values[here], span) for name, values in drawn.items()}
    return svg.lines(
        {name: (start + np.arange(n)[here], values) for name, values in shown_n.items()},
        width=980, xlabel="byte", y_from_zero=True,
        ylabel=("rank" if layer == "rank" else "bits") + f", means of {span:,}" * (span > 1),
        levels={f"threshold {threshold:g}": threshold} if level else None,
        cursor=start + cursor if cursor >= 0 else None,
    )  # fmt: skip


def running_mean(values_n: np.ndarray, span: int) -> np.ndarray:
    """The mean of the ``span`` values around each, fewer at the ends; NaN counts for nothing."""
    if span == 1:
        return values_n
    known_n = np.isfinite(values_n)
    sums_n, counts_n = (
        np.convolve(np.where(known_n, part, 0).astype(float), np.ones(span), "same")
        for part in (values_n, 1.0)
    )
    return np.where(counts_n > 0.5, sums_n / np.maximum(counts_n, 1), np.nan)
