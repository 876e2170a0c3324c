"""Packing, manifests, data sets: round trips, kills, strangers' manifests, the order of samples."""

import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte import shards
from bitbyte.data import corpora
from bitbyte.data import pack as pack_module
from bitbyte.files import BitbyteError, RunError, folder_lock, sha256_file, to_json
from bitbyte.shards import Manifest, Shard, open_dataset, shuffled

KB = 1e-6  # of a gigabyte


@dataclass
class Pieces:
    """A document in several chunks."""

    chunks: list[bytes]
    whole: bool


def pack(documents, out, **options):
    return pack_module.pack(documents, out, **{"progress": False} | options)


def split_bytes(folder: Path, split: str) -> bytes:
    names = [shard.name for shard in shards.manifest_of(folder).of(split)]
    return b"".join((folder / name).read_bytes() for name in names)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def packed(tmp_path) -> Path:
    pack([bytes([i]) * 1000 for i in range(40)], tmp_path / "d", shard_size_gb=9 * KB)
    return tmp_path / "d"


# --- packing

DOCUMENTS = st.lists(st.binary(max_size=40), max_size=25)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.integers(7, 200), st.none() | st.integers(0, 255))
def test_without_a_split_the_shards_are_the_documents_in_order(documents, size, sep):
    expected = b"".join(d + (b"" if sep is None else bytes([sep])) for d in documents if d)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "out")
        options = {"shard_size_gb": size * 1e-9, "sep_byte": sep, "val_fraction": 0}
        if not expected:
            with pytest.raises(BitbyteError, match="nothing to pack"):
                pack(documents, out, **options)
            assert not out.exists()
            return
        made = pack(documents, out, **options)
        assert split_bytes(out, "train") == expected and made.bytes_of("val") == 0
        sizes = [(out / shard.name).stat().st_size for shard in made.shards]
        assert all(n == size for n in sizes[:-1]) and 0 < sizes[-1] <= size
        assert sum(shard.documents for shard in made.shards) == sum(map(bool, documents))
        assert shards.verify(out) == made == shards.manifest_of(out)
        assert made.summary().startswith(f"train {len(expected):,} byte")
        data = open_dataset(out, 1)
        assert data.read(0, data.n_bytes).tobytes() == expected
        assert names(out) == {s.name for s in made.shards} | {
            ".lock", "manifest.json", ".verified.json",
        }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_split_keeps_order_and_never_divides_equal_documents(documents, fraction):
    documents = [bytes(b % 255 + 1 for b in document) for document in documents]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        made = pack(documents, out, sep_byte=0, val_fraction=fraction, shard_size_gb=30e-9)
        train, val = (split_bytes(out, split).split(b"\0")[:-1] for split in ("train", "val"))
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted(documents)
        assert train == [d for d in documents if d in set(train)]
        assert bool(val) == (len(set(documents)) > 1)
        assert train and made.counts()["val"]["documents"] == len(val)


def test_split_has_the_share_asked_for_and_does_not_depend_on_order(tmp_path):
    documents = [b"document %d" % i for i in range(4000)]
    folders, vals = [tmp_path / "a", tmp_path / "b"], []
    for folder, order in zip(folders, (documents, documents[::-1]), strict=True):
        made = pack(order, folder, sep_byte=10, val_fraction=0.1)
        assert 340 < made.counts()["val"]["documents"] < 460
        vals.append(set(split_bytes(folder, "val").split(b"\n")))
    assert len(vals[0] ^ vals[1]) <= 4  # but for the first two of each


def test_chunks_of_a_whole_document_stay_together(tmp_path):
    documents = [Pieces([bytes([i]) * 10, b"", bytes([i + 100]) * 5], True) for i in range(60)]
    documents.insert(3, Pieces([], True))
    pack(documents, tmp_path, sep_byte=255, val_fraction=0.3)
    for split in ("train", "val"):
        for document in split_bytes(tmp_path, split).split(b"\xff")[:-1]:
            assert document == bytes([document[0]]) * 10 + bytes([document[0] + 100]) * 5


