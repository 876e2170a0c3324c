"""Saves under kills, failing system calls, power loss, full and read-only disks."""

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from support import CONFIG, assert_loads, exit_code, in_child, mount, save, save_run

from bitbyte import checkpoint, models, runs
from bitbyte.checkpoint import MODEL, OPTIM, SaveError
from bitbyte.files import BitbyteError, folder_lock
from bitbyte.runs import META

fcntl = pytest.importorskip("fcntl", reason="needs fork, rlimits and mounts")
resource = pytest.importorskip("resource")


def test_kill_nine(tmp_path):
    """15 kills between and during saves: nothing reported is lost, all that is visible loads."""
    rng, last, left = random.Random(0), 0, set()
    for _ in range(15):
        reader, writer = os.pipe()

        def save_for_ever(first=last + 1, writer=writer):
            with folder_lock(tmp_path):
                for step in range(first, first + 10**6):
                    save(tmp_path, step, keep_last=3)
                    os.write(writer, b"%d\n" % step)

        pid = in_child(save_for_ever)
        os.close(writer)
        with open(reader, "rb") as said:
            reported = [int(said.readline())]
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            assert exit_code(pid) == -signal.SIGKILL
            reported += map(int, said.read().split())
        left |= set(tmp_path.glob(".t*"))
        steps = runs.complete_steps(tmp_path)
        assert len(steps) == len(list(tmp_path.glob("step_*")))
        assert max(steps) >= max(reported)
        for step in steps:
            assert_loads(tmp_path / runs.step_name(step))
        last = max(steps)
    assert left, "no kill hit a save"
    with folder_lock(tmp_path):  # free at once, although its holder was killed
        runs.clean(tmp_path)
    assert not list(tmp_path.glob(".t*"))
    assert runs.read_pointer(tmp_path, "latest") == last


def test_two_processes_one_run(tmp_path):
    reader, writer = os.pipe()

    def hold():
        with folder_lock(tmp_path):
            os.write(writer, b"!")
            time.sleep(60)

    pid = in_child(hold)
    assert os.read(reader, 1) == b"!"
    with pytest.raises(BitbyteError, match=f"in use by pid {pid} on "), folder_lock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    with folder_lock(tmp_path):
        save(tmp_path, 1)


