"""Models with a prior: no byte sees itself, a step is the full forward, runs resume and share."""

import dataclasses
import hashlib
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitbyte import checkpoint, ngrams, prior, runs, scoring, shards
from bitbyte import train as training
from bitbyte.config import (
    DiffusionConfig,
    MambaConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
    preset,
)
from bitbyte.distributed import World
from bitbyte.evaluate import evaluate, leaks
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import build, packed_bytes
from bitbyte.train import Trainer, train
from bitbyte.vocab import MASK, START

TABLES = {"prior": "counts", "prior_orders": 3, "prior_rows": 64, "prior_rank": 4}
SMALL = {"n_layer": 1, "d_model": 32, "seq_len": 48} | TABLES
CONFIGS = {
    "ar": TransformerConfig(**SMALL, d_ff=48, n_head=2),
    "mamba1": MambaConfig(**SMALL, ssm="mamba1"),
    "mamba2": MambaConfig(**SMALL, ssm="mamba2", n_head=2, linear="dense"),
    "diffusion": DiffusionConfig(**SMALL, d_ff=48, n_head=2),
    "blocks": DiffusionConfig(**SMALL, d_ff=48, n_head=2, block=8),
}
CAUSAL = ("ar", "mamba1", "mamba2", "blocks")


def filled(config, seed=0):
    """A model whose tables, gates and matches all matter."""
    model = build(config, seed).eval()
    random = torch.Generator().manual_seed(seed)
    p = model.prior
    p.codes.copy_(torch.randint(0, 256, p.codes.shape, generator=random))
    p.scale.fill_(0.3)
    with torch.no_grad():
        for parameter in (p.direct, p.gate, p.match):
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 4)
    return model


def text_ids(batch, T, seed=0):
    """Few different bytes, so that contexts and matches repeat."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(97, 100, (batch, T), generator=random)


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_and_prefills_are_the_full_forward(name):
    model, ids = filled(CONFIGS[name]), text_ids(2, 48)
    ids[:, 0] = START
    full = model.logits(ids)
    for split in (0, 1, 13):
        state = model.init_state(2)
        if split:
            logits, state = model.prefill(ids[:, :split], state)
            torch.testing.assert_close(logits, full[:, split - 1], atol=1e-4, rtol=1e-4)
        for t in range(split, 48):
            logits, state = model.step(ids[:, t], state)
            torch.testing.assert_close(logits, full[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_gate_against_leaks_finds_none(name):
    leaks.check(filled(CONFIGS[name]), text_ids(4, 48).numpy().astype(np.uint8))


def test_the_gate_against_leaks_finds_a_table_that_sees_the_byte(monkeypatch):
    model, whole = filled(CONFIGS["ar"]), prior.Prior.features

    def early(self, ids_BT, fold_BT=None):
        return whole(self, torch.roll(ids_BT, -1, 1), fold_BT)

    monkeypatch.setattr(prior.Prior, "features", early)
    with pytest.raises(RunError, match="perturbed_future"):
        leaks.check(model, text_ids(4, 48).numpy().astype(np.uint8))


def test_a_denoiser_reads_contexts_of_known_bytes_to_the_left():
    model, ids = filled(CONFIGS["diffusion"]), text_ids(1, 48)
    before = model.before(ids)
    plain = model.prior.features(before)
    ids[0, 20] = MASK
    hidden = model.prior.features(model.before(ids))
    assert (hidden[0, :21] == plain[0, :21]).all()  # the byte at 20 reads those before it
    for k in range(3):  # order k + 1 is unknown where one of its bytes is hidden
        assert (hidden[0, 21 : 22 + k, k] == 0).all()
        assert (hidden[0, 22 + k :, k] == plain[0, 22 + k :, k]).all()
    assert (plain[0, 0] == 0).all()  # START


def test_windows_stand_alone():
    """What a context needs from before the window is not there, whatever the order."""
    model = filled(CONFIGS["ar"])
    f = model.prior.features(torch.tensor([[START, 97, 98, 99]]))[0]
    known = (f != 0).any(-1)
    assert known.tolist() == [
        [False, False, False, False], [True, False, False, True],
        [True, True, False, True], [True, True, True, True],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bytes.bin"
    random = np.random.default_rng(0)
    words = [random.integers(97, 123, n).astype(np.uint8).tobytes() for n in (3, 4, 5, 6) * 5]
    path.write_bytes(b" ".join(words[i] for i in random.integers(0, 20, 4000)))
    return str(path)


RUN = {
    "n_layer": 1, "d_model": 32, "d_ff": 48, "n_head": 2, "seq_len": 48, "batch_size": 4,
    "dtype": "fp32", "threads": 1, "device": "cpu", "progress": False, "log_every": 1, "lr": 0.01,
    "embed_lr": 0.01,
} | TABLES  # fmt: skip


def run(data, out, **changes):
    return train(TrainConfig(**RUN | {"data": data, "steps": 12, "out": str(out)} | changes))


def test_training_reads_the_fold_of_every_byte(data, tmp_path, monkeypatch):
    """A byte's tables never counted the part of the data that it lies in."""
    seen, features = [], prior.Prior.features

    def look(self, ids_BT, fold_BT=None):
        seen.append((ids_BT.clone(), fold_BT))
        return features(self, ids_BT, fold_BT)

    monkeypatch.setattr(prior.Prior, "features", look)
    run(data, tmp_path / "run", steps=5, stride=31)
    windows = shards.open_dataset(data, 48, stride=31)
    folds, n = ngrams.folds_for(windows.n_bytes), windows.n_bytes
    everything = windows.read(0, n)
    assert len(seen) == 5
    for step, (ids, fold) in enumerate(seen):
        starts = windows.starts(step, batch_size=4)
        for row, start in enumerate(starts.tolist()):
            assert (ids[row, 1:].numpy() == everything[start : start + 47]).all()
            want = np.arange(start, start + 48) // -(-n // folds)
            assert fold[row].tolist() == want.tolist()