def test_single_file_is_split_by_pieces(tmp_path):
    (tmp_path / "text").write_bytes(os.urandom(50_000))
    documents, facts = corpora.open_corpus(tmp_path / "text")
    made = pack(documents, tmp_path / "d", source=facts, val_fraction=0.2)
    train, val = (split_bytes(tmp_path / "d", split) for split in ("train", "val"))
    assert len(val) >= 4096 and len(train) + len(val) == 50_000 and made.source == facts
    text = (tmp_path / "text").read_bytes()
    pieces = [text[i : i + 4096] for i in range(0, 50_000, 4096)]
    assert train == b"".join(piece for piece in pieces if piece not in val)


def test_too_little_to_split_is_said(tmp_path, capsys):
    pack([b"same", b"same"], tmp_path / "d")
    assert "no validation data" in capsys.readouterr().err
    with pytest.raises(BitbyteError, match=r"no val split; it has: train 8 bytes"):
        open_dataset(tmp_path / "d", 1, split="val")


def test_given_validation_documents_are_the_split_and_nothing_else(tmp_path):
    train, val = [bytes([i]) * 50 for i in range(100)], [b"v" * 7, b"w" * 8]
    pack(train, tmp_path / "d", val_documents=val, val_fraction=0.5)
    assert split_bytes(tmp_path / "d", "train") == b"".join(train)
    assert split_bytes(tmp_path / "d", "val") == b"".join(val)
    with pytest.raises(BitbyteError, match="no bytes to validate on"):
        pack(train, tmp_path / "e", val_documents=[])


