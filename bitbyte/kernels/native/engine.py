"""A model as a list of native operations.

Shapes: S lanes (independent streams), T positions fed at once, M = S T rows, D width, V bytes.
"""

import functools
import threading

import numpy as np
import torch
from torch import nn

from bitbyte.bitlinear import BitLinear, Linear
from bitbyte.kernels.native import products, transformer
from bitbyte.kernels.native.machine import Machine, Program
from bitbyte.transformer import rope_cos_sin
from bitbyte.vocab import N_BYTES, VOCAB_SIZE

KERNELS = [products.ternary, products.dense, *transformer.KERNELS]


@functools.cache
def machine() -> Machine:
    """All kernels, compiled for this processor."""
    return Machine(KERNELS)


class Engine:
    """Runs a causal transformer: `feed` any number of ids to a state, get logits.

    Raises ValueError for ids, positions or shapes that do not fit: below are raw addresses.
    """

    def __init__(self, model: nn.Module):
        c = model.config
        self.config, self.context = c, c.seq_len
        self.cached = -(-c.seq_len // 16) * 16
        self.width = c.d_model // c.n_head
        cos, sin = rope_cos_sin(0, c.seq_len, self.width, c.rope_theta, torch.device("cpu"))
        half = self.width // 2
        self.cos, self.sin = (np.ascontiguousarray(t.numpy()[:, :half]) for t in (cos, sin))
        self.table = _array(model.embed)
        self.head = products.pack_dense(self.table[:N_BYTES])
        self.norm = _array(model.norm.weight)
        self.blocks = [
            {
                "attn_norm": _array(b.attn_norm.weight), "mlp_norm": _array(b.mlp_norm.weight),
                "qkv": _packed(b.attn.qkv), "out": _packed(b.attn.out),
                "gate_up": _packed(b.mlp.gate_up), "down": _packed(b.mlp.down),
            }
            for b in model.body.blocks
        ]  # fmt: skip
        self.programs: dict[tuple, tuple] = {}
        self.lock = threading.Lock()  # programs share scratch

    def state(self, lanes: int) -> np.ndarray:
        """Keys and values of ``lanes`` streams that have been fed nothing."""
        c = self.config
        shape = (2, c.n_layer, lanes, c.n_head, self.cached * self.width)
        return np.zeros(shape, np.float32)

    def feed(self, ids_ST: np.ndarray, state: np.ndarray, start: int = 0) -> np.ndarray:
        """Logits_STV (float32) after each of T ids that follow ``start`` ids in each lane."""
        ids_ST = np.ascontiguousarray(ids_ST, np.int64)
        S, T = ids_ST.shape
        if not 0 <= start <= start + T <= self.context or not T:
            raise ValueError(f"positions {start} to {start + T} are outside 0 to {self.context}")
        if ids_ST.min() < 0 or ids_ST.max() >= VOCAB_SIZE:
            raise ValueError("ids are 0 to 256")
        if state.shape[2] != S:
            raise ValueError(f"a state of {state.shape[2]} lanes cannot take {S}")
        with self.lock:
            program, logits = self._program(S * T, state)
            program.context[:] = S * T, start, T, ids_ST.ctypes.data
            program()
            return logits.reshape(S, T, N_BYTES).copy()

    def stepper(self, state: np.ndarray):
        """``step(id, position)`` -> logits_V for one lane: addresses bound once.

        The result is overwritten by the next step.
        """
        program, logits = self._program(1, state)
        context, ids_1, logits_V = program.context, np.zeros(1, np.int64), logits[0]
        context[:] = 1, 0, 1, program.address(ids_1)
        limit = self.context

        def step(byte: int, position: int) -> np.ndarray:
            if not (0 <= byte < VOCAB_SIZE and 0 <= position < limit):
                raise ValueError(f"id {byte} at position {position} does not fit")
            ids_1[0], context[1] = byte, position
            program()
            return logits_V

        return step

    def _program(self, rows: int, state: np.ndarray) -> tuple[Program, np.ndarray]:
        """(program, logits_MV) for so many rows and this state's arrays."""
        key = rows, state.ctypes.data, state.shape[2]
        if key not in self.programs:
            self.programs = {key: self._build(rows, state)}  # one is enough: states come and go
        return self.programs[key]

    def _build(self, M: int, state: np.ndarray) -> tuple[Program, np.ndarray]:
        c, t, D, F = self.config, transformer, self.config.d_model, self.config.d_ff
        p = Program(machine())
        h, y, wide = (np.zeros((M, n), np.float32) for n in (D, max(D, F), max(3 * D, 2 * F)))
        q, scale, total = np.zeros((M, max(D, F)), np.int8), np.zeros(M, np.float32), np.zeros(M, np.int32)
        scores, logits = np.zeros(self.cached, np.float32), np.zeros((M, N_BYTES), np.float32)
        quantized = {"out": q, "scale": scale, "total": total}
        heads = {"heads": c.n_head, "width": self.width, "cached": self.cached}

        def product(weight, x, inputs, outputs, out, add=0):
            w, s = weight
            if s is None:
                p.add(products.dense, x=x, weight=w, out=out, inputs=inputs, outputs=outputs, add=add)
            else:
                p.add(products.ternary, x=q, x_scale=scale, x_sum=total, weight=w, scale=s, out=out,
                      inputs=inputs, outputs=outputs, add=add)  # fmt: skip

        p.add(t.embed, table=self.table, out=h, width=D)
        for i, b in enumerate(self.blocks):
            keys, values = state[0, i], state[1, i]
            ternary = b["qkv"][1] is not None
            if ternary:
                p.add(t.norm_quantize, x=h, weight=b["attn_norm"], **quantized, width=D)
            else:
                p.add(t.norm, x=h, weight=b["attn_norm"], out=y, width=D)
            product(b["qkv"], y, D, 3 * D, wide)
            p.add(t.rotate, qkv=wide, keys=keys, values=values, cos=self.cos, sin=self.sin, **heads)
            p.add(t.attend, qkv=wide, keys=keys, values=values, scores=scores, out=y, **heads)
            if ternary:
                p.add(t.quantize, x=y, **quantized, width=D)
            product(b["out"], y, D, D, h, add=1)
            if ternary:
                p.add(t.norm_quantize, x=h, weight=b["mlp_norm"], **quantized, width=D)
            else:
                p.add(t.norm, x=h, weight=b["mlp_norm"], out=y, width=D)
            product(b["gate_up"], y, D, 2 * F, wide)
            if ternary:
                p.add(t.gate_quantize, x=wide, gated=y, **quantized, width=F)
            else:
                p.add(t.gate, x=wide, out=y, width=F)
            product(b["down"], y, F, D, h, add=1)
        p.add(t.norm, x=h, weight=self.norm, out=y, width=D)
        p.add(products.dense, x=y, weight=self.head, out=logits, inputs=D, outputs=N_BYTES, add=0)
        p.finish()
        return p, logits


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _packed(layer: Linear) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight, scale_O) of a ternary layer, (weight, None) of a dense one."""
    if not isinstance(layer, BitLinear):
        return products.pack_dense(_array(layer.weight)), None
    q_OI, scale_O = layer.int8_weight()
    return products.pack_ternary(q_OI.numpy()), _array(scale_O)
