"""Compare what `bitbyte plan` predicts with what training then takes, on ten runs.

    python tests/tools/predictions.py           # minutes, on a machine that does nothing else
    python tests/tools/predictions.py --table   # from the record, without running anything

Writes artifacts/results/plan-cpu.json of this checkout, and the table in docs/scale.md.  The data
are packed folders, by path or by name: --data, and --small, whose n-grams are soon counted.
Prediction and training are processes of their own.  Times in the table are of the processor (all
threads), which other work on the machine changes little; wall times are recorded too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitbyte.config import TrainConfig
from bitbyte.data.readers import find_data
from bitbyte.device import environment
from bitbyte.evaluate.tables import write_between
from bitbyte.files import to_json, write_atomic

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "artifacts" / "results" / "plan-cpu.json"
PAGE = ROOT / "docs" / "scale.md"
THREADS = 1
COMMON = {
    "device": "cpu",
    "threads": THREADS,
    "progress": False,
    "log_every": 1,
    "eval_bytes": 16384,
    "steps": 24,
}
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


def table(record: dict) -> str:
    """The record as Markdown: predicted / what then happened."""
    lines = [
        "| run | processor time of a step | ratio | memory | ratio | disk | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["runs"]:
        said, was, ratio = row["predicted"], row["happened"], row["ratio"]
        cells = [
            name_of(row["run"]),
            f"{1000 * said['cpu']:.0f} / {1000 * was['cpu']:.0f} ms", f"{ratio['cpu']:.2f}",
            f"{said['memory'] / 1e6:.0f} / {was['memory'] / 1e6:.0f} MB", f"{ratio['memory']:.2f}",
            f"{said['disk'] / 1e6:.1f} / {was['disk'] / 1e6:.1f} MB", f"{ratio['disk']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    wall = [row["ratio"]["wall"] for row in record["runs"]]
    loads = [row["load"] for row in record["runs"] if "load" in row]
    about = record["environment"]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    lines += ["", f"{about['cpu']}, {threads}, PyTorch {about['versions']['torch']}. "
              f"Ratios of wall times: {min(wall):.2f} to {max(wall):.2f}"]  # fmt: skip
    if loads:
        lines[-1] += f", at a load of {min(loads):.1f} to {max(loads):.1f} before each run"
    return "\n".join(lines) + "."


def name_of(run: dict) -> str:
    name = f"{run.get('family', 'ar')} {run['preset']} {run['linear']}"
    if "batch_size" in run:
        name += f", {run['batch_size']} windows"
        name += f" x {run['grad_accum']}" if "grad_accum" in run else ""
    return name + (", tables" if run["prior"] == "counts" else "")


def measure(data: str, small: str) -> dict:
    rows = []
    for chosen in RUNS:
        fields = chosen | {"data": small if chosen["prior"] == "counts" else data}
        row: dict = {"run": chosen, "load": os.getloadavg()[0]}
        row |= {"predicted": child("plan", fields), "happened": child("train", fields)}
        row["ratio"] = {k: row["predicted"][k] / v for k, v in row["happened"].items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
    about = environment() | {"threads": THREADS}
    return {"format": "predictions 1", "runs": rows, "environment": about}


def main() -> None:
    if sys.argv[1:2] in (["plan"], ["train"]):
        work = {"plan": plan, "train": train}[sys.argv[1]]
        print(json.dumps(work(TrainConfig(**COMMON | json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="enwik8")
    parser.add_argument("--small", default="tinyshakespeare")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args()
    if not options.table:
        folders = [str(find_data(name).absolute()) for name in (options.data, options.small)]
        write_atomic(RECORD, to_json(measure(*folders)), follow=True)
    write_between(PAGE, "predictions", table(json.loads(RECORD.read_bytes())))


if __name__ == "__main__":
    main()
