"""Training: one function for every family, every machine and every caller.

``train(config, on_step=None)`` is what the command line, the notebooks and the tests call.  The
batch of a step is a pure function of the data, the seed and the step, and so is all else that is
drawn at random.  So no random state has to be saved, and on CPU, with as many threads and a budget
in steps, a resumed run's parameters equal those of an uninterrupted run bit for bit.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from bitbyte import checkpoint, models, ngrams, runs, scoring
from bitbyte.config import TrainConfig, config_to_dict, resumed
from bitbyte.device import (
    choose_dtype,
    dtype_name,
    environment,
    memory,
    peak_memory,
    prepare_process,
    settings_kept,
)
from bitbyte.distributed import (
    World,
    gather,
    parallel_mode,
    restarts,
    setup_ddp,
    shard_like,
    whole,
    wrap,
)
from bitbyte.files import (
    BitbyteError,
    RunError,
    artifacts,
    folder_lock,
    output_folder,
    to_json,
    user_path,
    write_atomic,
)
from bitbyte.optim import RowAdagrad, create_optimizer, lr_for_step, seq_len_for_step
from bitbyte.prior import Prior
from bitbyte.process import interrupts, say, stop_asked
from bitbyte.runs import Meter, due, refuse_used, run_name, status, tracker, tracker_module
from bitbyte.shards import SEEN, manifest_of, open_dataset, ordinals_of, overlap

TABLES = "prior.trained"  # name of trained n-gram tables in an optimizer's state
SILENCE = 60.0  # seconds between two lines of a training whose bar nobody sees, as in a log


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    run: Path  # run folder
    step: int  # total number of steps
    bytes_seen: int  # bytes trained on, over all epochs and processes
    bpb: float  # training BPB of the last logged steps (diffusion: of masked bytes), nan if unknown
    val_bpb: float | None  # of the validation split, at the last evaluation
    val_kind: str  # kind of that number: exact, or upper_bound (diffusion)
    seconds: float  # total training time, without evaluations
    finished: bool  # False: stopped early, resumable
    metrics: list[dict]  # rows of metrics.jsonl


def train(config: TrainConfig, on_step: Callable[[dict], object] | None = None) -> TrainResult:
    """Train, save, and return where everything is.

    ``on_step(row)`` is called with every logged row.  If it returns something true, the run stops
    as on Ctrl-C: the step is finished and saved.  A file named STOP in the run folder does the same
    at the next logged step and is then deleted; one from before the start is ignored.  If
    ``on_step`` has a method ``begin``, it is called with the run folder first.

    Raises BitbyteError (bad config, data or folder) and RunError (the loss is not finite; the last
    good checkpoint is untouched).
    """
    before = None
    if restarts() and not config.resume:
        if config.out is None or config.allow_overwrite:
            raise BitbyteError(
                "torchrun --max-restarts starts this command again when a process dies, which then "
                "continues the run: give --out, without --allow_overwrite"
            )
        config = config.replace(resume=bool(runs.complete_steps(user_path(config.out))))
    if config.resume:
        assert config.out is not None  # TrainConfig has checked it
        run = user_path(config.out)
        if not run.is_dir() or runs.latest_step(run) is None:
            raise BitbyteError(f"{run} holds no complete checkpoint to resume from")
        before = _training_state(run)
        stored = before["train"]
        if stored.get("dtype") == "auto":  # its meaning then is part of the run
            stored = stored | {"dtype": before["extra"]["dtype"]}
        config = resumed(config, stored, run)
    if config.data is None:
        raise BitbyteError("no training data: give --data FOLDER, or FILE")
    # Absolute, so that the run can be resumed from another folder.
    data, val = (
        None if path is None else str(user_path(path).absolute())
        for path in (config.data, config.val_data)
    )
    config = config.replace(data=data, val_data=val)
    n_bytes = open_dataset(str(data), 1, split="train").n_bytes
    config = config.with_prior(n_bytes)
    ngrams.check_countable(config.model_config(), n_bytes)
    out = artifacts("checkpoints", run_name(config)) if config.out is None else config.out
    run = user_path(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings_kept())
        prepare_process(config.threads, config.deterministic)
        world = stack.enter_context(setup_ddp(config.device))
        if before:
            config = _redivided(config, before["extra"], world.size)
        session = Trainer(config, run, world)  # may refuse, before anything is written
        if world.is_main:
            _claim(run, config, stack)
        world.barrier()
        result = session.train(on_step, stack)
        del session  # with its DDP, see `setup_ddp`
        return result


def check_trained_tables(config: TrainConfig, processes: int = 1) -> None:
    """Refuse n-gram tables that cannot be trained.  Raises BitbyteError."""
    shape = config.model_config()
    if shape.prior == "none" or not config.table_rate:
        return
    frozen = "choose tables that are not: --prior counts without --prior_lr"
    for what, given in ((f"{processes} processes", processes > 1), ("--compile", config.compile)):
        if given:
            raise BitbyteError(f"n-gram tables are not trained with {what}; drop it, or {frozen}")
    need = shape.trained_table_bytes + shape.table_bytes
    if need > memory():
        raise BitbyteError(
            f"training tables of {shape.prior_rows:,} contexts takes {need:,} bytes of memory, "
            f"this machine has {memory():,}; lower --prior_rows, --prior_orders or --prior_rank"
        )


def _training_state(run: Path) -> dict:
    """The metadata of the newest step.  Raises BitbyteError if training cannot continue from it."""
    folder = runs.resolve(run)
    meta = checkpoint.read_meta(folder)
    lacking = {"global_batch", "seconds", "val_bpb", "best", "dtype"} - meta["extra"].keys()
    if lacking or "train" not in meta["data"]:
        raise BitbyteError(
            f"{folder} holds a model without the state of its training (it was converted, or "
            "edited); it can be scored and sampled, not resumed"
        )
    return meta


def _redivided(config: TrainConfig, extra: dict, size: int) -> TrainConfig:
    """The config with the windows of a step divided over another number of processes.

    Raises BitbyteError if they cannot be.
    """
    windows = extra["global_batch"]
    if extra.get("world", size) == size or windows == config.batch_size * config.grad_accum * size:
        return config
    each, rest = divmod(windows, size)
    if rest:
        raise BitbyteError(
            f"the run has {windows} windows per step, which {size} processes cannot share evenly"
        )
    batch = max(n for n in range(1, min(each, config.batch_size) + 1) if each % n == 0)
    return config.replace(batch_size=batch, grad_accum=each // batch)


def _claim(run: Path, config: TrainConfig, stack: contextlib.ExitStack) -> None:
    """Make or open the run folder, and hold its lock until ``stack`` closes."""
    if not (config.resume or config.allow_overwrite):
        refuse_used(run)
    output_folder(run)
    stack.enter_context(folder_lock(run))
    runs.clean(run)
    if not config.resume:
        runs.remove_run(run)  # or the leftovers of a start that saved nothing


def block_at(progress: float, block: int) -> int:
    """Size of a block while it grows: the divisors of ``block`` from 1 on, for equal times each."""
    sizes = [n for n in range(1, block + 1) if block % n == 0]
    return sizes[min(len(sizes) - 1, int(progress * len(sizes)))]


class Trainer:
    """The state of one call of `train`."""

    def __init__(self, config: TrainConfig, run: Path, world: World):
        self.config, self.run, self.world = config, run, world
        device = world.device
        if config.tracker:
            tracker_module(config.tracker)  # refuse now, before there is a run folder
        check_trained_tables(config, world.size)
        self.dtype = choose_dtype(config.dtype, device)
        self.model, self.kernels = self._build()
        self.mode = parallel_mode(config.parallel, self.model.config.n_parameters, world)
        if world.size > 1:
            self.kernels["parallel"] = self.mode
        untried = {"--compile": config.compile, "fp16": self.dtype == torch.float16}
        untried["adamw8bit"] = config.optimizer == "adamw8bit"
        if self.mode == "fsdp2" and any(untried.values()):
            what = next(name for name, given in untried.items() if given)
            raise BitbyteError(f"fsdp2 does not work with {what}; drop it, or use --parallel ddp")
        self.origin: dict | None = None  # what the weights it started from were trained on
        self.trained_tables = False  # whether their tables were
        if config.init and not config.resume:
            self._take_weights(checkpoint.take_weights(self.model, config.init))
        self.parallel = wrap(self.model, world, self.mode)
        self.forward = torch.compile(self.parallel) if config.compile else self.parallel
        lr, embed_lr = config.rates()
        self.optimizer = create_optimizer(
            self.model, config.optimizer, lr=lr, embed_lr=embed_lr,
            weight_decay=config.weight_decay, precise=config.deterministic,
            steps=config.newton_schulz,
        )  # fmt: skip
        self.tables: torch.Tensor | None = None  # n-gram tables that are trained
        if self.model.prior and config.table_rate:
            tables = self.tables = self.model.prior.train_tables()
            self.optimizer.add(TABLES, RowAdagrad(tables, config.table_rate))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        assert config.data is not None  # `train` has checked it
        stages = config.curriculum or (self.model.config.seq_len,)
        lengths = {min(s, config.seq_len_cap or s) for s in stages}
        self.data = {
            T: open_dataset(config.data, T, split="train", stride=config.stride, seed=config.seed)
            for T in lengths
        }
        before = (self.origin or {}).get("data", {}).get("train")
        counted = self.model.config.prior == "counts"
        if self.origin and counted and before != self._train_data.fingerprint:
            raise BitbyteError(
                f"{config.init} has n-grams counted in other data than {config.data}: a model "
                "with a prior can only start from one of the same data"
            )
        if counted and self.trained_tables and self.tables is None:
            raise BitbyteError(
                f"{config.init} has n-gram tables that were trained; give --prior_lr"
            )
        self.val = self._validation_data()
        self.global_batch = config.batch_size * config.grad_accum * world.size
        self.steps = self._planned_steps()
        self.plan = self._plan()
        # The cost of masked bytes is not a BPB and never carries that name.
        self.bpb_name = "bpb" if scoring.kinds_of(self.model) == ("exact",) else "masked_bpb"
        self.val_name = "val_bpb" if self.model.exact else "val_bound"
        self.step, self.seconds, self.bytes_seen = 0, 0.0, 0
        self.counted = 0.0  # seconds of counting n-grams, part of ``seconds``
        self.prior_sha256 = ""
        self.val_bpb, self.best = None, math.inf

    def _build(self) -> tuple:
        """(model, kernels): a model of this run as it begins, and what it computes with."""
        c = self.config
        model = models.build(c.model_config(), c.seed).to(self.world.device)
        model.body.grad_checkpoint = c.grad_checkpoint
        attention = c.attention if c.use_sdpa else "plain"
        return model, models.use_kernels(
            model, attention, c.linear_kernel, c.scan, compiled=c.compile
        )

    def _take_weights(self, meta: dict) -> None:
        """Note where the weights came from, for records: all that they were trained on counts."""
        before = meta["extra"].get("init") or {}
        self.trained_tables = bool((meta.get("train") or {}).get("prior_lr"))
        self.origin = {
            "run": self.config.init,
            "checkpoint": meta["files"]["model.safetensors"]["sha256"],
            "bytes_seen": meta["bytes_seen"] + before.get("bytes_seen", 0),
            "seconds": meta["extra"].get("seconds", 0.0) + before.get("seconds", 0.0),
            "data": meta["data"] | {"init": before.get("data")},
        }

    def _validation_data(self):
        """The data's val split, or all of val_data (its val split if it has one)."""
        c = self.config
        assert c.data is not None
        manifest = manifest_of(c.val_data or c.data)
        if manifest is not None and manifest.bytes_of("val"):
            return open_dataset(c.val_data or c.data, 1, split="val")
        if c.val_data:
            return open_dataset(c.val_data, 1)
        if c.save_best or c.eval_every:
            raise BitbyteError(f"{c.data} has no validation split; give --val_data")
        return None

    def _planned_steps(self) -> int | None:
        """Number of steps of the whole run; None if the budget is in minutes."""
        if self.config.minutes:
            return None
        if self.config.epochs:
            windows = next(iter(self.data.values())).n_windows
            return max(1, math.ceil(self.config.epochs * windows / self.global_batch))
        return self.config.steps or 200

    def _plan(self) -> list[tuple[int, int]]:
        """(first step, window bytes) of each stage of the run."""
        c = self.config
        if not c.curriculum:
            return [(0, self.model.config.seq_len)]
        assert self.steps is not None  # TrainConfig: a curriculum needs steps
        plan: list[tuple[int, int]] = []
        for i in range(len(c.curriculum)):
            first = math.ceil(i * self.steps / len(c.curriculum))
            T = seq_len_for_step(first, self.steps, c.curriculum, c.seq_len_cap)
            if not plan or plan[-1][1] != T:
                plan.append((first, T))
        return plan

    def _progress(self) -> float:
        """Share of the run that is done; the same number on every process."""
        if self.steps:
            return self.step / self.steps
        assert self.config.minutes is not None  # else steps are planned
        # Counting n-grams takes from the budget, but the schedule begins after it.
        left = max(60 * self.config.minutes - self.counted, 1e-9)
        share = torch.tensor((self.seconds - self.counted) / left, device=self.world.device)
        return self.world.mean(share).item()

    def _load(self) -> None:
        """Restore weights, optimizer and counters; all are read to the CPU first."""
        folder = runs.resolve(self.run)
        meta, tensors, optim = checkpoint.load_step(folder, with_optim=True)
        if meta["model_family"] != self.config.family:
            raise BitbyteError(
                f"{folder}: a checkpoint of family {meta['model_family']}, not {self.config.family}"
            )
        want, have = self._data_identity(), meta["data"]
        if want["train"] != have["train"]:
            raise BitbyteError(
                f"{self.config.data} is not the data {folder} was trained on "
                f"(sha256 {want['train'][:12]}, not {have['train'][:12]})"
            )
        extra = meta["extra"]
        if extra["global_batch"] != self.global_batch:
            raise BitbyteError(
                f"{folder} was trained with {extra['global_batch']} windows per step, this call "
                f"has {self.global_batch}: batch_size x grad_accum x processes must stay the same"
            )
        own = self.model.state_dict()
        self.model.load_state_dict({k: shard_like(t, own[k]) for k, t in tensors.items()})
        if self.tables is not None:
            values = (optim or {}).pop(f"{TABLES}/values", None)
            if values is None or values.shape != self.tables.shape:
                raise BitbyteError(f"{folder} lacks the tables that were being trained")
            with torch.no_grad():
                self.tables.copy_(values)
        if optim or not self.scaler.is_enabled():  # in fp16 all steps so far may be skipped ones
            self.optimizer.load_state_tensors(optim or {})
        self.step, self.bytes_seen = meta["step"], meta["bytes_seen"]
        self.seconds, self.val_bpb = extra["seconds"], extra["val_bpb"]
        self.counted = extra.get("counted", 0.0)
        self.best = math.inf if extra["best"] is None else extra["best"]
        self.prior_sha256, self.origin = extra.get("prior_sha256", ""), extra.get("init")
        if self.scaler.is_enabled():
            try:
                self.scaler.load_state_dict(extra["scaler"])
            except (KeyError, TypeError, RuntimeError):
                raise BitbyteError(f"{folder} lacks the loss scale of a run in fp16") from None
        if self.world.is_main:
            self._note_changes(extra)
            runs.truncate_metrics(self.run, self.step)
            checkpoint.mend_best(self.run, self.best)

    def _note_changes(self, extra: dict) -> None:
        """Warn of changes that may alter a resumed run's last bits (older runs lack the record)."""
        now = {"device": self.world.device.type, "threads": torch.get_num_threads()}
        now["world"] = self.world.size
        for what, value in now.items():
            was = extra.get(what, value)
            if was != value and (what != "threads" or now["device"] == "cpu"):
                say(
                    f"{self.run} was trained with {what} {was}, now it is {value}: the run "
                    "continues, but its last bits will differ from those of a run without the stop"
                )

    @property
    def _train_data(self):
        return self.data[max(self.data)]

    def _data_identity(self) -> dict:
        data = self._train_data
        return {
            "path": str(self.config.data),
            "train": data.fingerprint,
            "val": self.val.fingerprint if self.val else None,
            "bytes": data.n_bytes,
            "files": data.hashes,
        }

    def train(
        self, on_step: Callable[[dict], object] | None, stack: contextlib.ExitStack
    ) -> TrainResult:
        """The loop: step, log, validate, save, until the budget is spent or the run is stopped."""
        c, main = self.config, self.world.is_main
        if c.resume:
            self._load()
        if self.model.config.prior == "counts":
            self._give_tables(self.model.prior)
        if self.tables is not None and self.origin and not c.resume:
            self.model.prior.keep_tables()
        if main:
            self._describe()
            getattr(on_step, "begin", lambda run: None)(self.run)
        rows = runs.read_metrics(self.run) if main and c.resume else []
        track = None
        if main and c.tracker:
            track = stack.enter_context(tracker(c.tracker, self.run, dataclasses.asdict(c)))
        last = self.step + c.stop_after if c.stop_after else math.inf
        # Counting alone may take all the minutes: a new run takes at least one step.
        done, stopped, window = self.step > 0 and self._progress() >= 1, False, Meter()
        if done and main:
            say(f"nothing to do: {self.run} is finished; more --steps or --minutes make it longer")
        total = self.steps or round(60 * (c.minutes or 0))  # seconds if the budget is in minutes
        bar = tqdm(
            total=total, initial=self.step if self.steps else round(self.seconds), desc="train",
            unit="step" if self.steps else "s", dynamic_ncols=True,
            disable=None if c.progress and main else True,
        )  # fmt: skip
        with bar, interrupts() as interrupted:
            saved = said = time.monotonic()
            while not (done or stopped):
                clock = time.perf_counter()
                first, T = next(stage for stage in reversed(self.plan) if stage[0] <= self.step)
                loss, norm, factor = self._train_step(T, first)
                self.step += 1
                self.bytes_seen += self.global_batch * T
                seconds = time.perf_counter() - clock
                self.seconds += seconds
                window.add(loss, norm, self.global_batch * T, seconds)
                done = self._progress() >= 1
                timed = main and not c.save_every and 60 * c.save_minutes > 0
                timed = timed and time.monotonic() - saved >= 60 * c.save_minutes
                stopped, timed = self.world.any_rank(bool(interrupted) or self.step >= last, timed)
                evaluating = done or due(self.step, c.eval_every)
                if done or stopped or evaluating or due(self.step, c.log_every):
                    row = self._row(window, factor, T)
                    if evaluating and self.val:
                        row[self.val_name] = self._validate()
                    window = Meter()
                    rows.append(row)
                    if main:
                        runs.append_metrics(self.run, row)
                        bar.set_postfix_str(status(row), refresh=False)
                        if bar.disable and c.progress and time.monotonic() - said >= SILENCE:
                            said = time.monotonic()
                            say(f"step {self.step:,}, {self._progress():.0%}: {status(row)}")
                        if track:
                            track(row)
                    asked = [on_step and on_step(row), main and stop_asked(self.run)]
                    stopped = self.world.any_rank(any(asked))[0] or stopped
                bar.update((self.step if self.steps else min(total, round(self.seconds))) - bar.n)
                best = self._is_best(rows)
                kept = done or stopped or best or due(self.step, c.save_every)
                if kept or timed:
                    self._save(best=best, finished=done, by_time=not kept)
                    saved = time.monotonic()
        bpb = rows[-1].get(self.bpb_name) if rows else None  # null if it was not finite
        if stopped and not done and main:
            say(f"stopped at step {self.step}; continue with: --out {self.run} --resume")
        return TrainResult(
            run=self.run, step=self.step, bytes_seen=self.bytes_seen,
            bpb=bpb if isinstance(bpb, float) else math.nan, val_bpb=self.val_bpb,
            val_kind=scoring.kind_of(self.model), seconds=self.seconds, finished=done, metrics=rows,
        )  # fmt: skip

    def _train_step(self, T: int, first: int) -> tuple[float, float, float]:
        """One optimizer step: (mean loss in nats, gradient norm, learning-rate factor)."""
        c, world = self.config, self.world
        device = world.device
        self.model.train()
        factor = lr_for_step(self._next_progress(), c.schedule, c.warmup)
        until = (2 / 3 if c.linear == "ternary" else 1) if c.decay_until is None else c.decay_until
        self.optimizer.set_rates(factor, decay=self._progress() < until)
        if c.anneal:
            self.model.block = block_at(self._progress() / c.anneal, self.model.config.block)  # pyright: ignore
        total = torch.zeros((), device=device)
        for micro in range(c.grad_accum):
            address: dict = {
                "batch_size": c.batch_size, "micro": micro, "grad_accum": c.grad_accum,
                "rank": world.rank, "world": world.size,
            }  # fmt: skip
            rows = torch.from_numpy(self.data[T].batch(self.step - first, **address))
            ids_BT = rows.to(device, non_blocking=True)
            last = micro == c.grad_accum - 1
            sync = contextlib.nullcontext()
            if not last and self.mode == "ddp":
                sync = self.parallel.no_sync()  # pyright: ignore
            with sync:
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    nats_BT = self.forward(
                        ids_BT, self._noise(first, address), self._folds(T, first, address)
                    )
                    loss = nats_BT.mean() / c.grad_accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
        mean = world.mean(total).item()
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)).item()
        if not math.isfinite(mean) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise self._diverged(mean, norm, T, first)
        if self.scaler.is_enabled():
            # All parts or none: Muon would make a full step even from gradients that were clipped
            # to zero because another part's overflowed.
            for part in self.optimizer.parts if math.isfinite(norm) else ():
                self.scaler.step(part)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, norm, factor

    def _next_progress(self) -> float:
        """Progress at the middle of the next step, so that neither end has a rate of zero."""
        if self.steps:
            return (self.step + 0.5) / self.steps
        return self._progress() if self.step else self.config.warmup / 100

    def _noise(self, first: int, address: dict) -> torch.Tensor:
        """noise_B of a micro-batch: a number for each window, keyed by its ordinal in the stage.

        So the same bytes are hidden however a step is divided, and a resume restores nothing.
        """
        key = hashlib.blake2b(f"{self.config.seed}:{first}".encode(), digest_size=7).digest()
        ordinals = ordinals_of(self.step - first, **address)
        start = int.from_bytes(key) + ordinals.start
        return torch.arange(start, start + len(ordinals), device=self.world.device)

    def _folds(self, T: int, first: int, address: dict) -> torch.Tensor | None:
        """fold_BT of a micro-batch's bytes, for a model with a prior."""
        if self.model.config.prior != "counts":
            return None
        data = self.data[T]
        starts_B = torch.from_numpy(data.starts(self.step - first, **address))
        places_BT = starts_B[:, None] + torch.arange(T)
        folds = ngrams.folds_for(data.n_bytes)
        return ngrams.fold_of(places_BT, data.n_bytes, folds).to(self.world.device)

    def _give_tables(self, prior: Prior) -> None:
        """Count the n-grams of the training data or, on resume, read the stored tables if there.

        The main process does this and shares its tables.  Counting counts as training time.
        """
        clock, world, data = time.perf_counter(), self.world, self._train_data
        path, folds = self.run / runs.PRIOR, ngrams.folds_for(data.n_bytes)
        codes = torch.zeros((folds + 1, *prior.codes.shape), dtype=torch.uint8)
        scale = torch.zeros(prior.scale.shape)
        missing = world.any_rank(world.is_main and not path.is_file())[0]
        if self.config.resume and not missing:
            if world.is_main:
                expected = {"codes": codes, "scale": scale}
                stored = checkpoint.read_tables(path, self.prior_sha256, expected)
                codes, scale = stored["codes"], stored["scale"]
            world.share(codes)
            world.share(scale)
            return prior.fill(codes, scale)
        held_out = np.empty(0, np.uint8)
        if self.val:
            held_out = self.val.read(0, min(self.config.eval_bytes, self.val.n_bytes))
        self.backoff = ngrams.Backoff(held_out)
        bar = tqdm(
            total=data.n_bytes * len(scale), desc="count n-grams", unit="B", unit_scale=True,
            dynamic_ncols=True, disable=None if self.config.progress and world.is_main else True,
        )  # fmt: skip
        with bar:
            tables = ngrams.count_tables(
                data.read, data.n_bytes, self.model.config, self.backoff, bar.update
            )
            for k in range(len(scale)):
                if world.is_main:
                    codes[:, k], scale[k] = next(tables)
                world.share(scale[k])
                codes[:, k] = world.share(codes[:, k].contiguous())
        prior.fill(codes, scale)
        if world.is_main:
            content = safetensors.torch.save({"codes": codes, "scale": scale})
            counted = hashlib.sha256(content).hexdigest()
            if self.config.resume and counted != self.prior_sha256:
                raise BitbyteError(
                    f"{path} is missing, and what was counted again here differs in the last bits; "
                    "put the file back"
                )
            self.prior_sha256 = counted
            write_atomic(path, content)
            if len(held_out) and self.config.progress:
                say(
                    f"n-grams alone, without a network: {self.backoff.bpb:.4f} bits per byte of "
                    f"{len(held_out):,} validation bytes; {time.perf_counter() - clock:.0f} s"
                )
        if not self.config.resume:
            self.seconds = self.counted = time.perf_counter() - clock

    def _diverged(self, loss: float, norm: float, T: int, first: int) -> RunError:
        good = runs.latest_step(self.run)
        return RunError(
            f"loss {loss}, gradient norm {norm} at step {self.step} (batch {self.step - first} of "
            f"{self.global_batch} windows of {T} bytes, seed {self.config.seed}); last good "
            f"checkpoint: {'none' if good is None else f'step {good}'} in {self.run}; "
            "try a lower --lr"
        )

    def _row(self, window: Meter, factor: float, T: int) -> dict:
        """One line of metrics.jsonl."""
        lr, embed_lr = self.config.rates()
        return {
            "step": self.step,
            "loss": window.loss,  # nats a byte, mean since the last row
            self.bpb_name: scoring.bits_per_byte(window.loss, 1),
            "lr": lr * factor,
            "embed_lr": embed_lr * factor,
            "grad_norm": window.norm,
            "bytes": self.bytes_seen,
            "bytes_per_second": window.n_bytes / window.seconds,
            "seconds": self.seconds,
            "seq_len": T,
            "memory": peak_memory(self.world.device),  # bytes
        }

    def _validate(self) -> float:
        """BPB, or one draw of its bound, of the first bytes of the validation split."""
        T, limit, model = self.model.config.seq_len, self.config.eval_bytes, self.model
        if model.prior:
            model.prior.settle()
        if self.mode == "fsdp2":  # scoring reads weights by other ways than a forward pass
            model = self._build()[0]
            own = model.state_dict()
            for name, tensor in self.model.state_dict().items():  # never all of them twice
                own[name].copy_(whole(tensor))
        options = {"window": T, "dtype": self.dtype, "stop": limit, "draws": 1}
        result = scoring.score(model, self.val, **options)
        self.val_bpb = result.bpb
        return result.bpb

    def _is_best(self, rows: list[dict]) -> bool:
        """Whether the last row is from this step and its validation is the best so far."""
        if not self.config.save_best or not rows or rows[-1]["step"] != self.step:
            return False
        return rows[-1].get(self.val_name, math.inf) < self.best

    def _save(self, best: bool, finished: bool, by_time: bool) -> None:
        """Save this step; of the steps saved by time only the newest is kept."""
        if best:
            self.best = self.val_bpb
        failed = None
        if self.model.prior:
            self.model.prior.settle()
        tensors = gather(self.model.state_dict(), self.world)  # all processes, if sharded
        optim = gather(self.optimizer.state_tensors(), self.world)
        if self.tables is not None:
            optim[f"{TABLES}/values"] = self.tables.detach()
        if self.world.is_main and self.step not in runs.complete_steps(self.run):
            try:
                checkpoint.save_step(
                    self.run, self.step, tensors, optim, self._meta(finished, by_time),
                    best=best, keep_last=self.config.keep_last,
                )  # fmt: skip
                checkpoint.drop_saved_by_time(self.run, self.step)
            except OSError as error:
                failed = error
        if self.world.any_rank(failed is not None)[0]:
            raise failed or OSError("the main process could not save")

    def _facts(self) -> dict:
        """Facts that both run.json and every step's meta.json hold.

        Both also hold the two configs: run.json has the training config as "config" and the model's
        as "model"; meta.json has the model config as "config" and the training's as "train".
        """
        return {
            "global_batch": self.global_batch, "world": self.world.size,
            "dtype": dtype_name(self.dtype), "kernels": self.kernels,
        }  # fmt: skip

    def _meta(self, finished: bool, by_time: bool) -> dict:
        extra = self._facts() | {
            "seconds": self.seconds,
            "val_bpb": self.val_bpb,
            "val_kind": scoring.kind_of(self.model),
            "best": None if math.isinf(self.best) else self.best,  # pyright: ignore
            "finished": finished,
            "by_time": by_time,
            "device": self.world.device.type,
            "threads": torch.get_num_threads(),
        }
        if self.model.config.prior == "counts":
            extra |= {"prior_sha256": self.prior_sha256, "counted": self.counted}
        if self.origin:
            extra["init"] = self.origin
        if self.scaler.is_enabled():
            extra["scaler"] = self.scaler.state_dict()
        return {
            "model_family": self.config.family,
            "variant": self.config.linear,
            "config": config_to_dict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "step": self.step,
            "bytes_seen": self.bytes_seen,
            "rng": {"seed": self.config.seed, "keyed_by": "seed, stage, sample ordinal"},
            # Lets an evaluation recognize bytes that were trained on, however they are packed.
            "data": self._data_identity() | {"sketch": self._train_data.sketch},
            "extra": extra,
        }

    def _describe(self) -> None:
        """Write run.json, or add to it on resume, and print what runs."""
        n = sum(p.numel() for p in self.model.parameters())
        seen = overlap(self._train_data.sketch, self.val.sketch) if self.val else 0.0
        data = self._data_identity()
        facts = self._facts() | {
            "config": dataclasses.asdict(self.config),
            "model": config_to_dict(self.model.config),
            "parameters": n,
            "packed_bytes": models.packed_bytes(self.model),
            "rates": dict(zip(("lr", "embed_lr"), self.config.rates(), strict=True)),
            "data": data,
            "val_overlap": round(seen, 4),
            "steps": self.steps,
            "device": str(self.world.device),
            "environment": environment(),
        }
        path = self.run / "run.json"
        if self.step and path.exists():  # a resumed run may be on another machine now
            first = runs.read_facts(self.run)
            before = first.pop("resumed", [])
            facts = first | {"resumed": [*before, facts | {"step": self.step}]}
        write_atomic(path, to_json(facts))
        if self.config.progress:
            kernels = ", ".join(f"{k} {v}" for k, v in self.kernels.items())
            name = f"{self.config.family} {self.config.preset} {self.config.linear}"
            where = f"{self.world.device} x {self.world.size}"
            say(
                f"{name}: {n:,} parameters, {data['bytes']:,} bytes of data, "
                f"{where}, {dtype_name(self.dtype)}, {kernels}\n-> {self.run}"
            )
            if self.mode == "none" and self.config.parallel != "auto":
                say(f"note: a single process trains, without --parallel {self.config.parallel}")
        if seen >= SEEN:
            say(
                f"note: {seen:.0%} of the validation bytes are in the training data, so validation "
                "partly measures memory; give --val_data with other bytes"
            )
