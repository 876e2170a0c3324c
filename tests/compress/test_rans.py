"""The coder: exactly invertible for any tables, size against entropy, damage, another coder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte.compress.rans import LOW, TOTAL, Decoder, encode, n_states_for
from bitbyte.files import BitbyteError


def tables(n: int, seed: int, sharpness: float = 8.0, V: int = 256) -> np.ndarray:
    """Random counts_NV: each row sums to TOTAL, none is 0."""
    weights = np.exp(sharpness * np.random.default_rng(seed).standard_normal((n, V)))
    counts = 1 + np.floor(weights / weights.sum(1, keepdims=True) * (TOTAL - V)).astype(np.int64)
    counts[np.arange(n), counts.argmax(1)] += TOTAL - counts.sum(1)
    return counts


def coded(symbols: np.ndarray, counts: np.ndarray, steps: list[int], n_states: int):
    row = np.arange(len(symbols))
    ends = counts.cumsum(1)
    freqs = counts[row, symbols]
    return encode(ends[row, symbols] - freqs, freqs, steps, n_states)


def decoded(states, words, counts: np.ndarray, steps: list[int]) -> np.ndarray:
    coder, first, found = Decoder(states, words), 0, [np.empty(0, np.int64)]
    for size in steps:
        found.append(coder.step(counts[first : first + size].cumsum(1)))
        first += size
    coder.finish()
    return np.concatenate(found)


@given(
    st.lists(st.integers(1, 40), max_size=30), st.sampled_from([1, 2, 3, 8, 17, 64]),
    st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 8.0, 40.0]), st.sampled_from([2, 3, 256]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_round_trip_of_any_symbols(steps, n_states, seed, sharpness, V):
    n = sum(steps)
    counts = tables(n, seed, sharpness, V)
    symbols = np.random.default_rng(seed + 1).integers(0, V, n)  # also the rarest ones
    states, words = coded(symbols, counts, steps, n_states)
    assert (len(states), states.dtype, words.dtype) == (n_states, np.uint64, np.uint32)
    assert decoded(states, words, counts, steps).tolist() == symbols.tolist()


@pytest.mark.parametrize("n_states", [1, 2, 8])
@pytest.mark.parametrize("symbol", [0, 255])
def test_certain_and_impossible_looking_symbols(symbol, n_states):
    counts = np.ones((3000, 256), np.int64)
    counts[:, 0] = TOTAL - 255
    states, words = coded(np.full(3000, symbol), counts, [30] * 100, n_states)
    bits = 32 * len(words)
    assert bits <= 32 if symbol == 0 else abs(bits - 24 * 3000) <= 32 * n_states
    assert (decoded(states, words, counts, [30] * 100) == symbol).all()


@pytest.mark.parametrize("n_states", [1, 16])
def test_size_is_the_entropy(n_states):
    n, lanes = 40_000, 16
    counts = tables(n, 7, 1.5)
    noise = np.random.default_rng(8).integers(0, TOTAL, n)
    symbols = (counts.cumsum(1) <= noise[:, None]).sum(1)  # drawn from their tables
    states, words = coded(symbols, counts, [lanes] * (n // lanes), n_states)
    exact = (24 - np.log2(counts[np.arange(n), symbols])).sum()
    inner = 32 * len(words) + np.log2(states.astype(float)).sum() - 32 * n_states
    assert abs(inner / exact - 1) < 2e-5  # what the arithmetic itself loses
    assert 0 < (32 * len(words) + 64 * n_states) / exact - 1 < 2e-4 + 64 * n_states / exact


def test_one_state_and_many_are_the_same_arithmetic():
    counts = tables(500, 3)
    symbols = np.random.default_rng(4).integers(0, 256, 500)
    alone, few = coded(symbols, counts, [1] * 500, 1), coded(symbols, counts, [1] * 500, 2)
    assert alone[0][0] == few[0][0] and (alone[1] == few[1]).all()
    assert few[0][1] == LOW  # the second was never used


def test_against_constriction():
    constriction = pytest.importorskip("constriction")
    n = 20_000
    counts = tables(n, 11, 1.5)
    noise = np.random.default_rng(12).integers(0, TOTAL, n)
    symbols = (counts.cumsum(1) <= noise[:, None]).sum(1)
    family = constriction.stream.model.Categorical(perfect=False)
    peer = constriction.stream.stack.AnsCoder()
    peer.encode_reverse(symbols.astype(np.int32), family, (counts / TOTAL).astype(np.float32))
    _, words = coded(symbols, counts, [10] * (n // 10), 1)
    assert len(words) + 2 <= len(peer.get_compressed()) * 1.0005


@given(st.binary(max_size=400), st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_noise_is_decoded_to_something_or_refused(noise, n_states, n):
    raw = np.frombuffer(noise[: len(noise) // 8 * 8], np.uint64)
    counts = tables(200, n)
    try:
        coder = Decoder(raw[:n_states], raw[n_states:].view(np.uint32))
        for first in range(0, 200, n):
            symbols = coder.step(counts[first : first + n].cumsum(1))
            assert ((symbols >= 0) & (symbols < 256)).all()
    except BitbyteError as error:
        assert "damaged" in str(error)


def test_what_is_left_over_is_noticed():
    counts = tables(100, 1)
    symbols = np.random.default_rng(2).integers(0, 256, 100)
    for n_states in (1, 8):
        states, words = coded(symbols, counts, [10] * 10, n_states)
        more = np.append(words, np.uint32(5))
        with pytest.raises(BitbyteError, match="does not end"):
            decoded(states, more, counts, [10] * 10)
        with pytest.raises(BitbyteError, match=r"too early|does not end"):
            decoded(states, words[:-1], counts, [10] * 10)


def test_number_of_states():
    assert [n_states_for(n, 128) for n in (0, 1, 1 << 18, 1 << 19, 1 << 20, 1 << 30)] == [
        1, 1, 1, 8, 16, 64,
    ]  # fmt: skip
    assert n_states_for(1 << 30, 20) == 16 and n_states_for(1 << 30, 7) == 1