def traced(action, log: Path, *options: str) -> int:
    """Exit code of ``action`` in a child under strace; skips where tracing is not possible."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    reader, writer = os.pipe()

    def wait_and_act():
        os.read(reader, 1)
        action()

    pid = in_child(wait_and_act)
    command = [strace, "-y", "-s", "8", "-o", str(log), *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    first = tracer.stderr.readline()
    if "attached" not in first:
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
        pytest.skip(f"strace cannot attach: {first.strip()}")
    os.write(writer, b"!")
    code = exit_code(pid)
    tracer.communicate()
    os.close(reader)
    os.close(writer)
    return code


FAULTS = [
    (call, fault)
    for call, faults in {
        "write": ("error=ENOSPC", "error=EIO", "signal=KILL"),
        "fsync": ("error=EIO", "signal=KILL"),
        "/^rename": ("error=EIO", "signal=KILL"),
        "/^mkdir": ("error=ENOSPC", "signal=KILL"),
        "openat": ("error=EMFILE", "signal=KILL"),
        "close": ("error=EIO", "signal=KILL"),
    }.items()
    for fault in faults
]


@pytest.mark.parametrize(("call", "fault"), FAULTS)
def test_every_system_call_of_a_save_may_fail(tmp_path, call, fault):
    """The N-th write, fsync, ... of a save fails or kills, N = 1, 2, ... until none is left."""
    run, log = tmp_path / "run", tmp_path / "log"
    for number in range(1, 60):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        old, new = save(run, 1), run / runs.step_name(2)
        inject = f"inject={call}:{fault}:when={number}"
        code = traced(lambda: save(run, 2), log, "-e", f"trace={call}", "-e", inject)
        text = log.read_text()
        fired = "INJECTED" in text or "killed by SIGKILL" in text
        want = 0 if not fired else 3 if "error" in fault else -signal.SIGKILL
        # Some failures to close do not matter: those of folders that were listed.
        assert code == want or (code == 0 and call == "close" and new.exists()), text
        assert_loads(old)
        if new.exists():
            assert_loads(new)
        assert fired or new.exists()
        assert runs.latest_step(run) == (2 if new.exists() else 1)
        if code == 3:
            assert not list(run.glob(".tmp-*")), text
        runs.clean(run)
        if not new.exists():
            assert_loads(save(run, 2))
        if not fired:
            break
    assert (
        number
        > {"write": 4, "fsync": 7, "/^rename": 2, "/^mkdir": 1, "openat": 8, "close": 8}[call]
    )


def test_order_of_system_calls(tmp_path):
    """All files are on the disk before the step has its name, and the name before `latest`."""
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    assert traced(lambda: save(run, 1), log, "-e", "trace=write,fsync,/^rename") == 0
    events = []
    for line in log.read_text().splitlines():
        call = line.partition("(")[0]
        paths = [Path(p) for p in re.findall(r'[<"](/[^>"]*)[>"]', line)]
        if call == "fsync" or call.startswith("rename"):
            name = f"step/{paths[0].name}" if ".tmp-step" in paths[0].parent.name else paths[0].name
            events.append((call[:6], re.sub(r"-\d+$", "", name)))
        elif call == "write" and paths and run in paths[0].parents:
            events.append(("write", paths[0].name))
    written = [("write", MODEL), ("write", OPTIM), ("write", META)]
    assert [e for e in events if e in written] == written
    assert [e for e in events if e[0] != "write"] == [
        ("fsync", f"step/{MODEL}"), ("fsync", f"step/{OPTIM}"), ("fsync", f"step/{META}"),
        ("fsync", ".tmp-step_0000001"), ("rename", ".tmp-step_0000001"), ("fsync", "run"),
        ("fsync", ".tmp-latest"), ("rename", ".tmp-latest"), ("fsync", "run"),
    ]  # fmt: skip
    for name in (MODEL, OPTIM, META):
        assert events.index(("write", name)) < events.index(("fsync", f"step/{name}"))


@pytest.mark.root
@pytest.mark.parametrize("synced", [True, False])
def test_power_loss(tmp_path, synced, monkeypatch):
    """The disk stops at once, its journal unwritten, and comes back: saved steps are there.

    Without fsync they are not, although another program's fsync wrote the journal: the control.
    """
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mount("-o", "loop", image, place)
    fsync = os.fsync
    try:
        save(place, 1)
        if not synced:
            monkeypatch.setattr(os, "fsync", lambda handle: None)
        save(place, 2)
        if not synced:
            with open(place / "other", "wb") as other:
                fsync(other.fileno())
        handle = os.open(place, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, 0x8004587D, struct.pack("I", 2))  # shut down, write no journal
        except OSError as error:
            pytest.skip(f"this disk cannot be shut down: {error}")
        finally:
            os.close(handle)
        subprocess.run(["umount", place], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        assert_loads(place / "step_0000001")
        if synced:
            assert_loads(place / "step_0000002")
            assert runs.latest_step(place) == 2
        else:
            with pytest.raises(BitbyteError):
                assert_loads(place / "step_0000002")
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
def test_full_disk(small_disk, capsys):
    save(small_disk, 1, rows=1500)  # 384 kB
    assert "warning" not in capsys.readouterr().err
    save(small_disk, 2, rows=1500)
    with pytest.raises(SaveError) as caught:
        save(small_disk, 3, rows=1500)
    assert str(caught.value) == (
        f"cannot save step 3: No space left on device (ENOSPC); last good: step 2 in {small_disk}"
    )
    assert isinstance(caught.value, OSError) and caught.value.errno == 28
    assert sorted(p.name for p in small_disk.iterdir()) == [
        "latest",
        "step_0000001",
        "step_0000002",
    ]
    for step in (1, 2):
        assert_loads(small_disk / runs.step_name(step), rows=1500)
    folder = save(small_disk, 3, rows=1500, keep_last=2)  # makes room and tries again
    assert "saving step 3 again" in capsys.readouterr().err
    assert_loads(folder, rows=1500)
    assert runs.complete_steps(small_disk) == [2, 3]


@pytest.mark.root
def test_full_disk_on_the_first_save(small_disk, capsys):
    with pytest.raises(SaveError, match="last good: none"):
        save(small_disk, 1, rows=5000)
    assert "1,048,576 bytes are free" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


@pytest.mark.root
def test_full_disk_while_logging(small_disk):
    runs.append_metrics(small_disk, {"step": 1})
    (small_disk / "fill").write_bytes(bytes(2**20 - 4096))
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 1000):
            runs.append_metrics(small_disk, {"step": step, "text": "x" * 99})
    assert [row["step"] for row in runs.read_metrics(small_disk)] == list(range(1, step))
    (small_disk / "fill").unlink()
    runs.append_metrics(small_disk, {"step": step})
    assert runs.read_metrics(small_disk)[-1] == {"step": step}


@pytest.mark.root
def test_read_only_disk(small_disk):
    folder = save(small_disk, 1)
    save_run(small_disk, models.build(CONFIG), 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveError, match=r"Read-only file system \(EROFS\); last good: step 2"):
        save(small_disk, 3)
    assert_loads(folder)
    assert checkpoint.load_model(small_disk)[1]["step"] == 2


def test_a_short_write_leaves_no_half_line(tmp_path):
    runs.append_metrics(tmp_path, {"step": 1})
    size = (tmp_path / "metrics.jsonl").stat().st_size

    def write_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, size + 5))
        runs.append_metrics(tmp_path, {"step": 2})

    assert exit_code(in_child(write_too_much)) == 3
    runs.append_metrics(tmp_path, {"step": 3})
    assert runs.read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_metrics_are_one_write_a_line(tmp_path):
    log = tmp_path / "log"
    rows = [{"step": step, "text": "x" * 20_000} for step in range(3)]

    def act():
        for row in rows:
            runs.append_metrics(tmp_path, row)

    assert traced(act, log, "-e", "trace=write,openat") == 0
    lines = [line for line in log.read_text().splitlines() if "metrics.jsonl" in line]
    assert sum(line.startswith("write") for line in lines) == 3
    assert all("O_APPEND" in line for line in lines if line.startswith("openat"))
