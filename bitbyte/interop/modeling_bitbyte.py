"""A byte-level language model, as bitbyte trains them, for transformers.

All that the model computes is in this file, which needs torch and transformers only:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Ids 0 to 255 are bytes.  Id 256 precedes a text (START), or stands for a hidden byte of a masked
model; it is never predicted.  ``config.shape`` has the sizes.  The texts of a batch have one
length.  There is no key-value cache, so writing a text computes it again for every byte.

Shapes: B texts, T positions, D width, H heads, K head width, V predicted ids, N states of a
channel, C contexts of n-grams, r numbers for each.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

START = 256
NEVER = -1e4  # logit of START
EPS = 1e-5  # of norms, and the smallest scale of activations
REACH = 12  # bytes that a context of n-grams may depend on
MATCHES, MATCH_REACH = (4, 7), 1024  # lengths of matches, and how many bytes back they may lie
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # of the hashes of contexts
POWERS = [0] + [(MULTIPLIER**n + 2**63) % 2**64 - 2**63 for n in range(1, REACH + 1)]


class BitbyteConfig(PretrainedConfig):
    """``shape``: the config of the model in bitbyte, field by field."""

    model_type = "bitbyte"

    def __init__(self, shape: dict | None = None, **others):
        self.shape = shape or {}
        super().__init__(**others)


class TernaryLinear(nn.Module):
    """x W^T, where W is a stack of matrices of -1, 0 and 1 with a scale each.

    Five weights are kept in a byte, in base 3.  With ``rounds`` the inputs are rounded to 8 bits,
    with one step for each position; sums of such integers are exact in float32.
    """

    def __init__(self, n_in: int, n_out: int, groups: int, rounds: bool):
        super().__init__()
        self.shape, self.rounds = (n_out, n_in), rounds
        self.register_buffer("trits", torch.zeros(-(-n_in * n_out // 5), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(groups))

    def forward(self, x):
        powers = torch.tensor([1, 3, 9, 27, 81], device=x.device)
        weight = (self.trits[:, None] // powers % 3).flatten()[: math.prod(self.shape)] - 1
        weight = weight.view(self.shape).to(x.dtype)
        scale = self.scale.repeat_interleave(self.shape[0] // len(self.scale))
        if not self.rounds:
            return F.linear(x, weight * scale[:, None])
        step = x.abs().amax(-1, keepdim=True).float().clamp(min=EPS) / 127
        return F.linear((x / step).round(), weight) * step * scale


def linear(c, n_in: int, n_out: int, groups: int = 1) -> nn.Module:
    if c.linear == "ternary":
        return TernaryLinear(n_in, n_out, groups, c.act_quant)
    return nn.Linear(n_in, n_out, bias=False)


class Norm(nn.Module):
    """x / rms(x) * weight, in the order of bitbyte on a CPU, so that the same bits come out."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return x * (square + EPS).rsqrt() * self.weight


# --- transformers


