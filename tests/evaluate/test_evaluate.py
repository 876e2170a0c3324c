"""One evaluator: windows, exactness, invariance, intervals, the leak check, records."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Bytes, record, sharp, stories_in

from bitbyte import checkpoint, scoring, shards
from bitbyte.config import TrainConfig, TransformerConfig
from bitbyte.data import corpora, pack
from bitbyte.evaluate import bootstrap, evaluation, records
from bitbyte.evaluate.records import check_record, read_records
from bitbyte.files import BitbyteError, RunError
from bitbyte.models import build, use_kernels
from bitbyte.stories.grammar import StoriesModel
from bitbyte.train import train
from bitbyte.transformer import CausalSelfAttention
from bitbyte.vocab import START

TINY = TransformerConfig(n_layer=2, d_model=32, d_ff=48, n_head=2, seq_len=32)


@pytest.fixture(scope="module")
def model():
    built = sharp(TINY, seed=1)
    use_kernels(built, "plain", "reference")
    return built


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories") / "packed"
    documents, facts = corpora.open_corpus("stories", n_bytes=60_000, seed=5)
    pack.pack(documents, folder, sep_byte=0, source=facts, val_fraction=0.3, progress=False)
    return folder


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_byte_is_scored_once(n, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for start, stop, first in scoring.windows(n, window, stride):
        assert 0 <= start <= first < stop <= n and stop - start <= window
        assert first == 0 or first - start >= min(first, window - stride)
        scored += range(first, stop)
    assert scored == list(range(n))


def test_uniform_model_scores_exactly_eight():
    uniform = build(TINY)
    with torch.no_grad():
        uniform.embed.zero_()
    result = scoring.score(uniform, Bytes(bytes(range(256)) * 3))
    assert result.bpb == pytest.approx(8.0, abs=1e-6)
    result = scoring.score(scoring.Uniform(), Bytes(bytes(range(256)) * 1280))
    assert bootstrap.bootstrap_interval(result) == pytest.approx((8.0, 8.0), abs=1e-9)


@pytest.mark.parametrize("stride", [32, 16, 5])
def test_bits_equal_a_byte_by_byte_walk(model, stride):
    data = bytes(np.random.default_rng(0).integers(0, 256, 90, dtype=np.uint8).tolist())
    got = np.concatenate(
        [bits for _, bits in scoring.surprisal(model, Bytes(data), window=32, stride=stride)]
    )
    want = []
    for start, stop, first in scoring.windows(len(data), 32, stride):
        for i in range(first, stop):
            context = torch.tensor([[START, *data[start:i]]])
            law = model.logits(context)[0, -1].double().log_softmax(0)
            want.append(-law[data[i]].item() / math.log(2))
    assert got == pytest.approx(want, abs=1e-4)
    result = scoring.score(model, Bytes(data), window=32, stride=stride)
    assert result.bits == pytest.approx(sum(want), abs=1e-3) and result.n_bytes == 90


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_batch_size_and_threads_do_not_change_the_number(linear):
    config = TransformerConfig(n_layer=2, d_model=256, d_ff=512, seq_len=64, linear=linear)
    net = sharp(config, seed=4, by=4)
    data = Bytes(np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8).tobytes())
    threads = torch.get_num_threads()
    seen = []
    for batch_size, n in ((1, 1), (7, 1), (32, 2)):
        torch.set_num_threads(n)
        seen.append(scoring.score(net, data, stride=32, batch_size=batch_size).bpb)
    torch.set_num_threads(threads)
    assert seen == pytest.approx([seen[0]] * 3, abs=1e-5)


def test_position_curve_is_the_mean_by_position(model):
    data = Bytes(bytes(range(64)))
    result = scoring.score(model, data, window=32)
    rows = model(torch.arange(64).view(2, 32)).detach().double().numpy() / math.log(2)
    assert result.position_bits == pytest.approx(rows.mean(0), abs=1e-5)
    carried = scoring.score(model, data, window=32, stride=16)
    assert np.isfinite(carried.position_bits).all()


def scored(bits: np.ndarray, size: int = 256) -> scoring.Score:
    """A score of windows of ``size`` bytes that cost ``bits``."""
    return scoring.Score(
        bits=bits.sum(), n_bytes=size * len(bits), block_bits=bits,
        block_bytes=np.full(len(bits), size), position_bits=np.zeros(1), seconds=0.0,
    )  # fmt: skip


def neighbours_alike(n_series: int, n: int, mean: float = 2.4) -> np.ndarray:
    """Bits of n windows of 256 bytes, (n_series, n): half of their variance is an AR(1) process.

    It forgets in 20 windows, 5 kB.  The variance of their mean is 20 times that of independent
    windows; that of a counted model's costs on enwik8's last 5 MB is 16 to 25 times.
    """
    rng, rho = np.random.default_rng(0), 0.95
    noise = rng.normal(size=(n, n_series))
    level = np.empty_like(noise)
    level[0] = noise[0]
    for t in range(1, n):
        level[t] = rho * level[t - 1] + math.sqrt(1 - rho**2) * noise[t]
    return 256 * (mean + 0.36 * (level + rng.normal(size=(n, n_series)))).T


@pytest.mark.parametrize("n", [1280, 2600, 5120])
def test_the_interval_covers_as_often_as_it_says(n, monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    found = [bootstrap.bootstrap_interval(scored(bits)) for bits in neighbours_alike(600, n)]
    assert np.mean([low <= 2.4 <= high for low, high in found]) == pytest.approx(0.95, abs=0.035)


def test_too_few_bytes_have_no_interval():
    assert bootstrap.bootstrap_interval(scored(np.ones(1279))) is None
    assert bootstrap.bootstrap_interval(scored(np.arange(1280.0))) is not None
    assert bootstrap.bootstrap_interval(scored(np.arange(10.0), size=1 << 15)) is not None
    assert bootstrap.bootstrap_interval(scored(np.arange(9.0), size=1 << 20)) is None


@settings(deadline=None)
@given(st.integers(64, 9000), st.integers(300_000, 6_000_000))
def test_no_block_is_short(window, n_bytes):
    sizes = bootstrap._merged(
        [b - first for _, b, first in scoring.windows(n_bytes, window, window)]
    )
    count = bootstrap._count(sizes)
    blocks = bootstrap._merged(sizes, count)
    assert len(blocks) == count <= bootstrap.BLOCKS and blocks.sum() == n_bytes
    assert blocks.min() >= records.BLOCK_BYTES
    assert count >= min(0.5 * n_bytes / records.BLOCK_BYTES, 40)  # and not many fewer than fit


def test_the_bootstrap_is_that_of_a_loop():
    rng = np.random.default_rng(5)
    bits, sizes = rng.normal(70_000, 9_000, 12), rng.integers(1 << 15, 1 << 16, 12)
    generator, means = np.random.default_rng(3), []
    for _ in range(bootstrap.DRAWS):
        chosen = generator.integers(12, size=12)
        means.append(bits[chosen].sum() / sizes[chosen].sum())
    tail = statistics.NormalDist().cdf(-math.sqrt(12 / 11) * bootstrap._student(11))
    assert bootstrap._bootstrap(bits, sizes, 3) == tuple(np.quantile(means, (tail, 1 - tail)))


def test_quantiles_of_student():
    for freedom, want in ((9, 2.262157), (19, 2.093024), (49, 2.009575), (99, 1.984217)):
        assert bootstrap._student(freedom) == pytest.approx(want, abs=5e-4)


def test_the_interval_shrinks_with_the_data():
    rng = np.random.default_rng(0)
    small, large = (
        bootstrap.bootstrap_interval(scored(rng.normal(614, 120, n))) for n in (2_000, 20_000)
    )
    assert small[0] < 2.4 < small[1] and large[0] < 2.4 < large[1]
    want = 2 * 1.984 * 120 / 256 / math.sqrt(20_000)
    assert large[1] - large[0] == pytest.approx(want, rel=0.2)
    assert small[1] - small[0] > 2 * (large[1] - large[0])


def test_law_of_the_stories_is_its_own_floor(stories):
    record, result = evaluation.evaluate(StoriesModel(), stories, name="law", progress=False)
    assert record["bits"] == pytest.approx(record["floor_bpb"] * record["bytes"], abs=1e-6)
    assert record["bpb"] == record["floor_bpb"] and 0.4 < record["bpb"] < 1.0
    assert record["kind"] == "exact" and record["bytes"] == result.n_bytes


def test_a_model_below_the_law_is_refused(stories, tmp_path):
    class Cheat(StoriesModel):
        def bits(self, data):
            return super().bits(data) * 0.9

    with pytest.raises(RunError, match="sees the bytes it should predict"):
        evaluation.evaluate(Cheat(), stories, name="cheat", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("leak", [False, True])
def test_a_trained_model_never_beats_the_law_unless_it_leaks(stories, tmp_path, leak, monkeypatch):
    """The same training with attention that sees ahead must be caught."""
    if leak:
        init = CausalSelfAttention.__init__
        monkeypatch.setattr(
            CausalSelfAttention, "__init__",
            lambda self, d, h, theta, causal, *rest: init(self, d, h, theta, False, *rest),
        )  # fmt: skip
    run = tmp_path / "run"
    made = TrainConfig(
        data=str(stories), out=str(run), n_layer=1, d_model=64, d_ff=64, seq_len=64, steps=300,
        batch_size=8, linear="dense", optimizer="adamw", lr=3e-3, attention="plain", threads=1,
        dtype="fp32", progress=False, device="cpu",
    )  # fmt: skip
    train(made)
    net, meta = checkpoint.load_model(run)
    if leak:
        with pytest.raises(RunError, match="sees the bytes it should predict"):
            evaluation.evaluate(net, stories, name="leaking", meta=meta, progress=False)
    else:
        record, _ = evaluation.evaluate(net, stories, name="honest", meta=meta, progress=False)
        assert record["floor_bpb"] < record["bpb"] < 5 and not record["trained_on_it"]


def test_record_counts_the_file_itself(model, tmp_path):
    path = tmp_path / "some text.bin"
    path.write_bytes(b"the quick brown fox " * 10)
    record, result = evaluation.evaluate(model, path, name="a/b model", stride=16, progress=False)
    assert record["data"]["split"] == "all" and record["data"]["whole"]
    assert record["bytes"] == 200 == result.n_bytes
    assert record["bpb"] == record["bits"] / 200 and record["interval"] is None
    start = "nothing before a window is seen"
    assert record["context"] == {"window": 32, "stride": 16, "start": start}
    import hashlib

    assert record["data"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    first = records.write_record(record, tmp_path / "results")
    assert "/" not in first.name and json.loads(first.read_text()) == record
    again = records.write_record(record | {"seconds": 9.9}, tmp_path / "results")
    other = records.write_record(record | {"bits": 1.0}, tmp_path / "results")
    assert again == first and other != first
    assert len(read_records("evaluation", tmp_path / "results")) == 2


def test_refusals(model, tmp_path):
    data = Bytes(b"x" * 50)
    with pytest.raises(BitbyteError, match="between 1 and the window"):
        scoring.score(model, data, window=16, stride=17)
    with pytest.raises(BitbyteError, match="windows of 1 to 32"):
        scoring.score(model, data, window=33)
    with pytest.raises(BitbyteError, match="batch_size"):
        scoring.score(model, data, batch_size=0)
    with pytest.raises(BitbyteError, match="no bytes"):
        scoring.score(model, Bytes(b""))
    broken = build(TINY)
    with torch.no_grad():
        broken.embed[0, 0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        scoring.score(broken, Bytes(bytes(64)))


def test_scoring_leaves_the_model_trainable(model):
    scoring.score(model, Bytes(bytes(64)))
    model.train()
    model(torch.zeros(1, 32, dtype=torch.long)).mean().backward()
    model.zero_grad()


def compared(bits: np.ndarray, **changes) -> dict:
    """The part of a record that is compared; windows of 256 bytes."""
    return {
        "model": "a", "kind": "exact", "checkpoint": "1" * 64, "bytes": 256 * len(bits),
        "bpb": bits.sum() / len(bits) / 256, "data": {"sha256": "d" * 64},
        "context": {"window": 256, "stride": 256}, "blocks": bootstrap._merged(bits).tolist(),
    } | changes  # fmt: skip


@pytest.mark.parametrize("n", [1280, 5120])
def test_a_comparison_errs_as_seldom_as_it_says(n, monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    same = neighbours_alike(600, n, mean=0.0)
    found = [bootstrap.paired_bootstrap(compared(0 * bits), compared(bits)) for bits in same]
    wrong = np.mean([row["verdict"] != "not distinguishable" for row in found])
    assert wrong == pytest.approx(0.05, abs=0.035)


def test_records_with_any_number_of_sums_are_compared():
    rng = np.random.default_rng(0)
    bits, other = rng.normal(600, 100, 4321), rng.normal(606, 100, 4321)
    a, b = compared(bits), compared(other, model="b", checkpoint="2" * 64)
    found = bootstrap.paired_bootstrap(a, b)
    for n in (len(bits), 400, 100):  # as many as earlier versions kept
        fine = {"blocks": bootstrap._merged(other, n).tolist()}
        assert bootstrap.paired_bootstrap(a, b | fine)["interval"] == pytest.approx(
            found["interval"]
        )
    with pytest.raises(BitbyteError, match="of b lacks the sums of its windows"):
        bootstrap.paired_bootstrap(a, b | {"blocks": b["blocks"][:50]})
    with pytest.raises(BitbyteError, match="of a lacks the sums of its windows"):
        bootstrap.paired_bootstrap(a | {"blocks": None}, b)


def test_a_verdict_says_what_it_rests_on():
    bits = np.random.default_rng(0).normal(600, 100, 2000)
    a, b = compared(bits), compared(bits + 9, model="b", checkpoint="2" * 64)
    found = bootstrap.paired_bootstrap(a, b)
    assert (found["verdict"], found["note"]) == ("a is better", bootstrap.ONE_RUN)
    low, high = found["interval"]
    assert low <= found["difference"] <= high < 0
    codes = bootstrap.paired_bootstrap(
        a, b | {"checkpoint": a["checkpoint"]}
    )  # of one training run
    assert codes["verdict"] == "a is better" and not codes["note"]
    assert not bootstrap.paired_bootstrap(a | {"checkpoint": None}, b)[
        "note"
    ]  # a law is not trained
    assert not bootstrap.paired_bootstrap(a, a)["note"]
    few = bootstrap.paired_bootstrap(compared(bits[:99]), compared(bits[:99] + 9))
    assert few["interval"] is None and few["difference"] == pytest.approx(-9 / 256)
    assert few["verdict"] == "25,344 bytes are too few to tell; it takes 327,680 or more"


def test_oracle_is_cut_into_the_windows_its_record_names(stories):
    record, result = evaluation.evaluate(
        StoriesModel(), stories, name="law", window=64, stride=48, limit=1000, progress=False
    )
    assert result.block_bytes.tolist() == [64, *[48] * 19, 24] and record["bytes"] == 1000
    data = shards.open_dataset(stories, 1, split="val")
    whole = scoring.score_stream(StoriesModel(), data, stop=10**9)
    assert whole.n_bytes == data.n_bytes


@pytest.mark.parametrize("change", [{"limit": 0}, {"limit": -5}, {"window": -1}, {"seed": 2**63}])
def test_numbers_out_of_range_are_refused_at_once(model, stories, change):
    with pytest.raises(BitbyteError, match=f"^{next(iter(change))} is "):
        evaluation.evaluate(model, stories, name="m", progress=False, **change)


def test_stories_among_other_bytes_have_no_floor(model, tmp_path):
    documents, facts = corpora.open_corpus("stories", n_bytes=20_000, seed=5)
    folder = tmp_path / "packed"
    pack.pack(documents, folder, sep_byte=65, source=facts, progress=False)
    record, _ = evaluation.evaluate(model, folder, name="m", limit=500, progress=False)
    assert record["floor_bpb"] is None and record["bytes"] == 500


def test_training_bytes_are_known_by_any_path(model, stories):
    seen = shards.open_dataset(stories, 1, split="train")
    meta = {"data": {"train": seen.fingerprint, "files": seen.hashes}, "rng": None}
    options = {"name": "m", "meta": meta, "limit": 200, "progress": False}
    (shard,) = stories.glob("shard_00000.bin")
    assert evaluation.evaluate(model, stories, split="train", **options)[0]["trained_on_it"]
    assert evaluation.evaluate(model, shard, **options)[0]["trained_on_it"]
    assert not evaluation.evaluate(model, stories, split="val", **options)[0]["trained_on_it"]


def test_training_bytes_are_known_by_content(model, stories, tmp_path):
    """Trained on raw text; scored after that text was packed, split and cut."""
    raw = tmp_path / "text.txt"
    raw.write_bytes(b"\n".join(stories_in(120_000, seed=7)))
    documents, facts = corpora.open_corpus(raw)
    pack.pack(documents, tmp_path / "packed", source=facts, val_fraction=0.3, progress=False)
    seen = shards.open_dataset(raw, 1)
    old = {"data": {"train": seen.fingerprint, "files": seen.hashes}}
    new = {"data": old["data"] | {"sketch": seen.sketch}}
    options = {"name": "m", "progress": False, "window": 32}

    def asked(path, meta, **more):
        record, _ = evaluation.evaluate(model, path, meta=meta, **options, **more)
        return record["trained_on_it"], record["trained_on_it_test"], record["overlap"]

    seen_it, test, share = asked(tmp_path / "packed", new, limit=4000)
    assert seen_it and test == "content" and share > 0.9
    assert asked(tmp_path / "packed", old, limit=4000) == (False, "files", None)  # it cannot tell
    assert asked(raw, old, limit=4000) == (True, "files", None)
    seen_it, test, share = asked(stories, new, limit=4000)
    assert not seen_it and test == "content" and share < 0.1
    assert asked(stories, None, limit=4000) == (False, None, None)
    # What is not scored does not count, and too little to be found again is not called a test.
    head = tmp_path / "head"
    head.write_bytes(raw.read_bytes()[:4000] + np.random.default_rng(0).bytes(40_000))
    assert asked(head, new)[0] is False and asked(head, new, limit=4000)[0] is True
    assert asked(stories, new, limit=20) == (False, "files", None)
    record, _ = evaluation.evaluate(model, head, meta=new, limit=4000, **options)
    check_record(record, "it")


def test_seeds_are_compared_in_pairs():
    def runs(model, *bpbs):
        return [record(model=model, bpb=b, train_seed=k) for k, b in enumerate(bpbs)]

    a, b = runs("a", 2.0, 2.2, 2.1), runs("b", 1.9, 2.09, 2.01)
    found = bootstrap.paired_seeds(a, b)
    gaps = [0.1, 0.11, 0.09]
    half = 4.303 * statistics.stdev(gaps) / 3**0.5
    assert found["difference"] == pytest.approx(0.1) and found["pairs"] == 3
    assert found["interval"] == pytest.approx([0.1 - half, 0.1 + half], abs=1e-9)
    assert found["verdict"] == "b is better"
    assert bootstrap.paired_seeds(b, a)["verdict"] == "b is better"
    same = bootstrap.paired_seeds(a, runs("c", 2.1, 2.1, 2.1))
    assert same["verdict"] == "not distinguishable"
    one = bootstrap.paired_seeds(a, runs("d", 1.0)[:1])
    assert one["interval"] is None and one["verdict"] == "one pair cannot tell"
    with pytest.raises(BitbyteError, match="no seed"):
        bootstrap.paired_seeds(a, [record(train_seed=7)])
    unknown = [record(train_seed=None, bpb=9.0)] * 2
    assert bootstrap.paired_seeds([*a, *unknown], b) == found
    bounds = [r | {"kind": "upper_bound"} for r in a]
    verdict = bootstrap.paired_seeds(bounds, b)["verdict"]
    assert verdict == "b is better, as far as the bound on a tells"
    assert bootstrap.paired_seeds(b, [r | {"bpb": 1.0} for r in bounds])["verdict"] == "a is better"
    both = bootstrap.paired_seeds(bounds, [r | {"kind": "upper_bound"} for r in same_as(a)])
    assert both["verdict"] == "not distinguishable, as far as two bounds tell"
    mixed = bootstrap.paired_seeds(a, [r | {"kind": "exact:mixed"} for r in b])
    assert mixed["verdict"] == "b in the mixer is better"


def same_as(records):
    return [r | {"model": "c", "bpb": r["bpb"] + 0.1 * (-1) ** k} for k, r in enumerate(records)]


@pytest.mark.parametrize(("changed", "said"), [
    ({"bytes": 5}, "not scored on the same bytes"),
    ({"data": {"path": "text", "split": "val", "sha256": "cd" * 32}}, "the same bytes"),
    ({"context": {"window": 64, "stride": 256}}, "not scored on the same windows"),
    ({"context": {"window": 256, "stride": 64}}, "not scored on the same windows"),
    ({"kind": "masked_only"}, "masked bytes only"),
])  # fmt: skip
def test_seeds_are_compared_only_where_they_can_be(changed, said):
    a, b = ([record(model=m, train_seed=k) for k in range(3)] for m in "ab")
    changed_b = [r | changed for r in b]
    for pair in ((a, changed_b), (changed_b, a), (a, [*b[:2], changed_b[2]]), ([changed_b[0]], a)):
        with pytest.raises(BitbyteError, match=said):
            bootstrap.paired_seeds(*pair)
    with pytest.raises(BitbyteError, match=said):
        bootstrap.paired_bootstrap(a[0] | {"blocks": [1.0]}, changed_b[0] | {"blocks": [1.0]})


def test_a_seed_has_one_record_of_one_kind():
    a, b = ([record(model=m, train_seed=k) for k in range(3)] for m in "ab")
    for pair in (([*a, a[0] | {"bpb": 5.0}], b), (b, [*a, a[0] | {"bpb": 5.0}])):
        with pytest.raises(BitbyteError, match="a has several records of seed 0"):
            bootstrap.paired_seeds(*pair)
    with pytest.raises(BitbyteError, match="a are exact and upper_bound"):
        bootstrap.paired_seeds([*a[:2], a[2] | {"kind": "upper_bound"}], b)
