"""Corpora as documents: files, folders, TinyStories JSON, Hugging Face data sets, built-in text.

A corpus is an iterator of documents, and a document streams its bytes in chunks of at most 1 MiB,
so memory does not grow with the size of a file.  Nothing is decoded or cleaned: a file is its
bytes (unpacked first if its name ends in .gz, .bz2, .xz or .zst), a record is its text as UTF-8.
`pack` turns the documents into shards.
"""

import codecs
import collections
import functools
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitbyte.data.parallel import in_order
from bitbyte.data.readers import CHUNK, bare_name, find_files, read_chunks, set_name
from bitbyte.files import JSON_LIMIT, BitbyteError, is_packed, sealed, shown, user_path
from bitbyte.process import say

STORIES_BYTES = 10_000_000  # default length of the built-in stories
STDLIB_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
BUILT_IN = ("stories", "stdlib")
FIELDS = ("text", "story")  # of records, unless the user names one
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A named stream of bytes.  If not ``whole``, its chunks may go to different splits."""

    name: str
    chunks: Iterator[bytes]
    whole: bool = True


def file_documents(
    inputs: list[str | Path], *, max_unpacked: int | None = None
) -> Iterator[Document]:
    """Files and folders as raw bytes, one document per file (see `find_files`).

    A file is cut into pieces of 1/256 of all input (4 KiB to 1 MiB), so that even a single file can
    be split; shorter files stay whole.  Raises BitbyteError naming the file.
    """
    return _file_documents(find_files(inputs), max_unpacked)


def _file_documents(
    files: list[Path], max_unpacked: int | None = None, whole: bool = False, workers: int = 1
) -> Iterator[Document]:
    piece = min(max(sum(path.stat().st_size for path in files) // 256, 4096), CHUNK)
    read = functools.partial(_cut_files, piece=piece, max_unpacked=max_unpacked, whole=whole)
    return read(files) if workers == 1 else in_order(read, files, workers, Document)


def _cut_files(
    files: list[Path], piece: int, max_unpacked: int | None, whole: bool
) -> Iterator[Document]:
    for path in files:
        chunks = read_chunks(path, piece, max_unpacked)
        yield Document(name=shown(path), chunks=chunks, whole=whole)


_WHITE = re.compile("[ \t\r\n\ufeff]*")  # concatenated files may each begin with a BOM


class _TooLongError(BitbyteError):
    """A JSON value does not end within the limit."""


class _JsonText:
    """The text of a JSON file, read value by value: memory holds one value, not the file."""

    def __init__(self, chunks: Iterator[bytes], name: str, limit: int = JSON_LIMIT):
        self._chunks, self._name, self._limit = chunks, name, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line, self._byte = 1, 0  # of the text's first character
        self._ended = False

    def _more(self) -> bool:
        """Drop what was read and at least double the rest; False at the end of the file."""
        self._line += self._text.count("\n", 0, self._at)
        self._byte += len(self._text[: self._at].encode())
        parts, self._at = [self._text[self._at :]], 0
        wanted, got = len(parts[0]), 0
        while not self._ended and got <= wanted:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            try:
                parts.append(self._decoder.decode(chunk, final=self._ended))
            except UnicodeDecodeError as error:
                place = self._byte + len("".join(parts).encode()) + error.start
                raise BitbyteError(f"{self._name}: byte {place} is not UTF-8") from None
            got += len(parts[-1])
        self._text = "".join(parts)
        return got > 0

    def fail(self, what: str, at: int | None = None) -> None:
        """Raise BitbyteError with the file, and the line and byte of the current position."""
        before = self._text[: self._at if at is None else at]
        line, byte = self._line + before.count("\n"), self._byte + len(before.encode())
        raise BitbyteError(f"{self._name}: line {line}, byte {byte}: {what}")

    def peek(self) -> str:
        """The next character that is not white space, without taking it; empty at the end."""
        while True:
            self._at = _WHITE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> None:
        """Take one character."""
        self._at += 1

    def value(self, check: Callable[[object], str | None]) -> object:
        """The value that starts here.  ``check`` returns what is wrong with it, or None."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if cut and len(self._text) - self._at > self._limit:
                    raise _TooLongError(
                        f"{self._name}: a value of over {self._limit} bytes"
                    ) from None
                after = error.pos - self._at
                if not cut or not self._more():
                    self.fail(f"not valid JSON ({error.msg})", self._at + after)
            except (ValueError, RecursionError) as error:
                self.fail(f"not valid JSON ({error})")
        if problem := check(value):
            self.fail(problem)
        self._at = end
        return value