def test_tables_hold_what_a_count_gives(data, tmp_path):
    result = run(data, tmp_path / "run")
    model, _ = checkpoint.load_model(result.run)
    windows = shards.open_dataset(data, 48)
    counts = ngrams.count(windows.read, windows.n_bytes, 2, 64, ngrams.folds_for(windows.n_bytes))
    codes, scale = ngrams.quantize(ngrams.low_rank(counts, 4), 4)
    assert torch.equal(ngrams.unpack(model.prior.codes[1], 4), codes[-1])
    assert torch.equal(model.prior.scale[1], scale)


@pytest.mark.parametrize(
    ("family", "tables"),
    [
        ("ar", {}),
        ("mamba", {}),
        ("diffusion", {}),
        ("ar", {"prior_lr": 0.05}),
        ("diffusion", {"prior": "learned", "prior_bits": 8}),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(family, tables, data, tmp_path):
    shape = {"family": family} | ({"d_ff": None, "n_head": None} if family == "mamba" else {})
    shape |= tables
    whole = run(data, tmp_path / "whole", **shape)
    run(data, tmp_path / "parts", stop_after=5, **shape)
    train(TrainConfig(out=str(tmp_path / "parts"), resume=True, progress=False))
    first, second = (
        checkpoint.load_step(runs.resolve(tmp_path / name), with_optim=True)
        for name in ("whole", "parts")
    )
    for a, b in zip(first[1:], second[1:], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole.finished and "prior.codes" in first[1]


def test_a_prior_learns_more_than_the_plain_model(data, tmp_path):
    plain = {name: None for name in TABLES} | {"prior": "none"}
    without = run(data, tmp_path / "plain", steps=60, **plain)
    assert run(data, tmp_path / "prior", steps=60).bpb < without.bpb - 0.3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", ["learned", "counts"])
def test_trained_tables_are_stored_as_they_were_used(where, bits):
    """Training reads rounded values: those of the codes, to which they settle."""
    model = build(dataclasses.replace(CONFIGS["ar"], prior=where, prior_bits=bits))
    p, ids = model.prior, text_ids(2, 48)
    added = p.train_tables()
    folds = None
    if where == "counts":
        random = torch.Generator().manual_seed(1)
        final = torch.randint(0, 256, p.codes.shape, dtype=torch.uint8, generator=random)
        p.fill(torch.stack((final, final, final)), torch.full_like(p.scale, 0.3))
        folds = torch.zeros_like(ids)
    with torch.no_grad():
        added += torch.randn(added.shape, generator=torch.Generator().manual_seed(2))
    used = p.train().features(ids, folds)
    weights = torch.randn(used.shape, generator=torch.Generator().manual_seed(3))
    (used * weights).sum().backward()
    p.settle()
    stored = p.eval().features(ids)
    torch.testing.assert_close(stored, used.detach(), atol=1e-6, rtol=0)
    rows, known = ngrams.context_rows(ids, 3, 64)
    if where == "learned":
        exact = added.detach()[rows + 64 * torch.arange(4)] * known[..., None]
        furthest = p.scale**2 * (2 ** (bits - 1) - 1 + 0.25)  # half a step of the root
        assert ((stored - exact).abs() <= furthest + 1e-6).all()
    want = torch.zeros_like(added).index_add_(
        0, (rows + 64 * torch.arange(4)).flatten(), (weights * known[..., None]).flatten(0, 2)
    )
    torch.testing.assert_close(added.grad.to_dense(), want)


def test_training_adds_the_same_to_the_tables_of_all_folds():
    model = build(dataclasses.replace(CONFIGS["ar"], prior_bits=8)).train()
    p, ids = model.prior, text_ids(1, 48)
    added = p.train_tables()
    codes = torch.randint(0, 60, (3, *p.codes.shape), dtype=torch.uint8)
    p.fill(codes, torch.full_like(p.scale, 0.02))
    before = [p.features(ids, torch.full_like(ids, fold)).detach() for fold in range(2)]
    with torch.no_grad():
        added += 0.5
    known = ngrams.context_rows(ids, 3, 64)[1][..., None]
    for fold in range(2):
        more = p.features(ids, torch.full_like(ids, fold)).detach() - before[fold]
        torch.testing.assert_close(more, 0.5 * known.expand_as(more), atol=0.05, rtol=0)


def test_learned_tables_learn_more_than_none_and_run_everywhere(data, tmp_path):
    plain = {name: None for name in TABLES} | {"prior": "none"}
    without = run(data, tmp_path / "plain", steps=60, **plain)
    learned = run(data, tmp_path / "learned", steps=60, prior="learned", val_data=data)
    assert learned.bpb < without.bpb - 0.3
    assert not (tmp_path / "learned" / runs.PRIOR).exists()
    model, meta = checkpoint.load_model(learned.run)
    assert meta["config"]["prior"] == "learned" and model.prior.codes.any()
    score = scoring.score(model, shards.open_dataset(data, 1), window=48)
    assert score.bpb == pytest.approx(learned.val_bpb, abs=1e-5)
    other = str(tmp_path / "other.bin")
    (tmp_path / "other.bin").write_bytes(bytes(range(97, 123)) * 100)
    begun = run(other, tmp_path / "begun", steps=1, prior="learned", init=str(learned.run))
    assert checkpoint.load_model(begun.run)[0].prior.codes.any()  # of other data


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prior": "learned", "prior_lr": 0.0}, "above 0"),
        ({"prior_lr": -1.0}, "from 0 to 10"),
        ({"prior": "none", **{n: None for n in TABLES if n != "prior"}, "prior_lr": 0.1}, "both"),
        ({"prior_lr": 0.1, "compile": True}, "not trained with --compile"),
        ({"prior": "learned", "prior_rows": 1 << 24, "prior_rank": 256}, "lower --prior_rows"),
        ({"prior": "auto", "prior_lr": 0.1}, "prior_lr belongs to n-gram tables, which 2.* bytes"),
    ],
)
def test_tables_that_cannot_be_trained(changes, word, data, tmp_path):
    with pytest.raises(BitbyteError, match=word):
        run(data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_what_was_trained_is_where_the_next_run_begins(data, tmp_path):
    """Of learned tables and of counted ones, whether they are trained further or not."""
    still = {"steps": 1, "lr": 1e-9, "embed_lr": 1e-9, "val_data": data}
    for tables, rate in (("learned", 0.1), ("counts", 0.5)):
        options = {"prior": tables, "prior_lr": rate}
        first = run(data, tmp_path / tables, steps=30, val_data=data, **options)
        after = {"prior": tables, "prior_lr": 1e-9, "init": str(first.run), **still}
        second = run(data, tmp_path / f"{tables}-2", **after)
        assert second.val_bpb == pytest.approx(first.val_bpb, abs=2e-3)
    with pytest.raises(BitbyteError, match="tables that were trained; give --prior_lr"):
        run(data, tmp_path / "frozen", init=str(first.run), **still)


def test_what_a_run_with_trained_tables_remembers(data, tmp_path):
    path = tmp_path / "run"
    run(data, path, stop_after=2, prior="learned")
    assert runs.read_facts(path)["config"]["prior_lr"] == 0.1
    again = TrainConfig(out=str(path), resume=True, progress=False, prior_lr=0.1, stop_after=1)
    assert train(again).step == 3
    with pytest.raises(BitbyteError, match=r"prior_lr = 0.1; a resumed run cannot change it"):
        train(again.replace(prior_lr=0.2))
    run(data, tmp_path / "counts", stop_after=2)
    with pytest.raises(BitbyteError, match=r"prior_lr = 0.0; a resumed run cannot change it"):
        train(again.replace(out=str(tmp_path / "counts")))


def test_tables_are_trained_by_one_process(data, tmp_path):
    options = {"data": data, "prior": "learned", "parallel": "ddp", "out": str(tmp_path / "run")}
    config = TrainConfig(**RUN | options)
    two = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(BitbyteError, match="not trained with 2 processes"):
        Trainer(config, tmp_path / "run", two)


def test_what_the_tables_need(data, tmp_path):
    run(data, tmp_path / "run", stop_after=2)
    again = TrainConfig(out=str(tmp_path / "run"), resume=True, progress=False)
    tables = tmp_path / "run" / runs.PRIOR
    content = tables.read_bytes()
    for changes, word in (
        ({"prior_rows": 128}, "prior_rows = 64"),
        ({"prior": "none"}, "prior = counts"),
    ):
        with pytest.raises(BitbyteError, match=word):
            train(again.replace(**changes))
    tables.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BitbyteError, match=r"prior\.safetensors is damaged; delete it"):
        train(again)
    tables.unlink()
    assert train(again).finished
    assert tables.read_bytes() == content


def test_a_run_with_tables_can_be_replaced(data, tmp_path):
    run(data, tmp_path / "run", steps=2)
    assert runs.strangers(tmp_path / "run") == []
    assert run(data, tmp_path / "run", steps=3, allow_overwrite=True).step == 3


def test_counting_longer_than_the_minutes(data, tmp_path):
    result = run(data, tmp_path / "run", steps=None, minutes=1e-6)
    assert result.finished and result.step == 1 and math.isfinite(result.bpb)


@pytest.mark.parametrize("family", ["ar", "mamba", "diffusion"])
def test_tables_without_a_network(family, data, tmp_path):
    """The control, in the native engine where it can."""
    shape = {"d_ff": None, "n_head": None} if family == "mamba" else {"d_ff": 64, "n_head": 1}
    options = shape | {"family": family, "n_layer": 0, "prior_rank": 32, "steps": 2}
    model, meta = checkpoint.load_model(run(data, tmp_path / "run", **options).run)
    record, _ = evaluate(model, data, name="x", meta=meta, limit=4000)
    assert 1 < record["bpb"] < 9


def test_counting_takes_from_the_minutes_and_not_from_the_warmup(data, tmp_path, monkeypatch):
    passed = iter(range(10**9))  # a second with every look at the clock
    skipped = [0.0]
    fake = SimpleNamespace(perf_counter=lambda: next(passed) + skipped[0], monotonic=time.monotonic)
    monkeypatch.setattr(training, "time", fake)
    tables = ngrams.count_tables

    def slow(*args):
        skipped[0] = 20.0
        return tables(*args)

    monkeypatch.setattr(ngrams, "count_tables", slow)
    options = {"minutes": 1.0, "warmup": 0.5, "log_every": 1, "stop_after": 10}
    run(data, tmp_path / "run", steps=None, **options)
    result = train(TrainConfig(out=str(tmp_path / "run"), resume=True, progress=False))
    assert result.seconds == 60 and result.step == 39
    rates = [row["lr"] / result.metrics[20]["lr"] for row in result.metrics]
    assert rates[4] == pytest.approx(0.2, rel=0.06) and rates[12] == pytest.approx(0.6, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prior": "some"}, "no prior 'some'"),
        ({"prior_rows": 100}, "a power of two"),
        ({"prior_rank": 3}, "an even number"),
        ({"prior_bits": 5}, "4 or 8"),
        ({"prior_orders": 13}, "from 1 to 12"),
        ({"prior": "none"}, "belongs to --prior counts"),
    ],
)
def test_wrong_options(changes, word, data, tmp_path):
    with pytest.raises(BitbyteError, match=word):
        run(data, tmp_path / "run", **changes)


