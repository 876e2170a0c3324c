"""The commands train and plan.

Their options are the parameters of functions, which import heavy modules inside.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from bitbyte.cli.hints import named, next_step
from bitbyte.cli.options import Flat, Json
from bitbyte.config import PRESETS, TrainConfig, preset
from bitbyte.files import BitbyteError, artifacts, shown

SECTIONS = {  # headings in the help, by the option below them
    "family": "Model", "prior": "Tables of n-grams", "data": "Data", "steps": "Length and batches",
    "optimizer": "Optimizer", "dtype": "Computing", "out": "Run folder and progress",
}  # fmt: skip


def train(
    config: Annotated[TrainConfig, Flat()],
    like: str | None = None,
    smoke_test: bool = False,
    profile: bool = False,
) -> None:
    """Train a model on packed data or any file.

    For example: bitbyte train ar --data FOLDER --minutes 5

    Args:
        like: run, packed model or result record whose configuration to copy; other options
            override it.
        smoke_test: ten steps of the smallest model on synthetic bytes, on the CPU.
        profile: trace the steps between the first two rows of the log into the run folder, and
            print the ten costliest operations.
    """
    from bitbyte.data.readers import find_data
    from bitbyte.train import train as run

    if like is not None and config.resume:
        raise BitbyteError("--like starts a new run, --resume continues one; drop one of them")
    if config.parallel != "auto" and "WORLD_SIZE" not in os.environ and not config.resume:
        raise BitbyteError(
            f"--parallel {config.parallel} is for several processes: start them with torchrun "
            "--nproc_per_node=N -m bitbyte train ..., or use --parallel auto"
        )
    if smoke_test and profile:
        raise BitbyteError("--smoke_test is too short for --profile; drop one of them")
    if not smoke_test:
        for name in ("data", "val_data"):  # a path, or the name of a packed folder
            if getattr(config, name) is not None:
                place = str(find_data(getattr(config, name)).absolute())
                config = config.replace(**{name: place})
        profiler = _profiler(config) if profile else None
        result = run(config, _together(_with_plan(config), profiler))
        if profiler:
            profiler.end()
        if os.environ.get("RANK", "0") == "0":
            _report_training(result, Path(config.data or result.run))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "bytes.bin")
        data.write_bytes(bytes((i * i // 7 + i) % 251 for i in range(65536)))
        out = str(Path(folder, "run")) if config.out is None else config.out
        small = dataclasses.replace(
            config, preset="nano", seq_len=128, steps=10, minutes=None, epochs=None,
            curriculum=(), data=str(data), device="cpu", out=out,
        )  # fmt: skip
        result = run(small)
    print(f"smoke test passed: {result.step} steps, {result.bpb:.3f} bits per byte")


def _profiler(config: TrainConfig):
    from bitbyte.workbench.profiling import Profiler, check_length

    check_length(config)
    return Profiler()


def _together(plan, profiler):
    """One ``on_step`` of two, each of which may be None."""
    if profiler is None or plan is None:
        return profiler or plan

    def on_step(row: dict) -> None:
        profiler(row)

    def begin(run: Path) -> None:
        plan.begin(run)
        profiler.begin(run)

    on_step.begin = begin  # pyright: ignore
    return on_step


def _with_plan(config: TrainConfig):
    """What `train` calls as it begins: it prints the plan in one line; None where nobody reads."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not (config.progress and alone and config.data) or config.resume:
        return None
    from bitbyte.process import say
    from bitbyte.workbench.plan import line

    text = line(config)

    def on_step(row: dict) -> None:
        pass

    on_step.begin = lambda folder: say(text)  # pyright: ignore
    return on_step


def plan(
    config: Annotated[TrainConfig, Flat()],
    like: str | None = None,
    probe: float = 10.0,
    processes: int = 1,
    json: Json = False,
) -> dict:
    """Show what a training would take: memory, time, disk, BPB.

    For example: bitbyte plan ar --preset micro --data FOLDER --minutes 60

    It takes the options of train, and trains nothing.  The rate is measured by some steps on this
    machine; bits per byte come from curves through the records of earlier trainings.

    Args:
        like: run, packed model or result record whose configuration to copy; other options
            override it.
        probe: seconds of measuring; 0 measures nothing and shows no times.
        processes: that train together on this machine, as with torchrun --nproc_per_node.
    """
    from bitbyte.data.readers import find_data
    from bitbyte.workbench import plan as plans

    if config.resume:
        raise BitbyteError("a plan is for a new run; drop --resume")
    if not 0 <= probe < math.inf:
        raise BitbyteError(f"probe is {probe}; it must be at least 0 seconds")
    if processes < 1:
        raise BitbyteError(f"processes is {processes}; it must be at least 1")
    if processes == 1 and config.parallel != "auto":
        raise BitbyteError(
            f"--parallel {config.parallel} is for several processes: say how many by --processes N"
        )
    for name in ("data", "val_data"):
        if getattr(config, name) is not None:
            place = str(find_data(getattr(config, name)).absolute())
            config = config.replace(**{name: place})
    found = plans.make_plan(config, probe, processes)
    if not json:
        print(plans.text(found))
    return found


