"""What a training run will take, before it starts: memory, time, disk, and bits per byte.

Memory is computed by part.  What a forward pass keeps for the backward pass is measured on one and
two layers and windows, and continued to the rest, as it grows evenly with both.  The rate is
measured, on this machine, by steps of the run itself, which also show the memory that they take.
Bits per byte come from the curves of `evaluate.scaling`.
"""

import dataclasses
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch

from bitbyte import models, ngrams, scoring
from bitbyte.bitlinear import Linear
from bitbyte.config import ModelConfig, TrainConfig
from bitbyte.device import (
    choose_device,
    choose_dtype,
    memory,
    peak_memory,
    prepare_process,
    settings_kept,
)
from bitbyte.distributed import World, needs_shares
from bitbyte.evaluate.records import read_records
from bitbyte.evaluate.scaling import curves
from bitbyte.files import BitbyteError, artifacts, user_path
from bitbyte.shards import manifest_of, open_dataset
from bitbyte.train import Trainer, check_trained_tables
from bitbyte.workbench.runner import clock

PROBE_SECONDS = 10.0
OTHER_SECONDS = 3.0  # for each other preset
WARM_STEPS = 2  # of a probe, not measured
COUNT_BYTES = 1 << 20  # on which the counting of n-grams is timed
LIBRARIES = 270 << 20  # bytes that training brings into a process on a CPU: code, engine, buffers
ALLOCATOR = 1.3  # memory of activations, over their own size: fragments, and what backward needs
SPARE = 0.9  # share of the free memory that a run may take
HOW = {"ddp": "ddp: all weights in each", "fsdp2": "fsdp2: weights in shares"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory that a training process takes, by part; of several, the one that saves."""

    process: int  # Python and its libraries; 0 on CUDA, where they are in other memory
    weights: int
    gradients: int
    optimizer: int
    tables: int  # n-grams: counted ones for every fold, trained ones in float32
    activations: int  # kept for the backward pass of one micro-batch
    work: int  # the optimizer's, at most
    counting: int  # of n-grams, before the training
    checkpoint: int  # all weights and all of the optimizer's state, as a save has them
    gathered: int = 0  # fsdp2: whole weights and gradients of the blocks at hand
    whole: int = 0  # fsdp2: all weights, at the start, in validation, and while saving

    @property
    def total(self) -> int:
        """The most at any time: see `moment`; counting, in the backward pass, in the optimizer."""
        fixed = self.process + self.weights + self.tables
        step = self.gradients + self.optimizer
        step += max(self.activations + self.gathered, self.work)
        return max(self.moment, fixed + max(step, self.counting))

    @property
    def moment(self) -> int:
        """While a process has all weights beside its share; 0 unless they are in shares."""
        if not self.whole:
            return 0
        return self.process + self.weights + self.tables + self.optimizer + self.whole


def memory_of(config: TrainConfig, n_bytes: int, process: int = 0, processes: int = 1) -> Memory:
    """What a run with a resolved prior (`with_prior`) on ``n_bytes`` of data needs by part.

    ``process`` is that of the process itself, before there is a model; ``processes`` train
    together.
    """
    device = choose_device(config.device)
    shape = config.model_config()
    P = shape.n_parameters
    small = models.build(_with_layers(shape, min(1, shape.n_layer)))
    matrices, largest = _matrices(small, shape.n_layer)
    optimizer = _optimizer(config, P, matrices)
    weights, state, gathered, whole = P, optimizer, 0, 0
    if mode_of(config, processes) == "fsdp2":
        weights, own, block, root = _share_of(small, shape.n_layer, processes)
        state = _optimizer(config, weights, own)
        # In the backward pass: a block, the next one already, the gradients of one and their copy
        # to be summed; and what is in no block, with its gradients.
        gathered = 4 * (4 * block + 2 * root)
        # On a CPU the main process saves from the memory that it trains in.
        whole = 4 * P + optimizer if device.type == "cpu" else 4 * P
    wide = config.deterministic or (
        device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    )
    work = largest * (12 + 3 * (4 if wide else 2)) if config.optimizer == "muon" else 0
    tables = counting = 0
    if shape.prior == "counts":
        folds = ngrams.folds_for(n_bytes)
        tables = (folds + 2) * shape.table_bytes  # of the folds, of all data, and to score with
        # Counts of one context by fold, and eight arrays as large as those of a fold to work with.
        counting = (folds + 8) * shape.prior_rows * 256 * 4
    trained = shape.trained_table_bytes if config.table_rate else 0
    tables = max(tables, shape.table_bytes) + trained
    return Memory(
        process=process, weights=4 * weights, gradients=4 * weights, optimizer=state,
        tables=tables, 
        activations=round(ALLOCATOR * activations(config, device)), work=work, counting=counting,
        checkpoint=4 * P + optimizer + shape.table_bytes + trained, gathered=gathered, whole=whole,
    )  # fmt: skip


def mode_of(config: TrainConfig, processes: int) -> str:
    """How that many processes would train: none, ddp or fsdp2; see `distributed.parallel_mode`."""
    if processes == 1:
        return "none"
    if config.parallel != "auto":
        return config.parallel
    n, device = config.model_config().n_parameters, choose_device(config.device)
    return "fsdp2" if needs_shares(n, processes, device) else "ddp"


def _optimizer(config: TrainConfig, parameters: int, matrices: int) -> int:
    """Bytes of the optimizer's state for these, of which so many are numbers in matrices."""
    if config.optimizer == "muon":
        return 4 * matrices + 8 * (parameters - matrices)
    return {"adamw": 8, "adamw8bit": 2}[config.optimizer] * parameters


def _share_of(small: torch.nn.Module, n_layer: int, n: int) -> tuple[int, int, int, int]:
    """(a process's numbers, those in matrices, a block's, those in no block), of n processes.

    PyTorch divides every parameter by rows, and pads where they do not divide.
    """
    matrices = {m.weight for m in small.modules() if isinstance(m, Linear)}
    share = own = block = root = 0
    for name, p in small.named_parameters():
        inside = ".blocks." in name
        rows = -(-p.shape[0] // n) if p.ndim else 1
        part = rows * (p.numel() // max(1, p.shape[0])) * (n_layer if inside else 1)
        share += part
        own += part if p in matrices else 0
        block += p.numel() if inside else 0
        root += 0 if inside else p.numel()
    return share, own, block, root


def _with_layers(shape: ModelConfig, n: int) -> ModelConfig:
    return dataclasses.replace(shape, n_layer=n)


def _matrices(small: torch.nn.Module, n_layer: int) -> tuple[int, int]:
    """(numbers in matrices, in the largest set of one shape) of a model, from one of one layer."""
    sizes: dict[tuple, int] = {}
    total = 0
    for name, module in small.named_modules():
        if isinstance(module, Linear):
            n = module.weight.numel() * (n_layer if ".blocks." in name else 1)
            rows = module.weight.shape[0] // module.groups
            sizes[rows, module.weight.shape[1]] = sizes.get((rows, module.weight.shape[1]), 0) + n
            total += n
    return total, max(sizes.values(), default=0)


def _resident() -> int:
    """Bytes of memory that this process has now; where that is unknown, what is usual."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096
    return 400 << 20


def activations(config: TrainConfig, device: torch.device) -> int:
    """Bytes that a forward pass of one micro-batch keeps for its backward pass.

    They grow linearly with layers and with windows, so four small passes suffice.
    With checkpointing of gradients a block's inputs are kept, and one block is computed again.
    """
    shape, batch = config.model_config(), config.batch_size

    def at(n: int, b: int) -> float:
        return _kept(config, _with_layers(shape, n), b, device, config.grad_checkpoint)

    layers = [1, 2] if shape.n_layer > 2 else [shape.n_layer]
    windows = [1, 2] if batch > 2 else [batch]
    by_window = []
    for b in windows:
        kept = [at(n, b) for n in layers]
        by_window.append(_line(kept, shape.n_layer))
    total = _line(by_window, batch)
    if config.grad_checkpoint and shape.n_layer:
        whole = _kept(config, _with_layers(shape, 1), 1, device, False)
        total += batch * (whole - at(1, 1))
    return round(total)


def _line(values: list[float], n: int) -> float:
    """The value at ``n`` of what has these values at 1 and 2; a single value is at ``n``."""
    return values[0] if len(values) == 1 else values[0] + (n - 1) * (values[1] - values[0])


def _kept(
    config: TrainConfig, shape: ModelConfig, batch: int, device: torch.device, again: bool
) -> int:
    """Bytes of the tensors, but for weights, that a forward pass keeps."""
    model = models.build(shape).to(device).train()
    model.body.grad_checkpoint = again
    attention = config.attention if config.use_sdpa else "plain"
    models.use_kernels(model, attention, config.linear_kernel, config.scan)
    fold_BT = None
    if model.prior is not None:
        model.prior.fold_codes = model.prior.codes[None]
        fold_BT = torch.zeros((batch, shape.seq_len), dtype=torch.int64, device=device)
    ours = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep the graph, and the graph it, forever

    ids_BT = torch.zeros((batch, shape.seq_len), dtype=torch.uint8, device=device)
    dtype = choose_dtype(config.dtype, device)
    noise_B = torch.arange(batch, device=device)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        loss = model(ids_BT, noise_B, fold_BT).mean()
    del loss
    return sum(kept.values())


def available(config: TrainConfig) -> int:
    """Bytes of memory that a run may take: free now, on the device it would run on."""
    device = choose_device(config.device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    return memory()


def that_fits(
    config: TrainConfig, n_bytes: int, limit: int, process: int = 0, processes: int = 1
) -> tuple[TrainConfig, Memory] | None:
    """The same run in ``limit`` bytes: smaller micro-batches, more of them, then checkpointing.

    The batch of a step stays as it is, and with it the result, but for the earlier diffusion scheme
    (``diffusion_steps``), whose weights depend on the micro-batch.  None: not even that fits.
    """
    for again in sorted({config.grad_checkpoint, True}):
        batch, accum = config.batch_size, config.grad_accum
        while True:
            changed = config.replace(batch_size=batch, grad_accum=accum, grad_checkpoint=again)
            needed = memory_of(changed, n_bytes, process, processes)
            if needed.total - process <= SPARE * limit:
                return changed, needed
            if batch % 2:
                break
            batch, accum = batch // 2, accum * 2
    return None


# --- time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """What a probe has measured."""

    step: float  # seconds of an optimizer step
    cpu: float  # seconds of processor time of one, over all threads
    n_bytes: int  # trained on in a step
    steps: int  # measured
    score: float  # seconds that scoring a byte takes
    count: float  # seconds that counting n-grams will take
    memory: int | None  # peak of this process (on CUDA, of the device) in bytes

    @property
    def bytes_per_second(self) -> float:
        return self.n_bytes / self.step


def probe(config: TrainConfig, seconds: float = PROBE_SECONDS) -> Rate:
    """Train a few steps of the run, for at most about ``seconds``, writing nothing.

    Raises BitbyteError and RunError as `train` does.
    """
    with settings_kept():
        prepare_process(config.threads, config.deterministic)
        device = choose_device(config.device)
        session = Trainer(config.replace(tracker=None), Path("no run"), World(device=device))
        count = _give_empty_tables(session)
        T = session.model.config.seq_len
        begin, times, cpu = time.perf_counter(), [], []
        while len(times) <= WARM_STEPS or time.perf_counter() - begin < seconds:
            start, busy = time.perf_counter(), time.process_time()
            session._train_step(T, 0)
            session.step += 1
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
            if session.steps and session.step >= session.steps and len(times) > WARM_STEPS:
                break
        # The median: a pause of the machine is not the run's.
        times, cpu = sorted(times[WARM_STEPS:]), sorted(cpu[WARM_STEPS:])
        score = 0.0
        if session.val:
            n = min(session.val.n_bytes, config.eval_bytes, 32 * T)
            options = {"window": T, "dtype": session.dtype, "stop": n, "draws": 1}
            score = scoring.score(session.model, session.val, **options, progress=False).seconds / n
        return Rate(
            step=times[len(times) // 2], cpu=cpu[len(cpu) // 2], n_bytes=session.global_batch * T,
            steps=len(times), score=score, count=count, memory=peak_memory(device),
        )  # fmt: skip


def _give_empty_tables(session: Trainer) -> float:
    """Tables of zeros for a model with a prior; seconds that counting the real ones will take."""
    prior, data = session.model.prior, session._train_data
    if prior is None or session.config.prior == "learned":
        return 0.0
    folds = ngrams.folds_for(data.n_bytes)
    prior.fill(
        torch.zeros((folds + 1, *prior.codes.shape), dtype=torch.uint8),
        torch.zeros(prior.scale.shape),
    )
    c = session.model.config
    some = min(data.n_bytes, COUNT_BYTES)
    ngrams.count(data.read, some, 1, 2, folds)  # compiles it, where numba is
    begin = time.perf_counter()
    counts_FRV = ngrams.count(data.read, some, c.prior_orders, c.prior_rows, folds)
    each = time.perf_counter() - begin
    begin = time.perf_counter()
    ngrams.low_rank(counts_FRV, c.prior_rank)
    rest = time.perf_counter() - begin
    return (c.prior_orders + 1) * (each * min(data.n_bytes, ngrams.COUNTED) / some + rest)


# --- the plan


def make_plan(config: TrainConfig, seconds: float = PROBE_SECONDS, processes: int = 1) -> dict:
    """The plan of a run, ready for JSON; sizes in bytes, times in seconds.

    ``processes`` train together on this machine, each with a card of its own or an even part of
    the memory; memory is that of the one that needs the most.  The rate is that of one process.
    Without ``seconds`` nothing is measured that takes time.  Raises BitbyteError as `train` does.
    """
    if config.data is None:
        raise BitbyteError("no training data: give --data FOLDER, or FILE")
    n_bytes = open_dataset(config.data, 1, split="train").n_bytes
    config = config.with_prior(n_bytes)
    shape = config.model_config()
    ngrams.check_countable(shape, n_bytes)
    check_trained_tables(config, processes)
    on_cpu = choose_device(config.device).type == "cpu"  # else other memory counts
    process = _resident() + LIBRARIES if on_cpu else 0
    mode, all_free = mode_of(config, processes), available(config)
    free = all_free // processes if on_cpu else all_free
    needed = memory_of(config, n_bytes, process, processes)
    fits = needed.total - process <= SPARE * free
    other = None if fits else that_fits(config, n_bytes, free, process, processes)
    plan: dict = {
        "parameters": shape.n_parameters, "processes": processes, "parallel": mode,
        "memory": dataclasses.asdict(needed) | {
            "total": needed.total, "moment": needed.moment, "free": free, "fits": fits,
        },
        "advice": None if other is None else {
            "batch_size": other[0].batch_size, "grad_accum": other[0].grad_accum,
            "grad_checkpoint": other[0].grad_checkpoint, "total": other[1].total,
        },
        "disk": _disk(config, needed, n_bytes, processes),
        "time": None,
    }  # fmt: skip
    if on_cpu and processes > 1 and config.threads is None:  # torchrun gives each one thread
        config = config.replace(threads=int(os.environ.get("OMP_NUM_THREADS") or 1))
    tried = config if other is None else config.replace(
        **{name: plan["advice"][name] for name in ("batch_size", "grad_accum", "grad_checkpoint")}
    )  # fmt: skip
    possible = fits or other is not None
    too_large = False  # for the probe, which has all weights in one process
    if possible and mode == "fsdp2":
        too_large = memory_of(tried, n_bytes, process).total - process > SPARE * all_free
    plan["probe_fits"] = not too_large
    if seconds and possible and not too_large:
        rate = probe(tried, seconds)
        plan["time"] = _time(config, rate, n_bytes, processes)
        if mode != "fsdp2":
            plan["memory"]["measured"] = rate.memory
            if other is None and rate.memory:  # the probe knows better
                plan["memory"]["total"] = max(needed.total, rate.memory)
    plan["bpb"] = _expected(config, plan["time"], seconds, processes)
    return plan


def _time(config: TrainConfig, rate: Rate, n_bytes: int, processes: int = 1) -> dict:
    """Steps, bytes and seconds of a run if each of the processes works at this rate."""
    if config.minutes:
        training = max(rate.step, 60 * config.minutes - rate.count)
        steps = max(1, round(training / rate.step))
    else:
        steps = _steps(config, n_bytes, processes)
        training = steps * rate.step
    checks = 1 + (steps - 1) // config.eval_every if config.eval_every else 1
    scored = checks * rate.score * min(config.eval_bytes, _validation_bytes(config))
    return {
        "steps": steps, "bytes": steps * rate.n_bytes * processes,
        "bytes_per_second": rate.bytes_per_second * processes,
        "step": rate.step, "step_cpu": rate.cpu, "count": rate.count, "train": training,
        "validate": scored, "total": rate.count + training + scored, "probe_steps": rate.steps,
    }  # fmt: skip


def _steps(config: TrainConfig, n_bytes: int, processes: int) -> int:
    """Steps of a run whose budget is not in minutes, as `train` counts them."""
    if not config.epochs:
        return config.steps or 200
    T = config.model_config().seq_len
    windows = max(0, n_bytes - T) // (config.stride or T) + 1
    each = config.batch_size * config.grad_accum * processes
    return max(1, math.ceil(config.epochs * windows / each))


def _validation_bytes(config: TrainConfig) -> int:
    """Bytes that a validation could score, 0 without validation data."""
    manifest = manifest_of(config.val_data or config.data or "")
    if manifest is not None and manifest.bytes_of("val"):
        return manifest.bytes_of("val")
    return open_dataset(config.val_data, 1).n_bytes if config.val_data else 0


def _disk(config: TrainConfig, needed: Memory, n_bytes: int, processes: int) -> dict:
    """Bytes of a run's folder, and of the disk it would be on."""
    step = needed.checkpoint
    saves = 1
    if config.save_every and not config.minutes:
        saves = -(-_steps(config, n_bytes, processes) // config.save_every)
        saves = min(saves, config.keep_last or saves)
    saves += config.save_best
    out = artifacts("checkpoints") if config.out is None else user_path(config.out)
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    total = saves * step
    shape = config.model_config()
    if shape.prior == "counts":
        total += (ngrams.folds_for(n_bytes) + 1) * shape.table_bytes
    free = shutil.disk_usage(there).free
    # While a step is written, the one before it is there too.
    return {"step": step, "total": total, "free": free, "fits": total + step <= free}


def _expected(
    config: TrainConfig, planned: dict | None, seconds: float, processes: int = 1
) -> list[dict]:
    """Bits per byte to expect by the records, of each preset of this kind, in the same time.

    Without a time, only which records there are.  Empty without records, or for a shape that is
    not a preset's.
    """
    shape = {config.n_layer, config.d_model, config.d_ff}
    plain = config.family == "ar" and shape == {None} and not config.table_rate
    found = []
    for curve in curves(read_records("evaluation")) if plain else ():
        if (curve.linear, curve.prior) != (config.linear, config.prior):
            continue
        row: dict = {
            "preset": curve.preset, "data": curve.data, "records": curve.records,
            "noise": curve.noise, "noise_measured": curve.measured,
        }  # fmt: skip
        found.append(row)
        if planned is None:
            continue
        n_bytes = planned["bytes"]
        if curve.preset != config.preset:
            other = config.replace(preset=curve.preset, seq_len=None, curriculum=())
            rate = probe(other, min(seconds, OTHER_SECONDS))
            n_bytes = round(planned["train"] * rate.bytes_per_second * processes)
        bpb, low, high = curve.at(n_bytes)
        row |= {"bytes": n_bytes, "bpb": bpb, "interval": [low, high], "far": curve.is_far(n_bytes)}
    return sorted(found, key=lambda row: row["preset"] != config.preset)


# --- as text


def line(config: TrainConfig) -> str:
    """The plan in one line, without a probe: parameters, memory, disk."""
    plan = make_plan(config, seconds=0)
    text = (
        f"plan: {plan['parameters']:,} parameters, about {_size(plan['memory']['total'])} of memory"
        f", {_size(plan['disk']['total'])} on disk"
    )
    return f"{text}; {_trouble(plan)}" if _trouble(plan) else text


def _trouble(plan: dict) -> str:
    """What will not fit, and what would; empty if all fits."""
    said = []
    needed, advice = plan["memory"], plan["advice"]
    if not needed["fits"]:
        said.append(f"only {_size(needed['free'])} of memory are free")
        if advice:
            options = f"--batch_size {advice['batch_size']} --grad_accum {advice['grad_accum']}"
            options += " --grad_checkpoint" * advice["grad_checkpoint"]
            said.append(f"the same training fits with {options} ({_size(advice['total'])})")
        else:
            said.append("not even one window at a time fits; take a smaller preset or seq_len")
    if not plan["disk"]["fits"]:
        said.append(f"only {_size(plan['disk']['free'])} of the disk are free")
    return "; ".join(said)


def text(plan: dict) -> str:
    """The plan as a page of text."""
    needed, disk, when = plan["memory"], plan["disk"], plan["time"]
    parts = [
        f"{name} {_size(needed[name])}"
        for name in (
            "process",
            "weights",
            "gradients",
            "optimizer",
            "tables",
            "activations",
            "gathered",
        )
        if needed[name]
    ]
    n_processes = plan["processes"]
    each = " in each process" if n_processes > 1 else ""
    lines = [
        f"parameters  {plan['parameters']:,}",
        f"memory      {_size(needed['total'])} of {_size(needed['free'])} free{each}: "
        f"{', '.join(parts)}",
    ]
    if n_processes > 1:
        lines.insert(1, f"processes   {n_processes} on this machine, {HOW[plan['parallel']]}")
    if needed["moment"]:
        lines.append(
            f"            {_size(needed['moment'])} for a moment, with all weights: at the start, "
            "in validation, in the main process as it saves"
        )
    if needed["counting"]:
        lines[-1] += f"; before that, {_size(needed['counting'])} to count n-grams"
    if needed.get("measured"):
        lines.append(f"            {_size(needed['measured'])} at most in the probe")
    lines.append(
        f"disk        {_size(disk['total'])} of {_size(disk['free'])} free, "
        f"{_size(disk['step'])} a checkpoint"
    )
    if when:
        n = when["steps"]
        at_best = f" at best, {n_processes} times that of one process" if n_processes > 1 else ""
        lines += [
            f"rate        {when['bytes_per_second'] / 1e3:.1f} kB/s{at_best}, here and now, from "
            f"{when['probe_steps']} step{'s' * (when['probe_steps'] > 1)}",
            f"time        {clock(when['total'])} for {n:,} step{'s' * (n > 1)}, "
            f"{when['bytes'] / 1e6:.1f} MB: {_shares(when)}",
        ]
    elif not plan["probe_fits"]:
        lines.append("rate        unknown: it is measured in one process, which this does not fit")
    lines += _quality(plan["bpb"])
    if _trouble(plan):
        lines.append(f"but         {_trouble(plan)}")
    return "\n".join(lines)


def _shares(when: dict) -> str:
    parts = {"counting n-grams": when["count"], "training": when["train"],
             "validation": when["validate"]}  # fmt: skip
    return ", ".join(f"{name} {clock(s)}" for name, s in parts.items() if s >= 0.5) or "seconds"


def _quality(rows: list[dict]) -> list[str]:
    """Lines on bits per byte, with what they rest on."""
    if not rows:
        return ["BPB         unknown: there are no records of such trainings (card-...)"]
    lines = []
    for row in rows:
        head = f"{'BPB' if row is rows[0] else '':12}"
        if "bpb" not in row:
            lines.append(f"{head}{row['preset']}: {len(row['records'])} records")
            continue
        low, high = row["interval"]
        far = "; far from all records, a guess" if row["far"] else ""
        lines.append(
            f"{head}{row['preset']} {row['bpb']:.2f} ({low:.2f} to {high:.2f}) after "
            f"{row['bytes'] / 1e6:.1f} MB{far}"
        )
    first = rows[0]
    source = "of several seeds" if first["noise_measured"] else "assumed"
    names = sum(len(row["records"]) for row in rows)
    lines.append(
        f"{'':12}by curves through {names} records on {first['data']}; 95 % interval from noise of "
        f"{first['noise']:.3f} ({source}); other data differ"
    )
    return lines


def _size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB" if n < 99.95 else f"{n:,.0f} GB"
