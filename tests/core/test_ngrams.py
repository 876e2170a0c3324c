"""Counted n-grams: contexts by brute force, both counters, folds, low rank, 4 bits, matches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitbyte import ngrams, prior
from bitbyte.kernels.ngram_counts import rows_before
from bitbyte.vocab import START

TEXT = b"The cat sat. The cat sat on the mat; caf\xc3\xa9 cat! " * 3
WRAP, MULTIPLIER = 2**64, 0x9E3779B97F4A7C15


def row_of(ids: list[int], rows: int) -> int:
    """The row of a context, its ids newest first, in Python's whole numbers."""
    h = 0
    for i in ids:
        h = (h + i + 1) * MULTIPLIER % WRAP
    return h * rows // WRAP


def contexts(ids: list[int], t: int, orders: int) -> list[list[int] | None]:
    """Newest first; None where one reaches before the first byte or over an id that is none."""
    found = []
    for k in range(1, orders + 1):
        context = ids[t::-1][:k]
        found.append(context if len(context) == k and max(context) < 256 else None)
    letters = []
    for i in ids[t::-1][:12]:
        if not (i < 256 and (i >= 128 or chr(i).isalpha())):
            break
        letters.append(i)
    return [*found, [*letters, ids[t]] if ids[t] < 256 else None]


@given(st.lists(st.sampled_from([*b"aZ .", 200, START]), min_size=1, max_size=30))
def test_rows_are_those_of_a_loop(ids):
    rows_TK, known_TK = (v[0] for v in ngrams.context_rows(torch.tensor([ids]), 4, 1024))
    for t in range(len(ids)):
        for k, context in enumerate(contexts(ids, t, 4)):
            assert known_TK[t, k] == (context is not None)
            if context is not None:
                assert rows_TK[t, k] == row_of(context, 1024)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_counts_are_those_of_a_loop(order, fast, monkeypatch):
    if fast:
        pytest.importorskip("numba")
    monkeypatch.setattr(ngrams, "SLICE", 17)
    data, rows, folds = np.frombuffer(TEXT, np.uint8), 64, 3
    want = np.zeros((folds, rows, 256), np.uint32)
    for t in range(max(1, order), len(data)):
        context = contexts(list(TEXT), t - 1, max(1, order))[order - 1]
        want[t // -(-len(data) // folds), row_of(context, rows), TEXT[t]] += 1
    seen = []
    got = ngrams.count(
        lambda a, b: data[a:b], len(data), order, rows, folds, seen.append, fast=fast
    )
    assert (got == want).all()
    assert sum(seen) == len(data) - max(1, order)


@given(st.binary(min_size=14, max_size=60), st.sampled_from([0, 1, 5, 12]))
def test_rows_are_counted_as_models_read_them(text, order):
    bytes_N, first = np.frombuffer(text, np.uint8), max(1, order)
    rows_NK, _ = ngrams.context_rows(torch.tensor([[*text]]), max(1, order), 1 << 10)
    want_N = rows_NK[0, first - 1 : -1, order - 1]
    assert (rows_before(bytes_N, first, order, 54) == want_N.numpy()).all()


def test_a_table_of_full_rank_gives_the_log_odds_back():
    counts = torch.randint(0, 50, (2, 8, 256), generator=torch.Generator().manual_seed(0))
    tables = ngrams.low_rank(counts.numpy().astype(np.uint32), 8)
    total = counts.sum(0).double()
    p = (total.sum(0) + 1) / (total.sum() + 256)
    weight = ngrams.SMOOTHING
    smooth = (total + weight * p) / (total.sum(1, keepdim=True) + weight)
    x = p.sqrt() * (smooth / p).log()
    # The rows span 8 dimensions, so eight numbers a row keep all inner products.
    basis = torch.linalg.lstsq(tables[-1].double(), x).solution
    assert torch.allclose(tables[-1].double() @ basis, x, atol=1e-4)


def test_a_fold_is_read_without_its_own_counts():
    counts = np.zeros((2, 4, 256), np.uint32)
    counts[0, 1, 65] = counts[1, 2, 66] = 100
    counts[:, 3, 67] = 50
    first, second, final = ngrams.low_rank(counts, 2)
    assert (first[1] == 0).all() and (second[2] == 0).all()  # seen in that fold only
    assert (final[1] != 0).any() and (final[2] != 0).any()
    assert (final[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_tables_keep_their_tails(bits):
    tables = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)) ** 3
    codes, scale = ngrams.quantize(tables, bits)
    levels = 2 ** (bits - 1) - 1
    assert codes.abs().max() == levels
    back = ngrams.dequantize(codes, scale)
    assert torch.allclose(back.abs().amax((0, 1)), tables.abs().amax((0, 1)))
    assert ((back.abs().sqrt() - tables.abs().sqrt()).abs() <= scale / 2 * 1.001).all()
    assert torch.equal(ngrams.unpack(ngrams.pack(codes, bits), bits), codes)


@given(st.lists(st.sampled_from([1, 2, START]), min_size=1, max_size=40), st.integers(1, 3))
def test_followers_are_those_of_a_loop(ids, length):
    got = prior.followers(torch.tensor([ids]), length)[0].tolist()
    for t in range(len(ids)):
        newest = ids[t + 1 - length : t + 1]
        want = 256
        for s in range(length - 1, t):
            if (
                len(newest) == length
                and max(newest) < 256
                and ids[s + 1 - length : s + 1] == newest
            ):
                want = ids[s + 1]
        assert got[t] == want
