"""Sketches: data are known again by content, however they are packed; strangers are not."""

import os
from pathlib import Path

import numpy as np
import pytest
from support import stories_in

from bitbyte import shards
from bitbyte.data import corpora, pack
from bitbyte.shards import PIECE, PIECES, SEEN, open_dataset, overlap


def sketch(path: Path, data: bytes | None = None, split: str = "train") -> list[str]:
    if data is not None:
        path.write_bytes(data)
    return open_dataset(path, 1, split=split).sketch


@pytest.fixture(scope="module")
def text() -> bytes:
    return b"\n".join(stories_in(600_000))


@pytest.fixture(scope="module")
def noise() -> bytes:
    return np.random.default_rng(0).bytes(600_000)


@pytest.mark.parametrize("kind", ["text", "noise"])
def test_the_same_bytes_are_known_again_however_they_lie(kind, request, tmp_path):
    data = request.getfixturevalue(kind)
    raw = sketch(tmp_path / "raw", data)
    assert len(raw) == PIECES and raw == sorted(set(raw)) and overlap(raw, raw) == 1
    assert {len(piece) for piece in raw} == {12}
    (tmp_path / "file").write_bytes(data)
    documents, facts = corpora.open_corpus(tmp_path / "file")
    pack.pack(documents, tmp_path / "d", source=facts, shard_size_gb=7e-5, progress=False)
    for split in ("train", "val"):  # shards of a size that no window fits
        assert overlap(raw, sketch(tmp_path / "d", split=split)) > 0.95
    half = len(data) // 2
    for name, part in (
        ("shifted", b"?" * 13 + data[5:]),
        ("turned", data[half:] + data[:half]),
        ("part", data[half + 1 : half + 40_001]),
        ("short", data[1000:5000]),
    ):
        assert overlap(raw, sketch(tmp_path / name, part)) > 0.95, name
    joined = data[: len(data) // 10] * 2 + np.random.default_rng(1).bytes(len(data) // 10)
    assert 0.35 < overlap(raw, sketch(tmp_path / "joined", joined)) < 0.65
    assert overlap(sketch(tmp_path / "part", data[:60_000]), raw) < 0.2  # it has seen a tenth


def test_records_are_known_in_another_order_and_with_other_separators(tmp_path):
    documents = stories_in(400_000)
    pack.pack(documents, tmp_path / "a", sep_byte=0, progress=False)
    pack.pack(documents[::-1], tmp_path / "b", sep_byte=10, val_fraction=0.4, progress=False)
    seen = sketch(tmp_path / "a")
    for split in ("train", "val"):
        assert overlap(seen, sketch(tmp_path / "b", split=split)) > 0.8


def test_strangers_and_proper_splits_are_no_alarm(text, noise, tmp_path):
    seen = sketch(tmp_path / "seen", text)
    library = b"".join(b"".join(document.chunks) for document in corpora.stdlib_documents())
    others = {
        "val": b"\n".join(stories_in(60_000, split="val")),
        "seed": b"\n".join(stories_in(300_000, seed=1)),
        "noise": noise,
        "code": library[:500_000],
        "little": b"\n".join(stories_in(3_000, seed=2)),
    }
    for name, data in others.items():
        assert overlap(seen, sketch(tmp_path / name, data)) < SEEN / 4, name
    documents, facts = corpora.open_corpus("stdlib")
    pack.pack(documents, tmp_path / "d", source=facts, progress=False)
    assert overlap(sketch(tmp_path / "d"), sketch(tmp_path / "d", split="val")) < SEEN * 0.8


def test_short_and_dull_data(tmp_path):
    assert sketch(tmp_path / "x", b"x" * (PIECE - 1)) == []
    assert overlap([], []) == overlap(["0" * 12], []) == overlap([], ["0" * 12]) == 0
    zeros = sketch(tmp_path / "zeros", bytes(100_000))
    assert len(zeros) == 1 and overlap(zeros, zeros) == 0  # one common piece proves nothing
    dull = sketch(tmp_path / "dull", b"ab" * 5000)
    assert len(dull) == 2 and overlap(dull, sketch(tmp_path / "less", b"ba" * 50)) == 1


def test_large_data_are_looked_at_in_blocks(tmp_path, monkeypatch):
    data = os.urandom(6 << 20)
    monkeypatch.setattr(shards, "SKETCHED", 3 << 20)
    some = sketch(tmp_path / "x", data)
    monkeypatch.undo()
    assert 0.4 < overlap(some, sketch(tmp_path / "y", data)) < 0.6