def config_like(name: str, named: Collection[str]) -> TrainConfig:
    """The configuration of a run, packed model or record, as the defaults of a new run.

    The new one sets the ``named`` fields.  Naming any budget (steps, epochs, minutes) drops the
    old budget, and naming seq_len or curriculum drops the old setting of window lengths.  Raises
    BitbyteError.
    """
    from bitbyte.evaluate.training import config_of

    stored, place = _stored_config(name)
    dropped = {"steps", "epochs", "minutes"} if {"steps", "epochs", "minutes"} & {*named} else set()
    dropped |= {"curriculum", "seq_len_cap"} if "seq_len" in named else set()
    dropped |= {"seq_len"} if "curriculum" in named else set()
    return config_of({k: v for k, v in stored.items() if k not in dropped - {*named}}, place)


def _stored_config(name: str) -> tuple[dict, str | Path]:
    """(configuration, where it was) of a run, from its newest step, or from run.json if none was
    saved; of a packed model; or of a record."""
    from bitbyte import checkpoint, runs
    from bitbyte.evaluate import listing
    from bitbyte.evaluate.records import find_record

    try:
        folder = runs.resolve(name)
        meta = checkpoint.read_meta(folder)
        stored, dtype = meta["train"], meta["extra"].get("dtype")
    except BitbyteError:
        if path := find_record(name):
            return _recorded_config(path), path
        if name.endswith(".json"):
            raise BitbyteError(
                f"there is no record {name}, neither here nor in {artifacts('results')}"
            ) from None
        folder = listing.find_run(name) / "run.json"
        if not folder.is_file():
            raise
        about = runs.read_facts(folder.parent)
        stored, dtype = about.get("config"), about.get("dtype")
    if not stored or not isinstance(stored, dict):
        raise BitbyteError(f"{folder} does not say how it was trained")
    # Keep what "auto" meant on that machine: it is part of the run's configuration.
    return stored | ({"dtype": dtype} if stored.get("dtype") == "auto" and dtype else {}), name


def _recorded_config(path: Path) -> dict:
    from bitbyte.evaluate.records import read_record

    kind, record = read_record(path)
    if kind != "evaluation":
        raise BitbyteError(f"{path} is not a result record of bitbyte eval, as --like needs")
    assert isinstance(record, dict)
    if not record.get("training"):
        raise BitbyteError(
            f"{path} does not say how the model was trained: it is a record of an earlier version, "
            "or of a model that bitbyte did not train; give the run, or the options"
        )
    return record["training"]["config"]


def presets() -> str:
    """The shapes that --preset names, for the help: one a line."""
    lines = ["Presets, as ar (layers x width, window in bytes, parameters):"]
    for name, (n_layer, d_model, _, seq_len) in PRESETS.items():
        n = preset(name).n_parameters
        lines.append(f"  {name:20}{n_layer:2} x {d_model:<5} {seq_len:5}  {n / 1e6:7,.2f} M")
    return "\n".join(["", *lines])


def _report_training(result, data: Path) -> None:
    exact = result.val_kind == "exact"
    sign, unit = ("", "bits per byte") if exact else ("<= ", "bits per masked byte")
    training = "" if math.isnan(result.bpb) else f", training {result.bpb:.4f} {unit}"
    val = "" if result.val_bpb is None else f", validation {sign}{result.val_bpb:.4f}"
    rate = result.bytes_seen / max(result.seconds, 1e-9) / 1000
    print(
        f"step {result.step}: {result.bytes_seen:,} bytes in {result.seconds:.0f} s "
        f"({rate:.1f} kB/s){training}{val}\n{shown(result.run)}"
    )
    name = named(result.run, "checkpoints")
    next_step(f"sample {name} --prompt 'The '", f"eval {name} --data {named(data, 'datasets')}")
