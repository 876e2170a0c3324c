"""Do all processes of a run end as they should?  Train under torchrun again and again, and count.

    python tests/tools/exit_rounds.py --rounds 25

tries every way to the end (the plan is done, a file STOP, SIGTERM to every process, SIGTERM to
torchrun) with 2 and with 3 processes, while another process keeps one core busy.  The threads of
gloo get the lowest priority, so that a race between them and the end of Python is lost often and
not once in fifty times.  Exit code 0 if every round was clean.  A short form is a test.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("plan", "stop", "term", "agent")
TINY = {
    "n_layer": 1, "d_model": 64, "d_ff": 64, "seq_len": 16, "batch_size": 2, "dtype": "fp32",
    "linear_kernel": "reference", "threads": 1, "device": "cpu", "log_every": 1,
}  # fmt: skip


def gloo_threads() -> list[int]:
    """Ids of the worker threads of gloo in this process; none where there is no /proc."""
    found = []
    for task in Path("/proc/self/task").glob("*"):
        if (task / "comm").read_text().startswith("pt_gloo"):
            found.append(int(task.name))
    return found


def be_rank(folder: str, lazy: str, arguments: list[str]) -> int:
    """What torchrun starts: ``bitbyte`` itself, perhaps lazy, that notes which threads are left."""
    import torch.distributed as dist

    from bitbyte.cli.dispatch import main

    def join(*args, **options):
        plain(*args, **options)
        dist.barrier()  # now the threads have their names
        for thread in gloo_threads() if lazy == "lazy" else ():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    plain, dist.init_process_group = dist.init_process_group, join
    note = Path(folder, "rank" + os.environ["RANK"])
    note.write_text(str(os.getpid()))
    code = main(arguments)
    note.write_text(f"{len(gloo_threads())} threads of gloo left")
    return code


def one_round(way: str, size: int, folder: Path, lazy: bool = False, limit: float = 120) -> str:
    """Train once in ``folder``, end it in the given way; what went wrong, or ""."""
    data, run, log = folder / "data.bin", folder / "run", folder / "log"
    data.write_bytes(bytes((i * i // 7 + i * 31) % 97 for i in range(8192)))
    steps = 6 if way == "plan" else 1_000_000
    options = [f"--{key}={value}" for key, value in TINY.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", __file__,
        "--rank", str(folder), "lazy" if lazy else "usual", "train", "ar",
        f"--data={data}", f"--out={run}", f"--steps={steps}", *options,
    ]  # fmt: skip
    with open(log, "wb") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file)
    end = time.monotonic() + limit
    while way != "plan" and not (run / "metrics.jsonl").exists() and agent.poll() is None:
        time.sleep(0.02)
        if time.monotonic() > end:
            break
    notes = [folder / f"rank{rank}" for rank in range(size)]
    if way == "stop":
        (run / "STOP").touch()
    elif way == "term":
        for note in notes:
            os.kill(int(note.read_text()), signal.SIGTERM)
    elif way == "agent":
        agent.terminate()
    try:
        code = agent.wait(limit)
    except subprocess.TimeoutExpired:
        agent.terminate()  # which ends the others too
        agent.wait()
        return f"no end after {limit:g} seconds"
    said = log.read_text("utf-8", "replace")
    left = [note.read_text() for note in notes]
    if way != "agent" and code != 0:  # torchrun itself calls it a failure to be told to end
        return f"exit code {code}: {said[-3000:]}"
    if "terminate called" in said:
        return said[-3000:]
    if left != ["0 threads of gloo left"] * size:
        return f"processes: {left}"
    return "" if list(run.glob("step_*/meta.json")) else "nothing was saved"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="of each way and size")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 3])
    choices = parser.parse_args()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    n_clean = n_all = 0
    try:
        for number in range(choices.rounds):
            for size in choices.sizes:
                for way in choices.ways:
                    with tempfile.TemporaryDirectory() as folder:
                        problem = one_round(way, size, Path(folder), lazy=True)
                    n_all += 1
                    n_clean += not problem
                    print(f"round {number}, {size} processes, {way}: {problem or 'clean'}")
                    sys.stdout.flush()
    finally:
        busy.kill()
        busy.wait()
    print(f"{n_clean} of {n_all} clean")
    return n_clean != n_all


if __name__ == "__main__":
    sys.exit(be_rank(*sys.argv[2:4], sys.argv[4:]) if sys.argv[1:2] == ["--rank"] else main())
