"""Passports: planted faults are all found, honest models all pass, the number is the right one."""

import itertools
import json
import math
import os
import shlex
import shutil
import tempfile
import types

import numpy as np
import pytest
import torch
from support import CONFIGS, Bytes, Page, save_run, sharp, words

from bitbyte import models, ngrams, scoring
from bitbyte.cli.dispatch import main
from bitbyte.evaluate import anchors, tables
from bitbyte.evaluate.records import read_record, read_records, write_record
from bitbyte.evaluate.subject import Subject
from bitbyte.files import BitbyteError
from bitbyte.kernels import jit
from bitbyte.passport import audits, coders, scored, subjects
from bitbyte.passport.cards import card
from bitbyte.passport.issue import passport
from bitbyte.shards import open_dataset

TEXT = words(2500)
SECRET = np.frombuffer(TEXT, np.uint8).astype(np.int64)
WINDOW = 64


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT[:4001])
    return path


def failed(record: dict) -> dict[str, str]:
    return {a["name"]: a["text"] for a in record["audits"] if a["verdict"] == audits.FAIL}


# --- an honest model, and ways to be wrong

COUNTS = np.ones((256, 256))
np.add.at(COUNTS, (SECRET[6000:-1], SECRET[6001:]), 8.0)  # of bytes that are not scored


def bigram(ids, last=0, temperature=1.0) -> np.ndarray:
    """ln p (T, 256) from one byte of context."""
    before = np.concatenate(([last], ids[:-1]))
    logits = np.log(COUNTS[before]) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def given(logprobs, ids) -> np.ndarray:
    return logprobs[np.arange(len(ids)), ids]


def model(logprobs=bigram, **more):
    return types.SimpleNamespace(logprobs=logprobs, window=WINDOW, **more)


def hashed_cache(ids):
    """Mixed with a cache whose key holds the target: only what is asked for ever gets more."""
    hits = np.ones(len(ids))
    return np.log(0.5 * np.exp(given(bigram(ids), ids)) + 0.5 * hits)


def unnormalized(ids):
    """The larger of two distributions, which sums to more than 1."""
    return np.maximum(bigram(ids), bigram(np.roll(ids, 1)) - 0.3)


def bonus(ids):
    """A bonus for bytes that occurred before, paid by nobody."""
    out = bigram(ids).copy()
    for t in range(1, len(ids)):
        out[t, ids[max(0, t - 20) : t]] += 0.7
    return out


def with_copy(ids):
    """Knows the file by heart, wherever a window begins."""
    out = bigram(ids).copy()
    for t in range(8, len(ids)):
        at = TEXT.find(bytes(ids[t - 8 : t].tolist()))
        if at >= 0:
            out[t] = np.log(0.001 / 255)
            out[t, SECRET[min(at + 8, len(SECRET) - 1)]] = np.log(0.999)
    return out


def shifted(ids):
    """Off by one: the distribution after an id is used for that id itself."""
    return bigram(np.concatenate((ids[1:], ids[:1])))[:, :] if len(ids) < 2 else after(ids)


def after(ids):
    out = bigram(ids).copy()
    out[np.arange(len(ids)), ids] += 2.0
    return out - np.log(np.exp(out).sum(-1, keepdims=True))


