"""The leak gate: honest models pass it, and each planted leak is found where it is."""

import math
import re

import numpy as np
import pytest
import support
import torch

from bitbyte import models, transformer
from bitbyte.config import TransformerConfig
from bitbyte.evaluate import leaks
from bitbyte.files import RunError
from bitbyte.vocab import N_BYTES, START, VOCAB_SIZE

TINY = {"n_layer": 1, "d_model": 32, "d_ff": 48, "n_head": 2, "seq_len": 160}
ROWS = np.random.default_rng(0).integers(32, 127, (4, 160), dtype=np.uint8)
ALL_CHECKS = ["batch", "perturbed_future", "truncated", "cached"]


def sharp(seed=3, scale=20.0, **changes):
    """An untrained model with sharper laws than at initialisation."""
    return support.sharp(TransformerConfig(**TINY | changes), seed, scale)


class Chain(torch.nn.Module):
    """The next byte depends on the last two ids; subclasses change costs(ids_BT, nats_BT)."""

    context = 1 << 20

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.last = torch.nn.Parameter(torch.randn(VOCAB_SIZE, N_BYTES, generator=generator))
        self.older = torch.nn.Parameter(torch.randn(VOCAB_SIZE, N_BYTES, generator=generator))

    def law(self, ids, older):
        return self.last[ids] + self.older[older]

    def logits(self, ids_BT):
        older_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=START)
        return self.law(ids_BT, older_BT)

    def forward(self, ids_BT):
        before_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=START)
        laws = self.logits(before_BT).log_softmax(-1)
        return self.costs(ids_BT, -laws.gather(-1, ids_BT[..., None])[..., 0])

    def costs(self, ids_BT, nats_BT):
        return nats_BT

    def init_state(self, batch):
        return torch.full((batch,), START)

    def step(self, ids_B, state):
        return self.law(ids_B, state), ids_B


class Uniform(torch.nn.Module):
    """No parameters: every byte costs 8 bits."""

    context = 1 << 20

    def forward(self, ids_BT):
        return torch.full(ids_BT.shape, math.log(256))

    def logits(self, ids_BT):
        return torch.zeros(*ids_BT.shape, N_BYTES)

    def init_state(self, batch):
        return None

    def step(self, ids_B, state):
        return torch.zeros(len(ids_B), N_BYTES), None


def caught(model, name, rows=ROWS, **options):
    """(position, bits, rest of the message) of the leak that the check ``name`` must find."""
    with pytest.raises(RunError) as refused:
        leaks.check(model, rows, **options)
    message = str(refused.value)
    pattern = rf"leak check {name}: byte (\d+) of a window .* by (\S+) bits \((.*); no record .*"
    match = re.fullmatch(pattern, message)
    assert match, message
    return int(match[1]), float(match[2]), match[3]


def cut_of(text):
    return int(re.search(r"when byte (\d+) and those after it change", text)[1]) - 1


@pytest.mark.parametrize("attention", ["sdpa", "chunked", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"act_quant": False}, {"linear": "dense"}], ids=["ternary", "float", "dense"]
)
def test_honest_transformers_pass(changes, dtype, attention):
    model = sharp(**changes)
    models.use_kernels(model, attention)
    seen = leaks.check(model, ROWS, dtype=dtype)
    assert list(seen) == ALL_CHECKS
    assert seen["perturbed_future"] == 0
    assert seen["cached"] < leaks.OTHER_SHAPE[dtype].largest / 1.5  # with room to spare


