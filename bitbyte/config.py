"""Every choice: shapes of models, training runs, sampling.  Frozen dataclasses, no torch.

A shape holds everything needed to rebuild a model; a size field left at 0 is derived from the
others.  `TrainConfig` is one run in one flat dataclass: the command line is generated from its
fields, and a notebook's parameter cell uses the same names.  Every config checks itself and raises
a one-line BitbyteError.
"""

import dataclasses
import math
import typing
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from bitbyte.files import BitbyteError, wrong_fields
from bitbyte.vocab import N_BYTES, VOCAB_SIZE

LINEARS = ("ternary", "dense")  # a model's projections
SSMS = ("mamba1", "mamba2")  # state-space layers
OPTIMIZERS = ("muon", "adamw", "adamw8bit")
SCHEDULES = ("linear", "cosine", "wsd")  # of the learning rate, after warm-up
NORM_EPS = 1e-5  # of every RMSNorm
PARALLEL = ("auto", "ddp", "fsdp2")  # how several processes train one model
PRIORS = ("none", "counts", "learned")  # where the n-gram tables that a model reads come from
AUTO_PRIOR_BYTES = 1 << 18  # bytes of training data from which prior "auto" means "counts"
MATCHES = (4, 7)  # lengths in bytes of the matches a model looks up, see `prior`

