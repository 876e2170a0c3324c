"""Diffusion in blocks: what sees what, the two modes of one set of weights, bounds and codes."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from support import Bytes, sampling, sharp, some_ids, words
from test_prior import CONFIGS as PRIOR_CONFIGS
from test_prior import filled, text_ids

from bitbyte import bounds, checkpoint, infill, models, runs, scoring
from bitbyte.config import (
    DiffusionConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from bitbyte.evaluate import evaluation, leaks, listing
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import BlockDiffusionLM, build
from bitbyte.train import block_at, train
from bitbyte.vocab import MASK, START

SMALL = {"n_layer": 2, "d_model": 32, "seq_len": 24, "d_ff": 48, "n_head": 2}
CONFIG = DiffusionConfig(**SMALL, block=4, linear="dense")


@pytest.fixture(params=["dense", "ternary", "prior"])
def model(request):
    if request.param == "prior":
        return filled(dataclasses.replace(PRIOR_CONFIGS["blocks"], seq_len=24, block=4))
    return sharp(dataclasses.replace(CONFIG, linear=request.param), seed=3)


def ids_for(model, batch: int = 2) -> torch.Tensor:
    return text_ids(batch, 24) if model.prior else some_ids(batch, 24)


def test_its_causal_mode_is_the_causal_model(model):
    fields = config_to_dict(model.config)
    for name in ("family", "block", "ar_share", "block_rank", "diffusion_steps", "min_mask_prob",
                 "max_mask_prob"):  # fmt: skip
        fields.pop(name)
    twin = build(TransformerConfig(**fields)).eval()
    tensors = model.state_dict()
    own = sum(tensors.pop(name).numel() for name in ("inside", "around", "apart"))
    twin.load_state_dict(tensors)
    ids = ids_for(model)
    assert torch.equal(model(ids), twin(ids))
    assert torch.equal(model.logits(ids), twin.logits(ids))
    assert model.config.n_parameters == twin.config.n_parameters + own


def visible(hidden: torch.Tensor) -> torch.Tensor:
    """seen_BGPN where what is hidden sees what is not."""
    return bounds.seen_in(hidden.long().unflatten(1, (-1, 4)))


def random_orders(batch: int, T: int = 24, N: int = 4) -> torch.Tensor:
    return torch.rand(batch, T // N, N, generator=torch.Generator().manual_seed(1)).argsort(-1)


def test_no_prediction_depends_on_a_byte_it_does_not_see_or_a_later_block(model):
    ids, rank = ids_for(model, 1), random_orders(1)
    hidden = torch.zeros(1, 24, dtype=torch.bool)
    hidden[0, [8, 10, 11, 13, 20, 21, 22, 23]] = True
    for seen in (bounds.seen_in(rank), visible(hidden)):
        want = model.block_logits(ids, seen)
        for t in range(24):
            other = ids.clone()
            other[0, t] = 97 + (other[0, t] - 97 + 1) % 3 if model.prior else (ids[0, t] + 77) % 256
            moved = (model.block_logits(other, seen) != want).any(-1)[0].tolist()
            start, stop = t // 4 * 4, t // 4 * 4 + 4
            assert not any(moved[:start]), t
            # Its own block sees it where it may, on both sides.
            assert moved[start:stop] == seen[0, t // 4, :, t % 4].tolist(), t
            assert any(moved[stop:]) or stop == 24, t


def test_filling_with_a_cached_past_equals_the_window_at_once(model):
    model.double()
    ids = ids_for(model)
    hidden = some_ids(2, 24, seed=4) % 2 == 0
    shown = ids.masked_fill(hidden, MASK)
    want = model.block_logits(ids, visible(hidden))
    before = torch.cat((torch.full((2, 4), START), ids), 1)
    state = model.empty_state(2)
    for start in range(0, 24, 4):
        block = torch.cat((before[:, start : start + 4], shown[:, start : start + 4]), 1)
        for _ in range(2):  # it does not change the state
            got = model.fill(block, state)
            assert torch.allclose(got, want[:, start : start + 4], atol=1e-5), start
        _, state = model.prefill(before[:, start + 3 : start + 7], state)


def test_what_is_seen_without_a_gap_is_read_as_in_the_causal_model():
    """A query that adds nothing of its own is the causal model, if it sees all before it."""
    model = sharp(CONFIG).double()
    with torch.no_grad():
        model.around.zero_()
        model.apart.zero_()
    ids = some_ids(2, 24)
    in_order = torch.arange(4).expand(2, 6, 4)
    want = model.logits(models.preceding(ids))
    assert torch.allclose(model.block_logits(ids, bounds.seen_in(in_order)), want, atol=1e-9)
    assert not torch.allclose(model.block_logits(ids, bounds.seen_in(-in_order)), want, atol=1e-2)


@pytest.mark.parametrize("kernel", ["sdpa", "chunked"])
def test_attention_kernels_agree(model, kernel):
    ids, noise = ids_for(model, 3), torch.arange(3)
    model.train()
    results = []
    for name in ("plain", kernel):
        models.use_kernels(model, name)
        model.zero_grad()
        fold = torch.zeros_like(ids) if model.prior else None
        if model.prior:
            model.prior.fold_codes = model.prior.codes[None]
        nats = model(ids, noise, fold)
        nats.mean().backward()
        results.append((nats.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-3, rtol=1e-3)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-2)


def test_the_loss_is_both_costs_in_their_shares(model):
    model.double()
    ids, noise = ids_for(model, 3), torch.arange(3) + 5
    logits = model.block_logits(ids, bounds.seen_in(model.orders(noise, 24)))
    nats = bounds.nats(logits, ids)
    for share in (0.5, 0.0, 0.9):
        object.__setattr__(model.config, "ar_share", share)
        want = share * model(ids) + (1 - share) * nats
        assert torch.allclose(model(ids, noise), want.float(), atol=1e-4)


def test_every_order_of_a_block_is_as_frequent():
    model = build(CONFIG)
    orders = model.orders(torch.arange(2400), 24)
    assert (orders.sort(-1).values == torch.arange(4)).all()
    for g in range(6):
        counts = torch.unique(orders[:, g], dim=0, return_counts=True)[1]
        assert len(counts) == 24 and (counts - 100).abs().max() < 50
    assert not torch.equal(orders[:, 0], orders[:, 1])
    assert torch.equal(model.orders(torch.tensor([7]), 24)[0], orders[7])


def test_what_a_query_sees_before_it():
    hidden = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    seen = bounds.seen_in(hidden)
    assert models.visible_prefix(seen)[0, [1, 4]].tolist() == [1, 1]
    assert models.visible_prefix(seen)[1].tolist() == [0] * 6
    assert int(models.visible_prefix(seen)[2, 5]) == 5
    runs = models.visible_before(seen)
    assert runs[0, 4] == 2 and runs[0, 1] > models.PAST and runs[2, 5] > models.PAST
    assert runs[1, 1:].tolist() == [0] * 5 and runs[1, 0] > models.PAST - 1


class Table(torch.nn.Module):
    """A law for every byte, past and pattern of revealed bytes of its block, drawn at random."""

    exact, block = True, 2
    V, T = 3, 5

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.laws = seed, {}

    def law(self, past: tuple, shown: tuple) -> torch.Tensor:
        key = (past, shown)
        if key not in self.laws:
            seed = hash((self.seed, *past, -1, *shown)) % 2**31
            generator = torch.Generator().manual_seed(seed)
            size = (len(shown), self.V)
            self.laws[key] = torch.randn(size, generator=generator, dtype=torch.float64)
        return self.laws[key]

    def block_logits(self, ids_BT, seen_BGPN):
        rows = []
        for ids, seen_GPN in zip(ids_BT.tolist(), seen_BGPN.tolist(), strict=True):
            row = []
            for t in range(len(ids)):
                a, seen_N = t // 2 * 2, seen_GPN[t // 2][t % 2]
                shown = [i if seen else MASK for i, seen in zip(ids[a : a + 2], seen_N)]  # noqa: B905
                row.append(self.law(tuple(ids[:a]), tuple(shown))[t - a])
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def path(self, x: tuple, order: tuple, start: int) -> float:
        """Nats of revealing the block that begins at ``start`` in this order."""
        shown, total = [MASK] * len(x[start : start + 2]), 0.0
        for i in order:
            total -= float(self.law(x[:start], tuple(shown)).log_softmax(-1)[i, x[start + i]])
            shown[i] = x[start + i]
        return total


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_the_mean_over_orders_within_blocks(seed):
    model = Table(seed)
    x = tuple(np.random.default_rng(seed).integers(0, 3, 5).tolist())
    exact_bound, any_order = 0.0, 0.0
    for start in (0, 2, 4):  # the last block has one byte
        orders = itertools.permutations(range(len(x[start : start + 2])))
        paths = [model.path(x, order, start) for order in orders]
        exact_bound += sum(paths) / len(paths)
        any_order -= math.log(sum(math.exp(-nats) for nats in paths) / len(paths))
    draws = [
        float(bounds.upper_bound(model, torch.tensor([x]), 5, draws=8, indices=[i]).sum())
        for i in range(300)
    ]
    error = np.std(draws) / math.sqrt(len(draws))
    assert np.mean(draws) == pytest.approx(exact_bound, abs=max(5 * error, 1e-9))
    assert error < 0.05 and exact_bound >= any_order - 1e-12


def test_each_code_within_blocks_is_a_code():
    """Probabilities of all windows sum to 1, also with part of a block given."""
    model = Table(1)
    everything = torch.tensor(list(itertools.product(range(3), repeat=5)))
    for order, per_pass in itertools.product(bounds.ORDERS, (1, 2)):
        nats = bounds.chain_rule(model, everything, 5, order=order, per_pass=per_pass)
        assert float(torch.exp(-nats.sum(1)).sum()) == pytest.approx(1, abs=1e-9)
        for given in range(1, 5):
            some = everything[(everything[:, :given] == 1).all(1)]
            nats = bounds.chain_rule(model, some, 5 - given, order=order, per_pass=per_pass)
            assert float(torch.exp(-nats.sum(1)).sum()) == pytest.approx(1, abs=1e-9), given


def test_the_codes_of_the_real_model_are_codes():
    config = dataclasses.replace(CONFIG, seq_len=4, block=2, n_layer=1)
    model = sharp(config)
    everything = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    with torch.no_grad():
        for order, per_pass in (("left_to_right", 1), ("confidence", 1), ("confidence", 2)):
            nats = torch.cat([
                bounds.chain_rule(model, part, 2, order=order, per_pass=per_pass)
                for part in everything.split(8192)
            ])  # fmt: skip
            assert float(torch.exp(-nats.sum(1)).sum()) == pytest.approx(1, abs=1e-4)


def test_left_to_right_is_the_chain_rule():
    model, x = Table(4), (2, 0, 1, 1, 0)
    got = bounds.chain_rule(model, torch.tensor([x]), 5, order="left_to_right")[0]
    want = model.path(x, (0, 1), 0) + model.path(x, (0, 1), 2) + model.path(x, (0,), 4)
    assert float(got.sum()) == pytest.approx(want, abs=1e-9)


def test_a_model_without_knowledge_pays_eight_bits_in_every_kind():
    model = build(CONFIG).eval()
    with torch.no_grad():
        model.embed.zero_()
    data = Bytes(some_ids(1, 100)[0].to(torch.uint8).numpy().tobytes())
    for kind in scoring.KINDS:
        for stride in (24, 7):
            result = scoring.score(model, data, kind=kind, draws=3, stride=stride)
            assert result.bpb == pytest.approx(8, abs=1e-6), kind


@pytest.mark.parametrize("kind", scoring.KINDS)
def test_records_of_all_kinds(kind, tmp_path):
    path = tmp_path / "bytes.bin"
    path.write_bytes((np.arange(3000) % 251).astype(np.uint8).tobytes())
    model = build(CONFIG).eval()
    record, result = evaluation.evaluate(
        model, path, name="blocks", limit=500, kind=kind, draws=2, progress=False, window=20
    )
    assert record["kind"] == kind and record["bytes"] == 500
    assert record["leaks"]["hidden"] == 0 == record["leaks"]["perturbed_future"]
    assert result.bpb == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("what", ["own byte", "later block", "prior"])
def test_the_gate_finds_a_hidden_byte_that_is_seen(what, monkeypatch):
    model = filled(dataclasses.replace(PRIOR_CONFIGS["blocks"], n_layer=1))
    rows = text_ids(4, 48).numpy().astype(np.uint8)
    assert leaks.check(model, rows)["hidden"] == 0
    if what == "own byte":
        near = BlockDiffusionLM._embed_queries
        monkeypatch.setattr(
            BlockDiffusionLM, "_embed_queries", lambda self, ids, seen: near(self, ids, seen | True)
        )
    elif what == "later block":
        prefix = models.visible_prefix
        monkeypatch.setattr(models, "visible_prefix", lambda seen: prefix(seen) + 1)
    else:
        whole = models.where_visible
        late = lambda f, n, visible: whole(f, n, visible + 1)  # noqa: E731
        monkeypatch.setattr(models, "where_visible", late)
    with pytest.raises(RunError, match="leak check hidden"):
        leaks.check(model, rows)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"block": 5}, "must divide windows of 24"), ({"block": -4}, "must divide"),
        ({"block": 48}, "must divide"), ({"block": 24}, "must divide"),
        ({"block": 4, "diffusion_steps": 8}, "drop --diffusion"),
        ({"block": 4, "ar_share": 1.0}, "below 1"), ({"block": 4, "ar_share": -0.1}, "from 0"),
    ],
)  # fmt: skip
def test_bad_blocks_are_refused(changes, word):
    with pytest.raises(BitbyteError, match=word):
        DiffusionConfig(**SMALL, **changes)


def test_configs_of_whole_windows_are_as_before():
    plain = DiffusionConfig(**SMALL)
    fields = config_to_dict(plain)
    assert not {"block", "ar_share"} & fields.keys()
    assert config_from_dict(fields) == plain
    assert isinstance(build(plain), models.MaskedDiffusionLM)
    assert config_from_dict(config_to_dict(CONFIG)) == CONFIG


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "bytes.bin"
    path.write_bytes(words(4000))
    return str(path)


def fields(data, **changes) -> dict:
    return {
        "family": "diffusion", "linear": "dense", "data": data, "n_layer": 2, "d_model": 64,
        "seq_len": 64, "batch_size": 4, "steps": 6, "progress": False, "device": "cpu",
        "deterministic": True, "val_data": data, "eval_bytes": 512, "log_every": 1,
    } | changes  # fmt: skip


def test_a_run_in_blocks_learns_resumes_and_has_an_exact_cost(data, tmp_path):
    options = fields(data, block=8, steps=12, anneal=0.7, prior="counts", prior_rows=256)
    whole = train(TrainConfig(**options, out=str(tmp_path / "whole")))
    train(TrainConfig(**options, out=str(tmp_path / "part"), stop_after=5))
    train(TrainConfig(out=str(tmp_path / "part"), resume=True, progress=False))
    ends = [checkpoint.load_step(runs.resolve(tmp_path / n))[1] for n in ("whole", "part")]
    assert ends[0].keys() == ends[1].keys() and "inside" in ends[0]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"] - 0.5
    assert "masked_bpb" in whole.metrics[-1] and "val_bpb" in whole.metrics[-1]
    assert "bpb" not in whole.metrics[-1] and whole.val_kind == "exact"
    meta = checkpoint.read_meta(runs.resolve(tmp_path / "whole"))
    assert checkpoint.validation(meta) == (whole.val_bpb, "exact")
    assert listing.describe(tmp_path / "whole").is_bound is False


def test_blocks_grow_in_equal_times():
    sizes = [block_at(i / 8, 8) for i in range(10)]
    assert sizes == [1, 1, 2, 2, 4, 4, 8, 8, 8, 8]
    assert block_at(0.5, 6) == 3


@pytest.mark.parametrize("prior", ["none", "counts"])
def test_a_causal_run_is_a_start(data, tmp_path, prior):
    options = fields(data, prior=prior) | ({"prior_rows": 256} if prior == "counts" else {})
    train(TrainConfig(**options | {"family": "ar"}, out=str(tmp_path / "ar")))
    first, meta = checkpoint.load_model(tmp_path / "ar")
    options |= {"block": 8, "init": str(tmp_path / "ar"), "lr": 1e-9, "embed_lr": 1e-9}
    train(TrainConfig(**options, out=str(tmp_path / "blocks")))
    model, new = checkpoint.load_model(tmp_path / "blocks")
    ids = torch.frombuffer(bytearray(words(40)[:128]), dtype=torch.uint8).view(2, 64)
    assert torch.allclose(model(ids), first(ids), atol=1e-3)
    assert new["extra"]["init"]["bytes_seen"] == meta["bytes_seen"]
    record, _ = evaluation.evaluate(model, data, name="b", meta=new, progress=False, limit=512)
    assert record["bytes_seen"] == 2 * meta["bytes_seen"] and record["trained_on_it"]
    # It goes on without the run it started from, and a third run counts both.
    (tmp_path / "ar").rename(tmp_path / "away")
    train(TrainConfig(out=str(tmp_path / "blocks"), resume=True, steps=7, progress=False))
    options |= {"init": str(tmp_path / "blocks"), "linear": "ternary"}
    train(TrainConfig(**options, out=str(tmp_path / "third")))
    _, third = checkpoint.load_model(tmp_path / "third")
    assert third["extra"]["init"]["bytes_seen"] == meta["bytes_seen"] * 13 // 6


def test_bytes_of_the_first_run_count_as_seen(data, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(range(256)) * 40)
    train(TrainConfig(**fields(data, family="ar"), out=str(tmp_path / "ar")))
    options = fields(str(other), block=8, init=str(tmp_path / "ar"), val_data=None)
    train(TrainConfig(**options, out=str(tmp_path / "blocks")))
    model, meta = checkpoint.load_model(tmp_path / "blocks")
    seen = evaluation.evaluate(model, data, name="b", meta=meta, progress=False, limit=512)[0]
    assert seen["trained_on_it"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"d_model": 128}, "has d_model 64, this run 128"), ({"n_layer": 1}, "has n_layer 2"),
        ({"n_head": 2}, "has n_head 1"), ({"block": None}, "has family ar, this run diffusion"),
        ({"prior": "counts"}, "has prior none, this run counts"),
    ],
)  # fmt: skip
def test_a_start_of_another_shape_is_refused(data, tmp_path, changes, word):
    train(TrainConfig(**fields(data, family="ar", steps=1, prior="none"), out=str(tmp_path / "ar")))
    options = fields(data, block=8, init=str(tmp_path / "ar"), prior="none") | changes
    with pytest.raises(BitbyteError, match=word):
        train(TrainConfig(**options, out=str(tmp_path / "blocks")))
    assert not (tmp_path / "blocks").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"family": "ar", "block": 8}, "ar models have no block"),
        ({"family": "mamba", "block": 8}, "mamba models have no block"),
        ({"ar_share": 0.5}, "ar_share belongs to --block"),
        ({"anneal": 0.5}, "anneal belongs to --block"),
        ({"block": 8, "anneal": 1.5}, "anneal is 1.5"),
        ({"block": 7}, "must divide windows of 64"),
        ({"block": 8, "seq_len": None, "curriculum": (12, 64)}, "do not divide windows of 12"),
        ({"block": 8, "init": "nowhere"}, "no checkpoint 'nowhere'"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(data, tmp_path, changes, word):
    with pytest.raises(BitbyteError, match=word):
        train(TrainConfig(**fields(data) | changes, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


class Copy(torch.nn.Module):
    """The real model, noting each call of ``fill`` and ``prefill``."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.block = model, model.config, model.block
        self.context, self.empty_state = model.context, model.empty_state
        self.fills, self.fed = [], []

    def fill(self, ids, state):
        self.fills.append((state.position, ids[0].tolist()))  # the block before, and the block
        return self.model.fill(ids, state)

    def prefill(self, ids, state):
        self.fed.append(ids.shape[1])
        return self.model.prefill(ids, state)


