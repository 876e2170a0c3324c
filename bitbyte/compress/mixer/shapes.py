"""What the encoder finds out about a frame: its kind, its records, how its sound is laid out.

A shape only says how the mixer looks at bytes, so a wrong one costs size, never content.
"""

import dataclasses

import numpy as np

from bitbyte.compress.mixer import fast, pcm
from bitbyte.compress.mixer.contexts import AT, BITMAP, GENERAL, SOUND

MAX_RECORD = (1 << 16) - 1
MAX_WIDTH, MAX_CHANNELS = 3, 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """How to look at a frame."""

    kind: int = GENERAL
    record: int = 0  # bytes of a record; 0: none
    record2: int = 0  # a second length
    width: int = 0  # bytes of a sample of sound
    channels: int = 0

    def numbers(self, mixer) -> np.ndarray:
        """The array that the mixer's functions take; see `contexts`."""
        start = int(mixer.past.now[AT])
        return np.array([self.kind, self.record, self.record2, self.width, start], np.int64)

    def valid(self) -> bool:
        """Whether an encoder could have chosen this."""
        if self.kind == SOUND:
            return 1 <= self.width <= MAX_WIDTH and 1 <= self.channels <= MAX_CHANNELS
        least = {GENERAL: 0, BITMAP: 1}.get(self.kind)
        if least is None:
            return False
        return least <= self.record <= MAX_RECORD and 0 <= self.record2 <= MAX_RECORD


def sound(width: int, channels: int) -> Shape:
    """The shape of PCM sound.  Records of a sample choose weights by the place in it."""
    return Shape(SOUND, width, 0, width, channels)


def to_mixer(data: np.ndarray, shape: Shape, fast_code: bool | None = None) -> np.ndarray:
    """The bytes that the mixer codes: those of the frame, but residuals of sound."""
    if shape.kind != SOUND:
        return data
    width, bits = shape.width, 8 * shape.width
    bytes_NW = data.reshape(-1, width).astype(np.int64)
    values = (bytes_NW << (8 * np.arange(width))).sum(1)
    values -= (values >> (bits - 1)) << bits if width > 1 else 128  # one byte: no sign
    fast.predict_sound(fast_code)(pcm.new_linear(shape.channels), values, bits, True)
    folded = np.where(values < 0, -2 * values - 1, 2 * values)
    return (folded[:, None] >> (8 * np.arange(width)[::-1]) & 0xFF).astype(np.uint8).reshape(-1)


def from_mixer(coded: np.ndarray, shape: Shape, fast_code: bool | None = None) -> np.ndarray:
    """The frame whose bytes `to_mixer` made into ``coded``."""
    if shape.kind != SOUND:
        return coded
    width, bits = shape.width, 8 * shape.width
    bytes_NW = coded.reshape(-1, width).astype(np.int64)
    folded = (bytes_NW << (8 * np.arange(width)[::-1])).sum(1)
    values = np.where(folded & 1, -((folded + 1) >> 1), folded >> 1)
    fast.predict_sound(fast_code)(pcm.new_linear(shape.channels), values, bits, False)
    values = values if width > 1 else values + 128
    return (values[:, None] >> (8 * np.arange(width)) & 0xFF).astype(np.uint8).reshape(-1)
