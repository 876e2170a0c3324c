"""Packing by several processes: the same bytes; data of a size that no memory holds."""

import gzip
import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest

from bitbyte.cli.dispatch import main
from bitbyte.data import corpora, parallel
from bitbyte.data.pack import pack
from bitbyte.files import BitbyteError, to_json
from bitbyte.shards import MANIFEST, VERIFIED, Manifest, Shard, open_dataset


def test_batches_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "BATCH", 100)
    monkeypatch.setattr(parallel, "FEW", 3)
    sizes = [10, 20, 30, 1, 200, 50, 50, 1]
    files = [tmp_path / f"{i}" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    found = list(parallel.batches(files))
    assert [len(batch) for batch in found] == [3, 1, 1, 2, 1]
    assert [*itertools.chain(*found)] == files


@pytest.mark.parametrize("kind", ["files", "whole", "records"])
def test_workers_pack_the_same_bytes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(parallel, "BATCH", 20_000)
    source, rng = tmp_path / "texts", np.random.default_rng(0)
    source.mkdir()
    for i in range(12):
        rows = [{"text": rng.bytes(rng.integers(0, 3000)).hex()} for _ in range(3)]
        if kind == "records":
            text = "\n".join(map(json.dumps, rows)).encode()
        else:
            text = "".join(row["text"] for row in rows).encode() * (1 + 3 * (i == 4))
        name = f"{i:02d}{'.jsonl' if kind == 'records' else ''}"
        opener = gzip.open if i % 3 == 0 else open
        with opener(source / f"{name}{'.gz' if i % 3 == 0 else ''}", "wb") as file:
            file.write(text)
    manifests = []
    for workers in (1, 2):
        documents, facts = corpora.open_corpus(
            source, whole_files=kind == "whole", workers=workers, max_unpacked=1 << 20
        )
        assert facts["kind"] == ("json" if kind == "records" else "files")
        made = pack(
            documents, tmp_path / str(workers), shard_size_gb=4e-5, sep_byte=0, source=facts,
            val_fraction=0.2, progress=False,
        )  # fmt: skip
        manifests.append(made.to_dict())
    assert manifests[0] == manifests[1] and len(manifests[0]["shards"]) > 3


def test_workers_read_the_standard_library(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes(b"x = 1\n" * 2000)
    monkeypatch.setattr(corpora, "_stdlib_files", lambda: [tmp_path / "a.py"])
    called = []

    def in_order(read, files, workers, make):
        called.append(workers)
        return read(files)

    monkeypatch.setattr(corpora, "in_order", in_order)
    documents, _ = corpora.open_corpus("stdlib", workers=2)
    assert b"".join(chunk for document in documents for chunk in document.chunks)[:6] == b"x = 1\n"
    assert called == [2]


def test_errors_of_workers_come_at_their_place(tmp_path, monkeypatch, capsys):
    """Also where packing stops before: at max_bytes nothing after it is read."""
    monkeypatch.setattr(parallel, "BATCH", 1)
    good, bad = tmp_path / "a.txt", tmp_path / "b.gz"
    good.write_bytes(b"good" * 5000)
    bad.write_bytes(gzip.compress(b"bad" * 5000)[:-9])
    documents, _ = corpora.open_corpus([good, bad], workers=2)
    kept = []
    with pytest.raises(BitbyteError, match=r"b\.gz: cannot be unpacked"):
        kept += [b"".join(document.chunks) for document in documents]
        kept += [b"".join(document.chunks) for document in documents]
    words = ["pack", str(good), str(bad), "--workers=2", "--max_bytes=9000"]
    assert main([*words, "--out", str(tmp_path / "d")]) == 0
    assert main([*words, "--out", str(tmp_path / "e"), "--workers=0"]) == 2
    assert "workers is 0" in capsys.readouterr().err


def test_documents_that_nobody_reads_are_skipped(tmp_path):
    """Each document ends where the next one begins, read or not."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": c * 9}) + "\n" for c in "abc"))
    documents, _ = corpora.open_corpus(tmp_path / "x.jsonl", workers=2)
    next(documents)
    assert b"".join(next(documents).chunks) == b"b" * 9
    assert len(list(documents)) == 1


def anonymous() -> int:
    """Bytes of memory of this process that are not of files."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory in /proc")
def test_a_hundred_gigabytes_take_no_memory(tmp_path):
    """Sparse files: they have the size, and no bytes on disk."""
    size, n, T = 1 << 30, 100, 1024
    listed, hashed = [], {}
    for i in range(n):
        name = f"shard_{i:05d}.bin"
        with open(tmp_path / name, "wb") as file:
            file.seek(size - 1)
            file.write(b"\x01")
        if (tmp_path / name).stat().st_blocks * 512 > size // 2:
            pytest.skip("this file system has no sparse files")
        digest, info = f"{i:064x}", (tmp_path / name).stat()
        listed.append(Shard(name=name, split="train", n_bytes=size, documents=1, sha256=digest))
        hashed[name] = [info.st_ino, size, info.st_mtime_ns, digest]
    manifest = Manifest(shards=tuple(listed), sep_byte=None, source={})
    (tmp_path / MANIFEST).write_bytes(to_json(manifest.to_dict()))
    (tmp_path / VERIFIED).write_bytes(to_json(hashed))
    before = anonymous()
    tracemalloc.start()
    data = open_dataset(tmp_path, T, seed=3)
    assert data.n_bytes == n * size and data.n_windows == n * size // T
    seen = set()
    for step in (0, 1, 10**6, 12 * 10**6):
        address = {"batch_size": 8, "rank": 1, "world": 2}
        assert data.batch(step, **address).shape == (8, T)
        seen |= {*data.starts(step, **address).tolist()}
    assert len(seen) == 32 and max(seen) > 50 * size
    assert data[len(data) - 1][-1] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20 and anonymous() - before < 80 << 20  # reading JSON takes 64 MiB
