"""`train --profile`: a trace that a viewer opens, and where the time went."""

import gzip
import json

import pytest
from support import brief_run

from bitbyte import runs
from bitbyte.cli.dispatch import main
from bitbyte.workbench.profiling import Profiler


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.bin").write_bytes(bytes(range(97, 123)) * 40)
    return tmp_path / "text.bin"


WORDS = ["--n_layer=1", "--d_model=32", "--seq_len=32", "--device=cpu", "--linear=dense"]


def test_a_profile_of_the_steps_between_two_rows(data, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*WORDS, "--steps=7", "--log_every=2", "--profile", f"--out={run}"]
    assert main(["train", "ar", f"--data={data}", *words]) == 0
    said = capsys.readouterr().err
    assert "of 2 steps" in said and said.count(" calls  ") == 10 and "trace-0000002.json.gz" in said
    assert said.index("parameters") < said.index("of 2 steps")  # what `_with_plan` says, too
    with gzip.open(run / "profile" / "trace-0000002.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    rows = json.loads((run / "profile" / "top-0000002.json").read_bytes())
    assert len(rows) == 10 and rows == sorted(rows, key=lambda row: -row["share"])
    assert 0 < sum(row["share"] for row in rows) <= 1
    assert runs.strangers(run) == []


def test_a_profile_changes_no_result(data, tmp_path):
    plain = brief_run("ar", data, tmp_path / "plain", steps=4, log_every=1)
    run = tmp_path / "run"
    words = ["--n_layer=1", "--d_model=64", "--seq_len=32", "--batch_size=4", "--device=cpu"]
    words += ["--steps=4", "--log_every=1", "--no_progress", "--profile", f"--out={run}"]
    assert main(["train", "ar", f"--data={data}", *words]) == 0
    losses = [[row["loss"] for row in runs.read_metrics(r)] for r in (run, tmp_path / "plain")]
    assert plain and losses[0] == losses[1]


def test_too_short_a_run_is_refused_before_it_starts(data, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "ar", f"--data={data}", *WORDS, "--profile", f"--out={run}", "--batch_size=8"]
    for short in (
        ["--steps=10"], ["--epochs=2"], ["--steps=40", "--stop_after=2"],
        ["--minutes=1", "--stop_after=10"], ["--steps=4", "--log_every=4", "--eval_every=4"],
    ):  # fmt: skip
        assert main([*words, *short]) == 2
        said = capsys.readouterr().err
        assert "--profile takes two rows of the log" in said and said.count("\n") == 1
        assert not run.exists()
    assert main(["train", "ar", "--smoke_test", "--profile"]) == 2


def test_the_last_step_is_a_row_too(data, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "ar", f"--data={data}", *WORDS, f"--out={run}", "--no_progress"]
    assert main([*words, "--steps=3", "--log_every=2", "--profile"]) == 0
    assert "of 1 step," in capsys.readouterr().err
    # A run that goes on: its next rows are those of steps 4 and 5.
    again = ["train", f"--out={run}", "--resume", "--profile", "--no_progress"]
    assert main([*again, "--steps=4"]) == 2
    assert "up to step 4, has fewer" in capsys.readouterr().err
    assert main([*again, "--steps=5"]) == 0
    assert (run / "profile" / "trace-0000004.json.gz").exists()


def test_a_run_that_is_stopped_early_says_so(data, tmp_path, capsys):
    profiler = Profiler()
    profiler.begin(tmp_path)
    profiler({"step": 1})
    profiler.end()
    assert "nothing was profiled" in capsys.readouterr().err
