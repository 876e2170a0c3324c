"""Grids on real queues: a Slurm cluster of two nodes on this machine, and Ray; with kills."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, until, words

from bitbyte.workbench import claims
from bitbyte.workbench.grid import read_grid, records_of

FIXED = {
    "n_layer": 1, "d_model": 32, "seq_len": 32, "batch_size": 2, "steps": 60, "device": "cpu",
    "threads": 1, "log_every": 1, "save_every": 10,
}  # fmt: skip
SPEC = {
    "command": "train", "grid": {"linear": ["ternary", "dense"], "seed": [0, 1, 2, 3, 4, 5]},
    "eval": {"limit": 1000},
}  # fmt: skip
CONF = """\
ClusterName=grid
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,sched_min_interval=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={control}
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""

# Ends the cluster if the process that should do so is killed: then nobody says that all is done.
GUARD = "read said && exit; sleep 3; scancel --user=root; sleep 15; kill $*; sleep 5; kill -9 $*"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of twelve cells; its file is grid.json in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    Path("text.bin").write_bytes(words(3000))
    fixed = FIXED | {"data": "text.bin"}
    Path("grid.json").write_text(json.dumps(SPEC | {"fixed": fixed}))
    return read_grid("grid.json")


def free_ports(n: int) -> list[int]:
    """Neighboring ports that are free now."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        try:
            for k in range(1, n):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port + k))
        except OSError:
            continue
        return [port + k for k in range(n)]


def starts(condition: Callable[[], object], process: subprocess.Popen) -> bool:
    """Whether it holds within a minute, while the process lives."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


def answer(*command: str) -> list[bytes]:
    """Words that a command of Slurm prints; none if it fails, or hangs for want of a controller."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.split()


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A cluster of two nodes, n1 and n2, without systemd; beside one that may be running."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch")
    lacking = [name for name in needed if not shutil.which(name)]
    if lacking:
        pytest.skip(f"no {', '.join(lacking)} here; on Debian: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("the daemons of Slurm need root")
    if importlib.util.find_spec("submitit") is None:
        pytest.skip('submitit is not installed; pip install "bitbyte[slurm]"')
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("slurm")))
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    control, first, last = free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(
        folder=folder, host=socket.gethostname(), control=control, first=first, last=last
    ))  # fmt: skip
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(conf))
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
         f"--key-file={folder}/key", f"--pid-file={folder}/munge.pid",
         f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n2", "-f", str(conf)],
    ]  # fmt: skip
    started, guard = [], None
    try:
        for words_ in daemons:
            started.append(subprocess.Popen(
                words_, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ))  # fmt: skip
            if len(started) == 1 and not starts((folder / "munge.socket").exists, started[0]):
                pytest.skip(f"munge does not start here: {last_words(folder, 'munge.log')}")
        pids = [str(process.pid) for process in started]
        guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", *pids], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        idle = [b"idle", b"2"]
        if not starts(lambda: answer("sinfo", "-h", "--format=%T %D") == idle, started[1]):
            logs = ("ctld.log", "slurmd-n1.log")
            said = "; ".join(f"{name}: {last_words(folder, name)}" for name in logs)
            pytest.skip(f"Slurm does not start here: {said}")
        yield folder
    finally:
        if len(started) == len(daemons) and started[1].poll() is None:
            answer("scancel", "--user=root")
            for _ in range(50):  # else steps outlive their daemons
                if not answer("squeue", "-h"):
                    break
                time.sleep(0.2)
        for process in reversed(started):  # a slurmd may wait for its controller for long
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if guard:
            guard.communicate(b"done\n")


def last_words(folder: Path, name: str) -> str:
    """The last line of a log, if there is one."""
    path = folder / name
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "no log"


def kill_one(grid, killed: set[int]) -> bool:
    """Kill a worker that trains and is not among the ``killed``; whether there was one."""
    for cell in grid.cells:
        state = claims.state_of(cell)
        if state.state != "running" or not state.progress:
            continue
        pid = claims.newest_claim(cell)[1]["pid"]
        if not pid or pid in killed:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # it may have finished the cell since
            caught = claims.state_of(cell).state == "running"
            os.kill(pid, signal.SIGKILL if caught else signal.SIGCONT)
            if caught:
                killed.add(pid)
                return True
    return False


def run_with_kills(grid, on: str, *words_: str) -> str:
    """Run the grid, kill two workers as they train; what the command says."""
    ending = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # with this one
    process = subprocess.Popen(
        [*ending, sys.executable, "-m", "bitbyte", "grid", "grid.json", "--on", on, *words_],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    killed: set[int] = set()
    try:
        for _ in range(2):
            until(lambda: kill_one(grid, killed), process, seconds=300)
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def assert_complete(grid) -> None:
    """Each cell has one record; some had to be taken up again."""
    assert [claims.state_of(cell).state for cell in grid.cells] == ["done"] * 12
    assert len(records_of(grid.folder)) == 12
    assert sum(claims.newest_claim(cell)[0] > 1 for cell in grid.cells) in (1, 2)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_grid_on_slurm(grid, slurm):
    said = run_with_kills(grid, "slurm:4", "--queue", "timeout_min=10", "--queue=cpus_per_task=1")
    assert_complete(grid)
    assert "12 of 12 done" in said
    logs = "".join(path.read_text() for path in (grid.folder / "logs").glob("*.sh"))
    assert "#SBATCH --array=0-3%4" in logs and "#SBATCH --time=10" in logs
    nodes = {f"n{k}" for k in (1, 2) if "Launching batch job" in
             (slurm / f"slurmd-n{k}.log").read_text()}  # fmt: skip
    assert nodes == {"n1", "n2"}


@pytest.fixture
def ray_folder(monkeypatch):
    """The folder of a Ray of the test's own; its path is short, as sockets lie deep in it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('ray is not installed; pip install "bitbyte[ray]"')
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_on_ray(grid, ray_folder):
    try:
        said = run_with_kills(grid, "ray:2", "--queue", "num_cpus=1")
    except AssertionError as error:
        if "Ray did not start" in str(error):  # its processes have half a minute, whatever the load
            pytest.skip(str(error))
        raise
    assert_complete(grid)
    assert "12 of 12 done" in said
    assert list(ray_folder.glob("ray/session_*"))