def json_strings(chunks: Iterator[bytes], name: str, field: str) -> Iterator[str]:
    """The field of each object in a list of objects, or in a sequence of objects.

    Objects whose field is null are skipped.  Raises BitbyteError with ``name``, line and byte of
    what is broken.
    """

    def check(value: object) -> str | None:
        if not isinstance(value, dict):
            return f"expected an object with the field {field!r}, not {_kind(value)}"
        return _field_problem(value, field)

    text = _JsonText(chunks, name)
    listed = text.peek() == "["
    if listed:
        text.take()
    closing = "]" if listed else ""
    while text.peek() != closing:
        if not text.peek():
            text.fail("the list is not closed: the file is cut off")
        string = text.value(check)[field]
        if string is not None:
            yield string
        if listed and text.peek() != "]":
            if text.peek() not in (",", ""):
                text.fail("expected a comma or ]")
            text.take()
            if text.peek() == "]":
                text.fail("expected an object after the comma")
    if listed:
        text.take()
        if text.peek():
            text.fail("there is more text after the list")


def _field_problem(record: dict, field: str) -> str | None:
    if field not in record:
        return f"no field {field!r}; it has: {', '.join(map(str, record)) or 'nothing'}"
    if record[field] is None:
        return None
    if not isinstance(record[field], str):
        return f"the field {field!r} is {_kind(record[field])}, not text"
    try:
        record[field].encode()
    except UnicodeEncodeError:
        return f"the field {field!r} has half of a surrogate pair, which is not text"
    return None


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")


def _is_json(path: Path) -> bool:
    return bare_name(path.name).lower().endswith(JSON_SUFFIXES)


