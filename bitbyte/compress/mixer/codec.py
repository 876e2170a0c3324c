"""Codes frames of bytes, one after another, with one mixer that goes on learning."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from bitbyte.compress.mixer import coder, fast, stream
from bitbyte.compress.mixer.shapes import Shape

CHUNK = 1 << 15  # bytes coded between two ticks
NO_COUNTS = np.zeros((0, 256), np.int32)
MIN_BUCKETS, BUCKET_STEP = 1 << 12, 1 << 10
BUCKETS_PER_BYTE = 12  # of the original; more would stay empty
MB = 1 << 20
MIN_MEMORY, MAX_MEMORY, MEMORY = 16, 1024, 120  # MB, for the buckets and the ring
MIN_RING_BITS, MAX_RING_BITS = 12, 24


class Model(Protocol):
    """A model as an expert: integer counts of the next byte that sum to 2^24.

    One whose steps are machine code may also have ``follow``, see `streamed.Expert`.
    """

    def known(self, data: np.ndarray) -> Iterator[np.ndarray]:
        """counts_TV (int32) of known bytes, in chunks of any length, in order."""
        ...

    def next(self) -> np.ndarray:
        """counts_1V of the next byte."""
        ...

    def take(self, byte: int) -> None:
        """The byte that `next` was asked about."""


def sizes_for(n_bytes: int, memory: int = MEMORY) -> tuple[int, int]:
    """(buckets, bits of the ring) for an original of that size, within ``memory`` MB."""
    ring_bits = max(MIN_RING_BITS, min(MAX_RING_BITS, (max(1, n_bytes) - 1).bit_length()))
    while (1 << ring_bits) > memory * MB // 8:
        ring_bits -= 1
    room = (memory * MB - (1 << ring_bits)) // 64
    buckets = max(MIN_BUCKETS, min(BUCKETS_PER_BYTE * n_bytes, room))
    return buckets // BUCKET_STEP * BUCKET_STEP, ring_bits


def _ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same items; another thread makes the next one while one is used."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


class Codec:
    """Codes frames to bytes and back.  Two that were made alike and saw the same stay alike.

    With ``fast`` False plain Python does what machine code does elsewhere, a thousand times slower.
    """

    def __init__(
        self,
        n_buckets: int,
        ring_bits: int,
        model: Model | None = None,
        fast_code: bool | None = None,
    ):
        self._mixer, self._model = stream.new_mixer(n_buckets, ring_bits), model
        self._code, self._follow = fast.code_bytes(fast_code), fast.decode_next(fast_code)

    def encode(
        self, data: np.ndarray, shape: Shape, tick: Callable[[int], object] = int
    ) -> bytes | None:
        """Code of ``data`` (uint8); None if it would not be shorter.  The mixer learns either way.

        ``tick`` is called with the number of bytes coded since it was called last.
        """
        out, span = np.empty(max(0, len(data) - 1), np.uint8), coder.new_span()
        numbers = shape.numbers(self._mixer)
        for part, counts_TV in self._parts(data):
            self._code(self._mixer, numbers, span, out, part.copy(), False, counts_TV)
            tick(len(part))
        coder.finish(span, out)
        size = int(span[coder.AT])
        return out[:size].tobytes() if size <= len(out) else None

    def _parts(self, data: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pieces of the data with the model's counts for them."""
        if self._model is None:
            for start in range(0, len(data), CHUNK):
                yield data[start : start + CHUNK], NO_COUNTS
            return
        start = 0
        for counts_TV in _ahead(self._model.known(data)):
            yield data[start : start + len(counts_TV)], counts_TV
            start += len(counts_TV)

    def decode(
        self, code: bytes, n_bytes: int, shape: Shape, tick: Callable[[int], object] = int
    ) -> np.ndarray | None:
        """The ``n_bytes`` bytes (uint8) of a code; None if it is not exactly as long as theirs."""
        values, span = np.frombuffer(code, np.uint8).copy(), coder.new_span()
        data, numbers = np.zeros(n_bytes, np.uint8), shape.numbers(self._mixer)
        coder.start_decoding(span, values)
        for n in self._decoded(data, (self._mixer, numbers, span, values)):
            tick(n)
        used = int(span[coder.AT]) - coder.BITS // 8 + (1 if span[coder.LOW] else 0)
        return data if used == len(code) else None

    def _decoded(self, data: np.ndarray, state: tuple) -> Iterator[int]:
        """Fill ``data``; yields the number of bytes that are new in it."""
        model, start = self._model, 0
        if model is not None and self._follow is not None and hasattr(model, "follow"):
            at = np.zeros(1, np.int64)
            self._code(*state, data[:0], True, NO_COUNTS)  # begins the first byte

            def operation(*model_arrays: np.ndarray) -> tuple[int, np.ndarray]:
                return self._follow.prepared(*state, data, at, *model_arrays)

            while start < len(data):
                n = model.follow(data, start, operation)
                start += n
                yield n
        while start < len(data):
            n = CHUNK if model is None else 1
            part = data[start : start + n]
            self._code(*state, part, True, NO_COUNTS if model is None else model.next())
            if model is not None:
                model.take(int(part[0]))
            start += len(part)
            yield len(part)

    def learn(self, data: np.ndarray, shape: Shape, tick: Callable[[int], object] = int) -> None:
        """Learn bytes that were stored, as the encoder did when it tried to code them."""
        self.encode(data, shape, tick)