def rotary(T: int, width: int, theta: float, device) -> tuple:
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), rates).repeat(1, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class Attention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.theta, self.causal = c.n_head, c.rope_theta, c.family == "ar"
        self.qkv, self.out = linear(c, c.d_model, 3 * c.d_model, 3), linear(c, c.d_model, c.d_model)

    def forward(self, x_BTD):
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        cos, sin = rotary(T, D // self.n_head, self.theta, x_BTD.device)
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin
                for x in qkv[:2])  # fmt: skip
        y_BHTK = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=self.causal and T > 1)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_up, self.down = (
            linear(c, c.d_model, 2 * c.d_ff, 2),
            linear(c, c.d_ff, c.d_model),
        )

    def forward(self, x_BTD):
        gate, up = self.gate_up(x_BTD).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP, each added to its input."""

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.mlp_norm = Norm(c.d_model), Norm(c.d_model)
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


# --- Mamba


class Mixer(nn.Module):
    """The selective state-space layer of Mamba-1 or Mamba-2, one position after the other.

    h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t,  y_t = <c_t, h_t> + skip x_t
    """

    def __init__(self, c):
        super().__init__()
        inner, N = c.expand * c.d_model, c.d_state
        self.first, self.sizes = c.ssm == "mamba1", (inner, N, c.dt_rank, c.n_head)
        self.in_proj = linear(c, c.d_model, 2 * inner, 2)
        self.out_proj = linear(c, inner, c.d_model)
        width, rows = (inner, inner) if self.first else (inner + 2 * N, c.n_head)
        self.conv_weight = nn.Parameter(torch.zeros(width, c.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.a_log = nn.Parameter(torch.zeros(rows, N) if self.first else torch.zeros(rows))
        self.dt_bias, self.skip = nn.Parameter(torch.zeros(rows)), nn.Parameter(torch.ones(rows))
        if self.first:
            self.x_proj = nn.Linear(inner, c.dt_rank + 2 * N, bias=False)
            self.dt_weight = nn.Parameter(torch.zeros(inner, c.dt_rank))
        else:
            self.bcdt_proj = nn.Linear(c.d_model, 2 * N + c.n_head, bias=False)
            self.norm = Norm(inner)

    def convolve(self, x_BTC):
        T, taps = x_BTC.shape[1], self.conv_weight.shape[1]
        x_BTC = F.pad(x_BTC, (0, 0, taps - 1, 0))
        parts = (x_BTC[:, k : k + T] * self.conv_weight[:, k] for k in range(taps))
        return F.silu(sum(parts, self.conv_bias))

    def forward(self, u_BTD):
        inner, N, rank, heads = self.sizes
        z, x = self.in_proj(u_BTD).chunk(2, -1)
        if self.first:
            x = self.convolve(x)
            delta, b, c = self.x_proj(x).split((rank, N, N), -1)
            delta = F.softplus(F.linear(delta, self.dt_weight, self.dt_bias))[..., None]
            x, skip = x[..., None], self.skip[:, None]  # a channel is a head of one
            a = -self.a_log.exp()[:, None]
        else:
            b_c, delta = self.bcdt_proj(u_BTD).split((2 * N, heads), -1)
            x, b, c = self.convolve(torch.cat((x, b_c), -1)).split((inner, N, N), -1)
            delta = F.softplus(delta + self.dt_bias)[..., None]
            x, skip = x.unflatten(-1, (heads, -1)), self.skip[:, None]
            a = -self.a_log.exp()[:, None, None]
        h = x.new_zeros(*x[:, 0].shape, N)
        rows = []
        for t in range(x.shape[1]):  # heads and their channels, (B, H, P), with N states each
            kept = torch.exp(delta[:, t, ..., None] * a) * h
            h = kept + (delta[:, t] * x[:, t])[..., None] * b[:, t, None, None]
            rows.append((h * c[:, t, None, None]).sum(-1) + skip * x[:, t])
        y = torch.stack(rows, 1).flatten(2) * F.silu(z)
        return self.out_proj(y if self.first else self.norm(y))


class MambaBlock(nn.Module):
    """A mixer, added to its input."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.mixer = Norm(c.d_model), Mixer(c)

    def forward(self, x_BTD):
        return x_BTD + self.mixer(self.norm(x_BTD))


class Stack(nn.Module):
    def __init__(self, c):
        super().__init__()
        kind = MambaBlock if c.family == "mamba" else Block
        self.blocks = nn.ModuleList(kind(c) for _ in range(c.n_layer))

    def forward(self, x_BTD):
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD


# --- tables of n-grams