@pytest.mark.parametrize("changes", [{}, {"linear": "dense"}], ids=["ternary", "dense"])
def test_a_trained_model_passes(changes):
    model = sharp(scale=1.0, **changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = np.frombuffer(b"she sells sea shells on the sea shore. " * 4, np.uint8)
    rows = np.stack([text[a : a + 66] for a in (0, 7, 16, 29)])
    for _ in range(20):
        loss = model(torch.from_numpy(rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.75 * math.log(256)
    for dtype in (torch.float32, torch.bfloat16):
        assert leaks.check(model, rows, dtype=dtype)["perturbed_future"] == 0
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("model", [Chain(), Uniform()], ids=["chain", "uniform"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 2), (2, 3), (9, 65), (1, 200)])
def test_small_models_and_windows_pass(model, shape):
    rows = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    seen = leaks.check(model.eval(), rows)
    assert list(seen) == [c for c in ALL_CHECKS if shape[1] > 1 or c != "truncated"]
    assert max(seen.values()) < 1e-5
    assert not model.training


def off_by_one(q_BHTK, k_BHSK, v_BHSK, causal, limit_BT=None):
    """`plain_attention` that sees the position after its own."""
    scores_BHTS = q_BHTK @ k_BHSK.mT / math.sqrt(q_BHTK.shape[-1])
    T, S = scores_BHTS.shape[-2:]
    future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 2)
    return scores_BHTS.masked_fill(future, -math.inf).softmax(-1) @ v_BHSK


@pytest.mark.parametrize("n_layer", [1, 2])
def test_a_mask_off_by_one(n_layer, monkeypatch):
    """Position t is fed byte t - 1: one layer sees the byte it predicts, two the one after it."""
    monkeypatch.setattr(transformer, "plain_attention", off_by_one)
    model = sharp(n_layer=n_layer, linear="dense")
    models.use_kernels(model, "plain")
    for dtype in (torch.float32, torch.bfloat16):
        position, bits, rest = caught(model, "perturbed_future", dtype=dtype)
        assert position - cut_of(rest) == (n_layer == 1) and abs(bits) > 0.01
        assert "it sees the bytes it should predict" in rest


def test_attention_without_a_mask():
    model = sharp(linear="dense")
    model.transformer.blocks[0].attn.causal = False
    models.use_kernels(model, "plain")
    position, _, rest = caught(model, "perturbed_future")
    assert position <= cut_of(rest)


class Discount(Chain):
    """A byte costs ``factor`` of its cost if the next one is even, at some positions."""

    def __init__(self, factor, where=slice(None)):
        super().__init__()
        self.factor, self.where = factor, where

    def costs(self, ids_BT, nats_BT):
        factor_BT = torch.ones_like(nats_BT)
        factor_BT[:, :-1][ids_BT[:, 1:] % 2 == 0] = self.factor
        hit = torch.zeros(ids_BT.shape[1])
        hit[self.where] = 1
        return nats_BT * torch.where(hit == 1, factor_BT, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.97, 0.999])
def test_a_tiny_leak(factor, dtype):
    for seed in range(2):
        position, bits, rest = caught(Discount(factor), "perturbed_future", dtype=dtype, seed=seed)
        assert position == cut_of(rest)
        assert leaks.SAME_SHAPE.largest < abs(bits) < 20 * (1 - factor)


@pytest.mark.parametrize("start", [127, 128])
def test_a_tiny_leak_at_borders_only(start):
    for seed in range(2):
        position, _, rest = caught(
            Discount(0.97, slice(start, None, 128)), "perturbed_future", seed=seed
        )
        assert position == cut_of(rest) == start


