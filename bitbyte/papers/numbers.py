"""Numbers of papers: what ``{{alias.field:format unit}}`` in a text prints, and from which record.

A paper names its result records by alias and pins the bytes they were measured on; every number it
shows is looked up here and remembered with its source.  No pandoc, no files written except by
`stamp`.  Text from records is not trusted: it is printed as ASCII and escaped for Markdown.
"""

import dataclasses
import hashlib
import math
import re
from pathlib import Path

from bitbyte.evaluate.records import read_record
from bitbyte.files import BitbyteError, read_json, to_json, write_atomic

FACTORS = {
    "MB": 1e6, "kB": 1e3, "GB": 1e9, "MiB": 2**20, "KiB": 2**10, "M": 1e6, "k": 1e3, "min": 60,
    "h": 3600, "s": 1, "ms": 1e-3, "%": 1e-2, "bits": 1, "bytes": 1, "x": 1,
    "kB/s": 1e3, "MB/s": 1e6,
}  # fmt: skip
SPACE, MINUS, AT_MOST, AT_LEAST, TIMES = "\u00a0", "\u2212", "\u2264", "\u2265", "\u00d7"
FORMAT = re.compile(r"(?P<spec>\+?,?(?:\.\d+)?[dfge]?)\s*(?P<unit>[^\s\d.,+]\S*)?")
TOKEN = re.compile(
    r"\s*(?:(?P<path>[A-Za-z]\w*(?:\+[A-Za-z]\w*)*(?:\.[\w-]+)+)"
    r"|(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])|(?P<op>[-+*/()]))"
)
PAIR = re.compile(r"(paired|verdict)\s+(\w+)\s+(\w+)")
COMPARED: dict[tuple, dict] = {}  # paired comparisons of this process, kept because they take time
COSTS = ("bpb", "bits")  # fields shown with an at-most sign if the record is an upper bound


class FailedRecordError(BitbyteError):
    """A number of a record that was already reported as wrong: not a new problem."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One entry of a paper's ``records``."""

    alias: str
    stem: str  # file name below results/, without .json
    value: dict
    line: int  # in the paper

    @property
    def is_bound(self) -> bool:
        return self.value.get("kind") == "upper_bound"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """A number to be printed; ``side`` 1: the true value is at most this, -1: at least."""

    number: float
    side: int = 0


def markdown_text(text: object) -> str:
    """Any text as Markdown that only shows it: ASCII, one line, escaped."""
    raw = str(text).encode("ascii", "backslashreplace").decode("ascii")
    raw = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in raw)
    return re.sub(r"([^\w\s])", r"\\\1", raw)


def find(name: str, folders: list[Path]) -> Path:
    """The file ``name`` in the first folder that has it.  Raises BitbyteError."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise BitbyteError(f"{name!r} is not a valid file name")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise BitbyteError(f"there is no {name} in artifacts/{folders[0].name}")


def load(alias: str, entry: dict, line: int, folders: list[Path]) -> Record:
    """The record that an entry ``{record: stem, data: digits, kind: k}`` names, checked."""
    if not re.fullmatch(r"[A-Za-z]\w*", alias):
        raise BitbyteError(f"alias {alias!r} must be letters, digits and underscores")
    strange = set(entry) - {"record", "data", "kind"}
    if strange or "record" not in entry:
        raise BitbyteError(f"{alias}: expected record, data and kind, not {', '.join(entry)}")
    path = find(f"{entry['record']}.json", folders)
    _, value = read_record(path)
    if not isinstance(value, dict):
        raise BitbyteError(f"{alias}: {path.name} is not a record")
    data = value.get("data")
    owner = data if isinstance(data, dict) else value  # a certificate is about one file
    digest = owner.get("sha256")
    pinned = entry.get("data")
    if digest is not None and not isinstance(digest, str):
        raise BitbyteError(f"{alias}: the data hash of {path.name} is not text")
    if digest is None and pinned is not None:
        raise BitbyteError(f"{alias}: {path.name} has no data hash, but data: {pinned} is pinned")
    if digest is not None and pinned is None:
        raise BitbyteError(f"{alias}: pin the bytes of {path.name} with data: {digest[:8]}")
    if digest is not None and (len(pinned) < 8 or not digest.startswith(pinned)):
        raise BitbyteError(
            f"{alias}: the data hash of {path.name} is {digest[:8]}, but the paper pins {pinned}"
        )
    if "kind" in entry and entry["kind"] != value.get("kind"):
        raise BitbyteError(
            f"{alias}: {path.name} is of kind {value.get('kind')}, the paper says {entry['kind']}"
        )
    return Record(alias=alias, stem=entry["record"], value=value, line=line)


def look_up(record: Record, path: str):
    """The value at a dotted path.  Raises BitbyteError listing the fields that exist."""
    value, parent = record.value, record.alias
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            known = ", ".join(value) if isinstance(value, dict) else f"{type(value).__name__}"
            if isinstance(value, list):
                known = f"a list of {len(value)}"
            raise BitbyteError(f"{record.stem} has no field {path}: {parent} has {known}")
        parent += f".{key}"
    return value


def windows_of(record: Record) -> str:
    """Window/stride of a record's evaluation; empty if it does not say."""
    context = record.value.get("context")
    known = isinstance(context, dict) and {"window", "stride"} <= set(context)
    return f"{context['window']}/{context['stride']}" if known else ""


