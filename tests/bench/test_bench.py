"""The bench: order of measurements, arithmetic, messages if a peer is missing; no speeds."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitbyte.bench import bench, inference, peers
from bitbyte.bench.bench import Row, compare, measure, run_bench
from bitbyte.bench.sides import Group, Pair, Side, Sizes
from bitbyte.cli.dispatch import main
from bitbyte.device import settings_kept
from bitbyte.files import BitbyteError

TINY = Sizes(
    loader_bytes=100_000, batches=((2, 64), (3, 32)), n_layer=1, d_model=64, d_ff=64,
    seq_len=32, batch=2, pack_bytes=300_000, min_seconds=0.0,
)  # fmt: skip


class Clock:
    """Time that passes only when a side runs, and a log of what ran."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(bench, "perf_counter", lambda: self.now)

    def side(self, name, seconds, before=None):
        """A side that takes the next of ``seconds`` at each call, and the last one from then on."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Side(run, before)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder in which the bench puts its files."""
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


def one_row(monkeypatch, row, name="loader"):
    monkeypatch.setattr(bench, "ROWS", {name: row})


def test_sides_take_turns_after_a_warm_up(clock):
    sides = {"a": clock.side("a", [9, 1, 2, 3]), "b": clock.side("b", [8, 10])}
    seconds = measure(sides, 3, min_seconds=0.5)
    assert clock.log == ["a", "b"] + ["a", "b"] * 3
    assert seconds == {"a": [1, 2, 3], "b": [10, 10, 10]}


def test_short_calls_are_repeated_until_they_can_be_timed(clock):
    sides = {"a": clock.side("a", [0.25]), "b": clock.side("b", [2])}
    seconds = measure(sides, 2, min_seconds=1.0)
    warm_up = ["a"] * (1 + 2 + 4) + ["b"]
    assert clock.log == warm_up + (["a"] * 4 + ["b"]) * 2
    assert seconds == {"a": [0.25, 0.25], "b": [2, 2]}


def test_preparation_is_not_timed_and_precedes_every_call(clock):
    def before():
        clock.log.append("clear")
        clock.now += 100

    seconds = measure({"a": clock.side("a", [0.25], before)}, 2, min_seconds=1.0)
    assert clock.log == ["clear", "a"] * 3
    assert seconds == {"a": [0.25, 0.25]}


def test_ratios():
    seconds = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 8.0, 4.0]}
    result = compare(Pair("ours", "peer", 3.0), seconds)
    assert result["ours"] == {
        "name": "ours", "median_s": 2.0, "min_s": 1.0, "max_s": 4.0, "all_s": [1.0, 2.0, 4.0],
    }  # fmt: skip
    assert (result["ratio"], result["ratio_min"], result["ratio_max"]) == (3.0, 1.0, 4.0)
    assert result["ratio_of_medians"] == 4.0 / 2.0
    assert result["reached"] is True
    assert compare(Pair("ours", "peer", 3.01), seconds)["reached"] is False
    assert compare(Pair("ours", "peer"), seconds)["reached"] is None


def test_record_and_table(clock, monkeypatch, tmp_path, capsys):
    def groups(sizes):
        sides = {"fast": clock.side("fast", [0.5]), "slow": clock.side("slow", [1.0])}
        yield Group("first", sides, [Pair("fast", "slow", 1.5), Pair("slow", "fast", 0.75)], {})
        yield Group("second", sides, [Pair("fast", "slow")], {"of": 2})

    one_row(monkeypatch, Row(groups, lambda sizes: None))
    out = tmp_path / "new" / "bench.json"
    results = run_bench(repeats=3, out=out, threads=torch.get_num_threads())
    record = json.loads(out.read_bytes())
    assert record["rows"] == results
    assert [row["case"] for row in results] == ["first", "first", "second"]
    assert [row["ratio"] for row in results] == [2.0, 0.5, 2.0]
    assert [row["reached"] for row in results] == [True, False, None]
    assert results[2]["facts"] == {"of": 2}
    assert record["repeats"] == 3
    about = record["environment"]
    assert about["threads"] == torch.get_num_threads() and about["cpu"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["numpy"] == np.__version__
    assert {"load_before", "load_after"} <= record.keys() & results[0].keys()
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].index("ratio") == shown[2].index("2.00") == shown[3].index("0.50")
    assert shown[2].split() == [
        "loader", "first", "fast", "500", "ms", "slow", "1", "s",
        "2.00", "2.00..2.00", ">=", "1.50", "reached",
    ]  # fmt: skip
    assert shown[3].endswith("missed") and shown[4].endswith("2.00..2.00")