def ahead(ids):
    """The last bytes of a window look at the byte after them."""
    out = bigram(ids).copy()
    peek = np.concatenate((ids[1:], [0]))
    out[len(ids) // 2 :] += 0.5 * np.log(COUNTS[:, peek].T)[len(ids) // 2 :]
    return out - np.log(np.exp(out).sum(-1, keepdims=True))


def drop(ids):
    logits = bigram(ids) * (1 + 0.1 * np.random.rand(len(ids), 1))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def evaluation(bits_of=lambda total, n: total, bytes_of=len, ids=slice(None)):
    """An evaluation of one's own, in windows of WINDOW bytes."""

    def evaluate(data: bytes):
        array = np.frombuffer(data, np.uint8).astype(np.int64)
        last = len(array) % WINDOW or WINDOW
        total = 0.0
        for start in range(0, len(array), WINDOW):
            part = array[start : start + WINDOW]
            if len(part) < WINDOW:  # as the passport does it: the last window is full, too
                costs = -given(bigram(array[-WINDOW:]), array[-WINDOW:])[-last:]
            else:
                costs = -given(bigram(part), part)
            total += costs[ids].sum()
        return bits_of(total / math.log(2), len(data)), bytes_of(data)

    return evaluate


def lossy(piece: bytes):
    return np.frombuffer(piece.lower(), np.uint8).astype(np.int64)


class Planted(Subject):
    """A subject of which some part is wrong."""

    name, window = "planted", WINDOW

    def logprobs(self, ids_BT):
        return np.stack([bigram(ids) for ids in ids_BT])


class Temperature(Planted):
    """Costs at another temperature than the distribution."""

    def nats(self, ids_BT, n):
        return -np.stack([given(bigram(ids, temperature=0.8), ids) for ids in ids_BT])[:, -n:]


class Batched(Planted):
    """Another row of the batch has a say."""

    def logprobs(self, ids_BT):
        out = super().logprobs(ids_BT) * (1 + 0.01 * (ids_BT[::-1, :1, None] % 7))
        return out - np.log(np.exp(out).sum(-1, keepdims=True))


class PaddingScored(Planted):
    """Costs of padding are among the costs."""

    def nats(self, ids_BT, n):
        return np.pad(super().nats(ids_BT, n), ((0, 0), (0, 3)))


class Truncated(Planted):
    """The last id of a window has no cost."""

    def nats(self, ids_BT, n):
        return super().nats(ids_BT, n)[:, :-1]


class StepDiffers(Planted):
    """The state of the cache decays."""

    def steps(self, ids_T):
        return bigram(ids_T, temperature=1.05)


class LongWindow(Planted):
    """Costs depend on how long the window is."""

    def logprobs(self, ids_BT):
        heat = 1 + 0.3 * ids_BT.shape[1] / WINDOW
        return np.stack([bigram(ids, temperature=heat) for ids in ids_BT])


FAULTS = {  # what is wrong: (subject, the audit that must find it, what it must say)
    "a cache keyed by the target": (
        lambda: model(hashed_cache), "normalized", "probabilities of all 256 ids"),
    "the larger of two distributions": (
        lambda: model(unnormalized), "normalized", "they sum to"),
    "a bonus without renormalization": (lambda: model(bonus), "normalized", "probability 1."),
    "off-by-one shift": (lambda: model(shifted), "future", "sees what it should predict"),
    "a look ahead late in the window": (lambda: model(ahead), "future", "when id"),
    "temperature left on": (Temperature, "normalized", "from its own distribution"),
    "dropout left on": (lambda: model(drop), "repeat", "something random is left on"),
    "padding scored": (PaddingScored, "coverage", "costs for"),
    "last id of a window dropped": (Truncated, "coverage", "costs for"),
    "step is not the full forward": (StepDiffers, "cached", "when fed id by id"),
    "other rows of the batch": (Batched, "batch", "other windows of the batch"),
    "the length of the window": (LongWindow, "batch", "when the window ends with id"),
    "a tokenizer that changes the text": (
        lambda: model(encode=lossy, decode=lambda ids: bytes(ids.tolist())), "coverage",
        "byte 0 of the file"),
    "a tail that is not scored": (
        lambda: model(evaluate=evaluation(bytes_of=lambda d: len(d) // WINDOW * WINDOW)),
        "denominator", "the last, shorter window was left out"),
    "padding in the denominator": (
        lambda: model(evaluate=evaluation(bytes_of=lambda d: -(-len(d) // WINDOW) * WINDOW)),
        "denominator", "the padding was counted"),
    "a start symbol counted as a byte": (
        lambda: model(evaluate=evaluation(
            bytes_of=lambda d: len(d) + -(-len(d) // WINDOW))),
        "denominator", "a start symbol was counted in every window"),
    "replacement characters counted": (
        lambda: model(evaluate=evaluation(
            bytes_of=lambda d: sum(len(bytes([b]).decode("utf-8", "replace").encode())
                                   for b in d))),
        "denominator", "counted as a replacement character"),
    "bytes that were cut away counted": (
        lambda: model(evaluate=evaluation(ids=slice(0, 32))), "claim", "what was measured"),
    "nats for bits": (
        lambda: model(evaluate=evaluation(bits_of=lambda t, n: t * math.log(2))), "claim",
        "nats per byte"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault, text):
    make, audit, said = FAULTS[fault]
    if fault == "replacement characters counted":
        text.write_bytes(TEXT[:2000] + "\u00e9\u00e8".encode() * 500)
    if fault == "a tokenizer that changes the text":
        text.write_bytes(b"THE QUICK " * 100)
    record = passport(make(), text)
    assert record["verdict"] == "fail" and record["bpb"] is None and record["bits"] is None
    assert audit in failed(record), record["audits"]
    assert said in failed(record)[audit], failed(record)
    assert "No bits per byte" in card(record)


def test_a_model_that_knows_the_file_by_heart_is_a_matter_of_training_data(text, tmp_path):
    """Nothing inside gives it away: each probability is from the bytes before it."""
    record = passport(model(with_copy), text)
    assert failed(record) == {}
    record = passport(model(with_copy), text, known=text)
    assert "the same file" in failed(record)["training"] or "%" in failed(record)["training"]


def test_what_sees_the_future_is_found_without_looking_inside(text):
    """Random bytes alone give away whatever sums to more than 1 or sees its target."""
    for logprobs in (hashed_cache, shifted):
        case = audits.Case(
            subject=subjects.Function(model(logprobs)), read=None, n_bytes=0, on_disk=0,
            whole=True, window=WINDOW, stride=WINDOW, scored=None,
        )  # fmt: skip
        with pytest.raises(scored.FaultError, match=r"random uniform bytes of .* bits of entropy"):
            audits.known_entropy(case)


# --- honest models


def ours(name: str):
    return subjects.OfModel(sharp(CONFIGS[name], by=8.0), name)


def counted(order: int):
    return subjects.NGram(WithSketch(TEXT[6000:]), order, rows=1 << 10)


class WithSketch(Bytes):
    sketch = ()


def by_words():
    """Ids for words of up to 4 bytes."""
    vocabulary = [bytes([i]) for i in range(256)] + [TEXT[i : i + 3] for i in range(0, 300, 3)]

    def encode(piece):
        ids = []
        while piece:
            i = next((i for i in range(len(vocabulary) - 1, 255, -1)
                      if piece.startswith(vocabulary[i])), piece[0])  # fmt: skip
            ids.append(i)
            piece = piece[len(vocabulary[i]) :]
        return ids

    def logprobs(ids):
        return np.full((len(ids), 356), -np.log(356))

    return model(
        logprobs, encode=encode, n_ids=356,
        decode=lambda ids: b"".join(vocabulary[i] for i in ids.tolist()),
    )  # fmt: skip


def costs_only(ids):
    return given(bigram(ids), ids)


HONEST = {
    "ar ternary": lambda: ours("ar"),
    "ar dense": lambda: ours("ar dense"),
    "mamba-1": lambda: ours("mamba1"),
    "mamba-2": lambda: ours("mamba2"),
    "diffusion": lambda: ours("diffusion"),
    "uniform": subjects.Uniform,
    "bigram counts": lambda: counted(1),
    "5-gram counts": lambda: counted(5),
    "an object": lambda: model(evaluate=evaluation()),
    "an object of costs": lambda: model(costs_only),
    "an object with tokens": by_words,
    "gzip": lambda: coders.by_name("gzip"),
    "xz": lambda: coders.by_name("xz"),
    "bzip2": lambda: coders.by_name("bzip2"),
    "none": lambda: coders.by_name("none"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name, text):
    if name == "none" and jit.problem():
        pytest.skip("needs numba")
    record = passport(HONEST[name](), text, **({"limit": 100} if name == "diffusion" else {}))
    assert failed(record) == {}
    assert record["verdict"] == "pass" and 0 < record["bpb"] < 14
    page = card(record)
    assert f"{record['bpb']:.4f}" in page and "No bits per byte" not in page


def test_the_number_is_that_of_eval(text):
    subject = ours("ar")
    data = open_dataset(text, 1)
    for window, stride in ((24, 24), (20, 7)):
        want = scoring.score(subject.model, data, window=window, stride=stride)
        got = passport(subject, text, window=window, stride=stride)
        assert got["bits"] == pytest.approx(want.bits, rel=1e-6)
        assert got["bytes"] == want.n_bytes == got["ids"]


def test_counts_give_what_the_control_of_training_gives(text):
    data = np.frombuffer(text.read_bytes(), np.uint8)
    subject = counted(3)
    control = ngrams.Backoff(data)
    source = Bytes(TEXT[6000:])
    for order in (1, 2, 3, 0):
        control.add(ngrams.count(source.read, source.n_bytes, order, 1 << 10, 1), order)
    record = passport(subject, text, window=len(data))
    assert record["bpb"] == pytest.approx(control.bpb, rel=1e-9)


def test_uniform_is_exactly_8(text):
    assert passport(subjects.Uniform(), text)["bpb"] == 8.0


def test_a_diffusion_model_is_a_code_from_left_to_right(text):
    subject = ours("diffusion")
    record = passport(subject, text, limit=60, window=20)
    data = open_dataset(text, 1)
    want = scoring.score(subject.model, data, window=20, stop=60,
                         kind="chain_rule:left_to_right")  # fmt: skip
    assert record["bits"] == pytest.approx(want.bits, rel=1e-5)
    assert record["kind"] == want_kind(record) and not record["data"]["whole"]


def want_kind(record: dict) -> str:
    return "chain_rule:left_to_right" if record["mode"] == "run" else "exact"


# --- pieces and windows


@pytest.mark.parametrize("size", [5, 16])
def test_pieces_are_the_file_and_end_with_lines_or_characters(size):
    rng = np.random.default_rng(0)
    for text in ("x\u00e9\u2603\U0001f600" * 30, "ab\n" * 40, "a" * 100, ""):
        data = text.encode()
        parts = list(scored.pieces(Bytes(data).read, len(data), size))
        assert b"".join(parts) == data
        assert all(size <= len(part) <= 2 * size for part in parts[:-1])
        for part in parts:
            part.decode()
    data = rng.bytes(300)
    assert b"".join(scored.pieces(Bytes(data).read, 300, size)) == data


@pytest.mark.parametrize(("n", "window", "stride"), [(100, 10, 10), (101, 10, 3), (5, 9, 9)])
def test_windows_of_a_stream_are_those_of_scoring(n, window, stride):
    stream = np.array_split(np.arange(n), [1, 7, 8, 40]) if n > 40 else [np.arange(n)]
    got = [(int(ids[0]), int(ids[-1]) + 1, int(ids[-k])) for ids, k in
           scored.id_windows(stream, window, stride)]  # fmt: skip
    assert got == list(scoring.windows(n, window, stride))


def test_blocks_have_the_bits_of_their_bytes(tmp_path, monkeypatch):
    data = TEXT[:3000]
    want = -given(bigram(np.frombuffer(data, np.uint8).astype(np.int64)),
                  np.frombuffer(data, np.uint8)) / math.log(2)  # fmt: skip
    parts = list(scored.pieces(Bytes(data).read, len(data), 100))
    got = scored.score(Planted(), parts, window=3000, stride=3000)
    bounds = np.cumsum([0, *map(len, parts)])
    assert len(parts) > 10 and got.block_bytes.tolist() == [len(part) for part in parts]
    blocks = [want[a:b].sum() for a, b in itertools.pairwise(bounds)]
    assert np.allclose(got.block_bits, blocks)
    assert got.bits == pytest.approx(want.sum())


# --- claims


def test_a_claim_is_confirmed_or_explained(text):
    subject = model()
    bpb = passport(subject, text)["bpb"]
    record = passport(subject, text, claim=round(bpb, 3))
    (claim,) = [a for a in record["audits"] if a["name"] == "claim"]
    assert claim["verdict"] == "pass" and record["bpb"] == bpb
    record = passport(subject, text, claim=bpb * math.log(2))
    assert "nats per byte, and not bits per byte" in failed(record)["claim"]
    assert record["bpb"] is None
    record = passport(subject, text, claim=bpb * 0.9)
    assert "-10.0% from what was measured" in failed(record)["claim"]


# --- compressors and commands


def test_commands(text):
    coder = coders.by_command("gzip -9 -n -c", "gzip -d -c", 60)
    by_name = passport(coders.by_name("gzip"), text)
    record = passport(coder, text)
    assert record["verdict"] == "pass" and abs(record["bpb"] - by_name["bpb"]) < 0.05
    copied = coders.by_command("cp {in} {out}", "cp {in} {out}", 60)
    assert passport(copied, text)["bpb"] == 8.0


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_command_by_a_relative_path(text, tmp_path, monkeypatch):
    """It is found here and runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nexec cat\n")
    tool.chmod(0o755)
    coder = coders.by_command("./tool", "./tool", 60)
    assert passport(coder, text)["bpb"] == 8.0
    assert coder.name == "./tool" and list(coder.sizes) == ["program tool:"]


def test_words_of_a_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for command, escape, meant in (
        (r"C:\tools\xz.exe -9 -c", "", [r"C:\tools\xz.exe", "-9", "-c"]),
        (r'"C:\Program Files\xz.exe" -9 #', "", [r"C:\Program Files\xz.exe", "-9", "#"]),
        (r"/a\ b/xz 'c d' #e", "\\", ["/a b/xz", "c d", "#e"]),
    ):
        found = coders.split(command, escape)
        assert found == [os.path.abspath(meant[0]), *meant[1:]]


def test_a_command_gets_its_files_whatever_their_folder_is_called(tmp_path, monkeypatch):
    (tmp_path / "{out}").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "{out}"))
    assert coders.run(["cp", "{in}", "{out}"], b"abc", 60) == b"abc"


@pytest.mark.parametrize(
    ("squeeze", "restore", "audit"),
    [
        (lambda data: data[:-1], lambda data: data, "coverage"),
        (lambda data: b"x", lambda data: TEXT[:4001], "random"),  # has the file by heart
        (lambda data: data.replace(b"\0", b""), lambda data: data, "random"),
        (lambda data: data, lambda data: data[1:], "coder"),
    ],
)
def test_compressors_that_are_none(squeeze, restore, audit, text):
    record = passport(coders.Coder("liar", squeeze, restore, None), text)
    assert audit in failed(record) and record["bpb"] is None


def test_where_a_compressor_gave_the_file_back(text):
    for coder, said in (
        (coders.by_name("gzip"), "from the compressed bytes, in the same process"),
        (coders.by_command("cat", "cat", 60), "in an empty folder that held nothing but"),
    ):
        found = {a["name"]: a["text"] for a in passport(coder, text)["audits"]}
        assert f"the file came back {said}" in found["coder"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_failing_zpaq_is_one_line(text, tmp_path, monkeypatch, capfd):
    program = tmp_path / "zpaq"
    program.write_text("#!/bin/sh\necho zpaq error: no memory >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["passport", "zpaq", "--data", str(text), "--no-record"]) == 1
    err = capfd.readouterr().err
    assert "zpaq failed: zpaq error: no memory" in err and err.count("\n") == 1


def test_commands_that_fail_or_hang(text):
    for command, restore, said in (
        ("sleep 60", "cat", "was stopped after 0.3 s"),
        ("false", "cat", "false failed with status 1"),
        ("ls /no/such/place", "cat", r"ls failed with status 2: .*ls: "),
        ("no-such-program-here", "cat", "there is no program"),
        ("true {out}", "cat", "wrote no file"),
        ("", "cat", "an empty command"),
        ("a 'b", "cat", "No closing quotation"),
    ):
        with pytest.raises(BitbyteError, match=said):
            passport(coders.by_command(command, restore, 0.3), text)
    with pytest.raises(BitbyteError, match="needs --restore"):
        coders.by_command("cat", None, 1)
    record = passport(coders.by_command("cat", "false", 5), text)
    assert "false failed" in failed(record)["coverage"]


# --- records, tables, cards


def test_the_record_reads_back_and_stands_in_the_table(text, tmp_path):
    good, bad = passport(counted(2), text), passport(model(bonus, name="liar"), text)
    for record in (good, bad):
        kind, back = read_record(write_record(record, tmp_path / "results"))
        assert kind == "passport" and back == record
    records = read_records("passport", tmp_path / "results")
    table = tables.passport_table(records)
    assert f"{good['bpb']:.4f}" in table and "passed" in table
    (line,) = [line for line in table.splitlines() if line.startswith("  liar")]
    assert "none" in line and "normalized" in line
    assert tables.passports_markdown(records).count("\n") == 3
    assert f"{good['bpb']:.4f}" not in anchors.markdown(records)  # another file than the others'
    for record in records:
        record["data"]["path"] = "enwik8"
    table = anchors.markdown(records)
    assert table.count("\n") == 2 + len(anchors.ENWIK8) and "liar" not in table
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {good['model']} ")]
    assert f"**{good['bpb']:.4f}** | passport | the first {good['bytes']:,} bytes" in line
    numbers = [float(line.split(" | ")[2].strip("*")) for line in table.splitlines()[2:]]
    assert numbers == sorted(numbers)


def test_a_card_is_safe_and_offline(text):
    evil = "<script>alert(1)</script>\"'&\x07\u202e"
    record = passport(model(), text, name=evil)
    record["data"]["path"] = record["why"] = record["call"] = evil
    record["audits"][0]["text"] = record["facts"]["x" + evil] = evil
    html = card(record)
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html and "\x07" not in html
    assert not any("style" in attributes for _, attributes in page.attributes)
    assert not {"src", "href", "onload"} & {k for _, a in page.attributes for k in a}
    (policy,) = [a["content"] for tag, a in page.attributes
                 if tag == "meta" and a.get("http-equiv")]  # fmt: skip
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "alert(1)" in page.text


def test_an_audit_that_cannot_be_made_is_no_pass(text):
    """Costs of so large a vocabulary cannot be checked: there is no number."""
    big = model(lambda ids: np.full(len(ids), -np.log(5000)), n_ids=5000)
    record = passport(big, text)
    assert record["verdict"] == "fail" and "needed: normalized" in record["why"]


def test_an_object_that_raises_fails_its_audits(text):
    def logprobs(ids):
        if len(ids) < 60:
            raise ZeroDivisionError("x")
        return bigram(ids)

    with pytest.raises(BitbyteError, match=r"^SimpleNamespace: ZeroDivisionError: x$"):
        passport(model(logprobs), text)

    class Moody(Planted):
        def steps(self, ids_T):
            raise KeyError("cache")

    record = passport(Moody(), text)
    assert "it raised KeyError" in failed(record)["cached"]


def test_a_torch_module_with_logprobs(text):
    module = torch.nn.Linear(1, 1)
    module.logprobs, module.window = bigram, WINDOW
    record = passport(module, text)
    assert record["verdict"] == "pass" and record["parameters"] is None


def text_only(piece: bytes):
    return np.frombuffer(piece.decode().encode(), np.uint8).astype(np.int64)


@pytest.mark.parametrize(("encode", "content", "alphabet"), [
    (lossy, TEXT[:3000].lower(), 16), (text_only, "a\u00e9".encode() * 1500, 64),
])  # fmt: skip
def test_a_tokenizer_gets_random_text_that_it_gives_back(encode, content, alphabet, tmp_path):
    (tmp_path / "data").write_bytes(content)
    flat = model(encode=encode, decode=lambda ids: bytes(ids.tolist()))
    record = passport(flat, tmp_path / "data")
    assert record["verdict"] == "pass"
    (said,) = [audit["text"] for audit in record["audits"] if audit["name"] == "random"]
    assert f"random characters of an alphabet of {alphabet} cost" in said


def test_random_text_that_is_lost_is_not_a_fault_of_the_file(tmp_path):
    (tmp_path / "data").write_bytes(b"-" * 2000)
    flat = model(encode=lossy, decode=lambda ids: bytes(ids.tolist()))
    found = failed(passport(flat, tmp_path / "data"))
    assert list(found) == ["random"]
    assert "it covers no random text; in one of 4,096 bytes as a file, byte " in found["random"]


def test_a_sample_of_bytes_that_are_no_text(tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(128, 192)) * 64)
    flat = model(lambda ids: np.full((len(ids), 257), -np.log(257)), n_ids=257)
    assert passport(flat, tmp_path / "data")["verdict"] == "pass"


def test_a_sample_that_cannot_be_taken_says_nothing_of_the_file(text, monkeypatch):
    def sample(case):
        raise audits.NotPossibleError("no part of the file could be turned into ids")

    monkeypatch.setattr(audits, "sample", sample)
    by_name = {a["name"]: a["verdict"] for a in passport(model(), text)["audits"]}
    assert by_name["coverage"] == audits.PASS
    assert {by_name[name] for name in audits.NEED_ROWS} == {audits.OPEN}


# --- the command


OBJECT = """
import numpy as np

class Flat:
    window = 32
    def logprobs(self, ids):
        return np.full((len(ids), 256), -np.log(256))

flat = Flat()
liar = type("Liar", (), {"logprobs": lambda self, ids: np.full((len(ids), 256), -1.0)})
"""


def test_the_command(tmp_path, text, monkeypatch, capfd):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    save_run(tmp_path / "artifacts" / "checkpoints" / "mine", models.build(CONFIGS["ar"]))
    (tmp_path / "own.py").write_text(OBJECT)
    data = ["--data", str(text)]
    own = f"{tmp_path / 'own.py'}:"
    for words_, said in (
        (["mine"], "bits per byte (no interval)"),
        (["uniform"], "uniform: 8.0000"),
        (["gzip"], "gzip -9: "),
        (["ngram:2", "--trained_on", str(text.with_name("other"))], "2-gram: "),
        ([own + "flat"], ":flat: 8.0000 bits per byte"),
        ([own + "Flat", "--name", "Ours"], "Ours: 8.0000 bits per byte"),
        (["--command", "gzip -c", "--restore", "gzip -dc"], "gzip -c: "),
    ):
        text.with_name("other").write_bytes(TEXT[6000:])
        assert main(["passport", *words_, *data]) == 0, words_
        assert said in capfd.readouterr().out
    assert main(["passport", own + "liar", *data]) == 1
    out = capfd.readouterr()
    assert "FAILED  normalized" in out.out and "no bits per byte for" in out.err
    assert main(["passport", own + "liar", *data, "--json"]) == 1
    document = json.loads(capfd.readouterr().out)
    assert document["verdict"] == "fail" and document["bpb"] is None
    assert main(["results"]) == 0
    assert "passports" in capfd.readouterr().out
    cards = sorted((tmp_path / "artifacts" / "reports").glob("passport-*.html"))
    assert len(cards) == 8
    target = tmp_path / "card.html"
    assert main(["passport", "uniform", *data, "--no-record", "--card", str(target)]) == 0
    assert "8.0000" in target.read_text("utf-8")
    assert main(["passport", "uniform", *data, "--card", str(target)]) == 2
    capfd.readouterr()
    for words_ in (
        ["uniform", *data, "--threads", "1", "--device", "auto", "--network"],
        [*data, "--command", "cat", "--restore", "cat", "--timeout", "60.0"],
    ):
        assert main(["passport", *words_, "--no-record", "--json"]) == 0
        call = json.loads(capfd.readouterr().out)["call"].split()
        assert sorted(call) == sorted(["bitbyte", "passport", *words_])
    assert main(["passport", "uniform", *data, "--no-record", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["call"].endswith(shlex.join(data))


NEEDS = """
class Needs:
    def __init__(self, path): self.logprobs = path

class Raises:
    def logprobs(self, ids): raise KeyError("probe")
"""


def test_bad_input_is_one_line(tmp_path, text, monkeypatch, capfd):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.py").write_text("x = ")
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "ends.py").write_text("raise SystemExit('two\\nlines')\n")
    (tmp_path / "needs.py").write_text(NEEDS)
    data = ["--data", str(text)]
    for words_, said in (
        (["uniform"], "--data names the file"),
        (["uniform", "--data", str(tmp_path / "empty")], "is empty"),
        (["uniform", "--data", str(tmp_path / "nothing")], "nothing"),
        (data, "name either a MODEL or a --command"),
        (["uniform", *data, "--command", "cat"], "name either a MODEL or a --command"),
        (["no-such", *data], "no-such"),
        ([str(tmp_path / "folder"), *data], "neither a run nor a folder of transformers"),
        (["ngram", *data], "--trained_on"),
        (["ngram:99", *data, "--trained_on", str(text)], "orders 1 to 11"),
        ([f"{tmp_path / 'bad.py'}:x", *data], "bad.py:x: SyntaxError: "),
        ([f"{tmp_path / 'none.py'}:y", *data], "has nothing called y"),
        (
            [f"{tmp_path / 'none.py'}:x", *data],
            "none.py:x: TypeError: 'int' object",
        ),
        ([f"{tmp_path / 'ends.py'}:x", *data], "ends.py:x: SystemExit: two\\nlines"),
        ([f"{tmp_path / 'needs.py'}:Needs", *data], "needs.py:Needs: TypeError: "),
        ([f"{tmp_path / 'needs.py'}:Raises", *data], "needs.py:Raises: KeyError: 'probe'"),
        (["no_such_module:x", *data], "no_such_module:x: ModuleNotFoundError: "),
        (["./mine:model", *data], "./mine:model: TypeError: "),
        ([".:m", *data], ".:m: TypeError: "),
        (["..:x", *data], "..:x: TypeError: "),
        (["json:loads", *data], "json:loads: TypeError: "),
        (["--command", "cat", *data], "needs --restore"),
        (["--command", "cat", "--restore", "cat", "--timeout", "0", *data], "timeout is 0"),
        (["--command", "cat", "--restore", "cat", *data, "--prefix", "0"], "--prefix: no effect"),
        (["uniform", *data, "--window", "0"], "window is 0"),
        (["uniform", *data, "--stride", "2000"], "stride is 2000"),
        (["uniform", *data, "--limit", "-1"], "limit is -1"),
        (["uniform", *data, "--claim", "nan"], "claim is nan"),
        (["gzip", *data, "--claim", "2"], "not to a compressor"),
        (["uniform", *data, "--name", ""], "an empty name"),
    ):
        assert main(["passport", *words_]) == 2, words_
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1, (words_, err)


def test_a_packed_folder_and_its_training_data(tmp_path, text, monkeypatch):
    """The denominator is the sizes of the files; a model trained on them fails."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    assert main(["pack", str(text), "--out", str(tmp_path / "packed"), "--val_fraction", "0"]) == 0
    source = open_dataset(tmp_path / "packed", 1, split="train")
    assert source.on_disk() == source.n_bytes
    seen = {"train": source.fingerprint, "files": source.hashes, "sketch": source.sketch}
    subject = ours("ar")
    subject.seen = seen
    record = passport(subject, tmp_path / "packed", split="train")
    assert "was trained on these bytes" in failed(record)["training"]
    assert record["trained_on_it"]
    began = {"data": {"train": "0" * 64}, "extra": {"init": {"data": seen}}}  # as with --init
    subject = subjects.OfModel(subject.model, "ar", began)
    record = passport(subject, tmp_path / "packed", split="train")
    assert "was trained on these bytes" in failed(record)["training"]
    subject.seen = {"train": "0" * 64, "files": [], "sketch": []}
    record = passport(subject, tmp_path / "packed", split="train")
    (training,) = [a for a in record["audits"] if a["name"] == "training"]
    assert training["verdict"] == "not possible"
