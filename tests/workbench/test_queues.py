"""Grids on real queues: a Slurm cluster of two nodes on this machine, and Ray; with kills."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A cluster of two nodes, n1 and n2, without systemd."""
    lacking = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name)]
    if lacking or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip(f"needs root and {', '.join(lacking) or 'nothing else'}")
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed")
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
    monkeypatch.setenv("SLURM_CONF", str(conf))
    munge = f"--socket={folder}/munge.socket"
    daemons = [
        ["munged", "--foreground", "--force", munge, f"--key-file={folder}/key",
         f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
         f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n2", "-f", str(conf)],
    ]  # fmt: skip
    started = []
    try:
        for words_ in daemons:
            started.append(subprocess.Popen(
                words_, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ))  # fmt: skip
            if words_[0] == "munged":
                until((folder / "munge.socket").exists, started[-1])

        def ready() -> bool:
            time.sleep(0.2)
            told = subprocess.run(
                ["sinfo", "--noheader", "--format=%T %D"], check=False, capture_output=True
            )
            return told.stdout.split() == [b"idle", b"2"]

        until(ready, started[1])
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        queue = ["squeue", "--noheader"]
        for _ in range(50):  # else steps outlive their daemons
            if not subprocess.run(queue, check=False, capture_output=True).stdout:
                break
            time.sleep(0.2)
        for process in reversed(started):  # a slurmd may wait for its controller for long
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_with_kills(grid, on: str, *words_: str) -> str:
    """Run the grid, kill the first two workers that train; what the command says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitbyte", "grid", "grid.json", "--on", on, *words_],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    killed = set()
    for _ in range(2):

        def running() -> list[int]:
            found = [c for c in grid.cells if (claims.state_of(c).progress or 0) > 0]
            pids = {claims.newest_claim(cell)[1]["pid"] for cell in found}
            return [pid for pid in pids if pid not in killed | {0}]

        until(running, process)
        pid = running()[0]
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
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


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_on_ray(grid):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    said = run_with_kills(grid, "ray:2", "--queue", "num_cpus=1")
    assert_complete(grid)
    assert "12 of 12 done" in said