def _fields(path: Path) -> list[str] | None:
    """The fields of the first object in a JSON file of objects; empty if there is no object.

    None if it is another kind of JSON, or broken.
    """
    text = _JsonText(read_chunks(path, CHUNK // 16), shown(path), limit=CHUNK)
    try:
        if text.peek() == "[":
            text.take()
        if text.peek() in ("", "]"):
            return []
        return list(text.value(lambda value: None)) if text.peek() == "{" else None
    except BitbyteError:
        return None


def _text_field(inputs: list, files: list[Path], field: str | None) -> str | None:
    """The field to take text from if the files are JSON records; None to take them as bytes.

    Choices that may surprise are noted on stderr.  Raises BitbyteError for a ``field`` requested of
    files that are not JSON, and for a folder that mixes records and other files.
    """
    if field is not None:
        other = next((path for path in files if not _is_json(path)), None)
        if other is not None:
            raise BitbyteError(
                f"{shown(other)} is not JSON by its name ({', '.join(JSON_SUFFIXES)}), so it has "
                f"no field {field!r}; name the JSON files, or drop --field"
            )
        return field
    fields = {path: _fields(path) for path in files if _is_json(path)}
    records = [path for path, names in fields.items() if {*(names or ())} & {*FIELDS}]
    known = {*records}
    others = [p for p in files if fields.get(p) is None or (fields[p] and p not in known)]
    if records and not others:
        return next(name for name in FIELDS if name in fields[records[0]])
    if records and any(Path(item).is_dir() for item in inputs):
        raise BitbyteError(
            f"{', '.join(map(shown, inputs))}: there are JSON records ({_some(records)}) and other "
            f"files ({_some(others)}); name the .json files, or the others, separately"
        )
    if records:
        _note(f"{_some(records)}: JSON records, taken as bytes because other files are named too")
        return None
    if unknown := [path for path, names in fields.items() if names]:
        _note(
            f"{_some(unknown)}: JSON without a field {' or '.join(FIELDS)}, taken as bytes; "
            f"--field takes the text of one of: {', '.join(fields[unknown[0]][:9])}"
        )
    if foreign := [path for path, names in fields.items() if names is None]:
        _note(
            f"{_some(foreign)}: does not begin with a JSON object in UTF-8 of up to 1 MiB, taken "
            "as bytes"
        )
    return None


def _note_sealed(files: list[Path]) -> None:
    """Note files whose bytes are not the text a reader sees in them (archives, PDF, Parquet)."""
    by_kind: dict[str, list[Path]] = {}
    for path in files:
        what = None if is_packed(path) else sealed(path)
        if is_packed(path) and bare_name(path.name).lower().endswith(".tar"):
            what = "unpacks to a tar archive, with names and padding"
        if what:
            by_kind.setdefault(what, []).append(path)
    for what, paths in by_kind.items():
        hint = "; --hf takes the text of one column" if "Parquet" in what else ""
        _note(f"{_some(paths)}: {what}; taken as bytes{hint}")


def _note(text: str) -> None:
    say(f"note: {text}")


def _some(paths: list[Path]) -> str:
    return ", ".join(shown(path.name) for path in paths[:2]) + ", ..." * (len(paths) > 2)


def tinystories_documents(
    path: str | Path, field: str = "story", *, max_unpacked: int | None = None
) -> Iterator[Document]:
    """The stories of a .json (a list of objects) or .jsonl file, or of a folder of them.

    One document per story, without newlines at either end.  Raises BitbyteError naming file, line
    and byte of what is broken.
    """
    files = [file for file in find_files([path]) if _is_json(file)]
    if not files:
        raise BitbyteError(f"{shown(path)} has no .json or .jsonl files")
    return _json_documents(files, field, max_unpacked)


def _json_documents(
    files: list[Path], field: str, max_unpacked: int | None, workers: int = 1
) -> Iterator[Document]:
    read = functools.partial(_json_rows, field=field, max_unpacked=max_unpacked)
    return read(files) if workers == 1 else in_order(read, files, workers, Document)


def _json_rows(files: list[Path], field: str, max_unpacked: int | None) -> Iterator[Document]:
    for path in files:
        chunks = read_chunks(path, max_unpacked=max_unpacked)
        for i, text in enumerate(json_strings(chunks, shown(path), field)):
            yield _record(f"{shown(path)} {i}", text.strip("\r\n"))


def _record(name: str, text: str) -> Document:
    data = text.encode()
    pieces = (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))
    return Document(name=name, chunks=pieces)


def hf_documents(
    dataset: str, name: str | None = None, split: str = "train", field: str = "text"
) -> Iterator[Document]:
    """The rows of a Hugging Face data set, streamed: the ``field`` of each row is a document.

    ``dataset`` is ORG/NAME on the hub, or a local Parquet or JSON file or a folder of them; local
    files give all their rows, without network access.  Empty cells are skipped.  Code that comes
    with a data set is never run.  Raises BitbyteError if it is not available, or has no such field
    (the message then lists its fields).
    """
    dataset = _hf_place(dataset)
    if Path(dataset).exists():
        return _local_rows(dataset, field)
    suffixes = (*JSON_SUFFIXES, ".parquet", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".csv")
    if not HUB_NAME.fullmatch(dataset) or dataset.lower().endswith(suffixes):
        raise BitbyteError(
            f"there is no file or folder {shown(dataset)}; a data set on the Hugging Face hub is "
            "written ORG/NAME"
        )
    return _hub_rows(dataset, name, split, field)


def _hf_place(dataset: str) -> str:
    """``dataset`` with ``~`` expanded; a name on the hub stays as it is, with its slash."""
    return str(user_path(dataset)) if dataset[:1] in ("", "~") else dataset


def _hub_rows(dataset: str, name: str | None, split: str, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise BitbyteError('Hugging Face sets need datasets: pip install "bitbyte[data]"') from None
    _note(f"{dataset} is not here; asking the Hugging Face hub for it")
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)  # it repeats itself at every retry
        rows = datasets.load_dataset(dataset, name, split=split, streaming=True)
        hub_log.setLevel(level)
        yield from _row_documents(dataset, rows, field)
    except BitbyteError:
        raise
    except Exception as error:  # whatever hub, network or reader may raise
        reason = " ".join(str(error).split())[:300]
        raise BitbyteError(
            f"there is no file or folder {dataset} here, and it cannot be read from the Hugging "
            f"Face hub ({type(error).__name__}: {reason})"
        ) from None
    finally:
        hub_log.setLevel(level)


def _row_documents(where: str, rows: Iterator[dict], field: str) -> Iterator[Document]:
    for i, row in enumerate(rows):
        if problem := _field_problem(row, field):
            raise BitbyteError(f"{where}, row {i}: {problem}")
        if row[field] is not None:
            yield _record(f"{where} {i}", row[field])


def _local_rows(path: str, field: str) -> Iterator[Document]:
    """Rows of local files, without `datasets`, which would take [ ] * :: in a name as a pattern."""
    files = find_files([path])
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    records = [file for file in files if _is_json(file)]
    if bool(parquet) == bool(records):
        raise BitbyteError(f"{shown(path)} must hold .parquet files, or .json and .jsonl files")
    return _parquet_rows(parquet, field) if parquet else _json_documents(records, field, None)


def _parquet_rows(files: list[Path], field: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BitbyteError('Parquet files need pyarrow: pip install "bitbyte[data]"') from None
    for path in files:
        try:
            with open(path, "rb") as file:
                table = parquet.ParquetFile(file)
                if field not in table.schema_arrow.names:
                    empty = dict.fromkeys(table.schema_arrow.names)
                    raise BitbyteError(f"{shown(path)}: {_field_problem(empty, field)}")
                batches = table.iter_batches(1024, columns=[field])
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from _row_documents(shown(path), rows, field)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BitbyteError(f"{shown(path)}: cannot be read ({reason})") from None


def stories_documents(
    n_bytes: int = STORIES_BYTES, seed: int = 0, split: str = "train"
) -> Iterator[Document]:
    """Stories of the built-in grammar until they reach ``n_bytes``, separators included."""
    from bitbyte.stories.grammar import stories

    for i, text in enumerate(stories(n_bytes, seed=seed, split=split)):
        yield _record(f"story {i}", text)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(path for path in files if not STDLIB_SKIPPED & set(path.relative_to(root).parts))


def stdlib_documents() -> Iterator[Document]:
    """The source of Python's standard library, without its tests: text found on every machine."""
    return _file_documents(_stdlib_files())


def is_name(source: object) -> bool:
    """Whether `open_corpus` takes this text for the name of a corpus, not for a path."""
    return isinstance(source, str) and (source in BUILT_IN or source.startswith("hf:"))


def name_of(source: str | Path | list | tuple) -> str | None:
    """The name by which `open_corpus` takes ``source``; None for paths."""
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    return source if is_name(source) else None


def open_corpus(
    source: str | Path | list, *, n_bytes: int | None = None, seed: int = 0,
    split: str = "train", field: str | None = None, name: str | None = None,
    max_unpacked: int | None = None, include: Sequence[str] = (), exclude: Sequence[str] = (),
    whole_files: bool = False, workers: int = 1,
) -> tuple[Iterator[Document], dict]:  # fmt: skip
    """(documents, facts) of a corpus; the facts go into the manifest.

    ``source`` is ``stories``, ``stdlib``, ``hf:SET``, or one or several paths; write a file that
    has a built-in name with a slash (./stories).  JSON files whose first object has a field
    ``text`` or ``story`` are read as records, all other files as bytes; a folder that mixes the two
    is refused, and a mix of named files is taken as bytes.  A ``field``, if given, must be in all
    files.  ``include`` and ``exclude`` choose files inside folders, see `find_files`; with
    ``whole_files`` all of a file goes to one split.  Choices that may surprise are noted on stderr.
    ``n_bytes`` and ``seed`` are for stories, ``split`` for stories and hf, ``name`` is the
    configuration of an hf set.  Files are read by so many ``workers`` processes, to the same
    documents in the same order.  The facts: kind, name (for a folder), sep_byte (recommended after
    each document: 0 between records, None for files), size (bytes to expect, None if unknown), and
    the origin.  Raises BitbyteError.
    """
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    from_hub = is_name(source) and source not in BUILT_IN
    if name is not None and not from_hub:
        raise BitbyteError(f"name {name!r} is a configuration of a Hugging Face set: give --hf SET")
    if is_name(source) and (include or exclude or whole_files):
        raise BitbyteError(
            f"{source} has no files to choose; drop --include, --exclude, --whole_files"
        )
    if workers < 1:
        raise BitbyteError(f"workers is {workers}; it must be at least 1")
    if source in BUILT_IN:
        if field is not None:
            raise BitbyteError(f"{source} is built-in text without fields; drop --field")
        if Path(source).exists():
            _note(f"{source} is the built-in text; for the file of that name, write ./{source}")
    if source == "stories":
        from bitbyte.stories.grammar import GRAMMAR_HASH

        n_bytes = STORIES_BYTES if n_bytes is None else n_bytes
        return stories_documents(n_bytes, seed, split), {
            "kind": "stories", "name": "stories", "sep_byte": 0, "size": n_bytes, "seed": seed,
            "split": split, "grammar": GRAMMAR_HASH,
        }  # fmt: skip
    if source == "stdlib":
        files = _stdlib_files()
        return _file_documents(files, workers=workers), {
            "kind": "stdlib", "name": "stdlib", "sep_byte": None, "size": _size(files),
            "python": platform.python_version(),
        }  # fmt: skip
    if from_hub:
        dataset = _hf_place(source.removeprefix("hf:"))
        field = "text" if field is None else field
        return hf_documents(dataset, name, split, field), {
            "kind": "hf", "name": _folder_name([dataset + (f"-{name}" if name else "")]),
            "sep_byte": 0, "size": None, "dataset": shown(dataset), "config": name,
            "split": split, "field": field,
        }  # fmt: skip
    inputs = list(source) if isinstance(source, list | tuple) else [source]
    files = find_files(inputs, include, exclude)
    facts = {"name": _folder_name(inputs), "inputs": [shown(item) for item in inputs]}
    chosen_by = {"include": list(include), "exclude": list(exclude)}
    facts |= {option: patterns for option, patterns in chosen_by.items() if patterns}
    chosen = _text_field(inputs, files, field)
    if chosen:
        if whole_files:
            raise BitbyteError(
                f"{_some(files)}: JSON records, which are held out one by one; drop --whole_files"
            )
        facts |= {"kind": "json", "field": chosen, "sep_byte": 0, "size": _size(files)}
        return _json_documents(files, chosen, max_unpacked, workers), facts
    _note_sealed(files)
    facts |= {"kind": "files", "sep_byte": None, "size": _size(files)}
    if len(files) > 1:
        _note(_taken(files))
    return _file_documents(files, max_unpacked, whole_files, workers), facts


def _taken(files: list[Path]) -> str:
    """How many files there are of each kind, for a reader who expected others."""
    kinds = collections.Counter(path.suffix.lower() or "without ending" for path in files)
    listed = [f"{number} {shown(kind)}" for kind, number in kinds.most_common(6)]
    rest = len(files) - sum(number for _, number in kinds.most_common(6))
    return f"{len(files)} files: {', '.join(listed)}" + (f", {rest} others" if rest else "")


def stamp(path: Path) -> list:
    """[(path, size, modification time)] of a file, or of all files of a folder.

    They stand for the content, which would take long to hash.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _size(files: list[Path]) -> int | None:
    """Bytes of all files; None if one is packed."""
    return None if any(map(is_packed, files)) else sum(path.stat().st_size for path in files)


def _folder_name(inputs: list) -> str:
    """A name for the folder of shards, made from the name of the first input."""
    path = Path(inputs[0])
    whole = (path if path.name not in ("", "..") else path.resolve()).name or "root"
    stem = bare_name(whole)
    for suffix in (*JSON_SUFFIXES, ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    stem = set_name(stem).encode()[:100].decode(errors="ignore")  # leaves room for suffixes
    if not stem:  # names made only of signs must differ, too
        stem = f"corpus-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"
    more = f"-and-{len(inputs) - 1}" if len(inputs) > 1 else ""
    return stem + more + ("-files" if stem in BUILT_IN else "")
