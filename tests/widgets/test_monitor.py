"""The training monitor: the log read as it comes, words, plots, Stop, runs of other processes."""

import contextlib
import dataclasses
import html
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import until

pytest.importorskip("ipywidgets", reason="needs bitbyte[workbench]")

from bitbyte import runs
from bitbyte.cli import dispatch
from bitbyte.config import TrainConfig
from bitbyte.files import BitbyteError, folder_lock
from bitbyte.plots import svg
from bitbyte.train import train
from bitbyte.widgets import monitor
from bitbyte.widgets.monitor import Followed, TrainingMonitor, flags, launch

TINY = {
    "n_layer": 1, "d_model": 64, "d_ff": 64, "n_head": 1, "seq_len": 16, "batch_size": 2,
    "dtype": "fp32", "linear_kernel": "reference", "threads": 1, "device": "cpu", "log_every": 1,
    "steps": 1_000_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "bytes.bin"
    path.write_bytes(bytes((i * i // 7 + i * 31) % 97 for i in range(8192)))
    return str(path)


def config(data, **changes) -> TrainConfig:
    return TrainConfig(**(TINY | {"data": data} | changes))


def row(step, **more) -> dict:
    return {
        "step": step, "loss": 1.0, "bpb": 4 - step / 100, "lr": 1e-3, "grad_norm": 0.5,
        "bytes": step * 32, "seconds": step / 10, "bytes_per_second": 320.0, "memory": 3 * 2**20,
    } | more  # fmt: skip


def write(run: Path, rows, facts=None) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if facts:
        (run / "run.json").write_text(json.dumps(facts))
    return run


# What is read


def test_lines_are_read_as_they_come_and_a_torn_one_waits(tmp_path):
    rows = [row(i, note="n" * i) for i in range(1, 40)]
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    run = Followed("run", tmp_path)
    monitor.read_new(run)
    assert run.rows == []
    with open(tmp_path / "metrics.jsonl", "ab", buffering=0) as file:
        for start in range(0, len(text), 61):
            file.write(text[start : start + 61])
            monitor.read_new(run)
            whole = text[: start + 61].count(b"\n")
            assert run.rows == rows[:whole]
    assert run.rows == rows and run.offset == len(text) and run.problem == ""


def test_a_resumed_or_overwritten_log_is_read_anew(tmp_path):
    run = Followed("run", write(tmp_path / "run", [row(i) for i in range(1, 9)]))
    monitor.read_new(run)
    runs.truncate_metrics(run.folder, 5)
    for step in (6, 7, 8, 9):
        runs.append_metrics(run.folder, row(step, again=True))
    monitor.read_new(run)
    assert [r["step"] for r in run.rows] == list(range(1, 10))
    assert [r["step"] for r in run.rows if "again" in r] == [6, 7, 8, 9]
    runs.append_metrics(run.folder, row(7, third=True))  # the same file goes back
    monitor.read_new(run)
    assert [r["step"] for r in run.rows] == list(range(1, 8)) and "third" in run.rows[-1]


def test_junk_in_the_log_is_left_out_and_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        json.dumps(row(1)).encode() + b'\n{"step": 2, "bpb": NaN}\n[3]\n{"step": "4"}\n\xff\n'
        + json.dumps(row(5, bpb="<b>", lr=None)).encode() + b"\n"
    )  # fmt: skip
    run = Followed("run", tmp_path)
    monitor.read_new(run)
    assert [r["step"] for r in run.rows] == [1, 5] and "skipped" in run.problem
    assert monitor.points(run.rows, "bytes", "bpb") == ([32], [3.99])
    assert "<b>1" not in monitor.panels([run], "step")


def test_foreign_values_in_the_log_are_not_drawn(tmp_path):
    foreign = [{"bpb": v, "lr": v, "memory": v} for v in ({"a": 1}, True, 1e308, 10**400)]
    rows = [row(1), *(row(i, **values) for i, values in enumerate(foreign, 2))]
    run = Followed("x", write(tmp_path / "x", rows))
    monitor.look(run)
    assert monitor.points(run.rows, "step", "bpb") == ([1], [row(1)["bpb"]])
    assert monitor.header([run]) and monitor.panels([run], "step") and monitor.table([run, run])


@pytest.mark.parametrize("facts", [[1], {"resumed": 3}, {"steps": "many", "config": [1]}])
def test_a_run_json_of_a_stranger_is_left_out(tmp_path, facts):
    folder = write(tmp_path / "run", [row(1), row(2)], facts)
    with folder_lock(folder):
        watch = TrainingMonitor(folder)
    assert "running &middot; step 2 &middot; 320 bytes/s" in watch.header.value


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_no_pipe_is_waited_for(tmp_path):
    for name in ("metrics.jsonl", "run.json"):
        os.mkfifo(tmp_path / name)
    assert "metrics.jsonl is not a plain file" in TrainingMonitor(tmp_path).header.value


# What is said


def test_time_left_is_the_budget_at_the_pace_of_the_last_rows():
    run = Followed("run", state="running", facts={"steps": 100, "config": {}})
    assert monitor.remaining(run) is None
    run.rows = [row(10, seconds=2.0)]
    assert monitor.remaining(run) == pytest.approx(18)
    slow = [row(10 + i, seconds=2.0 + 3 * i) for i in range(1, 25)]
    run.rows += slow
    assert monitor.remaining(run) == pytest.approx((100 - 34) * 3)
    run.facts = {"steps": None, "config": {"minutes": 2}}
    assert monitor.remaining(run) == pytest.approx(120 - 74)
    run.facts["resumed"] = [{"steps": 40, "config": {}}]
    assert monitor.remaining(run) == pytest.approx(18)
    run.state = "stopped"
    assert monitor.remaining(run) is None


def test_header_panels_and_units(tmp_path):
    rows = [row(i) for i in range(1, 31)]
    rows[9]["val_bpb"], rows[19]["val_bpb"] = 3.25, 3.5
    write(tmp_path / "run", rows, {"steps": 60, "config": {}})
    watch = TrainingMonitor(tmp_path / "run", floor=1.75)
    text = watch.header.value
    for words in ("step 30 of 60", "best val 3.2500 at step 10", "3 MiB", "320 bytes/s"):
        assert words in text
    assert "ended unsaved" in text and "ETA" not in text and watch.stop_button.disabled
    plots = watch.plots.value
    for words in ("floor 1.75", "bits per byte", "learning rate", "gradient norm", "bytes/s",
                  ">train<", ">val<"):  # fmt: skip
        assert words in plots
    assert "masked" not in plots and plots.count("<svg") == 4 and watch.table.value == ""
    with folder_lock(tmp_path / "run"):
        assert watch.update() and "running" in watch.header.value
        assert "ETA 0:00:03" in watch.header.value and not watch.stop_button.disabled


def test_masked_bytes_are_never_called_bits_per_byte(tmp_path):
    rows = [row(i, masked_bpb=5.0, val_bound=4.5) for i in range(1, 4)]
    for one in rows:
        del one["bpb"]
    run = write(tmp_path / "d", rows)
    watch = TrainingMonitor(run)
    assert "train (masked bytes)" in watch.plots.value and "val (bound)" in watch.plots.value
    assert ">train<" not in watch.plots.value and ">val<" not in watch.plots.value
    assert "best val (bound) 4.5000" in watch.header.value


def test_the_x_axis_can_be_chosen(tmp_path):
    watch = TrainingMonitor(write(tmp_path / "run", [row(i) for i in range(1, 9)]))
    by_step = watch.plots.value
    watch.axis.value = "bytes"
    assert watch.plots.value != by_step and watch.plots.value.count(">bytes<") == 4
    watch.axis.value = "seconds"
    assert watch.plots.value.count(">seconds<") == 4


def test_several_runs_are_compared_and_names_are_escaped(tmp_path):
    name = "a <img src=x onerror=alert(1)> & b"
    one = write(tmp_path / name, [row(1, val_bpb=2.5), row(2)])
    two = write(tmp_path / "two", [row(7, bpb=1.5)])
    watch = TrainingMonitor(one, two, floor={"<i>grammar</i>": 1.0})
    shown = watch.header.value + watch.plots.value + watch.table.value
    assert "<img" not in shown and "<i>" not in shown
    assert "1 a &lt;img src=x onerror=alert(1)&gt; &amp; b" in watch.table.value
    lines = watch.table.value.split("<tr>")[1:]
    cells = [re.findall(r"<td[^>]*>([^<]*)", line) for line in lines]
    values = [dict(zip(cells[0], line, strict=True)) for line in cells[1:]]
    assert values[0]["step"] == "2" and values[0]["val bits/byte"] == "2.5000"
    assert values[1]["train bits/byte"] == "1.5000" and values[1]["val bits/byte"] == "-"
    for words in ("1 train", "2 train", "1 val"):
        assert words in watch.plots.value


def test_a_run_has_one_color_in_all_plots_and_in_the_header(tmp_path):
    rows = [row(i, val_bpb=2.0) for i in range(1, 4)]
    names = [write(tmp_path / name, rows) for name in ("one", "two", "three")]
    watch = TrainingMonitor(*names)
    for color, number in zip(svg.COLORS, "123", strict=False):
        assert f'<span style="color:{color}">{number}</span>' in watch.header.value
        for plot in watch.plots.value.split("<svg")[1:]:
            labels = re.findall(rf'stroke="{color}" stroke-width="2"[^>]*/><text[^>]*>(\d)', plot)
            assert labels and set(labels) == {number}
    assert watch.plots.value.count(svg.COLORS[0]) == 2 * 5  # a line and its legend
    alone = TrainingMonitor(names[0])
    assert svg.COLORS[1] in alone.plots.value and "<span" not in alone.header.value


def test_lists_of_runs_are_runs(tmp_path):
    one, two = (write(tmp_path / name, [row(1)]) for name in ("one", "two"))
    watch = TrainingMonitor([one, str(two)])
    assert [run.name for run in watch.followed] == ["one", "two"]
    assert repr(TrainingMonitor(one, (two,))) == repr(watch)
    with pytest.raises(BitbyteError, match="a run is a folder or a name, not 7"):
        TrainingMonitor(one, 7)


def test_all_runs_is_a_choice_that_shows(tmp_path):
    watch = TrainingMonitor(*(write(tmp_path / name, [row(1)]) for name in ("one", "two")))
    assert watch.run_choice.index == 0 and watch.run_choice.label == "all runs"
    for run in watch.followed:
        run.state = "running"
    stopped: list[Followed | None] = []
    watch.stop = stopped.append
    watch.stop_button.disabled = False
    watch.stop_button.click()
    watch.run_choice.label = "2 two"
    watch._add(write(tmp_path / "three", [row(1)]))
    assert watch.run_choice.label == "2 two"  # still
    watch.stop_button.click()
    assert stopped == [None, watch.followed[1]]


def test_an_unknown_run_is_refused():
    with pytest.raises(BitbyteError, match="no run 'nowhere'"):
        TrainingMonitor("nowhere")


def test_nothing_is_drawn_twice(tmp_path, monkeypatch):
    run = write(tmp_path / "run", [row(1)])
    watch, drawn = TrainingMonitor(run), []
    monkeypatch.setattr(monitor, "panels", lambda *a: drawn.append(1) or "")
    for _ in range(5):
        watch.update()
    assert drawn == []
    runs.append_metrics(run, row(2))
    watch.update()
    assert drawn == [1]


def test_on_step_without_a_folder_draws_at_most_twice_a_second(monkeypatch):
    watch, drawn, real = TrainingMonitor(), [], monitor.panels
    monkeypatch.setattr(monitor, "panels", lambda *a: drawn.append(1) or real(*a))
    clock = iter(range(10**6))  # a tenth of a second passes with every look at it
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: next(clock) / 10))
    assert not any(watch(row(i)) for i in range(1, 301))
    assert len(drawn) <= 1 + 2 * next(clock) / 10
    monkeypatch.setattr(monitor, "time", time)
    watch.update()
    assert "step 300" in watch.header.value
    watch.stop()
    assert watch(row(301)) is True


# Stop


def test_a_thread_trains_and_the_button_stops_it(data, tmp_path):
    watch = TrainingMonitor(floor=1.0)
    out = tmp_path / "run"
    assert watch.train(config(data, out=str(out))) is watch  # at once: it would never end
    with pytest.raises(BitbyteError, match="already training"):
        watch.train(config(data))
    until(lambda: "ETA" in watch.header.value)
    watch.stop_button.click()
    result = watch.wait(60)
    assert result.step == runs.latest_step(out) and not result.finished
    assert not (out / "STOP").exists()
    watch.follow(wait=True)
    assert "stopped" in watch.header.value and watch.stop_button.disabled
    assert repr(watch) == "TrainingMonitor(run stopped)"
    more = dataclasses.replace(config(data, out=str(out)), resume=True, steps=result.step + 2)
    assert watch.train(more).wait(60).finished
    watch.follow(wait=True)
    assert len(watch.followed) == 1 and "finished" in watch.header.value


def test_a_thread_that_fails_says_why(data, tmp_path):
    watch = TrainingMonitor()
    (tmp_path / "<file>").write_bytes(b"")
    watch.train(config(str(tmp_path / "<file>"), out=str(tmp_path / "run")))
    with pytest.raises(BitbyteError, match="<file>"):
        watch.wait(60)
    assert "failed" in watch.header.value and "&lt;file&gt;" in watch.header.value


def test_as_on_step_it_knows_the_run_and_sees_its_end(data, tmp_path):
    watch = TrainingMonitor()
    train(config(data, out=str(tmp_path / "run"), steps=30, progress=False), watch)
    watch.follow(wait=True)
    assert "finished" in watch.header.value and "step 30 of 30" in watch.header.value
    assert [r["step"] for r in watch.followed[0].rows] == list(range(1, 31))


def test_a_stop_from_before_the_start_counts_for_nothing(data, tmp_path):
    out = tmp_path / "run"
    train(config(data, out=str(out), stop_after=2, progress=False, steps=9))
    (out / "STOP").touch()
    result = train(TrainConfig(out=str(out), resume=True, progress=False))
    assert result.finished and result.step == 9 and not (out / "STOP").exists()


def test_a_stop_file_is_heard_at_the_next_logged_step_and_used_up(data, tmp_path):
    out, seen = tmp_path / "run", []

    def ask(line):
        seen.append(line["step"])
        if line["step"] == 6:
            (out / "STOP").touch()

    result = train(config(data, out=str(out), log_every=3, progress=False), ask)
    assert seen == [3, 6] and result.step == 6 and not result.finished
    assert runs.latest_step(out) == 6 and not (out / "STOP").exists()


# Other processes


def test_flags_say_all_that_differs(data):
    configs = [
        TrainConfig(),
        config(data, lr=3e-4, act_quant=False, progress=False, compile=True, seed=5),
        TrainConfig(data="a b", steps=9, curriculum=(8, 16), seq_len_cap=12, allow_overwrite=True),
        TrainConfig(family="mamba", ssm="mamba1", minutes=0.5, out="-x", linear="dense"),
    ]
    for one in configs:
        call = dispatch._parse("train", flags(one))
        assert call.args == (one,) or call.keywords["config"] == one


def test_launch_trains_in_a_process_of_its_own_until_stop_or_says_why_it_died(data, tmp_path):
    out = tmp_path / "child"
    run = launch(config(data, out=str(out)))  # at once: it would never end
    assert run == out
    (tmp_path / "<file>").write_bytes(b"")
    dying = launch(config(str(tmp_path / "<file>")))
    child = monitor.CHILDREN[run]
    if os.name == "posix":
        assert os.getsid(child.pid) == child.pid != os.getsid(0)  # outlives this one's terminal
    watch = TrainingMonitor(run).follow()
    assert "starting" in repr(watch)
    watch.stop()  # too early to be heard: it is told again
    watch.follow(wait=True)
    assert child.wait(60) == 0 and runs.latest_step(run) == watch.followed[0].rows[-1]["step"]
    assert "stopped" in watch.header.value and not (out / "STOP").exists()
    log = monitor.log_of(run).read_text()
    assert " -m bitbyte train " in log.split("\n")[0] and "--resume" in log
    with pytest.raises(BitbyteError, match="exists; choose another"):
        launch(config(data, out=str(out)))
    watch = TrainingMonitor(dying).follow(wait=True)
    assert "failed" in watch.header.value and watch.followed[0].rows == []
    assert re.search(r"exit code 2: error: .*&lt;file&gt;", watch.header.value)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_launch_takes_names_that_are_not_text(data, monkeypatch, tmp_path):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    monkeypatch.setattr(monitor.subprocess, "Popen", lambda command, **_: None)
    monkeypatch.setattr(monitor, "CHILDREN", {})
    run = launch(config(data, out=str(tmp_path / os.fsdecode(b"caf\xe9"))))
    assert os.fsencode(run) in monitor.log_of(run).read_bytes()


def test_an_empty_name_is_not_an_absent_one(data):
    for resume in (True, False):
        with pytest.raises(BitbyteError, match="an empty name is not a file or folder"):
            launch(config(data, out="", resume=resume))


@pytest.mark.parametrize("name", ["k" * 250, "\u00e9" * 125])
def test_a_run_of_a_long_name_has_a_log(name, tmp_path):
    log = monitor.log_of(tmp_path / name)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("it can be written")
    other = monitor.log_of(tmp_path / f"{name[:-1]}x")
    assert log.name[:9] == name[:9] and log != other


def test_launch_goes_on_with_a_run_by_its_name(data, monkeypatch, tmp_path):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    run = tmp_path / "checkpoints" / "mine"
    train(config(data, out=str(run), stop_after=2, progress=False, steps=9))
    watch = TrainingMonitor("mine")
    said = re.search(r"continue with launch\((.*)\)", html.unescape(watch.header.value))[1]
    assert said == "TrainConfig(out='mine', resume=True)"
    assert monitor._placed(eval(said)).out == str(run)
    train(config(data, out=str(run), resume=True, progress=False, steps=9))
    assert not watch.update() and "finished" in watch.header.value
    assert "continue with" not in watch.header.value


def test_launch_refuses_what_train_would(data, tmp_path):
    with pytest.raises(BitbyteError, match="no training data"):
        launch(TrainConfig())
    with pytest.raises(BitbyteError, match="no complete checkpoint"):
        launch(config(data, out=str(tmp_path / "new"), resume=True))
    with pytest.raises(BitbyteError, match="no preset"):
        launch(config(data, preset="giant"))
    assert not (tmp_path / "new").exists()


def test_two_runs_of_one_second_get_two_folders(data, monkeypatch):
    monkeypatch.setattr(runs, "run_name", lambda config: "same-name")
    folders = {monitor._placed(config(data)).out for _ in range(3)}
    assert len(folders) == 3 and all(Path(folder).is_dir() for folder in folders)


def test_a_run_is_in_use_only_while_its_lock_is_held(tmp_path):
    assert not runs.in_use(tmp_path)
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from bitbyte.files import folder_lock
with folder_lock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n" and runs.in_use(tmp_path)
    child.communicate()
    assert not runs.in_use(tmp_path)
    with folder_lock(tmp_path):
        assert runs.in_use(tmp_path)


def test_launch_knows_data_below_the_project_and_refuses_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    (tmp_path / "mine.txt").write_bytes(bytes(4000))
    assert monitor._placed(TrainConfig(data="mine.txt")).data == str(tmp_path / "mine.txt")
    with pytest.raises(BitbyteError, match=r"yours\.txt: no such file or folder, and .*datasets"):
        launch(TrainConfig(data="yours.txt"))
    assert len([*(tmp_path / "artifacts" / "checkpoints").iterdir()]) == 1


def test_a_request_to_stop_is_written_through_no_link(tmp_path):
    """A stranger's folder may hold a link named STOP."""
    folder, target = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "STOP").symlink_to(target)
    run = Followed("run", folder)
    run.stopping = True
    with contextlib.suppress(BitbyteError), folder_lock(folder):
        monitor.look(run)
    assert not target.exists()