@pytest.mark.parametrize("prompt", [b"", b"a", b"abcd", b"abcdefghi", bytes(range(60))])
def test_a_sample_is_drawn_from_what_the_window_predicts(prompt):
    """Every pass sees what block_logits sees, whatever was cached."""
    model = sharp(CONFIG)
    watched, shown = Copy(model), {}
    config = sampling(temperature=0.0, max_new_tokens=21)
    new = infill.sample(
        watched, prompt, config, on_reveal=lambda *r: shown.__setitem__(r[0], r[1])
    )  # fmt: skip
    assert new == infill.sample(model, prompt, config) and len(new) == 21
    assert bytes(shown[len(prompt) + i] for i in range(21)) == new
    text = prompt + new
    passes = [ids[4:].count(MASK) for _, ids in watched.fills]
    assert max(passes) <= 4 and passes[0] == 4 - len(prompt[:20]) % 4
    # The last whole window: greedy bytes are the likeliest, in the order of confidence.
    first = watched.fills[0]
    window = len(prompt) - first[0] - (4 - passes[0])
    ids = torch.tensor([list(text[window : window + 24][: first[0] + 4])])
    hidden = torch.arange(ids.shape[1])[None] >= len(prompt) - window
    logits = model.block_logits(ids, visible(hidden))[0, -4:]
    got = model.fill(torch.tensor([first[1]]), cached(model, ids[0, : first[0]]))[0]
    assert torch.allclose(got, logits, atol=1e-4)