def test_max_bytes_cuts_files_and_not_records(tmp_path):
    file = [Pieces([b"a" * 10, b"b" * 10, b"c" * 10], False)]
    pack(file, tmp_path / "a", max_bytes=15, val_fraction=0)
    assert split_bytes(tmp_path / "a", "train") == b"a" * 10 + b"b" * 5
    pack([b"x" * 10] * 9, tmp_path / "b", max_bytes=35, sep_byte=0, val_fraction=0)
    assert split_bytes(tmp_path / "b", "train") == (b"x" * 10 + b"\0") * 3
    with pytest.raises(BitbyteError, match="no document fits into max_bytes"):
        pack([b"x" * 10], tmp_path / "c", max_bytes=10, sep_byte=0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shard_size_gb": 0}, "it must be 1e-9"),
        ({"shard_size_gb": float("nan")}, "is nan; it must be 1e-9"),
        ({"shard_size_gb": float("inf")}, "is inf; it must be 1e-9"),
        ({"max_bytes": 0}, "must be 1 or more"),
        ({"val_fraction": 1.0}, "below 1"),
        ({"val_fraction": float("nan")}, "below 1"),
        ({"sep_byte": 256}, "0 to 255"),
        ({"source": {"size": 2**62}}, "bytes free on that disk"),
    ],
)
def test_bad_options(options, word, tmp_path):
    with pytest.raises(BitbyteError, match=word):
        pack([b"x"], tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


def test_inputs_are_no_place_for_shards(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for item in (".", str(tmp_path), "link"):
        documents, facts = corpora.open_corpus(item)
        with pytest.raises(BitbyteError, match="is also an input"):
            pack(documents, tmp_path, source=facts)
    for out in (tmp_path / "text", tmp_path / "text" / "deep"):
        with pytest.raises(BitbyteError, match=r"text is not a folder; name one to write to$"):
            pack([b"x"], out)
    assert names(tmp_path) == {"text", "link"}


def test_validation_on_training_data_is_refused(tmp_path):
    for name in ("d/text", "e/text"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(name.encode())

    def packed(train, val):
        (a, source), (b, val_source) = (corpora.open_corpus(x, split=s) for x, s in (train, val))
        options = {"source": source, "val_source": val_source, "max_bytes": 3000}
        return pack(a, tmp_path / "out", val_documents=b, overwrite=True, **options)

    d, e = tmp_path / "d", tmp_path / "e"
    for one, other in ((d, d), (d, d / "text"), (d / "text", d), ([e, d], [d / ".." / "d"])):
        with pytest.raises(BitbyteError, match="is training data too"):
            packed((one, "train"), (other, "val"))
    with pytest.raises(BitbyteError, match="are the same"):
        packed(("stdlib", "train"), ("stdlib", "val"))
    made = packed((d, "train"), (e, "val"))
    assert made.summary() == "train 6 bytes (1 piece, 1 shard), val 6 bytes (1 piece, 1 shard)"


def test_summary_counts_in_words(packed, tmp_path):
    summary = shards.manifest_of(packed).summary()
    assert re.match(r"train [\d,]+ bytes \(\d+ documents, \d shards\), val [\d,]+ bytes", summary)
    made = pack([b"x"], tmp_path / "one", val_fraction=0)
    assert (
        made.summary() == "train 1 byte (1 document, 1 shard), val 0 bytes (0 documents, 0 shards)"
    )


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    block = os.urandom(1 << 19)
    documents = [Pieces((block + bytes([i]) for i in range(160)), False)]
    tracemalloc.start()
    made = pack(documents, tmp_path, shard_size_gb=0.02)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.bytes_of("train") + made.bytes_of("val") > 80_000_000 and peak < 24 << 20


def test_packed_folder_is_not_overwritten_unless_asked(packed):
    before = split_bytes(packed, "train")
    with pytest.raises(BitbyteError, match="is already packed"):
        pack([b"new"], packed)
    assert split_bytes(packed, "train") == before
    (packed / "notes.txt").write_text("mine")
    pack([b"new", b"val"], packed, overwrite=True)
    assert split_bytes(packed, "train") == b"new" and shards.verify(packed)
    assert names(packed) == {
        ".lock", "manifest.json", "notes.txt", "shard_00000.bin", "val_00000.bin",
    }  # fmt: skip


def test_files_of_others_are_never_touched(tmp_path):
    (tmp_path / "shard_00007.bin").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(BitbyteError, match=r"shard_00007\.bin is in the way"):
            pack([b"new"], tmp_path, overwrite=overwrite)
    assert (tmp_path / "shard_00007.bin").read_bytes() == b"mine"


def hostile(name: str, size: int) -> bytes:
    """A valid manifest that lists a file as a shard."""
    listed = [Shard(name=name, split="train", n_bytes=size, documents=1, sha256="0" * 64)]
    return to_json(Manifest(shards=tuple(listed), sep_byte=None, source={}).to_dict())


def test_a_manifest_deletes_no_file_that_pack_did_not_write(tmp_path):
    """Neither one in the folder, though overwriting is allowed, nor one left by a killed pack."""
    (tmp_path / "letter.txt").write_bytes(b"mine")
    (tmp_path / "manifest.json").write_bytes(hostile("letter.txt", 4))
    pack([b"new"], tmp_path, overwrite=True, val_fraction=0)
    assert (tmp_path / "letter.txt").read_bytes() == b"mine"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard_00000.bin").unlink()
    for name, size in (("letter.txt", 4), ("shard_00007.bin", 5)):
        (tmp_path / ".tmp-pack").mkdir()
        (tmp_path / ".tmp-pack" / "manifest.json").write_bytes(hostile(name, size))
        (tmp_path / "shard_00007.bin").write_bytes(b"mine")
        with pytest.raises(BitbyteError, match=r"shard_00007\.bin is in the way"):
            pack([b"new"], tmp_path)
        assert (tmp_path / "letter.txt").read_bytes() == b"mine"
        assert (tmp_path / "shard_00007.bin").read_bytes() == b"mine"
    (tmp_path / "manifest.json").write_bytes(hostile("shard_00007.bin", 5))
    with pytest.raises(BitbyteError, match=r"shard_00007\.bin .* not a file of 5 bytes"):
        pack([b"new"], tmp_path, overwrite=True)
    assert (tmp_path / "shard_00007.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("inside", ["poem", "manifest.json.txt", "shard_00000.bin/x", None])
def test_a_work_folder_of_others_is_in_the_way(inside, tmp_path):
    work = tmp_path / ".tmp-pack"
    path = work / inside if inside else work
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    with pytest.raises(BitbyteError, match=r"\.tmp-pack.* is in the way and not left by a pack"):
        pack([b"new"], tmp_path)
    assert path.read_bytes() == b"mine"


def test_a_torn_manifest_of_a_killed_pack_does_not_stop_the_next_one(tmp_path):
    (tmp_path / ".tmp-pack").mkdir()
    (tmp_path / ".tmp-pack" / "manifest.json").write_bytes(hostile("shard_00000.bin", 3)[:-9])
    pack([b"new"], tmp_path, val_fraction=0)
    assert shards.verify(tmp_path).bytes_of("train") == 3


@pytest.mark.parametrize(
    "name", [".tmp-pack", "manifest.json", "shard_00000.bin", ".verified.json"]
)
def test_packing_and_reading_write_through_no_link(name, tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "d"
    outside.mkdir()
    target = outside / name
    if name == ".tmp-pack":
        target.mkdir()
        (target / "shard_00000.bin").write_bytes(b"mine")
    else:
        target.write_bytes(hostile("shard_00000.bin", 3))
    out.mkdir()
    if name == ".verified.json":
        pack([b"old"], out, val_fraction=0)
    (out / name).symlink_to(target)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with contextlib.suppress(BitbyteError):
        if name == ".verified.json":
            open_dataset(out, 1)
        pack([b"new"], out, overwrite=True)
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_folder_in_use(tmp_path):
    with folder_lock(tmp_path), pytest.raises(BitbyteError, match=f"in use by pid {os.getpid()}"):
        pack([b"x"], tmp_path)


def test_error_in_the_source_leaves_nothing(tmp_path):
    def documents():
        yield b"x" * 3_000_000
        raise BitbyteError("file.gz: cannot be unpacked")

    with pytest.raises(BitbyteError, match=r"file\.gz"):
        pack(documents(), tmp_path)
    assert names(tmp_path) == {".lock"}
    with pytest.raises(BitbyteError, match=r"file\.gz"):
        pack(documents(), tmp_path / "new")
    assert names(tmp_path) == {".lock"}


SLOW = """
import sys, time
from bitbyte.data.pack import pack
def documents():
    yield b"x" * 3_000_000
    print("begun", flush=True)
    time.sleep(60)
pack(documents(), sys.argv[1], shard_size_gb=0.001, progress=False)
"""


def test_kill_leaves_no_manifest_and_the_next_run_starts_clean(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        with pytest.raises(BitbyteError, match=f"in use by pid {process.pid}"):
            pack([b"x"], tmp_path)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".tmp-pack" / "shard_00000.bin").exists()
    assert shards.manifest_of(tmp_path) is None
    with pytest.raises(BitbyteError, match="packing has not finished"):
        open_dataset(tmp_path, 1)
    pack([b"new"], tmp_path, val_fraction=0)
    assert names(tmp_path) == {".lock", "manifest.json", "shard_00000.bin"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
def test_kill_between_any_two_steps_of_publishing(again, tmp_path, monkeypatch):
    """Each disk operation in turn fails to happen, and so does everything after it."""
    old, new = [b"old%d" % i for i in range(30)], [b"NEW%d" % i for i in range(20)]
    whole = 0
    for alive in range(100):
        out = tmp_path / str(alive)
        if again:
            pack(old, out, shard_size_gb=50e-9)
        (out / "x").mkdir(parents=True)
        steps = iter(range(alive))

        def counted(real, steps=steps):
            def call(*args, **options):
                if next(steps, None) is None:
                    raise Killed
                return real(*args, **options)

            return call

        finished = False
        with monkeypatch.context() as patch:
            for module, name in (
                (os, "rename"), (os, "replace"), (shutil, "rmtree"),
                (Path, "unlink"), (Path, "mkdir"), (pack_module, "write_new"),
            ):  # fmt: skip
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                pack(new, out, shard_size_gb=50e-9, overwrite=again)
                finished = True
            except Killed:
                pass
        left = shards.manifest_of(out)
        if left is None:
            with pytest.raises(BitbyteError):
                open_dataset(out, 1)
        else:
            shards.verify(out)
            text = split_bytes(out, "train")
            assert text[:3] in ((b"old", b"NEW") if again else (b"NEW",))
            assert b"old" not in text or b"NEW" not in text
            whole += 1
        made = pack(new, out, shard_size_gb=50e-9, overwrite=True)
        assert names(out) == {"x", ".lock", "manifest.json"} | {s.name for s in made.shards}
        assert shards.verify(out).bytes_of("train") > 50
        if finished:
            break
    assert finished and alive > 5 and whole


@pytest.mark.root
@pytest.mark.parametrize("small_disk", ["size=2m"], indirect=True)
def test_full_disk(small_disk):
    pack([b"old"], small_disk / "d", val_fraction=0)
    with pytest.raises(OSError, match="No space left") as error:
        pack([b"x" * (1 << 20)] * 5, small_disk / "d", overwrite=True, shard_size_gb=0.0005)
    assert error.value.errno == errno.ENOSPC
    assert split_bytes(small_disk / "d", "train") == b"old" and shards.verify(small_disk / "d")
    assert not (small_disk / "d" / ".tmp-pack").exists()
    with pytest.raises(BitbyteError, match="5000000 bytes to pack"):
        pack([b"x"], small_disk / "d", overwrite=True, source={"size": 5_000_000})


def test_mode_of_files_follows_umask(packed):
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in packed.iterdir()} == {0o666 & ~mask}


# --- manifest

SHARDS = st.lists(
    st.builds(
        Shard,
        name=st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}\Z"),
        split=st.sampled_from(["train", "val"]),
        n_bytes=st.integers(1, 2**53),
        documents=st.integers(0, 2**40),
        sha256=st.from_regex(r"\A[0-9a-f]{64}\Z"),
    ),
    max_size=4,
    unique_by=lambda shard: shard.name,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(SHARDS, st.none() | st.integers(0, 255), st.dictionaries(st.text(), JSON))
def test_manifest_round_trip(listed, sep, source):
    made = Manifest(shards=tuple(listed), sep_byte=sep, source=source)
    text = json.dumps(made.to_dict())
    assert Manifest.from_dict(json.loads(text), "m") == made


def good() -> dict:
    facts = [("a", "train", 5, 2), ("b", "train", 4, 0), ("c", "val", 3, 1)]
    listed = (
        Shard(name=n, split=s, n_bytes=b, documents=d, sha256="0" * 64) for n, s, b, d in facts
    )
    return Manifest(shards=tuple(listed), sep_byte=0, source={"name": "x"}).to_dict()


@pytest.mark.parametrize("value", [None, True, 12.0, -1, 2**63, "x", [], {}, [{}], float("inf")])
@pytest.mark.parametrize("place", [*good(), *((0, key) for key in good()["shards"][0])], ids=str)
def test_every_wrong_value_is_refused(place, value):
    changed = good()
    where, key = (changed["shards"][0], place[1]) if isinstance(place, tuple) else (changed, place)
    if (place, value) in (("sep_byte", None), ("bitbyte", "x"), ("source", {})):
        return
    if isinstance(place, tuple) and (key, value) == ("name", "x"):
        return
    where[key] = value
    with pytest.raises(BitbyteError, match=r"^m: .*again$"):
        Manifest.from_dict(changed, "m")
    del where[key]
    with pytest.raises(BitbyteError, match=r"^m: .*again$"):
        Manifest.from_dict(changed, "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(more=1),
        lambda m: m["shards"][0].update(more=1),
        lambda m: m["splits"].update(test=m["splits"]["val"]),
        lambda m: m["splits"]["val"].update(bytes=3.0),
        lambda m: m["splits"]["val"].update(shards=True),
        lambda m: m.update(bytes=13),
        lambda m: m["shards"][1].update(bytes=5),
        lambda m: m["shards"][1].update(name="a"),
        lambda m: m["shards"][1].update(name="../b"),
        lambda m: m["shards"][1].update(name="/etc/passwd"),
        lambda m: m["shards"][1].update(name=".hidden"),
        lambda m: m["shards"][1].update(name="a\n"),
        lambda m: m["shards"][1].update(name="x" * 129),
        lambda m: m["shards"][1].update(split="test"),
        lambda m: m["shards"][1].update(bytes=0),
        lambda m: m["shards"][1].update(sha256="0" * 63 + "G"),
        lambda m: m.update(sep_byte=256),
        lambda m: m.update(sep_byte=True),
        lambda m: m.update(bitbyte="\ud800"),
    ],
)
def test_hostile_manifests_are_refused(change):
    changed = good()
    change(changed)
    if changed["bitbyte"] == "\ud800":  # odd, and harmless
        assert Manifest.from_dict(changed, "m").bitbyte == "\ud800"
        return
    with pytest.raises(BitbyteError, match=r"^m: "):
        Manifest.from_dict(changed, "m")


def test_manifest_of_the_future(packed):
    value = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_bytes(to_json({**value, "format": 2, "new": 1}))
    for call in (shards.manifest_of, shards.verify, lambda path: open_dataset(path, 1)):
        with pytest.raises(BitbyteError, match=r"manifest\.json: made by a newer bitbyte"):
            call(packed)
    with pytest.raises(BitbyteError, match="newer bitbyte"):
        pack([b"x"], packed, overwrite=True)


@settings(max_examples=150)
@given(st.data())
def test_edited_manifest_text_only_raises_bitbyte_errors(data):
    text = bytearray(to_json(good()))
    at = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        text[at] = data.draw(st.integers(0, 255))
    else:
        del text[at : at + data.draw(st.integers(1, 200))]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "manifest.json").write_bytes(text)
        try:
            shards.manifest_of(folder)
        except BitbyteError as error:
            assert "manifest.json: " in str(error)


# --- damaged data


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "8999 bytes.*says 9000"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "9001 bytes.*says 9000"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "has changed"),
        (lambda path: path.unlink(), "but missing"),
        (lambda path: (path.unlink(), path.mkdir()), "but missing"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "but missing"),
    ],
)
def test_damaged_shard_is_named(damage, word, packed):
    damage(packed / "shard_00001.bin")
    for call in (shards.verify, lambda path: open_dataset(path, 10)):
        with pytest.raises(BitbyteError, match=rf"shard_00001\.bin.*{word}"):
            call(packed)


