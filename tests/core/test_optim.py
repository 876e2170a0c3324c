"""Muon, parameter groups, state by name, schedules."""

import math
import sys

import pytest
import torch
from support import TINY

from bitbyte import optim
from bitbyte.config import SCHEDULES
from bitbyte.files import BitbyteError
from bitbyte.models import build


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalise_levels_singular_values_and_keeps_directions(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = optim.newton_schulz(g).float()
    assert x.shape == g.shape
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert (x * (u @ v)).sum() / (x.norm() * (u @ v).norm()) > 0.97


def test_muon_step_by_hand():
    p = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    muon = optim.Muon([p], [2], lr=0.1, weight_decay=0.5)
    before, p.grad = p.detach().clone(), torch.randn(6, 4)
    gradient = p.grad.clone()
    muon.step()
    momentum = 0.05 * gradient
    update = 0.05 * gradient + 0.95 * momentum
    want = before * (1 - 0.1 * 0.5)
    for half in (slice(0, 3), slice(3, 6)):  # two stacked 3 x 4 matrices
        want[half] -= 0.1 * 0.2 * 2 * optim.newton_schulz(update[half][None])[0].float()
    assert torch.allclose(p, want, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_moves_as_pytorchs_own(shape):
    """torch.optim.Muon on one matrix, ten steps: the same moves up to the rounding of its bf16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = optim.Muon([ours], [1], lr=0.02, weight_decay=0.1)
    oracle = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator)
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        oracle.step()
        moves = [(p.detach() - b).flatten() for p, b in zip((ours, theirs), before, strict=True)]
        assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.998
        assert (moves[0] - moves[1]).norm() < 0.06 * moves[1].norm()


def test_batching_over_layers_changes_nothing():
    a, b = build(TINY), build(TINY)
    for model in (a, b):
        model(torch.arange(16)[None]).mean().backward()
    optim.create_optimizer(a, "muon", lr=0.01, embed_lr=0.01, precise=True).step()
    for module in b.modules():
        if hasattr(module, "groups"):
            optim.Muon([module.weight], [module.groups], 0.01, 0.1, torch.float32).step()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if p.ndim == 2 and name != "embed":
            assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_learns_and_state_round_trips(name):
    def run(steps, model, optimizer):
        for _ in range(steps):
            loss = model(torch.arange(16)[None]).mean()
            loss.backward()
            optimizer.step()
            model.zero_grad()
        return loss.item()

    model = build(TINY, seed=1)
    optimizer = optim.create_optimizer(model, name, lr=0.01, embed_lr=0.01)
    assert run(20, model, optimizer) < 2.0 < math.log(256)
    other = build(TINY, seed=2)
    other.load_state_dict(model.state_dict())
    restored = optim.create_optimizer(other, name, lr=0.01, embed_lr=0.01)
    restored.load_state_tensors({k: v.clone() for k, v in optimizer.state_tensors().items()})
    assert run(3, model, optimizer) == run(3, other, restored)
    with pytest.raises(BitbyteError, match="belongs to no parameter"):
        restored.load_state_tensors(optimizer.state_tensors() | {"nose/momentum": torch.zeros(1)})


def test_rows_move_by_adagrad_with_one_size_each():
    table = torch.zeros(5, 2, requires_grad=True)
    optimizer = optim.RowAdagrad(table, lr=0.5)
    squares, want = torch.zeros(5), torch.zeros(5, 2)
    for step in range(3):
        ids = torch.tensor([1, 3, 1])  # a row met twice gets the sum
        weight = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, -1.0]]) * (step + 1)
        (torch.nn.functional.embedding(ids, table, sparse=True) * weight).sum().backward()
        grad = torch.zeros(5, 2).index_add_(0, ids, weight)
        squares += grad.square().mean(1)
        want -= torch.where(squares > 0, 0.5 / squares.sqrt(), 0.0)[:, None] * grad
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(table.detach(), want)
    assert not table[[0, 2, 4]].any()


def test_rates_and_decay_switch():
    optimizer = optim.create_optimizer(build(TINY), "muon", lr=0.4, embed_lr=0.2, weight_decay=0.1)
    optimizer.set_rates(0.5, decay=False)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.groups] == [(0.2, 0.0), (0.1, 0.0)]
    optimizer.set_rates(1.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.groups] == [(0.4, 0.1), (0.2, 0.0)]


def test_an_optimizer_that_cannot_run_says_why(monkeypatch):
    for package, words in ((None, "pip install bitsandbytes"), (object(), "runs on CUDA only")):
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        with pytest.raises(BitbyteError, match=words):
            optim.create_optimizer(build(TINY), "adamw8bit", lr=0.1, embed_lr=0.1)
    with pytest.raises(BitbyteError, match="no optimizer"):
        optim.create_optimizer(build(TINY), "lion", lr=0.1, embed_lr=0.1)


def test_schedules():
    for schedule in SCHEDULES:
        assert optim.lr_for_step(0.02, schedule, 0.04) == pytest.approx(0.5)
        assert optim.lr_for_step(0.04, schedule, 0.04) == pytest.approx(1.0)
        assert optim.lr_for_step(1.0, schedule, 0.04) == pytest.approx(0.0, abs=1e-12)
    assert optim.lr_for_step(0.52, "linear", 0.04) == pytest.approx(0.5)
    assert optim.lr_for_step(0.52, "cosine", 0.04) == pytest.approx(0.5)
    assert optim.lr_for_step(0.79, "wsd", 0.04) == 1.0
    assert optim.lr_for_step(0.9, "wsd", 0.04) == pytest.approx(0.5)


def test_curriculum_stages():
    stages = (2048, 4096, 8192)
    lengths = [optim.seq_len_for_step(step, 9, stages) for step in range(9)]
    assert lengths == [2048] * 3 + [4096] * 3 + [8192] * 3
    assert optim.seq_len_for_step(8, 9, stages, cap=4096) == 4096


def test_shared_state_is_saved_apart():
    """8-bit AdamW gives every parameter the same code book; a checkpoint refuses shared memory."""
    model = build(TINY)
    optimizer = optim.create_optimizer(model, "adamw", lr=0.1, embed_lr=0.1)
    book = torch.arange(4.0)
    for part in optimizer.parts:
        for p in model.parameters():
            part.state[p] = {"qmap1": book, "step": 3}
    tensors = optimizer.state_tensors()
    books = [t for name, t in tensors.items() if name.endswith("qmap1")]
    assert len({t.data_ptr() for t in books}) == len(books) > 3
    optimizer.load_state_tensors(tensors)
    assert all(s["step"] == 3 for s in optimizer.parts[0].state.values())
    tensors.pop("embed/qmap1"), tensors.pop("embed/step")
    with pytest.raises(BitbyteError, match="no saved optimizer state for embed"):
        optimizer.load_state_tensors(tensors)
