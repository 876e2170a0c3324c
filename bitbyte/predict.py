"""What turns ids into tables for the coder; encoder and decoder must use the same one.

A table gives each of the 256 byte values an integer count of at least 1, and they sum to TOTAL.
If one count differs between encoder and decoder, everything after it is lost.  So a predictor has
a ``fingerprint``, and a decoder with another one refuses before it decodes a byte.

`FloatPredictor` runs any causal model as it is.  Floating-point sums depend on the processor, the
libraries and the batch, so its fingerprint covers the laws that this machine computes for a fixed
probe, and the batch never changes within a file.

Shapes: S lanes (windows side by side), T positions, V = 256 byte values.
"""

import hashlib
import json
from typing import Protocol

import numpy as np
import torch

from bitbyte.files import BitbyteError
from bitbyte.integer import IntegerPredictor, supports
from bitbyte.models import config_to_dict
from bitbyte.rans import TOTAL
from bitbyte.vocab import N_BYTES, START

MODES = ("auto", "portable", "float")
PROBE_STEPS = 64  # of the numeric fingerprint
FINGERPRINT_BYTES = 16


class Predictor(Protocol):
    """Integer laws of the next byte, for ``lanes`` windows side by side."""

    mode: str  # "float" or "portable"
    fingerprint: bytes  # 16 bytes: of the weights and of how the numbers are computed
    window: int  # bytes of a window at most
    kernels: dict  # what computes it, for records

    def start(self, n_lanes: int) -> object:
        """State of so many windows before their first byte."""

    def step(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        """(counts_SV uint32, state) after one more int64 id a lane; the first is START."""

    def windows(self, ids_ST: np.ndarray) -> np.ndarray | None:
        """counts_STV that `step` gives for these ids, bit for bit; None where not promised."""


class FloatPredictor:
    """The model as it computes, always with ``lanes`` windows at a time."""

    mode = "float"

    def __init__(self, model, lanes: int):
        self.model, self.lanes = model.eval(), lanes
        self.kernels = {"arithmetic": "float"}
        self.window = model.config.seq_len
        self._device = next(model.parameters()).device
        self._fingerprint: bytes | None = None

    @property
    def fingerprint(self) -> bytes:
        """Of the weights, and of logits and counts of a probe on this machine, as it is set now."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"float 1 %d " % self.lanes + weights_hash(self.model))
            state, ids = self.start(self.lanes), np.full(self.lanes, START)
            lane = np.arange(self.lanes)
            for t in range(min(PROBE_STEPS, self.window)):
                logits, state = self._logits(ids, state)
                digest.update(logits.tobytes())
                digest.update(counts_from_floats(logits).tobytes())
                ids = (lane * 97 + t * t * 31 + t * 57) % N_BYTES
            self._fingerprint = digest.digest()[:FINGERPRINT_BYTES]
        return self._fingerprint

    def start(self, n_lanes: int):
        if n_lanes != self.lanes:
            raise AssertionError(f"{n_lanes} lanes, made for {self.lanes}: other sums would come")
        return self.model.init_state(n_lanes)

    def _logits(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        with torch.no_grad():
            ids = torch.from_numpy(np.ascontiguousarray(ids_S, np.int64)).to(self._device)
            logits_SV, state = self.model.step(ids, state)
            return logits_SV.float().cpu().numpy(), state

    def step(self, ids_S: np.ndarray, state) -> tuple[np.ndarray, object]:
        logits_SV, state = self._logits(ids_S, state)
        return counts_from_floats(logits_SV), state

    def windows(self, ids_ST: np.ndarray) -> None:
        return None  # a full forward pass sums in another order than steps do


def counts_from_floats(logits_SV: np.ndarray) -> np.ndarray:
    """counts_SV (uint32, each row sums to TOTAL, none 0) of float logits.

    Each value gets 1 and the whole part of its share of what is left; the largest count (the first
    of equals) takes the rest.
    """
    weights = logits_SV.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities give NaN, and that is refused
        weights -= weights.max(1, keepdims=True)
    np.exp(weights, out=weights)
    total = weights.sum(1, keepdims=True)
    if not np.isfinite(total).all():
        raise BitbyteError("the model's logits are NaN or infinite; its weights are broken")
    weights *= (TOTAL - N_BYTES) / total
    counts = weights.astype(np.uint32)  # rounds towards 0
    counts += 1
    rest = TOTAL - counts.sum(1, dtype=np.int64)
    counts[np.arange(len(counts)), counts.argmax(1)] += rest.astype(np.uint32)
    return counts


def weights_hash(model) -> bytes:
    """SHA-256 (32 bytes) of a model's config and of every tensor by name, shape, type and value."""
    digest = hashlib.sha256(json.dumps(config_to_dict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def predictor_for(model, meta: dict | None = None, mode: str = "auto", *, lanes: int) -> Predictor:
    """The predictor of a causal model; "auto" is portable where the model has that, else float.

    ``meta`` (of the checkpoint) only names the model in errors.  Raises BitbyteError for other
    families and for a mode that the model does not have.
    """
    if mode not in MODES:
        raise BitbyteError(f"no mode {mode!r}; choose from {', '.join(MODES)}")
    family = model.config.family
    if not hasattr(model, "step"):
        raise BitbyteError(
            f"a {family} model has no next byte to code: compress with one of family ar or mamba"
        )
    portable = supports(model.config)
    if mode == "portable" and not portable:
        what = (meta or {}).get("variant") or getattr(model.config, "linear", "")
        raise BitbyteError(
            f"models of family {family}, {what}, have no portable mode; use --mode float"
        )
    if portable and mode != "float":
        return IntegerPredictor(model)
    return FloatPredictor(model, lanes)