def test_shard_that_leads_out_of_the_folder_is_refused(packed, tmp_path):
    shutil.move(packed / "shard_00000.bin", tmp_path / "elsewhere")
    (packed / "shard_00000.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BitbyteError, match=r"shard_00000\.bin"):
        open_dataset(packed, 10)


def test_hashes_are_computed_once_for_each_state_of_a_file(packed, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        shards, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path)
    )
    n = len(shards.manifest_of(packed).of("train"))
    open_dataset(packed, 10)
    open_dataset(packed, 20)
    assert len(hashed) == n
    (packed / "shard_00001.bin").touch()
    open_dataset(packed, 10)
    assert hashed[n:] == ["shard_00001.bin"]
    data = bytearray((packed / "shard_00001.bin").read_bytes())
    data[5] ^= 1
    (packed / "shard_00001.bin").write_bytes(data)
    with pytest.raises(BitbyteError, match=r"shard_00001\.bin has changed"):
        open_dataset(packed, 10)
    (packed / ".verified.json").write_bytes(b"[broken")
    with pytest.raises(BitbyteError, match=r"shard_00001\.bin has changed"):
        open_dataset(packed, 10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_no_pipe_is_waited_for(packed):
    (packed / ".verified.json").unlink(missing_ok=True)
    os.mkfifo(packed / ".verified.json")
    with pytest.raises(BitbyteError, match=r"\.verified\.json is not a plain file"):
        open_dataset(packed, 10)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not cut a mapped file")
@pytest.mark.parametrize("stride", [100, 90])
def test_file_that_shrinks_in_use_is_named_and_kills_nothing(stride, tmp_path):
    (tmp_path / "x").write_bytes(os.urandom(100_000))
    data = open_dataset(tmp_path / "x", 100, stride=stride)
    data.batch(0, batch_size=8)
    os.replace(shutil.copy(tmp_path / "x", tmp_path / "y"), tmp_path / "x")
    data.batch(1, batch_size=8)  # another file of the name: the old one is still there
    data = open_dataset(tmp_path / "x", 100, stride=stride)
    os.truncate(tmp_path / "x", 99_999)
    for read in (
        lambda: data.batch(0, batch_size=8), lambda: data[0], lambda: data.read(0, 9),
        lambda: data.sketch,
    ):  # fmt: skip
        with pytest.raises(RunError, match=r"/x was cut from 100000 to 99999 bytes"):
            read()


def test_read_only_folder_is_only_slower(packed, monkeypatch):
    def refuse(path, data):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shards, "write_atomic", refuse)
    assert open_dataset(packed, 10).n_windows > 0 and not (packed / ".verified.json").exists()


