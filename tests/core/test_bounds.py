"""Costs of masked diffusion against brute force on a model small enough to enumerate."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte import bounds, scoring
from bitbyte.files import BitbyteError
from bitbyte.vocab import MASK

S, V = 3, 4


class Table(torch.nn.Module):
    """A law for every byte and every pattern of revealed bytes, drawn at random once."""

    exact = False

    def __init__(self, seed: int, context: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        length = S + context
        states = itertools.product([*range(V), MASK], repeat=length)
        self.table = {
            state: torch.randn(length, V, generator=generator, dtype=torch.float64)
            for state in states
        }
        self.calls = 0

    def logits(self, ids_BT):
        self.calls += 1
        return torch.stack([self.table[tuple(row)] for row in ids_BT.tolist()])

    def nats(self, state: tuple, position: int, byte: int) -> float:
        return -float(self.table[state].log_softmax(-1)[position, byte])


def path_nats(model: Table, x: tuple, order: tuple) -> float:
    """Cost of revealing x in this order, one by one."""
    state, total = [MASK] * len(x), 0.0
    for position in order:
        total += model.nats(tuple(state), position, x[position])
        state[position] = x[position]
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_the_mean_over_orders_and_above_the_any_order_cost(seed):
    model = Table(seed)
    x = tuple(np.random.default_rng(seed).integers(0, V, S).tolist())
    paths = [path_nats(model, x, order) for order in itertools.permutations(range(S))]
    exact_bound = sum(paths) / len(paths)
    any_order = -math.log(sum(math.exp(-nats) for nats in paths) / len(paths))
    ids_BT = torch.tensor([x])
    estimate = torch.stack(
        [bounds.upper_bound(model, ids_BT, S, draws=30, indices=[i]).sum() for i in range(100)]
    )
    error = float(estimate.std() / math.sqrt(len(estimate)))
    assert float(estimate.mean()) == pytest.approx(exact_bound, abs=max(5 * error, 1e-9))
    assert error < 0.05
    assert exact_bound >= any_order - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_left_to_right_is_the_chain_rule(seed):
    model = Table(seed)
    for x in itertools.product(range(V), repeat=S):
        got = bounds.chain_rule(model, torch.tensor([x]), S, order="left_to_right")
        assert float(got.sum()) == pytest.approx(path_nats(model, x, (0, 1, 2)), abs=1e-12)


def test_each_chain_rule_is_a_code():
    """Probabilities of all windows sum to 1: what a decoder can follow, and no more."""
    model = Table(7)
    everything = torch.tensor(list(itertools.product(range(V), repeat=S)))
    for order in bounds.ORDERS:
        nats_BS = bounds.chain_rule(model, everything, S, order=order)
        assert float(torch.exp(-nats_BS.sum(1)).sum()) == pytest.approx(1, abs=1e-12)
        nats_BS = bounds.chain_rule(model, everything, S, order=order, per_pass=2)
        assert float(torch.exp(-nats_BS.sum(1)).sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_confidence_follows_revealed_bytes_only(seed):
    model = Table(seed)
    for x in itertools.product(range(V), repeat=S):
        state, order = [MASK] * S, []
        while MASK in state:
            laws = model.table[tuple(state)].softmax(-1).sort(-1, descending=True).values
            margins = [(-float(laws[i, 0] - laws[i, 1]), i) for i in range(S) if state[i] == MASK]
            position = min(margins)[1]
            order.append(position)
            state[position] = x[position]
        got = bounds.chain_rule(model, torch.tensor([x]), S, order="confidence")[0]
        assert float(got.sum()) == pytest.approx(path_nats(model, x, tuple(order)), abs=1e-12)


def test_several_bytes_a_pass_do_not_see_each_other():
    model = Table(3)
    x = (2, 0, 1)
    got = bounds.chain_rule(model, torch.tensor([x]), S, order="left_to_right", per_pass=2)[0]
    nothing, two = (MASK,) * 3, (2, 0, MASK)
    want = [model.nats(nothing, 0, 2), model.nats(nothing, 1, 0), model.nats(two, 2, 1)]
    assert got.tolist() == pytest.approx(want, abs=1e-12)
    model.calls = 0
    bounds.chain_rule(model, torch.tensor([x]), S, order="confidence", per_pass=2)
    assert model.calls == 2


def test_context_is_given_and_never_hidden():
    model = Table(1, context=1)
    ids_BT = torch.tensor([[3, 1, 0, 2]])
    got = bounds.chain_rule(model, ids_BT, S, order="left_to_right")[0]
    states = [(3, MASK, MASK, MASK), (3, 1, MASK, MASK), (3, 1, 0, MASK)]
    want = [model.nats(s, i + 1, ids_BT[0, i + 1].item()) for i, s in enumerate(states)]
    assert got.tolist() == pytest.approx(want, abs=1e-12)
    seen = []
    model.logits, plain = lambda ids: seen.append(ids.clone()) or plain(ids), model.logits
    bounds.upper_bound(model, ids_BT, S, draws=8, indices=[0])
    assert all((ids[:, 0] == 3).all() for ids in seen)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 300), draws=st.integers(1, 20), index=st.integers(0, 10**6))
def test_masks_hide_at_least_one_and_are_reproducible(n, draws, index):
    hidden_RS = bounds.draw_masks(n, draws, index, seed=5)
    assert hidden_RS.shape == (draws, n)
    assert (hidden_RS.sum(1) >= 1).all()
    assert torch.equal(hidden_RS, bounds.draw_masks(n, draws, index, seed=5))


def test_the_number_of_hidden_bytes_is_uniform_over_windows_and_seeds():
    sizes = [int(bounds.draw_masks(8, 1, i, 0).sum()) for i in range(800)]
    assert np.bincount(sizes, minlength=9)[1:].tolist() == pytest.approx([100] * 8, abs=2)
    sizes = [int(bounds.draw_masks(8, 1, 0, seed).sum()) for seed in range(4000)]
    assert np.bincount(sizes, minlength=9)[1:].tolist() == pytest.approx([500] * 8, abs=100)


def test_batching_does_not_change_a_number():
    model = Table(2)
    ids_BT = torch.randint(0, V, (5, S), generator=torch.Generator().manual_seed(0))
    for cost in (
        lambda rows, at: bounds.upper_bound(model, rows, S, draws=4, indices=at, seed=9),
        lambda rows, at: bounds.chain_rule(model, rows, S, order="confidence"),
    ):
        whole = cost(ids_BT, range(5))
        apart = torch.cat([cost(ids_BT[i : i + 1], [i]) for i in range(5)])
        assert torch.equal(whole, apart)


@pytest.mark.parametrize("kind", scoring.KINDS)
def test_a_uniform_model_costs_8_bits_in_every_column(kind):
    class Data:
        n_bytes = 1000

        def read(self, start, stop):
            return (np.arange(start, stop) * 37 % 256).astype(np.uint8)

    for stride in (64, 50, 16):
        result = scoring.score(
            scoring.Uniform(64), Data(), window=64, stride=stride, kind=kind, draws=3
        )
        assert result.n_bytes == 1000
        assert result.bpb == pytest.approx(8, abs=1e-12)
        by_position = result.position_bits[~np.isnan(result.position_bits)]
        assert by_position.mean() == pytest.approx(8, abs=1e-9 if kind != "upper_bound" else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_laws_are_taken_in_float32_or_better_where_the_model_is(dtype):
    logits_BNV = (torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    ids_BN = torch.arange(100).view(2, 50)
    got_BN = bounds.nats(logits_BNV, ids_BN)
    assert got_BN.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want_BN = -logits_BNV.double().log_softmax(-1).gather(-1, ids_BN[..., None])[..., 0]
    assert torch.allclose(got_BN.double(), want_BN, rtol=1e-6, atol=1e-6)
    assert got_BN.double().sum().item() == pytest.approx(want_BN.sum().item(), rel=1e-7)


def test_orders_that_look_are_not_offered():
    with pytest.raises(BitbyteError, match="no order 'oracle'"):
        bounds.chain_rule(Table(0), torch.zeros(1, S, dtype=torch.long), S, order="oracle")
    with pytest.raises(BitbyteError, match="per_pass is 0"):
        bounds.chain_rule(
            Table(0), torch.zeros(1, S, dtype=torch.long), S, order="confidence", per_pass=0
        )
