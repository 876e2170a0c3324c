"""Counts of the native engine: the same bits on every machine, and files made with them."""

import dataclasses
import hashlib
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from support import with_features
from test_compress import TERNARY, TEXT, built, round_trip
from test_integer import by_formula, formula_ids

from bitbyte.compress import predictors, rans
from bitbyte.compress.predictors import NativePredictor
from bitbyte.config import TransformerConfig
from bitbyte.device import settings_kept
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine

pytest.importorskip("llvmlite")
assert engine.described(built(TERNARY)) == "native"
PRIOR = {"prior": "counts", "prior_orders": 3, "prior_rows": 64, "prior_rank": 32}
SHAPES = {
    "ar": {},
    "mamba1": {"d_model": 64, "n_head": 8},
    "mamba2": {"d_model": 64, "n_head": 8, "d_state": 16},
    "prior": {},
}  # fmt: skip
DENSE = dataclasses.replace(TERNARY, linear="dense")
GOLDEN = {  # counts and fingerprint
    "ar ternary": "e90adbfe13963e4c bd513bb0861cc3bee3ed461f21b5c92a",
    "ar dense": "28aa5c5a586cb07f 026e39d1484a7c64e2da7fa16deae61a",
    "mamba1 ternary": "c9f3c600220a5b70 d2af050cea43d19c8c22eb83a42f78ac",
    "mamba1 dense": "ccad20ee3933ec40 e198b9826c17c4950bea5a0596f8714a",
    "mamba2 ternary": "cf63458487e07ad7 288c41c5f55fd655a03190344a41ee07",
    "mamba2 dense": "56fd3d2f66db49ba 21953b7b57835f74144a29dc9a6ef207",
    "prior ternary": "331c66f4febb61bb d92481cc0e9ce4df18b1cf95a2d1a477",
    "prior dense": "796c131383cf6327 81f3d50ca45c631090ca5d8a36f4e44e",
}


def model_of(name):
    kind, linear = name.split()
    changes = SHAPES[kind] | {"linear": linear} | (PRIOR if kind == "prior" else {})
    return by_formula("ar" if kind == "prior" else kind, **changes)


def digest(name) -> str:
    """Of the counts and the fingerprint of a model whose weights are a formula."""
    predictor = NativePredictor(model_of(name))
    counts = predictor.windows(formula_ids(3, 32).numpy())
    made = hashlib.sha256(counts.astype("<u4").tobytes())
    return f"{made.hexdigest()[:16]} {predictor.fingerprint.hex()}"


def digests() -> str:
    return " ".join(digest(name) for name in GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    assert digest(name) == GOLDEN[name]


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs x86")
@pytest.mark.parametrize("features", ["+avx2,+avx,+fma,+sse4.2", "+sse2"])
def test_golden_counts_on_other_processors(features, tmp_path):
    code = "import test_native; print(test_native.digests())"
    said = with_features(features, code, Path(__file__).parent, tmp_path)
    assert said.splitlines()[-1] == " ".join(GOLDEN.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_steps_are_windows_for_any_lanes_and_threads(name):
    predictor, ids_ST = NativePredictor(model_of(name)), formula_ids(5, 32).numpy()
    whole = predictor.windows(ids_ST)
    assert whole.dtype == np.uint32 and whole.min() >= 1
    assert (whole.sum(-1, dtype=np.int64) == rans.TOTAL).all()
    with settings_kept():
        torch.set_num_threads(2)
        assert np.array_equal(predictor.windows(ids_ST), whole)
    for part in (slice(0, 1), slice(1, 5)):
        state, made = predictor.start(len(ids_ST[part])), []
        for ids_S in ids_ST[part].T:
            counts_SV, state = predictor.step(ids_S, state)
            made.append(counts_SV)
        assert np.array_equal(np.stack(made, 1), whole[part])


@pytest.mark.parametrize("name", GOLDEN)
def test_counts_are_the_model(name):
    """They cost what PyTorch's probabilities cost, within 0.001 bits a byte."""
    model, ids_ST = model_of(name), formula_ids(4, 32)
    counts_STV = NativePredictor(model).windows(ids_ST.numpy())
    engine.choose(model, "torch")
    with torch.no_grad():
        log_STV = model.logits(ids_ST).double().log_softmax(-1) / np.log(2)
    mine_STV = np.log2(counts_STV / rans.TOTAL)
    gap = (log_STV.exp2().numpy() * (log_STV.numpy() - mine_STV)).sum(-1)
    assert -1e-6 < gap.mean() < 1e-3


@pytest.mark.parametrize("config", [TERNARY, DENSE], ids=["ternary", "dense"])
def test_files_come_back(config, tmp_path):
    model = built(config)
    coded = round_trip(TEXT, model, tmp_path)
    assert (coded.header.mode, coded.header.threads) == ("native", 0)
    packed = (tmp_path / "p").read_bytes()
    with settings_kept():
        torch.set_num_threads(3)
        round_trip(TEXT, model, tmp_path)
    assert (tmp_path / "p").read_bytes() == packed
    round_trip(b"", model, tmp_path)


def test_what_has_no_native_mode(tmp_path, monkeypatch):
    narrow = built(TransformerConfig(n_layer=1, d_model=24, d_ff=32, n_head=2, linear="dense"))
    with pytest.raises(BitbyteError, match=r"no native mode here: .* multiples of 32"):
        round_trip(TEXT, narrow, tmp_path, mode="native")
    assert round_trip(TEXT, narrow, tmp_path).header.mode == "float"
    model = built(TERNARY)
    round_trip(TEXT, model, tmp_path, mode="native")
    monkeypatch.setattr(engine, "_problem_here", lambda: "llvmlite is not installed")
    with pytest.raises(BitbyteError, match="llvmlite is not installed"):
        predictors.predictor_for(model, mode="native", lanes=1)
    assert predictors.predictor_for(model, lanes=1).mode == "portable"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value):
    model = built(TERNARY)
    native = NativePredictor(model).engine
    native.norm[3] = value
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        native.counts(formula_ids(1, 4))
