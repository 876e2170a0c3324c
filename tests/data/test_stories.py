"""The stories grammar: writer and reader agree, probabilities are exact, the English is right."""

import hashlib
import itertools
import json
import math
import os
import re

import numpy as np
import pytest

from bitbyte.files import BitbyteError
from bitbyte.stories import grammar, tales
from bitbyte.stories.words import VERBS, WORDS, article

# sha256 of the first 50 stories, a 0 byte after each: change it only together with the grammar
GOLDEN = "afc44ffd85ec8546eb31f5ea2351b4a8d392207ada2b128f6af86c20afe4bd16"


def pack(texts, sep: int = 0) -> bytes:
    return b"".join(text.encode("ascii") + bytes([sep]) for text in texts)


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(grammar.stories(n_stories=2500))


@pytest.fixture(scope="module")
def val() -> list[str]:
    return list(grammar.stories(n_stories=600, split="val"))


def test_files_are_the_same_everywhere(train):
    assert hashlib.sha256(pack(train[:50])).hexdigest() == GOLDEN
    assert train[7] == grammar.story(7)  # addressed, not streamed
    assert grammar.story(7, seed=1) != train[7]
    assert re.fullmatch("[0-9a-f]{64}", grammar.GRAMMAR_HASH)


def test_reader_bits_are_writer_bits(train, val):
    for split, texts in (("train", train), ("val", val)):
        for index, text in enumerate(texts[:300]):
            writer = grammar._write(index, 0, split)
            assert "".join(writer.parts) == text
            assert grammar.story_bits(text) == pytest.approx(writer.bits, abs=1e-9)


@pytest.mark.parametrize("sep", [0, 10, 255])
def test_bytes_add_up_to_the_story(train, sep):
    bits = grammar.surprisal(pack(train[:100], sep), sep)
    ends = np.cumsum([len(text) + 1 for text in train[:100]])
    assert bits.dtype == np.float64 and len(bits) == ends[-1] and bits.min() >= 0
    assert not bits[ends - 1].any()  # the separator is certain
    for text, piece in zip(train, np.split(bits, ends[:-1]), strict=False):
        assert math.fsum(piece) == pytest.approx(grammar.story_bits(text), abs=1e-9)
    assert math.fsum(bits) == pytest.approx(sum(map(grammar.story_bits, train[:100])), abs=1e-6)


def test_floor_and_splits(train, val):
    floors = [grammar.surprisal(pack(texts[:600])).mean() for texts in (train, val)]
    assert all(0.48 < floor < 0.52 for floor in floors), floors
    assert len(set(train)) == len(train)
    assert not set(train) & set(val)
    lengths = [len(text) for text in train]
    assert min(lengths) > 600 and max(lengths) < 2400 and 1000 < np.mean(lengths) < 1500


def test_law_along_a_story(train):
    """At every byte the probabilities sum to 1 and give the surprisal of what follows."""
    data = pack([train[0], min(train[:200], key=len)])
    start = len(train[0]) - 30
    bits = grammar.surprisal(data)
    for at in range(start, len(data)):
        p_V = grammar.next_byte_probs(data[:at])
        assert p_V.shape == (256,) and p_V.min() >= 0
        assert p_V.sum() == pytest.approx(1, abs=1e-12)
        assert -math.log2(p_V[data[at]]) == pytest.approx(bits[at], abs=1e-9)
    assert (
        grammar.next_byte_probs(train[0].encode())[0] == 1
    )  # a finished story: only the separator
    np.testing.assert_array_equal(grammar.next_byte_probs(data), grammar.next_byte_probs(b""))


class Walk:
    """Driver that takes the given options, then always the first; records how many there were."""

    def __init__(self, path):
        self.path, self.taken, self.text, self.p = path, [], "", 1.0

    def lit(self, text):
        self.text += text

    def pick(self, choice):
        i = self.path[len(self.taken)] if len(self.taken) < len(self.path) else 0
        self.taken.append((i, len(choice.options)))
        self.text += choice.options[i]
        self.p *= choice.weights[i] / choice.total
        return i


def tiny_plot(s):
    s.any("The [ox|owl|oxen] ", "Them ", "a ", weights=(5, 2, 1))
    s.present = bool(s.pick(("was", "is")))
    if s.any(" [red|reddish]!", ". [It|I] <was|is>.", "? {small>n} {n}") == 2:
        s.say(", [one|on {n}|two];")


