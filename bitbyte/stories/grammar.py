"""The built-in corpus `stories`: English children's stories with an exactly known distribution.

One program (tales.py over words.py) is run by two drivers.  The writer draws every choice from a
keyed counter-based generator in integer arithmetic; the reader runs the same program over a text
and finds the option that the text took.  Every set of options is prefix-free and every choice shows
in the text, so a text has exactly one derivation, and its probability is the product of weight /
total over its choices: the entropy of every file is exact, not estimated.

This is neither natural text nor a benchmark: it is a ruler.  A model that was fixed before the file
was drawn beats the true distribution by s bits with probability at most 2^-s.  Written for this
project.
"""

import bisect
import functools
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitbyte.files import BitbyteError, replacing
from bitbyte.stories import tales
from bitbyte.stories.words import WORDS, article

SPLITS = ("train", "val")
UNIFORM = ("secret", "syllable", "town", "number", "small")  # in others common words weigh more

_PARTS = map(Path(__file__).with_name, ("grammar.py", "tales.py", "words.py"))
GRAMMAR_HASH = hashlib.sha256(  # of engine, tales and words, whatever line ends the checkout has
    b"".join(part.read_bytes().replace(b"\r\n", b"\n") for part in _PARTS)
).hexdigest()
SOURCE = f"bitbyte stories {GRAMMAR_HASH[:12]}"


class Choice:
    """A prefix-free set of options with integer weights, ready to be drawn and to be read.

    Raises ValueError if one option is a prefix of another: a bug in the grammar, not in its use.
    """

    def __init__(self, options: tuple[str, ...], weights: tuple[int, ...] | None = None):
        weights = weights or (1,) * len(options)
        if len(weights) != len(options) or min(weights) < 1:
            raise ValueError(f"{len(options)} options need as many positive weights: {weights}")
        # In sorted order everything between a prefix and its extension starts with the prefix.
        for one, other in itertools.pairwise(sorted(options)):
            if other.startswith(one):
                raise ValueError(f"options are not prefix-free: {one!r} starts {other!r}")
        self.options, self.weights = options, weights
        self.sums = tuple(itertools.accumulate(weights))
        self.total = self.sums[-1]
        self.bits = tuple(math.log2(self.total / weight) for weight in weights)
        self.index = {option: i for i, option in enumerate(options)}
        self.lengths = sorted({len(option) for option in options})
        self._leading: dict[int, np.ndarray] = {}

    def find(self, text: str, at: int) -> int:
        """Index of the option that ``text`` has at ``at``, or -1."""
        for length in self.lengths:
            i = self.index.get(text[at : at + length], -1)
            if i >= 0:
                return i
        return -1

    def law(self, start: str) -> dict[str, int]:
        """Weight of every character that can follow ``start``, a proper prefix of an option."""
        weights: dict[str, int] = {}
        for option, weight in zip(self.options, self.weights, strict=True):
            if option.startswith(start):
                weights[option[len(start)]] = weights.get(option[len(start)], 0) + weight
        return weights

    def path(self, text: str) -> list[float]:
        """Bits of each character of ``text``, a prefix of an option, while others are possible."""
        bits, weight, live = [], self.total, range(len(self.options))
        for k, character in enumerate(text):
            if len(live) == 1:
                break
            live = [i for i in live if self.options[i].startswith(character, k)]
            left = sum(self.weights[i] for i in live)
            bits.append(math.log2(weight / left))
            weight = left
        return bits

    def leading(self, i: int) -> np.ndarray:
        """`path` of option i, float64 and cached: readers copy it."""
        if i not in self._leading:
            self._leading[i] = np.array(self.path(self.options[i]))
        return self._leading[i]


_choice = functools.lru_cache(2048)(Choice)  # bounded: sets that contain names serve one story


@functools.cache
def _words(name: str, form: str, end: str) -> Choice:
    """The choice among the words of one list in one form, each followed by ``end``."""
    words = WORDS[f"{form}.{name}" if form in ("base", "past", "third") else name]
    n = len(words)
    weights = (1,) * n if name in UNIFORM else tuple(1 + (3 * i < n) for i in range(n))
    return Choice(tuple((article(w) if form == "a" else w) + end for w in words), weights)


_SLOT = re.compile(r"\{(?:(\w+)\.)?(\w+)(?:>(\w+))?\}|\[([^\]]*)\]|<([^|>]*)\|([^>]*)>")
_TEXT, _KNOWN, _TENSE, _WORD, _PICK = range(5)


