"""Tables of result records, as text and as Markdown.

Record fields are untrusted text: everything is escaped.
"""

import html
from collections.abc import Collection
from pathlib import Path

from bitbyte.evaluate.records import LEAST_BYTES, MIXED, runs_word
from bitbyte.files import BitbyteError, read_text, write_atomic
from bitbyte.vocab import printable

INTERVAL = "95 % interval of these bytes"
FACTS = ("windows", "kind", "step", "trained on", "seed")  # the last three: "" if not known
COLUMNS = ("model", "data", "bytes", "BPB", INTERVAL, *FACTS)
NO_INTERVAL = "no interval"
NUMBERS = ("bytes", "BPB", "step", "trained on", "seed")  # columns aligned to the right


def bpb_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Cells of the table, best first within each data set; a bound is marked ``<=``.

    A BPB over masked bytes only is not a BPB of the data and is left out.
    """
    rows = []
    for r in records:
        data, bpb = r["data"], f"{r['bpb']:.4f}"
        if r["kind"] != "masked_only":
            bpb = f"<= {bpb}" if r["kind"] == "upper_bound" else bpb
            order = (data["path"], data["split"], data["sha256"], r["bpb"])
            name = f"{data['path']} {data['split']} {data['sha256'][:8]}"
            name += ", trained on it" if r["trained_on_it"] else ""
            windows = "stream" if r["kind"] == MIXED else _windows(r)
            facts = (windows, _kind(r), *_amount(r))
            rows.append((order, (r["model"], name, f"{r['bytes']:,}", bpb, _interval(r), *facts)))
    rows.sort(key=lambda row: row[0])
    return [
        tuple(printable(cell.encode("utf-8", "replace")) for cell in cells) for _, cells in rows
    ]


def _kind(record: dict) -> str:
    kind, several = record["kind"], record.get("per_pass") or 1
    return KIND_COLUMNS.get(kind, kind) + f", {several} a pass" * (several > 1)


def _interval(record: dict) -> str:
    bounds = record["interval"]
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else NO_INTERVAL


def _amount(record: dict) -> tuple[str, str, str]:
    """How long and with which seed the model was trained: step, bytes, seed; "" if not known."""
    step, seen, seed = record.get("step"), record["bytes_seen"] or 0, record.get("train_seed")
    if seed is None:
        seed = (record.get("training") or {}).get("seed")
    size = f"{seen / 1e6:,.1f} MB" if seen >= 1e5 else f"{seen / 1e3:.1f} kB" * (seen > 0)
    return "" if step is None else f"{step:,}", size, "" if seed is None else str(seed)


def _windows(record: dict) -> str:
    return f"{record['context']['window']}/{record['context']['stride']}"


def bpb_table(records: list[dict]) -> str:
    """Result records as a text table: a heading for each data set, a line for each record.

    With names and numbers as long as those in artifacts/results it is at most 120 wide.
    """
    rows = bpb_rows(records)
    if not rows:
        return "no BPB was measured"
    head = ("model", "BPB", "95 % interval", *FACTS)
    table = _by_data(head, [
        (data, n_bytes, model, *cells) for model, data, n_bytes, *cells in rows
    ])  # fmt: skip
    if any(row[COLUMNS.index(INTERVAL)] != NO_INTERVAL for row in rows):
        table += "\n\nThe intervals are of these bytes; trainings with other seeds may differ more."
    return table


def _by_data(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A text table of rows that begin with data and bytes, which become headings."""
    lines = [head, *((f"  {model}", *cells) for _, _, model, *cells in rows)]
    top, rule, *body = text_table(lines, right=NUMBERS).splitlines()
    table, before = [top, rule], None
    for (data, n_bytes, *_), line in zip(rows, body, strict=True):
        if (data, n_bytes) != before:
            before = (data, n_bytes)
            table.append(f"{data}: {n_bytes} bytes")
        table.append(line)
    return "\n".join(table)


PASSPORT_COLUMNS = ("model", "data", "bytes", "BPB", INTERVAL, "audits")