class NextAt(Chain):
    """Some positions see the next byte: it makes theirs cheaper or dearer."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def costs(self, ids_BT, nats_BT):
        after_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1))
        nats_BT[:, self.where] += 0.01 * after_BT[:, self.where]
        return nats_BT


@pytest.mark.parametrize("T", [150, 160])
@pytest.mark.parametrize(
    ("where", "position"),
    [
        (slice(127, None, 128), 127), (slice(128, None, 128), 128), (slice(63, None, 128), 63),
        (slice(64, None, 128), 64), (slice(0, 1), 0), (slice(-2, -1), -2),
    ],
)  # fmt: skip
def test_a_leak_at_one_position(where, position, T):
    for seed in range(2):
        found, _, rest = caught(NextAt(where), "perturbed_future", ROWS[:, :T], seed=seed)
        assert found == cut_of(rest) == position % T


class OwnByteAt(Chain):
    """At one position the logits see the byte they predict, and favour it by ``nats``."""

    def __init__(self, at, nats):
        super().__init__()
        self.at, self.nats = at, nats

    def forward(self, ids_BT):
        before_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=START)
        laws = self.logits(before_BT)
        return torch.nn.functional.cross_entropy(laws.mT, ids_BT, reduction="none")

    def logits(self, ids_BT):
        laws = super().logits(ids_BT)
        if ids_BT.shape[1] > self.at + 1:
            own_B = ids_BT[:, self.at + 1, None]
            laws[:, self.at] = laws[:, self.at].scatter_add(
                1, own_B, torch.full(own_B.shape, self.nats)
            )
        return laws


@pytest.mark.parametrize("at", [0, 63, 64, 127, 128, 158])
@pytest.mark.parametrize("nats", [3.0, 0.02])
def test_a_law_that_sees_its_own_byte_at_a_border(at, nats):
    """Invisible to costs of bytes before the change: only the law of the changed byte tells."""
    position, bits, rest = caught(OwnByteAt(at, nats), "perturbed_future")
    assert position == at == cut_of(rest) + 1 and "by its logits" in rest and bits > nats


def test_costs_that_depend_on_other_rows():
    class Normalised(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT * (1 + 0.01 * (nats_BT[:, 5:6] - nats_BT[:, 5:6].mean(0)))

    class Shifted(Chain):
        """The rows run into each other: the last byte of one sees the first of the next."""

        def costs(self, ids_BT, nats_BT):
            nats_BT[:, -1] += 0.01 * ids_BT[:, 0].roll(-1)
            return nats_BT

    _, _, rest = caught(Normalised(), "batch")
    assert "other windows of the batch" in rest
    assert caught(Shifted(), "batch")[0] == 159
    assert caught(Shifted(), "batch", ROWS[:1])[0] == 159


def test_costs_that_depend_on_the_place_in_the_batch():
    class Placed(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT + torch.arange(len(ids_BT))[:, None]

    class Sized(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT + 0.02 * len(ids_BT)

    assert "alone" in caught(Placed(), "batch")[2]
    assert "alone" in caught(Sized(), "batch")[2]  # 0.09 bits a byte: each small, all of one sign


def test_costs_that_depend_on_the_length():
    class Length(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT * (1 - 0.0005 * ids_BT.shape[1])

    class Last(Chain):
        def costs(self, ids_BT, nats_BT):
            nats_BT[:, -1] += 2.0
            return nats_BT

    _, bits, rest = caught(Length(), "truncated")
    assert bits > 0 and "ends with byte 0" in rest
    position, bits, rest = caught(Last(), "truncated")
    assert position == 0 and bits == pytest.approx(2 / math.log(2), rel=0.01)


class Overwrites(models.BitByteLM):
    """From the position ``late`` on every step is stored over the step before."""

    late = 0

    def step(self, ids_B, state):
        early = state.position >= self.late
        return super().step(ids_B, state._replace(position=state.position - early))


@pytest.mark.parametrize(("late", "word"), [(1, "by step"), (40, "by step"), (90, "80 ids")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_off_by_one(late, word, dtype):
    model = Overwrites(TransformerConfig(**TINY))
    model.load_state_dict(sharp().state_dict())
    with torch.no_grad():  # attention that looks at few positions, so that each of them matters
        model.transformer.blocks[0].attn.qkv.weight.mul_(4)
    model.late = late
    position, _, rest = caught(model, "cached", dtype=dtype)
    assert position >= late and word in rest


def test_a_step_that_forgets():
    class Forgets(Chain):
        def step(self, ids_B, state):
            return self.law(ids_B, torch.full_like(ids_B, START)), ids_B

    class Swapped(Chain):
        def prefill(self, ids_BT, state):
            return self.logits(ids_BT)[:, -1], ids_BT[:, -2]

    assert caught(Forgets(), "cached")[0] >= 1
    position, _, rest = caught(Swapped(), "cached")
    assert position == 80 and "after a prefill of 80 ids" in rest


def test_costs_that_are_no_law():
    class Half(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT * 0.99

    class Broken(Chain):
        def costs(self, ids_BT, nats_BT):
            return nats_BT * math.nan

    assert "under its own logits" in caught(Half(), "cached")[2]
    with pytest.raises(RunError, match="not finite"):
        leaks.check(Broken(), ROWS)


def test_the_mode_comes_back_after_a_refusal():
    model = Discount(0.5).train()
    caught(model, "perturbed_future")
    assert model.training


@pytest.mark.parametrize("T", [1, 2, 3, 5, 64, 65, 130, 256, 1024])
def test_cuts(T):
    cuts = leaks._cuts(T, np.random.default_rng(0))
    assert cuts.shape[1] == leaks.ROWS and cuts.min() == -1 and cuts.max() == max(T - 2, -1)
    want = {-1, T - 2, *(2**i - 1 for i in range(10)), 62, 63, 64, 126, 127, 128}
    assert want & set(range(-1, T - 1)) <= set(cuts.flatten().tolist())
    assert cuts.size <= 40
