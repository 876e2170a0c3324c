"""Corpora as documents: files and folders, TinyStories JSON, Hugging Face sets, built-in text.

A corpus is an iterator of documents, and a document streams its bytes in chunks of at most 1 MiB,
so memory does not grow with the size of a file.  Nothing is decoded or cleaned: a file is its
bytes (unpacked first if its name ends in .gz, .bz2, .xz or .zst), a record is its text as UTF-8.
What becomes of the bytes is the business of shards.py.
"""

import codecs
import contextlib
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bitbyte.files import JSON_LIMIT, BitbyteError
from bitbyte.inputs import CHUNK, bare_name, find_files, is_packed, read_chunks, shown

STORIES_BYTES = 10_000_000  # length of the built-in stories if nobody says
STDLIB_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
BUILT_IN = ("stories", "stdlib")


@dataclass(frozen=True, kw_only=True)
class Document:
    """Something that streams.  If not ``whole``, each chunk may go to a split of its own."""

    name: str
    chunks: Iterator[bytes]
    whole: bool = True


def file_documents(
    inputs: list[str | Path], *, max_unpacked: int | None = None
) -> Iterator[Document]:
    """Files and folders as they are, any bytes, one document a file (see `find_files`).

    A file is cut into pieces of 1/256 of all input, 4 KiB to 1 MiB, so that a single file can be
    split too; shorter files stay whole.  Raises BitbyteError naming the file.
    """
    return _file_documents(find_files(inputs), max_unpacked)


def _file_documents(files: list[Path], max_unpacked: int | None = None) -> Iterator[Document]:
    piece = min(max(sum(path.stat().st_size for path in files) // 256, 4096), CHUNK)
    for path in files:
        chunks = read_chunks(path, piece, max_unpacked)
        yield Document(name=shown(path), chunks=chunks, whole=False)


# --- records


_WHITE = re.compile(r"[ \t\r\n]*")


class _TooLongError(BitbyteError):
    """A JSON value does not end within the limit."""


class _JsonText:
    """The text of a JSON file, moved through value by value: memory is one value, not the file."""

    def __init__(self, chunks: Iterator[bytes], name: str, limit: int = JSON_LIMIT):
        self._chunks, self._name, self._limit = chunks, name, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line, self._byte = 1, 0  # of the text's first character
        self._ended = False
        if self._more() and self._text.startswith("\ufeff"):
            self._at = 1

    def _more(self) -> bool:
        """Forget what is read and at least double the rest; False if there is no more."""
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
        """Raise BitbyteError with the file, the line and the byte of the current place."""
        before = self._text[: self._at if at is None else at]
        line, byte = self._line + before.count("\n"), self._byte + len(before.encode())
        raise BitbyteError(f"{self._name}: line {line}, byte {byte}: {what}")

    def peek(self) -> str:
        """The next character that is no white space, not taken; empty at the end."""
        while True:
            self._at = _WHITE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> None:
        """Go on by one character."""
        self._at += 1

    def value(self, check: Callable[[object], str | None]) -> object:
        """The value that starts here.  ``check`` says what is wrong with it, or None."""
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
    """The field of each object of a list of objects, or of objects one after the other.

    Raises BitbyteError with ``name``, line and byte of what is broken.
    """

    def check(value: object) -> str | None:
        if not isinstance(value, dict):
            return f"a {type(value).__name__} where an object with the field {field!r} should be"
        return _field_problem(value, field)

    text = _JsonText(chunks, name)
    listed = text.peek() == "["
    if listed:
        text.take()
    closing = "]" if listed else ""
    while text.peek() != closing:
        if not text.peek():
            text.fail("the list is not closed: the file is cut off")
        yield text.value(check)[field]
        if listed and text.peek() != "]":
            if text.peek() not in (",", ""):
                text.fail("a comma or ] should be here")
            text.take()
            if text.peek() == "]":
                text.fail("an object should follow the comma")
    if listed:
        text.take()
        if text.peek():
            text.fail("there is more after the list")


def _field_problem(record: dict, field: str) -> str | None:
    if field not in record:
        return f"no field {field!r}; there is: {', '.join(map(str, record)) or 'nothing'}"
    if not isinstance(record[field], str):
        return f"the field {field!r} is a {type(record[field]).__name__}, not text"
    try:
        record[field].encode()
    except UnicodeEncodeError:
        return f"the field {field!r} has half of a surrogate pair, which is no text"
    return None


def _is_json(path: Path) -> bool:
    return bare_name(path.name).lower().endswith((".json", ".jsonl"))


def _first_record(path: Path) -> dict:
    """The first object of a JSON file of objects; empty if it is another kind of JSON."""
    text = _JsonText(read_chunks(path), shown(path), limit=CHUNK)
    if text.peek() == "[":
        text.take()
    if text.peek() != "{":
        return {}
    try:
        return text.value(lambda value: None)
    except _TooLongError:
        return {}


def _refuse_mixed(inputs: list[str], files: list[Path], fields: tuple) -> None:
    """Raise BitbyteError if some files are records and others not: bytes of all are not meant."""
    others = [path.name for path in files if not _is_json(path)]
    records = []
    for path in files if others else ():
        with contextlib.suppress(BitbyteError):  # broken JSON is no record
            if _is_json(path) and not _first_record(path).keys().isdisjoint(fields):
                records.append(path.name)
    if records:
        raise BitbyteError(
            f"{', '.join(inputs)}: there are JSON records ({_some(records)}) and other files "
            f"({_some(others)}); name the .json files, or the others, separately"
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:2])) + ", ..." * (len(names) > 2)