def test_law_against_enumeration(monkeypatch):
    monkeypatch.setattr(tales, "tell", tiny_plot)
    laws, path = {}, []
    while path is not None:
        walk = Walk(path)
        tiny_plot(grammar.Teller(walk))
        assert walk.text not in laws
        laws[walk.text] = walk.p
        taken = walk.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        path = [i for i, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None
    assert len(laws) == 5 * 2 * (2 + 2 + 6 * 3)
    assert sum(laws.values()) == pytest.approx(1)
    for text, p in laws.items():
        assert grammar.story_bits(text) == pytest.approx(-math.log2(p), abs=1e-12)
    prefixes = {text[:k] for text in laws for k in range(len(text) + 1)}
    for prefix in prefixes:
        follow = np.zeros(256)
        for text, p in laws.items():
            if text.startswith(prefix):
                follow[ord(text[len(prefix)]) if len(text) > len(prefix) else 0] += p
        np.testing.assert_allclose(
            grammar.next_byte_probs(prefix.encode()), follow / follow.sum(), atol=1e-12
        )
        total = -math.log2(follow.sum())
        assert grammar.surprisal(prefix.encode()).sum() == pytest.approx(total, abs=1e-9)


def test_a_cut_stream_is_scored_exactly(train):
    data = pack(train[:3])
    bits = grammar.surprisal(data)
    for end in [0, 1, 17, len(train[0]), len(train[0]) + 1, *range(len(data) - 400, len(data), 7)]:
        np.testing.assert_array_equal(grammar.surprisal(data[:end]), bits[:end])


def test_cut_or_joined_stories_are_no_story(train):
    with pytest.raises(BitbyteError, match=r"cut off after 100 bytes"):
        grammar.story_bits(train[0][:100])
    with pytest.raises(BitbyteError, match=r"cut off after 0 bytes"):
        grammar.story_bits("")
    with pytest.raises(BitbyteError, match=rf"ends at byte {len(train[0])} of"):
        grammar.story_bits(train[0] + " The end.")
    with pytest.raises(BitbyteError, match=rf"byte {len(train[0])} is 'x'"):
        grammar.surprisal(train[0].encode() + b"x")


def test_an_edit_is_refused_with_its_position(train):
    data = pack(train[:2])
    for at in range(0, len(data), 53):
        broken = data[:at] + b"\xff" + data[at + 1 :]
        with pytest.raises(BitbyteError, match=rf"byte {at} is '\xff'"):
            grammar.surprisal(broken)
    with pytest.raises(BitbyteError, match="byte 0 is 'x'"):
        grammar.story_bits("x" + train[0])
    hero = re.search(r"named (\w+)\.", train[0])
    other = train[0][: hero.end()] + train[0][hero.end() :].replace(hero[1], "Quux")
    first = other.index("Quux")
    with pytest.raises(BitbyteError, match=r"byte \d+ is") as caught:
        grammar.story_bits(other)
    assert first <= int(re.search(r"byte (\d+)", str(caught.value))[1]) < first + 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [("red", "reddish"), ("a ", "b ", "a "), ("", "x"), ("kite.", "kite. It")]
)
def test_options_must_be_prefix_free(options):
    with pytest.raises(ValueError, match="not prefix-free") as caught:
        grammar.Choice(options)
    assert not isinstance(caught.value, BitbyteError)  # the grammar's fault, not the user's


def test_templates_are_checked():
    teller = grammar.Teller(grammar.Writer(0, "train", 0))
    with pytest.raises(ValueError, match="not prefix-free"):
        teller.any("The {toy}.", "The big {toy}.")
    with pytest.raises(ValueError, match="the name of a list"):
        teller.say("{toy>animal}.")
    with pytest.raises(ValueError, match="a choice inside"):
        teller.say("[{toy}|nothing].")
    with pytest.raises(ValueError, match="positive weights"):
        grammar.Choice(("a", "b"), (1, 0))


def test_draws_are_exact():
    """A uniform draw from 64 bits: the uneven rest is redrawn, and weights are respected."""
    writer = grammar.Writer(0, "train", 0)
    writer.numbers = [8, 2**64 - 1, 5]  # taken from the end; 2**64 % 10 == 6
    assert writer._below(10) == 5 and writer._below(10) == 8 and not writer.numbers
    choice = grammar.Choice(("a", "b", "c"), (1, 2, 5))
    counts = np.bincount([writer.pick(choice) for _ in range(8000)])
    assert abs(counts - [1000, 2000, 5000]).max() < 200  # five standard deviations


def test_words_are_plenty_and_distinct():
    assert all(len(set(words)) == len(words) for words in WORDS.values())
    for name in WORDS:
        for end, form in itertools.product(".,!", ("", "a")):
            if name not in ("secret", "syllable"):
                grammar._words(name, form, end)  # prefix-free, or ValueError
    kinds = ["girl", "boy", "petname", "toy", "tool", "wear", "food", "animal"]
    for one, other in itertools.combinations(kinds[:6], 2):
        assert not set(WORDS[one]) & set(WORDS[other]), (one, other)
    assert len(WORDS["girl"] + WORDS["boy"]) >= 400
    assert len({word for name in kinds[3:] for word in WORDS[name]}) >= 300
    assert min(len(WORDS["look"]), len(WORDS["mood"])) >= 80
    assert sum(len(text.split()) for text in VERBS.values()) >= 120
    assert len(WORDS["town"]) >= 200 and len(WORDS["place"]) >= 80
    assert all(re.fullmatch(r"[A-Za-z0-9 .-]+", w) for words in WORDS.values() for w in words)
    heads = {head.split()[0] for head in (*tales.MIDDLE, *tales.SCENES)}
    assert not heads & {*WORDS["girl"], *WORDS["boy"], *WORDS["petname"]}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("apple", "an apple"),
        ("kite", "a kite"),
        ("unicorn", "a unicorn"),
        ("useful", "a useful"),
        ("ukulele", "a ukulele"),
        ("unusual", "an unusual"),
        ("umbrella", "an umbrella"),
        ("honest", "an honest"),
        ("yo-yo", "a yo-yo"),
    ],
)
def test_articles(word, expected):
    assert article(word) == expected