# --- reading


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.integers(1, 60), st.integers(1, 40),
       st.none() | st.integers(1, 50), st.data())  # fmt: skip
def test_windows_are_slices_whatever_the_shards(data, size, T, stride, draw):
    step = stride or T
    with tempfile.TemporaryDirectory() as name:
        pack([data], Path(name), shard_size_gb=size * 1e-9, val_fraction=0)
        if len(data) < T:
            with pytest.raises(BitbyteError, match=f"its {len(data)} bytes .* one window of {T}"):
                open_dataset(name, T, stride=stride)
            return
        windows = open_dataset(name, T, stride=stride, seed=3)
        starts = range(0, len(data) - T + 1, step)
        assert windows.n_windows == len(windows) == len(starts)
        expected = [data[start : start + T] for start in starts]
        assert [row.tobytes() for row in windows] == expected
        a = draw.draw(st.integers(0, len(data)))
        b = draw.draw(st.integers(a, len(data)))
        assert windows.read(a, b).tobytes() == data[a:b]
        got = windows.batch(0, batch_size=len(starts))
        assert sorted(row.tobytes() for row in got) == sorted(expected)
        order = shuffled(np.arange(len(starts)), len(starts), 3)
        assert [row.tobytes() for row in got] == [expected[w] for w in order]
        (Path(name) / "manifest.json").unlink()
        plain = open_dataset(name, T, stride=stride, seed=3)
        assert (plain.batch(5, batch_size=3) == windows.batch(5, batch_size=3)).all()
        assert open_dataset(f"{name}/*.bin", T).n_bytes == len(data)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**70), st.integers(0, 3))
