"""Compare what `bitbyte plan` predicts with what training then takes, on ten runs.

    python tests/tools/predictions.py DATA SMALL_DATA OUT.json

DATA is a packed folder, SMALL_DATA one whose n-grams are soon counted.  Prediction and training are
processes of their own.  Times are of the processor (all threads), which other work on the machine
changes little; wall times are recorded too.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitbyte.config import TrainConfig
from bitbyte.device import environment
from bitbyte.files import to_json, write_atomic

COMMON = {"device": "cpu", "progress": False, "log_every": 1, "eval_bytes": 16384, "steps": 24}
RUNS = [
    {"preset": "nano", "linear": "ternary", "prior": "none"},
    {"preset": "nano", "linear": "dense", "prior": "none"},
    {"preset": "tiny", "linear": "ternary", "prior": "none"},
    {"preset": "tiny", "linear": "dense", "prior": "none", "batch_size": 16},
    {"preset": "micro", "linear": "ternary", "prior": "none"},
    {"preset": "micro", "linear": "dense", "prior": "none", "batch_size": 4, "grad_accum": 2},
    {"family": "mamba", "preset": "nano", "linear": "ternary", "prior": "none"},
    {"family": "mamba", "preset": "tiny", "linear": "dense", "prior": "none"},
    {"family": "diffusion", "preset": "tiny", "linear": "ternary", "prior": "none"},
    {"preset": "nano", "linear": "ternary", "prior": "counts"},
]


def plan(config: TrainConfig) -> dict:
    from bitbyte.workbench.plan import make_plan

    found = make_plan(config, 8.0)
    when = found["time"]
    disk, total = found["disk"]["total"], found["memory"]["total"]
    return {"cpu": when["step_cpu"], "wall": when["step"], "memory": total, "disk": disk}


def train(config: TrainConfig) -> dict:
    from bitbyte.train import train as run

    cpu, wall = [], []

    def note(row: dict) -> None:
        cpu.append(time.process_time())
        wall.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        result = run(config.replace(out=f"{folder}/run"), note)
        files = [p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()]
    # The last row comes after validation.
    steps = len(cpu) - 2
    return {
        "cpu": (cpu[-2] - cpu[0]) / steps, "wall": (wall[-2] - wall[0]) / steps,
        "memory": result.metrics[-1]["memory"], "disk": sum(files),
    }  # fmt: skip


def child(what: str, fields: dict) -> dict:
    words = [sys.executable, __file__, what, json.dumps(fields)]
    return json.loads(subprocess.check_output(words, text=True).splitlines()[-1])


def main() -> None:
    if sys.argv[1] in ("plan", "train"):
        work = {"plan": plan, "train": train}[sys.argv[1]]
        print(json.dumps(work(TrainConfig(**COMMON | json.loads(sys.argv[2])))))
        return
    data, small, out = sys.argv[1:]
    rows = []
    for chosen in RUNS:
        fields = chosen | {"data": small if chosen["prior"] == "counts" else data}
        row: dict = {"run": chosen}
        row |= {"predicted": child("plan", fields), "happened": child("train", fields)}
        row["ratio"] = {k: row["predicted"][k] / v for k, v in row["happened"].items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
    write_atomic(Path(out), to_json({
        "format": "predictions 1", "runs": rows, "environment": environment(),
    }), follow=True)  # fmt: skip


if __name__ == "__main__":
    main()
