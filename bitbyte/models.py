"""The model families: frozen configs, presets, and one contract for all.

Every family maps a window of bytes to the cost of each byte:

``forward(ids_BT, generator=None) -> nats_BT``
    float32 nats; the training loss is the mean, bits per byte the sum / ln 2 / bytes.
``logits(ids_BT) -> logits_BTV``
    V = 256.  For a causal family position t holds the law of the byte after ids[0..t].
``exact``
    True if the nats are the cost itself, False if they are an upper bound.

Causal families add ``context`` (longest window of ids, START included), ``init_state(batch)``,
``prefill(ids_BT, state)`` and ``step(ids_B, state)``, equal to the full forward.

A window stands alone: START (id 256) precedes it, so all of its bytes are scored, the first one
from nothing.  Shapes: B batch, T bytes of a window, D model width, V byte values.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbyte.bitlinear import KERNELS, LINEARS, BitLinear
from bitbyte.files import BitbyteError
from bitbyte.transformer import ATTENTION, CausalSelfAttention, RMSNorm, Transformer, attention_for
from bitbyte.vocab import N_BYTES, START, VOCAB_SIZE

MAX_PARAMETERS = 2**36  # refuses a corrupt size before memory is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a transformer model; everything needed to rebuild it."""

    family: ClassVar[str] = "ar"
    n_layer: int = 2  # blocks
    d_model: int = 128  # width of the residual stream
    d_ff: int = 256  # width inside the MLP
    n_head: int = 0  # attention heads; 0 = heads of 64
    seq_len: int = 256  # ids of context, START included
    linear: str = "ternary"  # "ternary" or "dense"
    act_quant: bool = True  # int8 activations in ternary layers
    rope_theta: float = 10000.0  # base of the rotary wavelengths

    def __post_init__(self):
        if self.linear not in LINEARS:
            raise BitbyteError(f"linear is {self.linear!r}; choose from {', '.join(LINEARS)}")
        for name in ("n_layer", "d_model", "d_ff", "seq_len"):
            if getattr(self, name) < 1:
                raise BitbyteError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_head == 0:
            object.__setattr__(self, "n_head", max(1, self.d_model // 64))
        if self.n_head < 0 or self.d_model % self.n_head or self.d_model // self.n_head % 2:
            raise BitbyteError(
                f"d_model {self.d_model} does not divide into {self.n_head} heads of even width; "
                "choose d_model as a multiple of 64, or n_head to fit"
            )
        if self.rope_theta <= 0:
            raise BitbyteError(f"rope_theta is {self.rope_theta}; it must be above 0")
        if self.n_parameters > MAX_PARAMETERS:
            raise BitbyteError(f"{self.n_parameters:,} parameters are more than bitbyte supports")

    @property
    def n_parameters(self) -> int:
        """Parameters of the model this describes, without building it."""
        per_layer = 4 * self.d_model**2 + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return VOCAB_SIZE * self.d_model + self.n_layer * per_layer + self.d_model


class State(NamedTuple):
    """What a causal transformer keeps of the ids it was fed."""

    caches: list[tuple[Tensor, Tensor]]  # per layer k_BHSK, v_BHSK
    position: int  # ids fed so far


class BitByteLM(nn.Module):
    """Causal transformer over bytes: predicts each byte from those before it in the window."""

    exact = True

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(VOCAB_SIZE, config.d_model))
        nn.init.normal_(self.embed, std=0.02)
        self.transformer = Transformer(
            n_layer=config.n_layer, d_model=config.d_model, d_ff=config.d_ff,
            n_head=config.n_head, rope_theta=config.rope_theta, causal=True,
            linear=config.linear, act_quant=config.act_quant,
        )  # fmt: skip
        self.norm = RMSNorm(config.d_model)

    @property
    def context(self) -> int:
        return self.config.seq_len

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cost of every byte in nats (float32); ids are 0..255, ``generator`` is not used."""
        ids_BT = ids_BT.long()
        before_BT = F.pad(ids_BT[:, :-1], (1, 0), value=START)
        logits_NV = self.logits(before_BT).float().flatten(0, 1)
        return F.cross_entropy(logits_NV, ids_BT.flatten(), reduction="none").view_as(ids_BT)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Law of the byte that follows each position; ids 0..256, START in front."""
        return self._head(self.transformer(F.embedding(ids_BT.long(), self.embed)))

    def _head(self, h_BTD: Tensor) -> Tensor:
        return F.linear(self.norm(h_BTD), self.embed[:N_BYTES])  # tied; START is never predicted

    def init_state(self, batch: int) -> State:
        """Empty key-value cache for ``batch`` streams of up to ``context`` ids."""
        c = self.config
        shape = (batch, c.n_head, c.seq_len, c.d_model // c.n_head)
        new = self.embed.new_empty
        return State([(new(shape), new(shape)) for _ in range(c.n_layer)], 0)

    def prefill(self, ids_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed T ids at once; logits_BV is the law of the byte after them."""
        stop = state.position + ids_BT.shape[1]
        if stop > self.context:
            raise BitbyteError(f"{stop} ids do not fit into the model's context of {self.context}")
        h_BTD = F.embedding(ids_BT.long(), self.embed)
        h_BTD = self.transformer(h_BTD, state.caches, state.position)
        return self._head(h_BTD[:, -1:])[:, 0], State(state.caches, stop)

    def step(self, ids_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one id a stream; equals the last position of the full forward.

        The cache is written in place: a state is used once.
        """
        return self.prefill(ids_B[:, None], state)


class Family(NamedTuple):
    """One model family: how it is described and how it is built."""

    config: type
    model: type


FAMILIES = {"ar": Family(TransformerConfig, BitByteLM)}

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


def preset(name: str, family: str = "ar", **changes) -> TransformerConfig:
    """Config of a preset, with fields replaced where ``changes`` has a value other than None."""
    if name not in PRESETS:
        raise BitbyteError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    fields = dict(zip(("n_layer", "d_model", "d_ff", "seq_len"), PRESETS[name], strict=True))
    fields |= {key: value for key, value in changes.items() if value is not None}
    return family_of(family).config(**fields)


def family_of(name: str) -> Family:
    """The family called ``name``.  Raises BitbyteError that lists the known ones."""
    if name not in FAMILIES:
        raise BitbyteError(f"no model family {name!r}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[name]


def build(config, seed: int = 0) -> nn.Module:
    """A freshly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family_of(config.family).model(config)


def config_to_dict(config) -> dict:
    """JSON-ready form of a model config; `config_from_dict` reads it back."""
    return {"family": config.family} | dataclasses.asdict(config)


def config_from_dict(fields: dict) -> object:
    """Rebuild a model config; unknown, missing or mistyped fields raise BitbyteError."""
    if not isinstance(fields, dict) or "family" not in fields:
        raise BitbyteError("the model config names no family")
    fields = dict(fields)
    config_class = family_of(fields.pop("family")).config
    known = {field.name: field.type for field in dataclasses.fields(config_class)}
    for problem, names in (
        ("unknown", fields.keys() - known.keys()),
        ("missing", known.keys() - fields.keys()),
        ("mistyped", {n for n in fields.keys() & known.keys() if type(fields[n]) is not known[n]}),
    ):
        if names:
            raise BitbyteError(f"model config: {problem} field {', '.join(sorted(names))}")
    return config_class(**fields)


def use_kernels(model: nn.Module, attention: str = "auto", linear: str = "auto") -> dict:
    """Choose how attention and ternary layers are computed; returns what will run.

    attention: auto | sdpa | chunked | plain.  linear: auto | reference | int8.  The answer, for
    the run's record, is resolved for the device the model is on.
    """
    for kind, name, known in (("attention", attention, ATTENTION), ("linear", linear, KERNELS)):
        if name not in known:
            raise BitbyteError(f"no {kind} kernel {name!r}; choose from {', '.join(known)}")
    device = next(model.parameters()).device
    chosen: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.kernel = attention
            T = model.config.seq_len
            chosen["attention"] = attention_for(attention, device, T, T, module.causal)
        elif isinstance(module, BitLinear):
            module.kernel = linear
            ran = {chosen.get("linear"), module.kernel_for(device)} - {None}
            chosen["linear"] = "+".join(sorted(set("+".join(ran).split("+"))))
    return chosen


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights stored small: 5 trits a byte, an fp32 scale a matrix, the rest bf16."""
    ternary_layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    in_layers = sum(m.weight.numel() for m in ternary_layers)
    rest = sum(p.numel() for p in model.parameters()) - in_layers
    trits = sum(-(-m.weight.numel() // 5) + 4 * m.groups for m in ternary_layers)
    return trits + 2 * rest