@functools.cache
def _parse(template: str) -> tuple[tuple, ...]:
    """Parts of a template: fixed ones (text, known, tense) and choices (word, pick)."""
    parts, at = [], 0
    for slot in _SLOT.finditer(template):
        if at < slot.start():
            parts.append((_TEXT, template[at : slot.start()]))
        at = slot.end()
        form, name, key, options, past, present = slot.groups()
        # The character after a choice ends its options, unless another slot follows.
        end = "" if template[at : at + 1] in ("", "{", "[", "<") else template[at]
        if past is not None:
            parts.append((_TENSE, (past, present)))
        elif key in WORDS:
            raise ValueError(f"{template!r} remembers a word as {key!r}, the name of a list")
        elif options is not None:
            inner = tuple(_parse(option + end) for option in options.split("|"))
            if any(part[0] in (_WORD, _PICK) for option in inner for part in option):
                raise ValueError(f"{template!r} has a choice inside a choice")
            parts.append((_PICK, inner))
            at += len(end)
        elif name in WORDS or f"base.{name}" in WORDS:
            parts.append((_WORD, name, form, key, end))
            at += len(end)
        else:
            parts.append((_KNOWN, name))
    if at < len(template):
        parts.append((_TEXT, template[at:]))
    return tuple(parts)


class Teller:
    """What a tale calls: fills in templates and passes every choice to a driver."""

    def __init__(self, driver: "Writer | Reader"):
        self.driver = driver
        self.known: dict[str, str] = {}
        self.present = False

    def pick(self, options: tuple[str, ...], weights: tuple[int, ...] | None = None) -> int:
        """Choose one of several prefix-free texts; returns its index."""
        return self.driver.pick(_choice(options, weights))

    def say(self, template: str) -> None:
        """Tell one template."""
        self._tell(_parse(template))

    def any(self, *templates: str, weights: tuple[int, ...] | None = None) -> int:
        """Tell one of several templates, chosen by the text before its first slot; its index."""
        heads = [self._head(_parse(template)) for template in templates]
        i = self.pick(tuple(head for head, _ in heads), weights)
        self._tell(heads[i][1])
        return i

    def _head(self, parts: tuple) -> tuple[str, tuple]:
        """The fixed text that ``parts`` begin with, and the parts after it."""
        text = ""
        for k, part in enumerate(parts):
            if part[0] == _TEXT:
                text += part[1]
            elif part[0] == _KNOWN:
                text += self.known[part[1]]
            elif part[0] == _TENSE:
                text += part[1][self.present]
            else:
                return text, parts[k:]
        return text, ()

    def _tell(self, parts: tuple) -> None:
        while True:
            fixed, parts = self._head(parts)
            if fixed:
                self.driver.lit(fixed)
            if not parts:
                return
            if parts[0][0] == _WORD:
                self._word(*parts[0][1:])
            else:
                self.pick(tuple(self._head(option)[0] for option in parts[0][1]))
            parts = parts[1:]

    def _word(self, name: str, form: str | None, key: str | None, end: str) -> None:
        if f"base.{name}" in WORDS and form != "base":
            form = "past" if not self.present else "base" if form == "they" else "third"
        i = self.driver.pick(_words(name, form or "", end))
        if key:
            self.known[key] = WORDS[name][i]


class Writer:
    """Driver that draws: keyed counter-based generator, integers only, exact probabilities."""

    def __init__(self, seed: int, split: str, index: int):
        self.key = hashlib.sha256(f"bitbyte stories {seed} {split} {index}".encode()).digest()
        self.blocks = 0
        self.numbers: list[int] = []
        self.parts: list[str] = []
        self.bits = 0.0

    def _below(self, n: int) -> int:
        """Uniform integer in [0, n): numbers in the uneven rest of the 64-bit range are redrawn."""
        while True:
            if not self.numbers:
                block = self.blocks.to_bytes(8, "little")
                digest = hashlib.blake2b(block, key=self.key, digest_size=64).digest()
                self.numbers = list(struct.unpack("<8Q", digest))
                self.blocks += 1
            number = self.numbers.pop()
            if number < 2**64 - 2**64 % n:
                return number % n

    def lit(self, text: str) -> None:
        self.parts.append(text)

    def pick(self, choice: Choice) -> int:
        i = bisect.bisect_right(choice.sums, self._below(choice.total))
        self.parts.append(choice.options[i])
        self.bits += choice.bits[i]
        return i


class _Cut(Exception):  # noqa: N818  (not an error: the text ends here)
    """The text ended inside a story; args[0]: weight of each character that may follow."""


class Reader:
    """Driver that follows a text from ``at``; bits of each character go to ``out_N``.

    Raises BitbyteError at the first character that no story could have there.
    """

    def __init__(self, text: str, at: int, out_N: np.ndarray):
        self.text, self.at, self.out_N = text, at, out_N
        self.bits = 0.0

    def lit(self, text: str) -> None:
        if self.text.startswith(text, self.at):
            self.at += len(text)
        else:
            self._stop(Choice((text,)))

    def pick(self, choice: Choice) -> int:
        i = choice.find(self.text, self.at)
        if i < 0:
            self._stop(choice)
        leading = choice.leading(i)
        self.out_N[self.at : self.at + len(leading)] = leading
        self.at += len(choice.options[i])
        self.bits += choice.bits[i]
        return i

    def _stop(self, choice: Choice) -> None:
        """Called where the text ends within ``choice``, or is not a story."""
        rest = self.text[self.at : self.at + choice.lengths[-1]]
        weights = choice.law(rest)
        if weights:  # some option is longer than the rest, so the rest reaches the end of the text
            path = choice.path(rest)
            self.out_N[self.at : self.at + len(path)] = path
            raise _Cut(weights)
        while not weights:
            rest = rest[:-1]
            weights = choice.law(rest)
        _refuse(self.text, self.at + len(rest), "".join(sorted(weights)))