def test_each_window_once_per_epoch(n, seed, epoch):
    assert sorted(shuffled(np.arange(epoch * n, (epoch + 1) * n), n, seed)) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.data())
def test_a_step_has_the_same_windows_for_any_world_and_accumulation(B, accum, world, n, data):
    """The union over processes and micro-batches is a contiguous run of ordinals."""
    total, T = B * accum * world, 2
    with tempfile.TemporaryDirectory() as name:
        text = np.arange(n, dtype=np.uint16).view(np.uint8)  # window i is the number i
        Path(name, "x").write_bytes(text.tobytes())
        windows = open_dataset(Path(name, "x"), T, seed=7)
        step = data.draw(st.integers(0, 9999 // total))
        rows = [
            windows.batch(step, batch_size=B, micro=m, grad_accum=accum, rank=r, world=world)
            for m in range(accum)
            for r in range(world)
        ]
        seen = np.concatenate(rows).view(np.uint16).ravel()
        expected = shuffled(np.arange(step * total, (step + 1) * total), n, 7)
        assert sorted(seen.tolist()) == sorted(expected.tolist())


def test_order_is_a_shuffle_that_changes_with_epoch_and_seed():
    n = 1000
    first = shuffled(np.arange(3 * n), n, 0).reshape(3, n)
    other = shuffled(np.arange(n), n, 1)
    for order in (*first, other):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.12
    for a, b in ((first[0], first[1]), (first[1], first[2]), (first[0], other)):
        assert (a == b).sum() < 10  # one by chance
    places = shuffled(np.arange(4 * 2400), 4, 5).reshape(2400, 4)
    counts = np.array([np.bincount(column, minlength=4) for column in places.T])
    assert abs(counts - 600).max() < 110  # five standard deviations


GOLDEN = [8, 1, 5, 2, 6, 7, 4, 3, 9, 0, 3, 8, 4, 6, 2, 0, 5, 1, 7, 9]


def test_order_is_the_same_in_every_version():
    """Resumed runs rely on it: if these numbers change, the order needs a new name."""
    assert shuffled(np.arange(20), 10, 0).tolist() == GOLDEN
    assert shuffled(np.array([7, 3]), 10, 0).tolist() == [GOLDEN[7], GOLDEN[3]]


def test_batches_fill_the_buffer_given(packed):
    data = open_dataset(packed, 64)
    out = np.full((5, 64), 7, np.uint8)
    assert data.batch(3, batch_size=5, out=out) is out
    assert (out == data.batch(3, batch_size=5)).all()
    assert data.batch(0, batch_size=5000).shape == (5000, 64)  # more than is computed at once


def test_fingerprint_names_bytes_and_split(packed, tmp_path):
    train, val = (open_dataset(packed, 10, split=split).fingerprint for split in ("train", "val"))
    assert len(train) == 64 and train != val
    assert open_dataset(packed, 99, seed=5).fingerprint == train
    (tmp_path / "x").write_bytes(b"some bytes")
    (tmp_path / "y").write_bytes(b"same bytes")
    a, b = (open_dataset(tmp_path / name, 1).fingerprint for name in "xy")
    shutil.copy(tmp_path / "x", tmp_path / "z")
    assert a != b and open_dataset(tmp_path / "z", 1).fingerprint == a


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("nothing", "no such file or folder"),
        ("empty", r"there are no \.bin files"),
        ("*.bin", r"there are no \.bin files"),
        ("zero", "zero is empty: it has no bytes to train on or to score"),
        ("short", "its 8 bytes are fewer than one window of 9; lower --seq_len or add data"),
    ],
)
def test_no_data(path, word, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"12345678")
    with pytest.raises(BitbyteError, match=word):
        open_dataset(tmp_path / path, 9)