def passport_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Cells of the table of passports: best first within each data set, refused ones last."""
    rows = []
    for r in records:
        data = r["data"]
        refused = r["bpb"] is None or r["verdict"] != "pass"
        name = f"{data['path']} {data['split']} {data['sha256'][:8]}"
        bpb = "none" if refused else f"{r['bpb']:.4f}"
        order = (data["path"], data["split"], data["sha256"], refused, r["bpb"] or 0.0, r["model"])
        rows.append((order, (r["model"], name, f"{r['bytes']:,}", bpb, _interval(r), r["why"])))
    rows.sort(key=lambda row: row[0])
    return [
        tuple(printable(cell.encode("utf-8", "replace")) for cell in cells) for _, cells in rows
    ]


def passport_table(records: list[dict]) -> str:
    """Passports as a text table, like `bpb_table`; empty without any."""
    rows = [(data, n_bytes, model, *cells)
            for model, data, n_bytes, *cells in passport_rows(records)]  # fmt: skip
    return _by_data(("model", "BPB", "95 % interval", "audits"), rows) if rows else ""


def passports_markdown(records: list[dict]) -> str:
    """Passports as a Markdown table."""
    head = f"| {' | '.join(PASSPORT_COLUMNS)} |\n|---|---|--:|--:|---|---|"
    return "\n".join(
        [head, *(f"| {' | '.join(map(cell, row))} |" for row in passport_rows(records))]
    )


def text_table(rows: list[tuple[str, ...]], right: Collection[str] = ()) -> str:
    """Aligned text; the first row is the head.  Columns named in ``right`` are right-aligned.

    Every cell is a single line.
    """
    head, *body = rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in (head, tuple("-" * width for width in widths), *body):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


KIND_COLUMNS = {
    "exact": "exact",
    MIXED: "in the mixer",
    "upper_bound": "bound",
    "chain_rule:left_to_right": "left to right",
    "chain_rule:confidence": "confidence",
}


def results_markdown(records: list[dict]) -> str:
    """Markdown tables of the records on bytes the models were not trained on, one per data set.

    Tables of many bytes come first, as they say most.  A row is a model, a column a kind of BPB.
    Checkpoints with the same name are trainings of one model, shown as mean and range; of several
    records of one checkpoint one counts, see `_one_each`.
    """
    tables: dict[tuple, dict[tuple, list[dict]]] = {}
    for r in records:
        if not r["trained_on_it"]:
            data = (r["data"]["path"], r["data"]["split"], r["bytes"], r["data"]["sha256"])
            row = (r["model"], r["parameters"], r["packed_bytes"], r["bytes_seen"])
            table = tables.setdefault((*data, _windows(r)), {})
            table.setdefault(row, []).append(r)
    return "\n\n".join(
        _results_table(key, tables[key]) for key in sorted(tables, key=lambda key: (-key[2], key))
    )


def _results_table(key: tuple, rows: dict[tuple, list[dict]]) -> str:
    path, split, n_bytes, sha256, windows = key
    about = "; too few bytes for intervals" if n_bytes < LEAST_BYTES else ""
    if any(r["interval"] for group in rows.values() for r in group):
        about = "; 95 % intervals of these bytes"
    kinds = [k for k in KIND_COLUMNS if any(r["kind"] == k for rs in rows.values() for r in rs)]
    head = ["model", "parameters", "packed", "trained on", "kB/s", *map(KIND_COLUMNS.get, kinds)]
    data = f"**{cell(path)}, {cell(split)}**: {n_bytes:,} bytes (sha256 {cell(sha256[:8])})"
    lines = [
        f"{data}, windows {windows}{about}",
        "",
        f"| {' | '.join(head)} |",
        "|---|" + "--:|" * 4 + "---|" * len(kinds),
    ]
    # A mixed cost does not rank a model, unless it has no other.
    order = sorted(
        rows.items(), key=lambda item: min((r["kind"] == MIXED, r["bpb"]) for r in item[1])
    )
    for (name, parameters, packed, seen), group in order:
        runs = {r.get("checkpoint"): r for r in group if r.get("train_seconds")}.values()
        speeds = [r["bytes_seen"] / r["train_seconds"] for r in runs]
        cells = [
            cell(name),
            f"{parameters:,}",
            f"{packed / 1e6:.2f} MB",
            f"{seen / 1e6:.1f} MB" if seen else "",
            f"{sum(speeds) / len(speeds) / 1e3:.1f}" if speeds else "",
            *(_kind_cell([r for r in group if r["kind"] == kind]) for kind in kinds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_each(group: list[dict]) -> list[dict]:
    """One record per checkpoint: the one with most draws, fewest bytes per pass, and then fp32.

    Scores of one checkpoint differ in how they were measured, not in how well training went.
    """

    def care(r: dict) -> tuple:
        draws = r["draws"]["per_window"] if r.get("draws") else 0
        return draws, -(r.get("per_pass") or 1), r.get("dtype") == "fp32"

    found: dict[str | None, dict] = {}
    for r in group:
        found[r.get("checkpoint")] = max(found.get(r.get("checkpoint"), r), r, key=care)
    return [*found.values()]


def _kind_cell(group: list[dict]) -> str:
    """BPB and its 95 % interval; for several trainings of one model, mean and range."""
    if not group:
        return ""
    group = _one_each(group)
    values = [r["bpb"] for r in group]
    sign = "<= " if group[0]["kind"] == "upper_bound" else ""
    several = {r["per_pass"] for r in group if r.get("per_pass")} - {1}
    note = f", {several.pop()} bytes a pass" if several else ""
    text = f"{sign}**{sum(values) / len(values):.4f}**"
    if len(group) > 1:
        word = runs_word(group)
        return f"{text} ({len(group)} {word}, {min(values):.4f} to {max(values):.4f}{note})"
    about = [_interval(group[0])] * bool(group[0]["interval"]) + [note.removeprefix(", ")]
    return f"{text} ({', '.join(filter(None, about))})".removesuffix(" ()")


def cell(text: str) -> str:
    """Any text, escaped for a cell of a Markdown table."""
    text = html.escape(printable(text.encode("utf-8", "replace")))
    return text.replace("|", "&#124;")


def write_between(readme: Path, name: str, markdown: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- end of name -->`` in a file.

    The rest stays as it is, line endings included.  Raises BitbyteError if the file lacks these
    lines or is not UTF-8.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = read_text(readme)
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise BitbyteError(f"{readme} lacks the lines {start} and {end}")
    part = f"{start}\n{markdown}\n{end}"
    if "\r\n" in text:
        part = part.replace("\n", "\r\n")
    write_atomic(readme, f"{before}{part}{after}".encode(), follow=True)
