"""`train --profile`: a trace that a viewer opens, and where the time went."""

import gzip
import json

import pytest
from support import brief_run

from bitbyte import runs
from bitbyte.cli.dispatch import main


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


def test_too_short_a_run_says_so(data, tmp_path, capsys):
    words = [*WORDS, "--steps=2", "--profile", f"--out={tmp_path / 'run'}", "--no_progress"]
    assert main(["train", "ar", f"--data={data}", *words]) == 0
    assert "nothing was profiled" in capsys.readouterr().err
    assert main(["train", "ar", "--smoke_test", "--profile"]) == 2