def same_bytes(records: list[Record], windows: bool = True) -> None:
    """Raise BitbyteError if costs are not comparable: different bytes, or different windows."""
    about = [r.value["data"] if isinstance(r.value.get("data"), dict) else {} for r in records]
    hashes = {str(data.get("sha256")) for data in about}
    if len(hashes) > 1:
        raise BitbyteError(
            f"{', '.join(r.alias for r in records)} are not about the same bytes "
            f"({', '.join(sorted(digest[:8] for digest in hashes))})"
        )
    cuts = {windows_of(r) for r in records}
    if windows and len(cuts) > 1:
        raise BitbyteError(
            f"{', '.join(r.alias for r in records)} were scored in different windows "
            f"({', '.join(sorted(cuts))})"
        )


def shown(value, spec: str = "", unit: str = "", side: int = 0) -> str:
    """A number as text: a Python format, a unit whose factor divides it, a sign for bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BitbyteError(f"a {type(value).__name__} has no format {spec or unit}")
    if unit and unit not in FACTORS:
        raise BitbyteError(f"no unit {unit!r}; known: {' '.join(FACTORS)}")
    if unit and FACTORS[unit] != 1:
        value = value / FACTORS[unit]
    if not math.isfinite(value):
        raise BitbyteError(f"the value is {value}")
    if spec.endswith("d"):
        if value != int(value):
            raise BitbyteError(f"{value:g} is not a whole number, as the format {spec} requires")
        value = int(value)
    elif isinstance(value, float) and "." not in spec:
        raise BitbyteError(f"{value!r} needs a format with digits, such as .3f")
    if "." in spec and spec[-1] not in "fge":
        spec += "f"
    text = format(value, spec).replace("-", MINUS)
    sign = {0: "", 1: AT_MOST + SPACE, -1: AT_LEAST + SPACE}[side]
    if unit == "x":
        return f"{sign}{text}{TIMES}"
    return f"{sign}{text}{SPACE}{unit}" if unit else f"{sign}{text}"


class Numbers:
    """All records of a paper, and every number it has shown so far."""

    def __init__(self, records: dict[str, Record]):
        self.records = records
        self.used: set[str] = set()  # aliases
        self.list: list[dict] = []
        self.failed: set[str] = set()  # aliases whose record could not be read

    def record(self, alias: str) -> Record:
        """A record by its alias, which counts as used from now on."""
        if alias in self.failed:
            raise FailedRecordError(f"the record of {alias} cannot be used")
        if alias not in self.records:
            known = ", ".join(self.records) or "none"
            raise BitbyteError(f"unknown alias {alias}; the records of this paper: {known}")
        self.used.add(alias)
        return self.records[alias]

    def group(self, word: str) -> list[Record]:
        """The records of "a" or "a+b+c", seeds of one model."""
        records = [self.record(alias) for alias in word.split("+")]
        if len(records) > 1:
            same_bytes(records)
            if len({(r.value.get("model"), r.value.get("kind")) for r in records}) > 1:
                raise BitbyteError(f"{word} are not records of one model and one kind")
            if len({r.value.get("checkpoint") for r in records}) < len(records):
                raise BitbyteError(f"{word} are scores of one checkpoint, so they are not seeds")
        return records

    def note(self, text: str, value, sources: list[tuple[Record, str]], line: int, what: str):
        """Remember a number that the paper shows."""
        used = [
            {"alias": r.alias, "record": f"{r.stem}.json", "field": path, "value": look_up(r, path)}
            for r, path in sources
        ]
        self.list.append(
            {"text": text, "line": line, "expression": what, "value": value, "sources": used}
        )

    def render(self, inner: str, line: int) -> str:
        """What the inside of ``{{...}}`` prints, as Markdown.  Raises BitbyteError."""
        expression, colon, tail = inner.strip().partition(":")
        found = FORMAT.fullmatch(tail.strip())
        if not found or (colon and not tail.strip()):
            raise BitbyteError(f"bad format {tail.strip()!r} in {{{{{inner.strip()}}}}}")
        spec, unit = found["spec"], found["unit"] or ""
        pair = PAIR.fullmatch(expression.strip())
        if pair:
            text, value, sources = self._pair(*pair.groups(), spec, unit)
        else:
            text, value, sources = self._expression(expression.strip(), spec, unit)
        self.note(text, value, sources, line, inner.strip())
        return markdown_text(text) if isinstance(value, str) else text

    def _pair(self, word: str, first: str, second: str, spec: str, unit: str):
        """(text, value, sources) of a paired comparison."""
        from bitbyte.evaluate.bootstrap import paired_bootstrap

        a, b = self.record(first), self.record(second)
        for record in (a, b):
            if "blocks" not in record.value:
                raise BitbyteError(f"{record.stem} has no sums of blocks to compare")
        key = (a.stem, str(a.value.get("bits")), b.stem, str(b.value.get("bits")))
        try:
            if key not in COMPARED:
                COMPARED[key] = paired_bootstrap(a.value, b.value)
        except BitbyteError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BitbyteError(
                f"{a.stem} and {b.stem} are not both records of an evaluation ({error!r})"
            ) from None
        result = COMPARED[key]
        if result["interval"] is None:
            raise BitbyteError(
                f"{first} and {second} cannot be paired: {result['verdict']}; without an interval "
                f"write {{{{{first}.bpb - {second}.bpb}}}}"
            )
        low, high = result["interval"]
        sources = [(a, "bpb"), (b, "bpb")]
        if word == "verdict":
            if spec or unit:
                raise BitbyteError("a verdict has no format")
            text = "not distinguishable"
            if low > 0 or high < 0:
                text = "worse" if low > 0 else "better"
                worse = a if low > 0 else b
                text += ", as far as the bound tells" if worse.is_bound else ""
            return text, text, sources
        spec = spec or "+.4f"
        side = int(a.is_bound) - int(b.is_bound)
        ends = [shown(end, spec.lstrip("+"), unit) for end in (low, high)]
        text = shown(result["difference"], spec, unit, side)
        text += f" (95{SPACE}% interval {ends[0]} to {ends[1]})"
        return text, result["difference"], sources

    def _expression(self, text: str, spec: str, unit: str):
        """(text, value, sources) of one field or of arithmetic."""
        tokens, sources = _tokens(text), []
        kinds = [kind for kind, _ in tokens]
        if kinds == ["path"] and "+" not in tokens[0][1]:
            alias, _, path = tokens[0][1].partition(".")
            record = self.record(alias)
            value = look_up(record, path)
            sources = [(record, path)]
            if isinstance(value, str):
                if spec or unit:
                    raise BitbyteError(f"{path} is text; it has no format")
                return value, value, sources
            if isinstance(value, list):
                if len(value) != 2:
                    raise BitbyteError(f"{path} is a list of {len(value)}, not an interval")
                return " to ".join(shown(x, spec, unit) for x in value), value, sources
            side = int(record.is_bound and path in COSTS)
            return shown(value, spec, unit, side), value, sources
        value = self._sum(tokens, sources)
        if tokens:
            raise BitbyteError(f"cannot read {text!r} from {tokens[0][1]!r} on")
        costs = [record for record, path in sources if path in COSTS]
        same_bytes(list({r.alias: r for r in costs}.values()))
        marks = {r.value.get("checkpoint") for r in costs}
        side = 0 if len(costs) > 1 and len(marks) == 1 else value.side  # two codes of one model
        return shown(value.number, spec, unit, side), value.number, sources

    def _sum(self, tokens: list, sources: list) -> Value:
        value = self._product(tokens, sources)
        while tokens and tokens[0][1] in ("+", "-"):
            sign = 1 if tokens.pop(0)[1] == "+" else -1
            other = self._product(tokens, sources)
            value = Value(
                number=value.number + sign * other.number,
                side=_side(value.side, sign * other.side),
            )
        return value

    def _product(self, tokens: list, sources: list) -> Value:
        value = self._operand(tokens, sources)
        while tokens and tokens[0][1] in ("*", "/"):
            operator = tokens.pop(0)[1]
            other = self._operand(tokens, sources)
            if operator == "/" and other.number == 0:
                raise BitbyteError("division by 0")
            number = other.number if operator == "*" else 1 / other.number
            sign = 1 if operator == "*" else -1
            value = Value(number=value.number * number, side=_side(value.side, sign * other.side))
        return value

    def _operand(self, tokens: list, sources: list) -> Value:
        kind, text = tokens.pop(0) if tokens else ("end", "the end")
        if text == "(":
            value = self._sum(tokens, sources)
            if not tokens or tokens.pop(0)[1] != ")":
                raise BitbyteError("a bracket is not closed")
            return value
        if kind == "number":
            return Value(number=float(text))
        if kind != "path":
            raise BitbyteError(f"expected a field, not {text}")
        word, _, path = text.partition(".")
        records = self.group(word)
        numbers = [look_up(record, path) for record in records]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise BitbyteError(f"{text} is not a number to calculate with")
        sources += [(record, path) for record in records]
        side = int(records[0].is_bound and path in COSTS)
        return Value(number=math.fsum(numbers) / len(numbers), side=side)


def _side(a: int, b: int) -> int:
    """The side of a result; two bounds in opposite directions cancel, and no sign is printed."""
    return a or b if a * b >= 0 else 0


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        found = TOKEN.match(text, at)
        if not found:
            raise BitbyteError(f"cannot read {text[at:].strip()!r} in a number")
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    if not tokens:
        raise BitbyteError("an empty placeholder")
    return tokens


def sources_line(stems: list[str]) -> str:
    """Names of records in one line; names that differ only in their last part are joined."""
    groups: dict[str, list[str]] = {}
    for stem in dict.fromkeys(stems):
        head, dash, tail = stem.rpartition("-")
        groups.setdefault(head + dash, []).append(tail)
    names = [
        head + (tails[0] if len(tails) == 1 else "{" + ", ".join(tails) + "}")
        for head, tails in groups.items()
    ]
    return ", ".join(names)


def text_hash(path: Path) -> str:
    """SHA-256 of a text file, whatever line ends the checkout has."""
    data = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return hashlib.sha256(data).hexdigest()


def stamp(arrays: Path, records: list[Path]) -> None:
    """Write into saved arrays which records they belong to, with the hash of each."""
    value = read_json(arrays)
    if not isinstance(value, dict) or not records:
        raise BitbyteError(f"{arrays}: needs a JSON object, and at least one record")
    value["records"] = {path.stem: text_hash(path) for path in records}
    write_atomic(arrays, to_json(value))


def fresh_arrays(path: Path, folders: list[Path]) -> tuple[dict, list[str]]:
    """Saved arrays and the records they belong to.  Raises BitbyteError when they are stale."""
    value = read_json(path)
    stamps = value.pop("records", None) if isinstance(value, dict) else None
    if not isinstance(stamps, dict) or not stamps:
        raise BitbyteError(f"{path.name} names no records; add them with papers.numbers.stamp")
    for stem, digest in stamps.items():
        if text_hash(find(f"{stem}.json", folders)) != digest:
            raise BitbyteError(
                f"{path.name} is stale: the record {stem} has changed; draw and save it again"
            )
    return value, list(stamps)