MAX_PARAMETERS = 2**36  # refuses a corrupt size before memory is allocated


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that the shapes of all families share."""

    family: ClassVar[str] = ""
    per_layer: ClassVar[int]  # parameters per block
    n_layer: int = 2  # blocks
    d_model: int = 128  # width of the residual stream
    seq_len: int = 256  # bytes per window
    linear: str = "ternary"  # "ternary" or "dense"
    act_quant: bool = True  # int8 activations in ternary layers
    prior: str = "none"  # n-gram tables, see `prior`: "counts", "learned", or "none": a plain model
    prior_orders: int = 6  # bytes of the longest context; the word so far is one more
    prior_rows: int = 1 << 16  # rows of each table, a power of two
    prior_rank: int = 32  # numbers stored per row
    prior_bits: int = 4  # bits per stored number: 4 or 8

    def __post_init__(self):
        self._check_prior()
        if self.linear not in LINEARS:
            raise BitbyteError(f"linear is {self.linear!r}; choose from {', '.join(LINEARS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # A prior without blocks is the control: it shows what the tables achieve alone.
            low = 0 if field.name == "n_layer" and self.prior != "none" else 1
            if field.type is int and field.name not in self.may_be_0 and value < low:
                more = " (0 needs a prior)" if (field.name, value) == ("n_layer", 0) else ""
                raise BitbyteError(f"{field.name} is {value}; it must be at least {low}{more}")
        self._resolve()
        if self.n_parameters > MAX_PARAMETERS:
            raise BitbyteError(f"{self.n_parameters:,} parameters are more than bitbyte supports")

    may_be_0: ClassVar[tuple[str, ...]] = ()

    @property
    def computes_as(self) -> str:
        """The family whose ``logits`` this model computes, for the kernels that know them."""
        return self.family

    def _check_prior(self) -> None:
        if self.prior not in PRIORS:
            raise BitbyteError(f"no prior {self.prior!r}; choose from {', '.join(PRIORS)}")
        power = self.prior_rows & (self.prior_rows - 1) == 0
        for name, good, text in (
            ("prior_orders", 1 <= self.prior_orders <= 12, "from 1 to 12"),
            (
                "prior_rows",
                power and 2 <= self.prior_rows <= 2**24,
                "a power of two, 2 to 2^24",
            ),
            ("prior_rank", self.prior_rank in range(2, 257, 2), "an even number from 2 to 256"),
            ("prior_bits", self.prior_bits in (4, 8), "4 or 8"),
        ):
            if not good:
                raise BitbyteError(f"{name} is {getattr(self, name)}; it must be {text}")

    def _resolve(self) -> None:
        """Fill in what depends on other fields, and check what must fit together."""

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the model, without building it."""
        own = VOCAB_SIZE * self.d_model + self.n_layer * self.per_layer + self.d_model
        if self.prior == "none":
            return own
        tables = self.prior_orders + 1
        reading = tables * self.prior_rank * (self.d_model + N_BYTES) + tables * self.d_model
        return own + reading + len(MATCHES) * (N_BYTES + 1) * self.d_model

    @property
    def table_bytes(self) -> int:
        """Size of the prior's tables, without building them."""
        if self.prior == "none":
            return 0
        return (self.prior_orders + 1) * self.prior_rows * self.prior_rank * self.prior_bits // 8

    @property
    def trained_table_bytes(self) -> int:
        """What training the tables keeps: their values in float32, and a number per row."""
        if self.prior == "none":
            return 0
        return 4 * (self.prior_orders + 1) * self.prior_rows * (self.prior_rank + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Shape of a transformer."""

    family: ClassVar[str] = "ar"
    may_be_0: ClassVar[tuple[str, ...]] = ("n_head",)
    d_ff: int = 256  # width inside the MLP
    n_head: int = 0  # attention heads; 0 = heads of 64
    rope_theta: float = 10000.0  # base of the rotary wavelengths

    def _resolve(self):
        if self.n_head == 0:
            object.__setattr__(self, "n_head", max(1, self.d_model // 64))
        if self.n_head < 0 or self.d_model % self.n_head or self.d_model // self.n_head % 2:
            raise BitbyteError(
                f"d_model {self.d_model} does not divide into {self.n_head} heads of even width; "
                "choose d_model as a multiple of 64, or n_head to fit"
            )
        if self.rope_theta <= 0:
            raise BitbyteError(f"rope_theta is {self.rope_theta}; it must be above 0")

    @property
    def per_layer(self) -> int:
        return 4 * self.d_model**2 + 3 * self.d_model * self.d_ff + 2 * self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(TransformerConfig):
    """Shape of a masked-diffusion model and the noise it is trained with.

    With ``block`` 0 a model sees whole windows, else all before a block and what is shown of it,
    and also predicts next bytes (see `models.BlockDiffusionLM`).  With ``around`` a model of whole
    windows also gets, from a small table, the visible bytes up to ``around`` places to either side.

    With ``diffusion_steps`` 0 the loss is the continuous-time bound: k of the T bytes of a window
    are hidden, with k spread evenly over 1..T.  With N steps, step s (1..N) hides each byte with
    probability min_mask_prob + s / N (max_mask_prob - min_mask_prob).
    """

    family: ClassVar[str] = "diffusion"
    may_be_0: ClassVar[tuple[str, ...]] = ("n_head", "diffusion_steps", "block", "around")
    diffusion_steps: int = 0  # noise levels; 0 = all of them, weighted as the bound requires
    min_mask_prob: float = 0.05  # see above
    max_mask_prob: float = 0.5  # share hidden at the last step
    block: int = 0  # bytes of a block; 0 = the whole window
    ar_share: float = 0.5  # with blocks: share of next-byte prediction in the loss
    around: int = 0  # whole windows: bytes to either side that a small table describes
    block_rank: int = 32  # numbers by which a byte is known in the places around it

    def _resolve(self):
        super()._resolve()
        if self.block and (
            self.block < 0 or self.seq_len % self.block or self.block == self.seq_len
        ):
            raise BitbyteError(
                f"block is {self.block}; it must divide windows of {self.seq_len} bytes and be "
                "smaller, or be 0 for the whole window"
            )
        if self.block and self.around:
            raise BitbyteError("blocks see what is around them anyway; drop --around")
        if self.around < 0:
            raise BitbyteError(f"around is {self.around}; it must be at least 0")
        if self.block and self.diffusion_steps:
            raise BitbyteError("blocks are trained on all noise levels; drop --diffusion_steps")
        if not 0 <= self.ar_share < 1:
            raise BitbyteError(f"ar_share is {self.ar_share}; it must be from 0 to below 1")
        if self.diffusion_steps < 0:
            raise BitbyteError(f"diffusion_steps is {self.diffusion_steps}; it must be at least 0")
        if not 0 < self.min_mask_prob <= self.max_mask_prob <= 1:
            raise BitbyteError(
                f"mask probabilities {self.min_mask_prob} to {self.max_mask_prob} must satisfy "
                "0 < min_mask_prob <= max_mask_prob <= 1"
            )

    @property
    def computes_as(self) -> str:
        return "ar" if self.block else self.family

    @property
    def n_parameters(self) -> int:
        if not self.block:
            near = self.block_rank * (N_BYTES + (2 * self.around + 1) * self.d_model)
            return super().n_parameters + (near if self.around else 0)
        inside = self.block_rank * (N_BYTES + (2 * self.block - 1) * self.d_model)
        return super().n_parameters + inside + self.block * self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(ModelConfig):
    """Shape of a Mamba model; a size field left at 0 is derived from the others."""

    family: ClassVar[str] = "mamba"
    may_be_0: ClassVar[tuple[str, ...]] = ("d_state", "dt_rank", "n_head")
    ssm: str = "mamba2"  # mamba1 (selective scan) or mamba2 (SSD)
    d_state: int = 0  # state numbers per channel; 0 = 16 for mamba1, 64 for mamba2
    expand: int = 2  # inner channels / d_model
    d_conv: int = 4  # taps of the convolution
    dt_rank: int = 0  # rank of delta's projection in mamba1; 0 = d_model / 16
    n_head: int = 0  # heads of mamba2; 0 = heads of 64 channels

    def _resolve(self):
        if self.ssm not in SSMS:
            raise BitbyteError(f"ssm is {self.ssm!r}; choose from {', '.join(SSMS)}")
        for name, value in (
            ("d_state", 16 if self.ssm == "mamba1" else 64),
            ("dt_rank", -(-self.d_model // 16)),
            ("n_head", max(1, self.d_inner // 64)),
        ):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
            if getattr(self, name) < 0:
                raise BitbyteError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_inner % self.n_head:
            raise BitbyteError(f"{self.d_inner} channels do not divide into {self.n_head} heads")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def per_layer(self) -> int:
        D, N, M = self.d_inner, self.d_state, self.d_model
        shared = M + 3 * M * D
        if self.ssm == "mamba1":
            select = D * (self.dt_rank + 2 * N) + D * self.dt_rank + D * N
            return shared + select + D * (self.d_conv + 1) + 2 * D
        select = M * (2 * N + self.n_head) + 3 * self.n_head
        return shared + select + (D + 2 * N) * (self.d_conv + 1) + D


PRIOR_FIELDS = {field.name for field in dataclasses.fields(ModelConfig) if "prior" in field.name}
PRIOR_CHOICES = PRIOR_FIELDS - {"prior"} | {"prior_lr"}  # options that belong to a prior
# Fields that came later: absent from the JSON of a model without the feature, so that earlier
# versions can read it, and not missed there.
LATER = {"prior": PRIOR_FIELDS, "block": {"block", "ar_share", "block_rank"}, "around": {"around"}}
CONFIGS = {c.family: c for c in (TransformerConfig, MambaConfig, DiffusionConfig)}

# n_layer, d_model, d_ff, seq_len
PRESETS = {
    "nano": (2, 128, 256, 256),
    "tiny": (4, 128, 384, 256),
    "micro": (2, 256, 512, 256),
    "mini": (6, 256, 768, 512),
    "small": (6, 512, 1024, 1024),
    "medium": (12, 512, 2048, 1024),
    "base": (12, 768, 2048, 1024),
    "large": (24, 1536, 4096, 1024),
}


def preset(name: str, family: str = "ar", **changes) -> ModelConfig:
    """Config of a preset, with fields replaced where ``changes`` has a value other than None.

    A Mamba preset has as many layers as make its two large projections match the transformer's
    matrices in parameters; the rest of Mamba comes on top.  Raises BitbyteError on a field that the
    family does not have.
    """
    if name not in PRESETS:
        raise BitbyteError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    fields: dict = dict(zip(("n_layer", "d_model", "d_ff", "seq_len"), PRESETS[name], strict=True))
    config_class = family_config(family)
    if name == "nano" and changes.get("prior", "none") != "none":
        fields["prior_rows"] = 1 << 14
    if family == "mamba":
        d_model, d_ff = fields["d_model"], fields["d_ff"]
        per_layer = (4 * d_model + 3 * d_ff) / (6 * d_model)
        fields["n_layer"] = max(1, round(fields["n_layer"] * per_layer))
    known = {field.name for field in dataclasses.fields(config_class)}
    fields = {key: value for key, value in fields.items() if key in known}
    fields |= {key: value for key, value in changes.items() if value is not None}
    foreign = fields.keys() - known
    if foreign:
        raise BitbyteError(f"{family} models have no {sorted(foreign)[0]}; leave it out")
    return config_class(**fields)


def family_config(name: str) -> type[ModelConfig]:
    """The config class of the family called ``name``.  Raises BitbyteError listing the families."""
    if name not in CONFIGS:
        raise BitbyteError(f"no model family {name!r}; choose from {', '.join(CONFIGS)}")
    return CONFIGS[name]


def config_to_dict(config) -> dict:
    """JSON-ready form of a model config; `config_from_dict` reads it back."""
    fields = dataclasses.asdict(config)
    for feature, names in LATER.items():
        if fields.get(feature) in ("none", 0):
            used = {"block_rank"} if fields.get("around") else set()
            fields = {name: v for name, v in fields.items() if name not in names - used}
    return {"family": config.family} | fields


def config_from_dict(fields: dict) -> ModelConfig:
    """Rebuild a model config; unknown, missing or mistyped fields raise BitbyteError."""
    if not isinstance(fields, dict) or "family" not in fields:
        raise BitbyteError("the model config names no family")
    fields = dict(fields)
    config_class = family_config(fields.pop("family"))
    known = {field.name: (field.type,) for field in dataclasses.fields(config_class)}
    if wrong := wrong_fields(fields, known, optional=set().union(*LATER.values())):
        raise BitbyteError(f"model config: {wrong}")
    return config_class(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next byte is chosen.  Values outside their range raise BitbyteError."""

    temperature: float = 0.8  # divides the logits; 0 = greedy
    top_k: int = 0  # keep this many bytes; 0 = off
    top_p: float = 1.0  # keep the fewest bytes with this total probability; 1 = off
    min_p: float = 0.0  # drop bytes below this share of the likeliest one's probability; 0 = off
    repetition_penalty: float = 1.0  # above 1 makes recent bytes less likely; 1 = off
    repetition_window: int = 64  # bytes that count as recent; 0 = none
    max_new_tokens: int = 256  # bytes to generate
    seed: int = 0  # the same seed gives the same draws

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds):
                kind = "a number" if field.type is float else "a whole number"
                raise BitbyteError(f"{field.name} is {value!r}; it must be {kind}")
        for name, allowed, text in (
            ("temperature", 0 <= self.temperature <= 10, "from 0 (greedy) to 10"),
            ("top_k", 0 <= self.top_k <= N_BYTES, f"from 0 (off) to {N_BYTES}"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "from 0.1 to 10, 1 = off"),
            ("repetition_window", 0 <= self.repetition_window <= 65536, "from 0 (off) to 65536"),
            ("max_new_tokens", 1 <= self.max_new_tokens <= 2**40, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not allowed:
                raise BitbyteError(f"{name} is {getattr(self, name)}; it must be {text}")


# Upper limit of parameters -> (dense matrix lr, ternary matrix lr, embedding and norm lr) for Muon.
# Measured up to 2 M, scaled down in the usual way beyond; AdamW takes a quarter on the matrices.
RATES = (
    (2e6, (4e-3, 6e-3, 4e-3)),
    (10e6, (4e-3, 6e-3, 3e-3)),
    (60e6, (3e-3, 4e-3, 2e-3)),
    (math.inf, (2e-3, 3e-3, 1e-3)),
)
# What a resumed run may change.  All else defines the run.
OPERATIONAL = {
    "out", "resume", "allow_overwrite", "steps", "minutes", "epochs", "stop_after", "log_every",
    "save_every", "save_minutes", "eval_every", "eval_bytes", "save_best", "keep_last", "device",
    "threads", "progress", "tracker", "parallel", "grad_checkpoint", "data", "val_data",
    "batch_size", "grad_accum",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.  Fields that are None take the value of the preset or the recipe."""

    said: ClassVar[frozenset[str]]  # the fields given by name, see __new__
    family: str = "ar"  # model family: ar, mamba or diffusion
    preset: str = "nano"  # shape to start from: nano tiny micro mini small medium base large
    n_layer: int | None = None  # blocks; default, here and below: the preset's
    d_model: int | None = None  # width of the residual stream
    d_ff: int | None = None  # width inside the MLP
    n_head: int | None = None  # attention heads; default: heads of 64
    linear: str = "ternary"  # ternary, or dense for the float twin
    act_quant: bool = True  # int8 activations in ternary layers
    ssm: str | None = None  # mamba: mamba2 (default) or mamba1
    d_state: int | None = None  # mamba: state numbers per channel
    diffusion_steps: int | None = None  # diffusion: noise levels; default: the continuous bound
    min_mask_prob: float | None = None  # diffusion with N steps: step s hides min + s/N (max - min)
    max_mask_prob: float | None = None  # diffusion with N steps: share hidden at the last step
    block: int | None = None  # diffusion: bytes of a block after a clean past; 0 = whole windows
    ar_share: float | None = None  # diffusion in blocks: share of next-byte prediction; default 0.5
    around: int | None = None  # diffusion of whole windows: bytes to either side seen by a table
    anneal: float = 0.0  # diffusion in blocks: share of the run in which blocks grow from 1 byte
    init: str | None = None  # run of the same shape whose weights to start from, e.g. one of ar

    prior: str = "auto"  # n-gram tables: counts | learned | none | auto (counts from 256 KiB)
    prior_orders: int | None = None  # longest context besides the word so far, bytes; default 6
    prior_rows: int | None = None  # contexts per table; default 65,536, nano 16,384
    prior_rank: int | None = None  # numbers stored per context; default 32
    prior_bits: int | None = None  # bits per stored number: 4 (default) or 8
    prior_lr: float | None = None  # learning rate of the tables; default 0 (counts), 0.1 (learned)

    data: str | None = None  # packed folder (also s3://...), folder or glob of .bin, or one file
    val_data: str | None = None  # validation bytes; default: the val split of data
    seq_len: int | None = None  # bytes per training window; default: the preset's
    curriculum: tuple[int, ...] = ()  # window bytes in equal stages instead, e.g. 2048 4096 8192
    seq_len_cap: int | None = None  # upper limit for the stages of the curriculum, bytes
    stride: int | None = None  # bytes from one window's start to the next; default: no overlap

    steps: int | None = None  # optimizer steps; default 200 if no budget is given
    epochs: float | None = None  # passes over the training windows
    minutes: float | None = None  # wall time of the training and of counting n-grams
    stop_after: int | None = None  # save and stop after this many steps of this call
    batch_size: int = 8  # windows per micro-batch on each process
    grad_accum: int = 1  # micro-batches per step

    optimizer: str = "muon"  # muon | adamw | adamw8bit
    newton_schulz: int = 5  # iterations that make Muon's updates orthogonal
    lr: float | None = None  # peak learning rate of the matrices; default: by the model's size
    embed_lr: float | None = None  # peak rate of embeddings and norms; default: by the model's size
    weight_decay: float = 0.1  # on matrices, decoupled
    decay_until: float | None = None  # share of the run with weight decay; ternary 2/3, dense 1
    schedule: str = "linear"  # after warm-up: linear | cosine | wsd (constant, then decay)
    warmup: float = 0.04  # share of the run in which the learning rate rises
    clip: float = 1.0  # largest gradient norm

    dtype: str = "auto"  # auto | bf16 | fp16 | fp32
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    parallel: str = "auto"  # under torchrun: ddp | fsdp2 (weights in shares) | auto (by need)
    threads: int | None = None  # CPU threads
    use_sdpa: bool = True  # PyTorch's fused attention; without: the plain formula
    attention: str = "auto"  # auto | sdpa | chunked | plain
    linear_kernel: str = "auto"  # auto | reference | int8
    scan: str = "auto"  # mamba: auto | reference | fast | mamba_ssm
    grad_checkpoint: bool = False  # recompute blocks in the backward pass: less memory
    compile: bool = False  # run the model through torch.compile
    deterministic: bool = False  # reproducible kernels; Muon in float32
    seed: int = 0  # seed of the initial weights and the data order

    out: str | None = None  # run folder; default: time-stamped under artifacts/checkpoints
    resume: bool = False  # continue from the newest checkpoint in out
    allow_overwrite: bool = False  # first delete the run in out; other files stay
    log_every: int = 10  # steps from one logged line to the next
    save_every: int | None = None  # steps from one save to the next; default: by time
    save_minutes: float = 5.0  # without save_every: wall time between saves; 0 = at the end only
    eval_every: int | None = None  # steps between validations; default: at the end only
    eval_bytes: int = 262144  # validation bytes scored while training; `eval` scores all
    save_best: bool = False  # also keep the checkpoint with the best validation BPB
    keep_last: int | None = None  # keep this many newest checkpoints; of timed saves only the last
    tracker: str | None = None  # tensorboard | wandb | mlflow, besides metrics.jsonl
    progress: bool = True  # show a progress bar on a terminal, and notes

    def __new__(cls, **given):
        """Remember which fields were given: on resume these count, and defaults do not."""
        self = super().__new__(cls)
        object.__setattr__(self, "said", frozenset(given))
        return self

    def naming(self, fields: Collection[str]) -> "TrainConfig":
        """A copy in which only ``fields`` count as given, as a parser fills in all of them."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "said", self.said & set(fields))
        return copy

    def replace(self, **changes) -> "TrainConfig":
        """A copy with some fields changed; fields given before still count as given."""
        changed = dataclasses.replace(self, **changes)
        object.__setattr__(changed, "said", self.said | changes.keys())
        return changed

    def with_prior(self, n_bytes: int) -> "TrainConfig":
        """A copy in which prior "auto" is resolved for ``n_bytes`` of training data.

        So is the rate of learned tables, for the run and its records to state.
        """
        if self.prior not in ("auto", "learned"):
            return self
        changes: dict = {"prior_lr": self.table_rate}
        if self.prior == "auto":
            changes = {"prior": "counts" if n_bytes >= AUTO_PRIOR_BYTES else "none"}
        given = sorted(name for name in PRIOR_CHOICES if getattr(self, name) is not None)
        if changes.get("prior") == "none" and given:
            raise BitbyteError(
                f"{given[0]} belongs to n-gram tables, which {n_bytes:,} bytes of training data "
                "do not get by default; give --prior counts too, or neither"
            )
        copy = dataclasses.replace(self, **changes)
        object.__setattr__(copy, "said", self.said)
        return copy

    def __post_init__(self):
        for name, low in (
            ("steps", 1), ("batch_size", 1), ("grad_accum", 1), ("seq_len", 1), ("log_every", 1),
            ("save_every", 1), ("eval_every", 1), ("eval_bytes", 1), ("stop_after", 1),
            ("stride", 1), ("newton_schulz", 1), ("threads", 1), ("keep_last", 1),
            ("seq_len_cap", 1), ("d_state", 1),
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
            ("save_minutes", 0, 1e9), ("anneal", 0, 1), ("prior_lr", 0, 10),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BitbyteError(f"{name} is {value}; it must be from {low} to {high:g}")
        for name, known in (
            ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("prior", (*PRIORS, "auto")),
            ("parallel", PARALLEL),
        ):  # fmt: skip
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
        for name, default in (("ar_share", None), ("anneal", 0.0)):
            if getattr(self, name) != default and not self.block:
                raise BitbyteError(f"{name} belongs to --block; give both or neither")
        uneven = [s for s in self.curriculum if self.block and s % self.block]
        if uneven:
            raise BitbyteError(f"blocks of {self.block} bytes do not divide windows of {uneven[0]}")
        if self.scan != "auto" and self.family != "mamba":
            raise BitbyteError(f"a model of family {self.family} has no scan; drop --scan")
        for name, why in {} if self.resume else self.idle_kernels().items():  # kept on resume
            raise BitbyteError(f"{why}; drop --{'no_' * (name == 'use_sdpa')}{name}")
        if self.prior == "none" and not self.resume:
            for name in sorted(PRIOR_CHOICES):
                if getattr(self, name) is not None:
                    raise BitbyteError(f"{name} belongs to --prior counts or learned; give both")
        if self.prior == "learned" and not self.table_rate:
            raise BitbyteError("learned tables need a prior_lr above 0")
        if self.linear == "dense" and not self.act_quant:
            raise BitbyteError("dense layers have no int8 activations; drop --no_act_quant")
        if self.resume and self.out is None:
            raise BitbyteError("resume needs the run folder: --out RUN --resume")
        if self.tracker not in (None, "tensorboard", "wandb", "mlflow"):
            raise BitbyteError(f"no tracker {self.tracker!r}; choose tensorboard, wandb or mlflow")

    def idle_kernels(self) -> dict[str, str]:
        """{field: reason} of the kernels chosen by name that this run would not use."""
        idle = {}
        if not self.use_sdpa and self.attention not in ("auto", "plain"):
            idle["attention"] = "--no_use_sdpa already chooses the plain attention"
        if self.family == "mamba":
            chosen = {"attention": self.attention != "auto", "use_sdpa": not self.use_sdpa}
            idle |= {name: "a Mamba has no attention" for name in chosen if chosen[name]}
        if self.linear_kernel == "int8" and self.linear == "dense":
            idle["linear_kernel"] = "dense layers have no int8 kernel"
        elif self.linear_kernel == "int8" and not self.act_quant:
            idle["linear_kernel"] = "the int8 kernel needs int8 activations"
        return idle

    def model_config(self):
        """The config of the model this run trains; prior "auto" means none, see `with_prior`."""
        prior = "none" if self.prior == "auto" else self.prior
        stages = [min(s, self.seq_len_cap or s) for s in self.curriculum]
        return preset(
            self.preset, self.family, n_layer=self.n_layer, d_model=self.d_model, d_ff=self.d_ff,
            n_head=self.n_head, linear=self.linear, act_quant=self.act_quant,
            seq_len=max(stages, default=self.seq_len), ssm=self.ssm, d_state=self.d_state,
            diffusion_steps=self.diffusion_steps, min_mask_prob=self.min_mask_prob,
            max_mask_prob=self.max_mask_prob, block=self.block, ar_share=self.ar_share,
            around=self.around,
            prior=prior, prior_orders=self.prior_orders,
            prior_rows=self.prior_rows, prior_rank=self.prior_rank, prior_bits=self.prior_bits,
        )  # fmt: skip

    @property
    def table_rate(self) -> float:
        """Peak learning rate of the n-gram tables; 0: they stay as they were counted."""
        return (0.1 if self.prior == "learned" else 0.0) if self.prior_lr is None else self.prior_lr

    def rates(self) -> tuple[float, float]:
        """(matrix, embedding) peak learning rates, as given or from the recipe."""
        size = self.model_config().n_parameters
        dense, ternary, embed = next(rates for limit, rates in RATES if size < limit)
        matrix = ternary if self.linear == "ternary" else dense
        matrix = matrix if self.optimizer == "muon" else matrix / 4
        return self.lr or matrix, self.embed_lr or embed


def fits(value: object, kind: object) -> bool:
    """Whether a value from JSON has the type of a `TrainConfig` field."""
    if isinstance(value, tuple):
        return kind == tuple[int, ...] and all(type(item) is int for item in value)
    kinds = typing.get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def resumed(config: TrainConfig, stored: dict, run: Path) -> TrainConfig:
    """Config of a resumed run: the ``stored`` one, with the changes that this call asks for.

    Raises BitbyteError if ``config`` gives another value for a field that defines the run.
    """
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    stored = {"prior": "none", "newton_schulz": 5} | stored  # of runs older than these options
    unknown = stored.keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise BitbyteError(f"{run}: its config has the unknown field {sorted(unknown)[0]}")
    for field in dataclasses.fields(TrainConfig):
        if field.name in stored and not fits(stored[field.name], field.type):
            raise BitbyteError(f"{run}: its config has a {field.name} of the wrong type")
    changed = {}
    for name in sorted(config.said):
        value, old = getattr(config, name), stored.get(name, getattr(TrainConfig(), name))
        if name in OPERATIONAL:
            changed[name] = value
        elif value not in (None, old) and (name, value) != ("prior", "auto"):
            if old is None:  # it was left to the preset, the family or the prior
                begun = TrainConfig(**stored | {"resume": True, "out": str(run)})
                old = getattr(begun.model_config(), name, old)
                old = begun.table_rate if name == "prior_lr" else old
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
    for name in ("data", "val_data"):  # None: unchanged
        if changed.get(name, "") is None:
            del changed[name]
    stored |= {"stop_after": None, "allow_overwrite": False}
    return TrainConfig(**(stored | changed))