def test_verbs_have_their_forms():
    def forms(verb):
        name = next(n for n in ("move", "say", "act", "hold") if verb in WORDS[f"base.{n}"])
        i = WORDS[f"base.{name}"].index(verb)
        return WORDS[f"past.{name}"][i], WORDS[f"third.{name}"][i]

    assert forms("go") == ("went", "goes")
    assert forms("hurry") == ("hurried", "hurries")
    assert forms("play") == ("played", "plays")
    assert forms("dash") == ("dashed", "dashes")
    assert forms("dance") == ("danced", "dances")
    assert forms("tiptoe") == ("tiptoed", "tiptoes")
    assert forms("grin") == ("grinned", "grins")


def test_english(train):
    vowel = re.compile(r"\b[Aa] (?!uni|use|uku)[aeiou]|\b[Aa] honest|\b[Aa]n (?!honest)[^aeiou]")
    for text in train:
        assert text.isascii() and text.isprintable() is False  # line ends, nothing else
        assert set(re.findall(r"[^\w ,.!?:\"'()-]", text)) <= {"\n"}, text
        assert not re.search(r"  |\n\n\n| \n|\n |^\s|\s$|_", text), text
        assert not vowel.search(text), vowel.search(text)
        assert not re.search(r"(?<!Mr)(?<!Mrs)[.!?] [a-z]|,[.,!?]|\.\.", text), text
        assert text.count('"') % 2 == 0
        assert all(re.search(r"[.!?]\"?$", paragraph) for paragraph in text.split("\n\n"))
        assert all(re.match(r"[A-Z\"]", paragraph) for paragraph in text.split("\n\n"))


def test_counting_is_right(train):
    rows = [
        re.search(r'had (\w+) .* had (\w+)\. .*"One, ([a-z, ]+)\." "We have (\w+)', t)
        for t in train
    ]
    number = {word: n for n, word in enumerate(WORDS["number"], 2)}
    rows = [row.groups() for row in rows if row]
    assert len(rows) > 100
    for one, other, row, total in rows:
        assert number[one] + number[other] == number[total] == len(row.split(", ")) + 1


def test_what_is_owned_is_told_again(train):
    for text in train[:200]:
        town = re.search(r"(?:town|village) of (\w+),", text)[1]
        assert f"back to {town}" in text.split("\n\n")[-1]


def test_limits(tmp_path):
    texts = list(grammar.stories(n_bytes=5000))
    assert sum(len(t) + 1 for t in texts) >= 5000 > sum(len(t) + 1 for t in texts[:-1])
    assert list(grammar.stories(n_stories=0)) == []
    assert len(list(itertools.islice(grammar.stories(), 3))) == 3
    with pytest.raises(BitbyteError, match="choose one of train, val"):
        grammar.story(0, split="test")
    with pytest.raises(BitbyteError, match="n_bytes or n_stories"):
        grammar.write_json(tmp_path / "x.json")
    for n_bytes in (0, -1):
        with pytest.raises(BitbyteError, match=f"{n_bytes} bytes of stories; ask for 1 or more"):
            grammar.write_json(tmp_path / "x.json", n_bytes=n_bytes)
    with pytest.raises(BitbyteError, match="is a folder; name a file"):
        grammar.write_json(tmp_path, n_stories=1)
    assert not list(tmp_path.iterdir())
    assert grammar.write_json(tmp_path / "new" / "deep" / "x.json", n_stories=1) == 1


def test_json_is_tinystories_shape(tmp_path, train):
    path = tmp_path / "data00.json"
    assert grammar.write_json(path, n_stories=20) == 20
    rows = json.loads(path.read_text())
    assert [row["story"] for row in rows] == train[:20]
    assert {row["source"] for row in rows} == {grammar.SOURCE}
    assert grammar.write_json(path, n_stories=0, seed=3, split="val") == 0
    assert json.loads(path.read_text()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["data00.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data00.json"
    grammar.write_json(path, n_stories=2)
    before = path.read_bytes()
    with pytest.raises(BitbyteError):
        grammar.write_json(path, n_stories=2, split="nothing")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        grammar.write_json(path, n_stories=3)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["data00.json"]


def test_oracle(train):
    law = grammar.StoriesModel(sep_byte=10)
    data = pack(train[:5], 10)
    assert law.exact and law.name == "stories-law"
    np.testing.assert_array_equal(law.bits(data), grammar.surprisal(data, 10))
    np.testing.assert_array_equal(law.bits(np.frombuffer(data, np.uint8)), law.bits(data))