def tinystories_documents(
    path: str | Path, field: str = "story", *, max_unpacked: int | None = None
) -> Iterator[Document]:
    """The stories of a .json (a list of objects) or .jsonl file, or of a folder of them.

    One document a story, without the newlines at its ends.  Raises BitbyteError that names file,
    line and byte of what is broken.
    """
    files = [file for file in find_files([path]) if _is_json(file)]
    if not files:
        raise BitbyteError(f"{shown(path)} has no .json or .jsonl files")
    return _json_documents(files, field, max_unpacked)


def _json_documents(files: list[Path], field: str, max_unpacked: int | None) -> Iterator[Document]:
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
    """The rows of a Hugging Face data set, streamed; one document a row, its ``field``.

    ``dataset`` is a name on the hub, or a local parquet or JSON file or a folder of them.  No
    code that comes with a data set is run.  Raises BitbyteError if it cannot be had, or has no
    such field (then its fields are listed).
    """
    try:
        import datasets
    except ImportError:
        raise BitbyteError('Hugging Face sets need datasets: pip install "bitbyte[data]"') from None
    try:
        if Path(dataset).exists():
            kind, files = _local_rows(dataset)
            files = {split: [str(path) for path in files]}
            rows = datasets.load_dataset(kind, data_files=files, split=split, streaming=True)
        else:
            rows = datasets.load_dataset(dataset, name, split=split, streaming=True)
        for i, row in enumerate(rows):
            if row.get(field, "") is not None:  # an empty cell is an empty document
                if problem := _field_problem(row, field):
                    raise BitbyteError(f"{dataset}, row {i}: {problem}")
                yield _record(f"{dataset} {i}", row[field])
    except BitbyteError:
        raise
    except Exception as error:  # whatever hub, network, parquet or JSON reader may raise
        reason = " ".join(str(error).split())[:300]
        raise BitbyteError(
            f"{dataset}: cannot be read ({type(error).__name__}: {reason})"
        ) from None


def _local_rows(path: str) -> tuple[str, list[Path]]:
    """(loader, files) of local files of rows; all must be of one kind."""
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    files = [file for file in find_files([path]) if file.suffix.lower() in kinds]
    found = {kinds[file.suffix.lower()] for file in files}
    if len(found) != 1:
        raise BitbyteError(f"{shown(path)} must hold .parquet files, or .json and .jsonl files")
    return found.pop(), files


# --- built-in


