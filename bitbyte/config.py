"""The training config: every choice of a run in one flat, frozen dataclass.

The command line is generated from its fields; a notebook's parameter cell names the same ones.
"""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

from bitbyte.files import BitbyteError
from bitbyte.shapes import OPTIMIZERS, SCHEDULES, preset

# Parameters below -> (dense matrix lr, ternary matrix lr, embedding and norm lr) for Muon.  Up to
# 2 M measured, beyond that scaled down as is usual; AdamW takes a quarter on the matrices.
RATES = (
    (2e6, (4e-3, 6e-3, 4e-3)),
    (10e6, (4e-3, 6e-3, 3e-3)),
    (60e6, (3e-3, 4e-3, 2e-3)),
    (math.inf, (2e-3, 3e-3, 1e-3)),
)
# What a resumed run may change: everything else is part of what the run is.
OPERATIONAL = {
    "out", "resume", "allow_overwrite", "steps", "minutes", "epochs", "stop_after", "log_every",
    "save_every", "save_minutes", "eval_every", "eval_bytes", "save_best", "keep_last", "device",
    "threads", "progress", "tracker", "grad_checkpoint", "data", "val_data", "batch_size",
    "grad_accum",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.  Fields that are None take the value of the preset or the recipe."""

    family: str = "ar"  # model family: ar, mamba or diffusion
    preset: str = "nano"  # shape to start from: nano tiny micro mini small medium base large
    n_layer: int | None = None  # blocks
    d_model: int | None = None  # width of the residual stream
    d_ff: int | None = None  # width inside the MLP
    n_head: int | None = None  # attention heads; default: heads of 64
    linear: str = "ternary"  # ternary, or dense for the float twin
    act_quant: bool = True  # int8 activations in ternary layers
    ssm: str | None = None  # mamba: mamba2 (default) or mamba1
    d_state: int | None = None  # mamba: numbers of state a channel
    diffusion_steps: int | None = None  # diffusion: noise levels; default: the continuous bound
    min_mask_prob: float | None = None  # diffusion with N steps: step s hides this share
    max_mask_prob: float | None = None  # plus s / N of the way to this one

    data: str | None = None  # packed folder, folder or glob of .bin, or one file
    val_data: str | None = None  # validation bytes; default: the val split of data
    seq_len: int | None = None  # bytes of a training window; default: the preset's
    curriculum: tuple[int, ...] = ()  # window bytes in equal stages instead, e.g. 2048 4096 8192
    seq_len_cap: int | None = None  # upper limit for the stages of the curriculum, bytes
    stride: int | None = None  # bytes from window to window; default: no overlap

    steps: int | None = None  # optimiser steps; default 200 if no budget is given
    epochs: float | None = None  # passes over the training windows
    minutes: float | None = None  # wall time of training
    stop_after: int | None = None  # save and stop after this many steps of this call
    batch_size: int = 8  # windows a micro-batch and process
    grad_accum: int = 1  # micro-batches a step

    optimizer: str = "muon"  # muon | adamw | adamw8bit
    lr: float | None = None  # peak learning rate of the matrices
    embed_lr: float | None = None  # peak learning rate of embeddings and norms
    weight_decay: float = 0.1  # on matrices, decoupled
    decay_until: float | None = None  # share of the run with weight decay; ternary 2/3, dense 1
    schedule: str = "linear"  # after warm-up: linear | cosine | wsd (constant, then decay)
    warmup: float = 0.04  # share of the run
    clip: float = 1.0  # largest gradient norm

    dtype: str = "auto"  # auto | bf16 | fp16 | fp32
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    threads: int | None = None  # CPU threads
    use_sdpa: bool = True  # False: the plain attention formula
    attention: str = "auto"  # auto | sdpa | chunked | plain
    linear_kernel: str = "auto"  # auto | reference | int8
    scan: str = "auto"  # mamba: auto | reference | fast | mamba_ssm
    grad_checkpoint: bool = False  # recompute blocks in the backward pass: less memory
    compile: bool = False  # torch.compile
    deterministic: bool = False  # reproducible kernels; Muon in float32
    seed: int = 0  # of initial weights and data order

    out: str | None = None  # run folder; default: time-stamped under artifacts/checkpoints
    resume: bool = False  # go on from the newest checkpoint in out
    allow_overwrite: bool = False  # delete what is in out
    log_every: int = 10  # steps
    save_every: int | None = None  # steps; default: by time
    save_minutes: float = (
        5.0  # without save_every: wall time from save to save; 0 = at the end only
    )
    eval_every: int | None = None  # steps; default: at the end only
    eval_bytes: int = 262144  # validation bytes scored while training; `eval` scores all
    save_best: bool = False  # also keep the checkpoint with the best validation BPB
    keep_last: int | None = None  # keep so many newest checkpoints; of those by time only the last
    tracker: str | None = None  # tensorboard | wandb, besides metrics.jsonl
    progress: bool = True  # bar and notes on a terminal

    def __new__(cls, **given):
        """Remembers which fields were named: on resume these count, and defaults do not."""
        self = super().__new__(cls)
        object.__setattr__(self, "said", frozenset(given))
        return self

    def naming(self, fields: Collection[str]) -> "TrainConfig":
        """A copy in which only ``fields`` count as named: a parser fills in all of them."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "said", self.said & set(fields))
        return copy

    def replace(self, **changes) -> "TrainConfig":
        """A copy with some fields changed; what was said before still counts as said."""
        changed = dataclasses.replace(self, **changes)
        object.__setattr__(changed, "said", self.said | changes.keys())
        return changed

    def __post_init__(self):
        for name, low in (
            ("steps", 1), ("batch_size", 1), ("grad_accum", 1), ("seq_len", 1), ("log_every", 1),
            ("save_every", 1), ("eval_every", 1), ("eval_bytes", 1), ("stop_after", 1),
            ("stride", 1), ("threads", 1), ("keep_last", 1), ("seq_len_cap", 1), ("d_state", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise BitbyteError(f"{name} is {value}; it must be at least {low}")
        for name in ("lr", "embed_lr", "epochs", "minutes", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BitbyteError(f"{name} is {value}; it must be a number above 0")
        for name, low, high in (
            ("weight_decay", 0, 1e3), ("decay_until", 0, 1), ("seed", 0, 2**63 - 1),
            ("save_minutes", 0, 1e9),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BitbyteError(f"{name} is {value}; it must be from {low} to {high:g}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise BitbyteError(f"no {name} {getattr(self, name)!r}; choose {', '.join(known)}")
        if not 0 <= self.warmup < 1:
            raise BitbyteError(f"warmup is {self.warmup}; it is a share of the run, 0 to below 1")
        if sum(x is not None for x in (self.steps, self.epochs, self.minutes)) > 1:
            raise BitbyteError("give one budget: steps, epochs or minutes")
        if self.curriculum and (self.seq_len or not self.steps or min(self.curriculum) < 1):
            raise BitbyteError("a curriculum needs steps, stages of at least 1, and no seq_len")
        if self.seq_len_cap and not self.curriculum:
            raise BitbyteError("seq_len_cap limits a curriculum; without one give --seq_len")
        if self.family == "diffusion" and not self.diffusion_steps:
            for name in ("min_mask_prob", "max_mask_prob"):
                if getattr(self, name) is not None:
                    raise BitbyteError(f"{name} belongs to --diffusion_steps; give both or neither")
        if self.scan != "auto" and self.family != "mamba":
            raise BitbyteError(f"a model of family {self.family} has no scan; drop --scan")
        if self.linear == "dense" and not self.act_quant:
            raise BitbyteError("dense layers have no int8 activations; drop --no_act_quant")
        if self.resume and self.out is None:
            raise BitbyteError("resume needs the run folder: --out RUN --resume")
        if self.tracker not in (None, "tensorboard", "wandb"):
            raise BitbyteError(f"no tracker {self.tracker!r}; choose tensorboard or wandb")

    def model_config(self):
        """The config of the model this run trains."""
        stages = [min(s, self.seq_len_cap or s) for s in self.curriculum]
        return preset(
            self.preset, self.family, n_layer=self.n_layer, d_model=self.d_model, d_ff=self.d_ff,
            n_head=self.n_head, linear=self.linear, act_quant=self.act_quant,
            seq_len=max(stages, default=self.seq_len), ssm=self.ssm, d_state=self.d_state,
            diffusion_steps=self.diffusion_steps, min_mask_prob=self.min_mask_prob,
            max_mask_prob=self.max_mask_prob,
        )  # fmt: skip

    def rates(self) -> tuple[float, float]:
        """(matrix, embedding) peak learning rates: as given, else from the recipe."""
        size = self.model_config().n_parameters
        dense, ternary, embed = next(rates for limit, rates in RATES if size < limit)
        matrix = ternary if self.linear == "ternary" else dense
        matrix = matrix if self.optimizer == "muon" else matrix / 4
        return self.lr or matrix, self.embed_lr or embed


def resumed(config: TrainConfig, stored: dict, run: Path) -> TrainConfig:
    """Config of a resumed run: the ``stored`` one, with what this call may change and named.

    Raises BitbyteError if ``config`` names another value of a field that makes the run.
    """
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    unknown = stored.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise BitbyteError(f"{run}: its config has the unknown field {sorted(unknown)[0]}")
    changed = {}
    for name in sorted(config.said):
        value, old = getattr(config, name), stored.get(name, getattr(TrainConfig(), name))
        if name in OPERATIONAL:
            changed[name] = value
        elif value is not None and value != old:
            shape = TrainConfig(**stored).model_config() if old is None else None
            old = getattr(shape, name, old)  # what was left to the preset or the family
            if value != old:
                raise BitbyteError(
                    f"{run} was trained with {name} = {old}; a resumed run cannot change it "
                    f"to {value}"
                )
    budget = {"steps", "epochs", "minutes"}
    if any(changed.get(name) is not None for name in budget):
        stored |= dict.fromkeys(budget)
    else:
        changed = {name: value for name, value in changed.items() if name not in budget}
    for name in ("data", "val_data"):  # None: where it was
        if changed.get(name, "") is None:
            del changed[name]
    stored |= {"stop_after": None, "allow_overwrite": False}
    return TrainConfig(**(stored | changed))