def test_threads_are_set_for_what_is_measured_and_then_set_back(monkeypatch):
    seen, before = [], torch.get_num_threads()

    def groups(sizes):
        seen.append(torch.get_num_threads())
        yield from ()

    one_row(monkeypatch, Row(groups, lambda sizes: None))
    assert run_bench(threads=before + 1) == []
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_a_row_that_cannot_run_is_told_in_the_table(monkeypatch, capsys):
    row = Row(lambda sizes: pytest.fail("it ran"), lambda sizes: "needs CUDA")
    one_row(monkeypatch, row, "gpu")
    assert run_bench() == [{"row": "gpu", "not_measured": "needs CUDA"}]
    assert "gpu: not measured: needs CUDA" in capsys.readouterr().out
    with pytest.raises(BitbyteError, match="needs CUDA"):
        run_bench(("gpu",))


def test_missing_peer_is_an_error_before_the_other_rows_run(no_transformers, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *values: pytest.fail("it ran"))
    with pytest.raises(BitbyteError, match=r'pip install "bitbyte\[bench\]"') as caught:
        run_bench(("loader", "step"), sizes=TINY)
    assert "\n" not in str(caught.value)


def test_missing_peer_leaves_the_other_rows(no_transformers, temporary, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", {name: bench.ROWS[name] for name in ("loader", "step")})
    results = run_bench(repeats=1, sizes=TINY)
    assert [row["row"] for row in results if "not_measured" in row] == ["step"]
    assert "bitbyte[bench]" in results[-1]["not_measured"]
    assert [row["row"] for row in results if "ratio" in row] == ["loader"] * 6
    assert all(row["ratio"] > 0 for row in results if "ratio" in row)
    assert list(temporary.iterdir()) == []


def test_no_space(temporary, monkeypatch):
    full = SimpleNamespace(free=2 * TINY.pack_bytes)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(BitbyteError, match=r"GB are needed in .* set TMPDIR"):
        run_bench(("pack",), sizes=TINY)


@pytest.mark.parametrize(
    ("rows", "repeats", "message"),
    [(("lodaer",), 5, "no bench row 'lodaer'; choose from loader, step, decode, prefill, "),
     ((), 0, "repeats is 0")],
)  # fmt: skip
def test_mistakes(rows, repeats, message, capsys):
    with pytest.raises(BitbyteError, match=message):
        run_bench(rows, repeats=repeats)
    assert main(["bench", *rows, "--repeats", str(repeats)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_preset_that_is_not_there(capsys):
    assert main(["bench", "decode", "--presets", "huge"]) == 2
    assert "no preset 'huge' in the bench; choose from micro, small, " in capsys.readouterr().err


def test_loader_sides_do_the_same_work(temporary):
    path = temporary / "bytes.bin"
    path.write_bytes(bytes(range(256)) * 40)
    x, y = bench.nanogpt_batch(path, 5, 32)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (5, 32)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal((x[:, :1] + torch.arange(32)) % 256, x)
    group = bench._loader_group(path, 5, 32)
    ours = group.sides["uint8 batch"].run()
    assert ours.dtype == torch.uint8 and ours.shape == x.shape
    assert not torch.equal(ours, group.sides["uint8 batch"].run())  # the next step's
    assert group.sides["batch widened to int64"].run().dtype == torch.int64


def test_step_sides_have_the_same_shape():
    pytest.importorskip("transformers")
    (group,) = bench.step(TINY)
    assert group.facts["parameters"]["ours"] == group.facts["parameters"]["peer"]
    assert group.facts["kernels"].keys() == {"dense bf16", "ternary bf16"}
    seconds = measure(group.sides, 1, 0.0)
    llamas = ["HF Llama bf16", "HF Llama bf16 muon", "HF Llama fp32"]
    assert list(seconds) == ["dense bf16", "ternary bf16", *llamas]
    assert {pair.target for pair in group.pairs if pair.peer == "HF Llama bf16"} == {1.2}


@pytest.mark.parametrize(("threads", "largest"), [(1, 10**9), (2, 10**9), (1, 0)])
def test_decode_sides(threads, largest, monkeypatch):
    """One thread beside several; of a very large model only the ternary form."""
    pytest.importorskip("transformers")
    pytest.importorskip("llvmlite")
    monkeypatch.setattr(inference, "LARGEST", largest)
    monkeypatch.setattr(inference.peers, "llama_cpp_problem", lambda: "not now")
    with settings_kept():
        torch.set_num_threads(threads)
        group = next(inference.decode(dataclasses.replace(TINY, decode=("micro",))))
        assert list(measure(group.sides, 1, 0.0)) == list(group.sides)
    names = {pair.ours for pair in group.pairs} | {pair.peer for pair in group.pairs}
    assert names == set(group.sides)
    assert (inference.ALONE in names) == (threads > 1)
    assert ("dense native" in names) == ("HF Llama fp32" in names) == (largest > 0)


@pytest.mark.parametrize("cat", ["cat", None])
def test_pack_writes_all_bytes_and_cleans_up(cat, temporary, monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: cat)
    groups = bench.pack(TINY)
    group = next(groups)
    (folder,) = temporary.iterdir()
    source = (folder / "source").read_bytes()
    assert len(source) == TINY.pack_bytes
    for name, side in group.sides.items():
        for _ in range(2):
            side.before()
            assert [path.name for path in folder.iterdir()] == ["source"]
            side.run()
        if name == "pack":
            packed = b"".join(path.read_bytes() for path in (folder / "packed").glob("*.bin"))
            assert sorted(packed) == sorted(source)  # pieces of it went to validation
        else:
            assert (folder / "copy").read_bytes() == source
    assert [pair.target for pair in group.pairs] == [0.33, None]
    groups.close()
    assert list(temporary.iterdir()) == []


def test_an_interrupted_row_cleans_up(temporary, monkeypatch):
    def stop(*values):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run_bench(("loader",), sizes=TINY)
    assert list(temporary.iterdir()) == []


def test_imports_are_fresh_processes(monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append((command, check)))
    (group,) = bench.imports(TINY)
    for side in group.sides.values():
        side.run()
    names = ("bitbyte", "bitbyte.models", "bitbyte.cli", "torch")
    assert ran == [([sys.executable, "-c", f"import {name}"], True) for name in names]
    assert [pair.target for pair in group.pairs] == [pytest.approx(1 / 1.15), None, None]


def pid_writer(path):
    return lambda: path.write_text(str(os.getpid()))


def broken():
    raise ValueError("no such peer")


def test_peer_runs_in_a_process_of_its_own(tmp_path):
    with peers.in_own_process(pid_writer, tmp_path / "pid") as call:
        call()
        first = int((tmp_path / "pid").read_text())
        (tmp_path / "pid").unlink()
        call()
        assert int((tmp_path / "pid").read_text()) == first != os.getpid()


def test_peer_that_dies_is_an_error():
    with peers.in_own_process(broken) as call, pytest.raises((OSError, EOFError)):
        call()


def test_the_mixer_row():
    pytest.importorskip("llvmlite")
    groups = list(inference.mixer(Sizes(mixed=4000)))
    assert [group.case.split(" ", 2)[2] for group in groups] == [
        "no model", "ar ternary micro", "mamba ternary micro",
    ]  # fmt: skip
    for group in groups:
        for side in group.sides.values():
            side.run()
        assert all({pair.ours, pair.peer} <= group.sides.keys() for pair in group.pairs)