def stories_documents(
    n_bytes: int = STORIES_BYTES, seed: int = 0, split: str = "train"
) -> Iterator[Document]:
    """Stories of the built-in grammar until they reach ``n_bytes``, with one byte between two."""
    from bitbyte.stories import stories

    for i, text in enumerate(stories(n_bytes, seed=seed, split=split)):
        yield _record(f"story {i}", text)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(path for path in files if not STDLIB_SKIPPED & set(path.relative_to(root).parts))


def stdlib_documents() -> Iterator[Document]:
    """The source of the running Python's library, without its tests: text on every machine."""
    return _file_documents(_stdlib_files())


# --- one entry


def open_corpus(
    source: str | Path | list, *, n_bytes: int | None = None, seed: int = 0,
    split: str = "train", field: str | None = None, name: str | None = None,
    max_unpacked: int | None = None,
) -> tuple[Iterator[Document], dict]:  # fmt: skip
    """(documents, facts) of a corpus; the facts go into the manifest.

    ``source`` is ``stories``, ``stdlib``, ``hf:SET`` or one or several paths; a file that has a
    built-in name is written with a slash (./stories).  JSON files whose first object has
    ``field`` or ``story`` are read as records, all other files as bytes; a folder of both is
    refused, files of both that are named are bytes.  ``n_bytes`` and ``seed`` are for stories,
    ``split`` for stories and hf, ``name`` is the configuration of an hf set.  The facts: kind,
    name (for a folder), sep_byte (recommended after each document: 0 between records, None for
    files), size (bytes to expect, None if unknown), and the origin.
    """
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    if source == "stories":
        from bitbyte.stories import GRAMMAR_HASH

        n_bytes = STORIES_BYTES if n_bytes is None else n_bytes
        return stories_documents(n_bytes, seed, split), {
            "kind": "stories", "name": "stories", "sep_byte": 0, "size": n_bytes, "seed": seed,
            "split": split, "grammar": GRAMMAR_HASH,
        }  # fmt: skip
    if source == "stdlib":
        files = _stdlib_files()
        return _file_documents(files), {
            "kind": "stdlib", "name": "stdlib", "sep_byte": None, "size": _size(files),
            "python": platform.python_version(),
        }  # fmt: skip
    if isinstance(source, str) and source.startswith("hf:"):
        dataset, field = source.removeprefix("hf:"), field or "text"
        return hf_documents(dataset, name, split, field), {
            "kind": "hf", "name": _folder_name([dataset + (f"-{name}" if name else "")]),
            "sep_byte": 0, "size": None, "dataset": shown(dataset), "config": name,
            "split": split, "field": field,
        }  # fmt: skip
    inputs = list(source) if isinstance(source, list | tuple) else [source]
    files = find_files(inputs)
    facts = {"name": _folder_name(inputs), "inputs": [shown(item) for item in inputs]}
    asked = (field,) if field not in (None, "text") else (field, "story")
    if any(Path(item).is_dir() for item in inputs):
        _refuse_mixed(facts["inputs"], files, asked)
    record = _first_record(files[0]) if all(map(_is_json, files)) else {}
    chosen = next((key for key in asked if key in record), None)
    if chosen:
        facts |= {"kind": "json", "field": chosen, "sep_byte": 0, "size": _size(files)}
        return _json_documents(files, chosen, max_unpacked), facts
    if record and "story" not in asked:
        raise BitbyteError(f"{shown(files[0])}: {_field_problem(record, field)}")
    facts |= {"kind": "files", "sep_byte": None, "size": _size(files)}
    return _file_documents(files, max_unpacked), facts


def _size(files: list[Path]) -> int | None:
    """Bytes of all files; None if one is packed."""
    return None if any(map(is_packed, files)) else sum(path.stat().st_size for path in files)


def _folder_name(inputs: list) -> str:
    """A name for the folder of shards, made of the first input's."""
    path = Path(inputs[0])
    stem = (path if path.name not in ("", "..") else path.resolve()).name or "root"
    stem = bare_name(stem)
    for suffix in (".json", ".jsonl", ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-") or "corpus"
    more = f"-and-{len(inputs) - 1}" if len(inputs) > 1 else ""
    return stem + more + ("-files" if stem in BUILT_IN else "")