def test_a_compressed_file_is_not_taken_for_its_text(tmp_path, capsys):
    packed = gzip.compress(b"some text")
    (tmp_path / "x.txt.gz").write_bytes(packed)
    with pytest.raises(BitbyteError, match=r"x\.txt\.gz is compressed with gzip; bitbyte pack unp"):
        open_dataset(tmp_path / "x.txt.gz", 1)
    for name, data, word in (
        ("x", packed, "x is compressed with gzip; its bytes are used as they are"),
        ("plain.gz", b"plain", ""),
        ("x.docx", b"PK\x03\x04....", "x.docx is a zip archive"),
    ):
        (tmp_path / name).write_bytes(data)
        for _ in range(3):
            assert open_dataset(tmp_path / name, 1).n_bytes == len(data)
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == bool(word)  # once


def test_bad_arguments(packed):
    for options in ({"seq_len": 0}, {"seq_len": 5, "stride": 0}):
        with pytest.raises(BitbyteError, match="at least 1"):
            open_dataset(packed, **options)
    with pytest.raises(BitbyteError, match="no test split"):
        open_dataset(packed, 5, split="test")
    data = open_dataset(packed, 5)
    for wrong in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[wrong]
    for start, stop in ((-1, 3), (4, 3), (0, data.n_bytes + 1)):
        with pytest.raises(IndexError):
            data.read(start, stop)
    with pytest.raises(BitbyteError, match="nothing to verify"):
        shards.verify(packed.parent)
