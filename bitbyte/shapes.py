"""Shapes of the model families: frozen configs that say everything needed to rebuild a model.

Fields that are 0 where that makes no size follow from the others.  Every config checks itself and
raises BitbyteError in one line.
"""

import dataclasses
from typing import ClassVar

from bitbyte.files import BitbyteError
from bitbyte.vocab import VOCAB_SIZE

LINEARS = ("ternary", "dense")  # projections of a model
SSMS = ("mamba1", "mamba2")  # state-space layers
OPTIMIZERS = ("muon", "adamw", "adamw8bit")
SCHEDULES = ("linear", "cosine", "wsd")  # of the learning rate, after warm-up
NORM_EPS = 1e-5  # of every RMSNorm

MAX_PARAMETERS = 2**36  # refuses a corrupt size before memory is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the shapes of all families have in common."""

    family: ClassVar[str] = ""
    n_layer: int = 2  # blocks
    d_model: int = 128  # width of the residual stream
    seq_len: int = 256  # bytes of a window
    linear: str = "ternary"  # "ternary" or "dense"
    act_quant: bool = True  # int8 activations in ternary layers

    def __post_init__(self):
        if self.linear not in LINEARS:
            raise BitbyteError(f"linear is {self.linear!r}; choose from {', '.join(LINEARS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in self.may_be_0 and value < 1:
                raise BitbyteError(f"{field.name} is {value}; it must be at least 1")
        self._resolve()
        if self.n_parameters > MAX_PARAMETERS:
            raise BitbyteError(f"{self.n_parameters:,} parameters are more than bitbyte supports")

    may_be_0: ClassVar[tuple[str, ...]] = ()

    def _resolve(self) -> None:
        """Fill in what depends on other fields, and check what must fit together."""

    @property
    def n_parameters(self) -> int:
        """Parameters of the model this describes, without building it."""
        return VOCAB_SIZE * self.d_model + self.n_layer * self.per_layer + self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Shape of a transformer model; everything needed to rebuild it."""

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

    ``diffusion_steps`` 0 is the continuous-time bound: k of the T bytes of a window are hidden, k
    spread evenly over 1..T.  Above 0, step s of that many hides each byte with a probability that
    goes linearly from ``min_mask_prob`` to ``max_mask_prob``.
    """

    family: ClassVar[str] = "diffusion"
    may_be_0: ClassVar[tuple[str, ...]] = ("n_head", "diffusion_steps")
    diffusion_steps: int = 0  # noise levels; 0 = all of them, weighted as the bound asks
    min_mask_prob: float = 0.05  # step s of N hides this + s / N of the way to max_mask_prob
    max_mask_prob: float = 0.5  # what the last step hides

    def _resolve(self):
        super()._resolve()
        if self.diffusion_steps < 0:
            raise BitbyteError(f"diffusion_steps is {self.diffusion_steps}; it must be at least 0")
        if not 0 < self.min_mask_prob <= self.max_mask_prob <= 1:
            raise BitbyteError(
                f"mask probabilities {self.min_mask_prob} to {self.max_mask_prob} must satisfy "
                "0 < min_mask_prob <= max_mask_prob <= 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(ModelConfig):
    """Shape of a Mamba model; fields that are 0 follow from the others."""

    family: ClassVar[str] = "mamba"
    may_be_0: ClassVar[tuple[str, ...]] = ("d_state", "dt_rank", "n_head")
    ssm: str = "mamba2"  # mamba1 (selective scan) or mamba2 (SSD)
    d_state: int = 0  # numbers of state a channel; 0 = 16 for mamba1, 64 for mamba2
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


CONFIGS = {c.family: c for c in (TransformerConfig, MambaConfig, DiffusionConfig)}

# n_layer, d_model, d_ff, seq_len.  tiny learns most in under ten CPU minutes; from micro on the
# widths are multiples of 256, which exact exports need.
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

    A Mamba preset has as many layers as give about the parameters of the transformer.  Raises
    BitbyteError on a field that the family does not have.
    """
    if name not in PRESETS:
        raise BitbyteError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    fields = dict(zip(("n_layer", "d_model", "d_ff", "seq_len"), PRESETS[name], strict=True))
    config_class = family_config(family)
    if family == "mamba":
        d_model, d_ff = fields["d_model"], fields.pop("d_ff")
        per_layer = (4 * d_model + 3 * d_ff) / (6 * d_model)
        fields["n_layer"] = max(1, round(fields["n_layer"] * per_layer))
    fields |= {key: value for key, value in changes.items() if value is not None}
    foreign = fields.keys() - {field.name for field in dataclasses.fields(config_class)}
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
    return {"family": config.family} | dataclasses.asdict(config)


def config_from_dict(fields: dict) -> object:
    """Rebuild a model config; unknown, missing or mistyped fields raise BitbyteError."""
    if not isinstance(fields, dict) or "family" not in fields:
        raise BitbyteError("the model config names no family")
    fields = dict(fields)
    config_class = family_config(fields.pop("family"))
    known = {field.name: field.type for field in dataclasses.fields(config_class)}
    for problem, names in (
        ("unknown", fields.keys() - known.keys()),
        ("missing", known.keys() - fields.keys()),
        ("mistyped", {n for n in fields.keys() & known.keys() if type(fields[n]) is not known[n]}),
    ):
        if names:
            raise BitbyteError(f"model config: {problem} field {', '.join(sorted(names))}")
    return config_class(**fields)