def _refuse(text: str, at: int, expected: str) -> None:
    problem = f"byte {at} is {text[at]!r}, not one of {expected!r}"
    raise BitbyteError(f"not a text of the stories grammar: {problem}")


def _write(index: int, seed: int, split: str) -> Writer:
    if split not in SPLITS:
        raise BitbyteError(f"split {split!r} of stories: choose one of {', '.join(SPLITS)}")
    writer = Writer(seed, split, index)
    tales.tell(Teller(writer))
    return writer


def story(index: int, *, seed: int = 0, split: str = "train") -> str:
    """Story number ``index`` of a stream: ASCII, the same on every machine and Python version.

    Raises BitbyteError for an unknown split.
    """
    return "".join(_write(index, seed, split).parts)


def stories(
    n_bytes: int | None = None, n_stories: int | None = None, *, seed: int = 0, split: str = "train"
) -> Iterator[str]:
    """The first stories of a stream: ``n_stories``, or until they reach ``n_bytes``.

    Each story counts one byte more, for its separator.  With neither limit the stream is endless.
    Raises BitbyteError for an ``n_bytes`` below 1.
    """
    if n_bytes is not None and n_bytes < 1:
        raise BitbyteError(f"{n_bytes} bytes of stories; ask for 1 or more")
    index = written = 0
    while (n_stories is None or index < n_stories) and (n_bytes is None or written < n_bytes):
        text = story(index, seed=seed, split=split)
        index, written = index + 1, written + len(text) + 1
        yield text


def write_json(
    path: Path, n_bytes: int | None = None, n_stories: int | None = None, **stream: object
) -> int:
    """Write `stories` in TinyStories' original shape, one list of objects; returns their number.

    ``stream``: seed and split.  Constant memory; the file appears under its name only when
    complete, in folders made for it.  Raises BitbyteError if neither limit is given or ``path``
    is a folder, OSError if the disk refuses.
    """
    if n_bytes is None and n_stories is None:
        raise BitbyteError("stories have no end: give n_bytes or n_stories")
    path, count = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for count, text in enumerate(stories(n_bytes, n_stories, **stream), 1):
            file.write(b"[" if count == 1 else b",\n")
            file.write(json.dumps({"story": text, "source": SOURCE}).encode("ascii"))
        file.write(b"]\n" if count else b"[]\n")
    return count


def story_bits(text: str) -> float:
    """Bits of one whole story.  Raises BitbyteError naming the byte if ``text`` is not one."""
    reader = Reader(text, 0, np.zeros(len(text)))
    try:
        tales.tell(Teller(reader))
    except _Cut:
        raise BitbyteError(f"not a whole story: it is cut off after {len(text)} bytes") from None
    if reader.at < len(text):
        raise BitbyteError(f"not one story: it ends at byte {reader.at} of {len(text)}")
    return reader.bits


def _follow(data: bytes, sep_byte: int) -> tuple[np.ndarray, dict[str, int]]:
    """Bits of every byte of a stream, and the weights of the bytes that can follow it."""
    text = bytes(data).decode("latin-1")  # one character for each byte
    sep, at, out_N = chr(sep_byte), 0, np.zeros(len(data))
    while True:
        reader = Reader(text, at, out_N)
        try:
            tales.tell(Teller(reader))
        except _Cut as cut:
            return out_N, cut.args[0]
        at = reader.at
        if at == len(text):
            return out_N, {sep: 1}
        if text[at] != sep:
            _refuse(text, at, sep)
        at += 1


def surprisal(data: bytes, sep_byte: int = 0) -> np.ndarray:
    """Exact bits of every byte of packed stories, each followed by ``sep_byte``; float64 (n,).

    The stream starts at a story; the last story may be cut off anywhere.  A separator after a
    whole story is certain and costs nothing.  Raises BitbyteError naming the first wrong byte.
    """
    return _follow(data, sep_byte)[0]


def next_byte_probs(prefix: bytes, sep_byte: int = 0) -> np.ndarray:
    """Exact probabilities of the byte after ``prefix``, a stream as in `surprisal`; (256,)."""
    weights = _follow(prefix, sep_byte)[1]
    p_V = np.zeros(256)
    p_V[[ord(character) for character in weights]] = list(weights.values())
    return p_V / p_V.sum()


@dataclass(frozen=True, kw_only=True)
class StoriesModel:
    """The grammar as an oracle: exact bits (n,) of every byte of a stream of packed stories."""

    sep_byte: int = 0  # byte that follows every story
    name = "stories-law"
    exact = True

    def bits(self, data: bytes) -> np.ndarray:
        """`surprisal` of the stream."""
        return surprisal(data, self.sep_byte)
