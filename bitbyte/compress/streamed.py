"""A model as an expert of the mixer: its counts along one stream of bytes.

They come from the native engine, whose steps have the bits of its windows: the encoder takes whole
pieces, the decoder bytes.  A Mamba's state streams on.  A transformer's window is full at some
point; then it begins anew with the newest quarter of its bytes, which are computed once more.  (A
half, as in older files, is 0.2 % smaller and takes half as much time again.)

Shapes: T bytes, V byte values.
"""

from collections.abc import Callable, Iterator

import numpy as np

from bitbyte.compress.codec import model_names
from bitbyte.compress.mixer.codec import Codec
from bitbyte.compress.mixer.shapes import Shape
from bitbyte.compress.predictors import NativePredictor
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.vocab import START

PIECE = 2048  # bytes that a Mamba reads at once
TRIAL_BYTES = 1 << 16
TRIAL_BUCKETS, TRIAL_RING_BITS = 1 << 20, 16
LEAST_GAIN = 0.005  # of a trial's size
NAMED = 32  # bytes by which naming a model makes the header longer


def problem(model) -> str | None:
    """Why a model cannot be mixed here, at a bearable speed; None if it can."""
    if not hasattr(model, "step"):
        return f"a {model.config.family} model has no next byte"
    how = engine.described(model)
    return None if how == "native" else f"it needs the native engine: {how}"


class Expert:
    """See `mixer.codec.Model`.  ``name`` and ``fingerprint`` (16 bytes each) are for the header.

    A full window begins anew with one part in ``kept`` of it.  Raises BitbyteError if the model
    cannot be mixed here.
    """

    def __init__(self, model, meta: dict | None = None, kept: int = 4):
        if why := problem(model):
            raise BitbyteError(f"this model cannot be mixed here: {why}")
        predictor = NativePredictor(model)
        self.names, self.fingerprint = model_names(model, meta), predictor.fingerprint
        self._state = predictor.engine.state(1)
        self._window = predictor.engine.context  # ids that fit; a Mamba takes any number
        self.kept = kept if self._window == predictor.window else 2  # nothing to keep
        self._kept = max(1, predictor.window // kept)  # bytes
        self.begin()

    @property
    def name(self) -> bytes:
        return self.names[0]

    def begin(self) -> None:
        """Forget all bytes."""
        self._state.clear()
        self._ids = [START]  # to be fed before the next byte is predicted
        self._newest = b""

    def _counts(self, more: bytes) -> np.ndarray:
        """counts_TV after the waiting ids, and after each of ``more``."""
        ids = np.array([[*self._ids, *more]], np.int64)
        counts_TV = self._state.run(ids, kind=np.uint32)[len(self._ids) - 1 :]
        return counts_TV.view(np.int32)

    def _note(self, data: bytes) -> None:
        """Bytes that were predicted."""
        self._newest = (self._newest + data)[-self._kept :]
        self._ids = [data[-1]]
        if self._state.position == self._window:
            self._state.clear()
            self._ids = [START, *self._newest]

    def known(self, data: np.ndarray) -> Iterator[np.ndarray]:
        """counts_TV (int32) of known bytes, in pieces, in order."""
        start = 0
        while start < len(data):
            room = self._window - self._state.position - len(self._ids) + 1
            part = data[start : start + min(PIECE, room)].tobytes()
            yield self._counts(part[:-1]).copy()
            self._note(part)
            start += len(part)

    def next(self) -> np.ndarray:
        """counts_1V of the next byte."""
        return self._counts(b"")

    def follow(self, data: np.ndarray, at: int, operation: Callable) -> int:
        """Decode from data[at] on, in machine code; returns how many bytes.

        ``operation`` is that of `engine.State.follow`: it puts what it decodes into ``data``.
        Raises FloatingPointError if a logit is NaN or infinite.
        """
        *before, first = self._ids
        if before:
            self._state.run(np.array([before], np.int64), last=True)
        n = self._state.follow(first, len(data) - at, operation)
        self._note(data[at : at + n].tobytes())
        return n

    def take(self, byte: int) -> None:
        """The byte that `next` was asked about."""
        self._note(bytes([byte]))


def helps(expert: Expert, sample: bytes) -> bool:
    """Whether the model saves enough of a sample to be worth its time."""
    data, sizes = np.frombuffer(sample[:TRIAL_BYTES], np.uint8), []
    if not len(data):
        return False
    for model in (None, expert):
        code = Codec(TRIAL_BUCKETS, TRIAL_RING_BITS, model).encode(data, Shape())
        sizes.append(len(data) if code is None else len(code))
    expert.begin()
    return sizes[1] + NAMED <= sizes[0] * (1 - LEAST_GAIN)


def expert_for(header, model, meta: dict | None, name: str) -> Expert:
    """The expert that a file with this header (of `frames`) needs.

    Raises BitbyteError if ``model`` is another one, or computes other numbers.
    """
    expert = Expert(model, meta, header.kept)
    if header.model not in expert.names:
        raise BitbyteError(
            f"{name} was made with another model: it needs {header.model.hex()}, this is "
            f"{expert.name.hex()}; without --ckpt bitbyte looks for it below artifacts/checkpoints"
        )
    if header.fingerprint != expert.fingerprint:
        raise BitbyteError(
            f"{name} cannot be decoded here because the numbers differ: it was made by another "
            "version of the native arithmetic"
        )
    return expert