def test_data_shorter_than_a_context(tmp_path):
    (tmp_path / "few.bin").write_bytes(b"twelve bytes")
    with pytest.raises(BitbyteError, match="too few to count n-grams in; use --prior none"):
        run(str(tmp_path / "few.bin"), tmp_path / "run", seq_len=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"prior_rows": 1 << 20},  # the counts themselves
        {"prior_rows": 1 << 14, "prior_rank": 256, "prior_bits": 8, "prior_orders": 12},
    ],
)
def test_tables_that_no_memory_holds(data, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(ngrams, "memory", lambda: 2**28)
    with pytest.raises(BitbyteError, match="lower --prior_rows"):
        run(data, tmp_path / "run", **changes)


@pytest.mark.parametrize("byte", [b"\0", b"ab"])
def test_data_of_one_context_or_none_twice(byte, tmp_path):
    (tmp_path / "dull.bin").write_bytes(byte * 200 if len(byte) == 1 else bytes(range(200)))
    result = run(str(tmp_path / "dull.bin"), tmp_path / "run", steps=3)
    assert math.isfinite(result.bpb)


def test_long_data_are_counted_in_part(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    monkeypatch.setattr(ngrams, "SLICE", 100)
    monkeypatch.setattr(ngrams, "COUNTED", 1300)
    counts = ngrams.count(lambda a, b: data[a:b], 5000, 1, 64, 2)
    assert 1200 <= counts.sum() <= 1500 and counts[0].sum() == pytest.approx(700, abs=60)
    counts = ngrams.count(lambda a, b: data[a:b], 1400, 1, 64, 1)
    assert 1200 <= counts.sum() <= 1400


def test_plain_configs_are_as_they_were():
    plain = config_to_dict(preset("nano"))
    assert not [name for name in plain if "prior" in name]
    assert config_from_dict(plain) == preset("nano")
    for config in CONFIGS.values():
        assert config_from_dict(config_to_dict(config)) == config
        model = build(config)
        assert sum(p.numel() for p in model.parameters()) == config.n_parameters
        plain = dataclasses.replace(config, prior="none")
        tables = 4 * 64 * 2 + 4 * 4 * 4  # contexts x rows x 4 numbers of 4 bits, and the scales
        extra = packed_bytes(model) - packed_bytes(build(plain)) - tables
        assert 0 < extra <= 2 * (config.n_parameters - plain.n_parameters)


def test_counts_alone_are_a_distribution():
    """Summed over all values of the next byte, the control's probabilities are 1."""
    text = np.frombuffer(b"the cat sat on the mat, the cat sat on the hat" * 4, np.uint8)
    sums = np.zeros(11)
    for value in range(256):
        held_out = np.frombuffer(b"the cat sat", np.uint8).copy()
        held_out[10] = value
        backoff = ngrams.Backoff(held_out)
        for order in (1, 2, 3, 0):
            backoff.add(ngrams.count(lambda a, b: text[a:b], len(text), order, 64, 2), order)
        sums[10] += backoff.probs_N[10]
    assert sums[10] == pytest.approx(1)


@pytest.mark.slow
def test_two_processes_count_once_and_train_as_one(data, tmp_path):
    code = f"""
import sys
from bitbyte import ngrams
from bitbyte.config import TrainConfig
from bitbyte.train import train
count, calls = ngrams.count, []
ngrams.count = lambda *a, **k: calls.append(1) or count(*a, **k)
train(TrainConfig(**{RUN!r} | {{"data": {data!r}, "steps": 3, "out": {str(tmp_path / "two")!r},
                               "batch_size": 2}}))
import os
assert len(calls) == (4 if os.environ["RANK"] == "0" else 0), calls
"""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    (tmp_path / "job.py").write_text(code)
    done = subprocess.run([*words, str(tmp_path / "job.py")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    run(data, tmp_path / "one", steps=3)
    one, two = (checkpoint.load_model(tmp_path / name)[0] for name in ("one", "two"))
    assert torch.equal(one.prior.codes, two.prior.codes)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3, msg=name)
    first, second = (
        hashlib.sha256((tmp_path / name / runs.PRIOR).read_bytes()).digest()
        for name in ("one", "two")
    )
    assert first == second
