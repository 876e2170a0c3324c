"""Signals: what stops a run, what goes on, and that nothing half done is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import until

from bitbyte import process, runs, train
from bitbyte.cli.dispatch import main
from bitbyte.files import BitbyteError
from bitbyte.process import Terminated, interrupts, stoppable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX thing")
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture
def handlers():
    """Handlers that must not be called, and must be there again afterwards."""

    def unexpected(number, frame):
        raise AssertionError(f"signal {number} was not handled")

    numbers = [getattr(signal, name) for name in NAMES]
    before = {number: signal.signal(number, unexpected) for number in numbers}
    yield dict.fromkeys(numbers, unexpected)
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == dict.fromkeys(numbers, unexpected)


@pytest.mark.parametrize("name", NAMES)
def test_every_signal_is_collected(name, handlers):
    with interrupts() as seen:
        assert not seen
        send(name)
        send(name)  # launchers repeat them at once
        assert len(seen) == 2


@pytest.mark.parametrize(("terminal", "told"), [(True, [process.STOPPING]), (False, [])])
def test_ctrl_c_is_answered_once_on_a_terminal(terminal, told, handlers, monkeypatch):
    written = []
    monkeypatch.setattr(os, "isatty", lambda number: terminal)
    monkeypatch.setattr(os, "write", lambda number, text: written.append(text))
    with interrupts() as seen:
        send("SIGINT")
        send("SIGINT")
        assert len(seen) == 2
    assert written == told


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_stoppable_stops_once(name, handlers, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stoppable():
        with pytest.raises(Terminated):
            send(name)
        send(name)  # a terminal that closes sends two: the tidying goes on
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            send(name)


@pytest.mark.parametrize("handle", [interrupts, stoppable])
def test_a_hang_up_that_is_ignored_stays_so(handle):
    """That is what nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle() as seen:
            send("SIGHUP")
            assert not seen
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone(handlers):
    def work():
        with interrupts(), stoppable():
            done.append({number: signal.getsignal(number) for number in handlers})

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert done == [handlers]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_training_with_a_save(name, tmp_path, monkeypatch, capsys, handlers):
    step = train.Trainer._train_step

    def step_with_signal(session, *args):
        if session.step == 2:
            send(name)
        return step(session, *args)

    monkeypatch.setattr(train.Trainer, "_train_step", step_with_signal)
    (tmp_path / "data").write_bytes(bytes(range(256)) * 4)
    words = ["train", "ar", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    words += ["--n_layer=1", "--d_model=32", "--d_ff=32", "--n_head=2", "--seq_len=32"]
    assert main([*words, "--steps=9", "--device=cpu", "--linear=dense"]) == 0
    assert runs.latest_step(tmp_path / "run") == 3
    assert "--resume" in capsys.readouterr().err


def test_a_signal_ends_any_command_in_order(tmp_path, monkeypatch, capsys, handlers):
    """Here while a file is being written: its temporary goes."""
    real = os.fsync

    def fsync(handle):
        real(handle)
        send("SIGHUP")

    monkeypatch.setattr(os, "fsync", fsync)
    words = ["corpus", "stories", "--out", str(tmp_path / "x.json"), "--n_bytes", "1000"]
    assert main(words) == 130
    assert capsys.readouterr().err == "stopped\n" and not list(tmp_path.iterdir())


def test_a_tracker_writes_through_no_link(tmp_path):
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    watched = runs.tracker("tensorboard", tmp_path, {})
    with pytest.raises(BitbyteError, match="tensorboard is a link"), watched:
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_closed_terminal_marks_a_batch_run_as_stopped(tmp_path):
    pytest.importorskip("papermill")
    nbformat = pytest.importorskip("nbformat")
    cells = [
        nbformat.v4.new_code_cell("n = 1  # a number", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("open('started', 'w').close()\nimport time; time.sleep(600)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_slow.ipynb")
    process = subprocess.Popen(
        [sys.executable, "-m", "bitbyte", "run", "00_slow.ipynb", "--out", "run"], cwd=tmp_path,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until((tmp_path / "started").exists, process)
        process.send_signal(signal.SIGHUP)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "bitbyte run --resume" in said
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["notebooks"][0]["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "run" / "index.html").read_text("utf-8")