class Prior(nn.Module):
    """What usually follows the bytes before a position in the training data.

    A context is the last 1, 2, ... bytes, or the word so far.  Its hash is a row of a table, which
    holds r numbers in 4 or 8 bits: value = sign(code) (code scale)^2.
    """

    def __init__(self, c):
        super().__init__()
        self.orders, self.rows, self.bits = c.prior_orders, c.prior_rows, c.prior_bits
        C, r = c.prior_orders + 1, c.prior_rank
        width = r * c.prior_bits // 8
        self.register_buffer("codes", torch.zeros(C, self.rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(C, r))
        self.project = linear(c, C * r, c.d_model)
        self.direct = nn.Parameter(torch.zeros(START, C * r))
        self.gate = nn.Parameter(torch.zeros(C, c.d_model))
        self.match = nn.Parameter(torch.zeros(len(MATCHES), START + 1, c.d_model))

    def contexts(self, ids_BT):
        """(rows_BTC, known_BTC) of the contexts that end at each position."""
        ids_BT = F.pad(ids_BT, (REACH - 1, 0), value=START)
        newest = ids_BT.unfold(1, REACH, 1).flip(-1)  # the ids up to each position, newest first
        whole = (newest < START).cumprod(-1).bool()
        orders = [[POWERS[max(0, k - i)] for i in range(REACH)] for k in range(1, self.orders + 1)]
        hashes = ((newest + 1)[..., None, :] * torch.tensor(orders, device=ids_BT.device)).sum(-1)
        small = ids_BT | 32
        letters = (small >= ord("a")) & (small <= ord("z")) & (ids_BT < 128)
        letters = letters | (ids_BT >= 128) & (ids_BT < 256)
        letters = letters.unfold(1, REACH, 1).flip(-1).cumprod(-1)
        back = (letters.sum(-1, keepdim=True) - torch.arange(REACH, device=ids_BT.device)).clamp(0)
        word = ((newest + 1) * torch.tensor(POWERS, device=ids_BT.device)[back]).sum(-1)
        word = (word + newest[..., 0] + 1) * MULTIPLIER
        hashes = torch.cat((hashes, word[..., None]), -1)
        known = torch.cat((whole[..., : self.orders], whole[..., :1]), -1)
        return hashes >> (65 - self.rows.bit_length()) & (self.rows - 1), known

    def features(self, ids_BT):
        rows, known = self.contexts(ids_BT)
        C = rows.shape[-1]
        packed = self.codes.flatten(0, 1)[rows + torch.arange(C, device=rows.device) * self.rows]
        codes = packed.view(torch.int8)
        if self.bits == 4:  # two to a byte, the first in the low half
            codes = (torch.stack((packed << 4, packed), -1).view(torch.int8) >> 4).flatten(-2)
        root = codes.float() * self.scale
        return (root * root.abs() * known[..., None]).to(self.gate.dtype)

    def embed(self, features, ids_BT):
        h = self.project(features.flatten(2))
        for length, table in zip(MATCHES, self.match, strict=True):
            h = h + F.embedding(followers(ids_BT, length), table)
        return h

    def logits(self, features, h_BTD):
        gate = 1 + F.linear(h_BTD, self.gate)
        return F.linear((features * gate[..., None]).flatten(2), self.direct)


def followers(ids_BT, length: int):
    """The id after the last earlier occurrence of the ``length`` newest ids; START if none."""
    none = torch.full_like(ids_BT, START)
    T = ids_BT.shape[1]
    if length >= T:
        return none
    keys = ids_BT.unfold(1, length, 1)
    whole = (keys < START).all(-1)
    powers = torch.tensor([(START + 1) ** i for i in range(length)], device=ids_BT.device)
    # A stable sort makes equal keys neighbors, earlier positions first.
    ordered, order = (keys * powers).sum(-1).sort(dim=1, stable=True)
    earlier = F.pad(order[:, :-1], (1, 0))
    same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0)) & (order - earlier <= MATCH_REACH)
    at = torch.empty_like(order).scatter_(1, order, earlier + length)
    found = torch.empty_like(same).scatter_(1, order, same) & whole
    after = ids_BT.gather(1, at.clamp(max=T - 1))
    none[:, length - 1 :] = torch.where(found, after, none[:, length - 1 :])
    return none


# --- models


class BitbyteModel(PreTrainedModel):
    """What both kinds of models share."""

    config_class = BitbyteConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        c = SimpleNamespace(**config.shape)
        self.embed = nn.Embedding(START + 1, c.d_model)
        setattr(self, self.body, Stack(c))
        self.norm = Norm(c.d_model)
        self.prior = Prior(c) if getattr(c, "prior", "none") != "none" else None
        self.post_init()

    @property
    def body(self) -> str:
        return "mamba" if self.config.shape["family"] == "mamba" else "transformer"

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return None  # the embedding's first 256 rows

    def _init_weights(self, module):
        pass  # there is nothing that a folder does not hold

    def logits(self, ids_BT, attention_mask=None):
        """(B, T, 257); of a causal model at t those of the id after ids[0..t]."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("texts of one batch must have one length: padding is not supported")
        family, most = self.config.shape["family"], self.config.shape["seq_len"]
        if ids_BT.shape[1] > most and family != "mamba":
            raise ValueError(f"{ids_BT.shape[1]} ids: this model sees {most} at most")
        h_BTD, features = self.embed(ids_BT), None
        if self.prior is not None:
            past_BT = ids_BT
            if family == "diffusion":  # the id at a place may be the one to be predicted
                past_BT = F.pad(ids_BT[:, :-1], (1, 0), value=START)
            features = self.prior.features(past_BT)
            h_BTD = h_BTD + self.prior.embed(features, past_BT)
        h_BTD = self.norm(getattr(self, self.body)(h_BTD))
        logits_BTV = F.linear(h_BTD, self.embed.weight[:START])
        if features is not None:
            logits_BTV = logits_BTV + self.prior.logits(features, h_BTD)
        return F.pad(logits_BTV, (0, 1), value=NEVER)


class BitbyteForCausalLM(BitbyteModel, GenerationMixin):
    """Predicts each byte from START and the bytes before it."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **others):
        logits_BTV, loss = self.logits(input_ids, attention_mask), None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **others):
        """The newest ids that fit, after START."""
        room = self.config.shape["seq_len"] - 1
        first = input_ids.new_full((len(input_ids), 1), START)
        if (input_ids[:, 0] == START).all():
            input_ids = input_ids[:, 1:]
        return {
            "input_ids": torch.cat((first, input_ids[:, max(0, input_ids.shape[1] - room) :]), 1)
        }


class BitbyteForMaskedLM(BitbyteModel):
    """Predicts the bytes that are hidden, where the id is 256."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **others):
        logits_BTV, loss = self.logits(input_ids, attention_mask), None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits_BTV)