def cached(model, ids_T):
    """The state after a text of whole blocks, whose last byte is yet to be fed."""
    state = model.empty_state(1)
    if len(ids_T):
        before = torch.tensor([[START, *ids_T[:-1].tolist()]])
        _, state = model.prefill(before, state)
    return state


@pytest.mark.parametrize(
    ("schedule", "most"), [({}, 4), ({"per_pass": 2}, 2), ({"steps": 1}, 1), ({"per_pass": 3}, 2)]
)
def test_the_schedule_limits_the_passes_of_a_block(schedule, most):
    watched = Copy(sharp(CONFIG))
    for order in infill.ORDERS:
        watched.fills.clear()
        assert len(infill.sample(watched, b"", sampling(), order=order, **schedule)) == 20
        per_block = np.bincount([position for position, _ in watched.fills])
        assert per_block.max() <= most
        assert order == "ancestral" or (per_block[::4] == most).all()


def test_a_threshold_reveals_what_is_sure_at_once():
    watched = Copy(sharp(CONFIG))
    passes = []
    for threshold in (1e-6, 0.05, 1.0):
        watched.fills.clear()
        infill.sample(watched, b"", sampling(), threshold=threshold)
        passes.append(len(watched.fills))
    assert passes[0] == 5 and passes[2] == 20 and passes[0] <= passes[1] <= passes[2]
    for wrong in ({"threshold": 0.0}, {"threshold": 0.5, "order": "ancestral"}, {"per_pass": 0},
                  {"steps": 2, "per_pass": 2}, {"order": "random"}):  # fmt: skip
        with pytest.raises(BitbyteError):
            infill.Schedule(**wrong)


def test_holes_are_filled_and_the_rest_stays():
    model = sharp(CONFIG)
    ids = some_ids(1, 24)[0]
    ids[[1, 2, 9, 21, 22, 23]] = MASK
    calls = []
    done = infill.infill(model, ids, sampling(), on_reveal=lambda *r: calls.append(r[0]))
    assert sorted(calls) == [1, 2, 9, 21, 22, 23] == done.positions
    assert ((done.ids_T == ids) | (ids == MASK)).all() and (done.ids_T != MASK).all()
    assert done.method == "confidence denoising in blocks of 4"
    # A hole begins a block, so what follows it in the block has a say.
    base = infill.denoise(model, ids, sampling(temperature=0.0))
    moved = 0
    for byte in range(0, 250, 10):
        ids[11] = byte
        moved += bool((infill.denoise(model, ids, sampling(temperature=0.0)) != base)[9])
    assert moved
