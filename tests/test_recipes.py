"""Recipes: a run is made once, alone or side by side with others, and found again."""

import pytest
import torch

from bitbyte import checkpoint, recipes
from bitbyte.files import BitbyteError

TINY = {"n_layer": 1, "d_model": 32, "seq_len": 32, "batch_size": 2, "steps": 4, "log_every": 1}
TWINS = {"ternary": {"linear": "ternary"}, "dense": {"linear": "dense"}}


@pytest.fixture(scope="module")
def data():
    return recipes.dataset("stories", n_bytes=20_000)


def losses(run):
    return [row["loss"] for row in checkpoint.read_metrics(run)]


def test_side_by_side_makes_what_one_by_one_makes(data, tmp_path, monkeypatch):
    together = recipes.all_trained(data, TWINS, **TINY)
    assert len(set(together.values())) == 2
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    for name, own in TWINS.items():
        alone = recipes.trained(data, **TINY, **own)
        assert alone.name == together[name].name
        assert losses(alone) == losses(together[name])


def test_what_is_there_is_not_made_again(data, monkeypatch):
    first = recipes.all_trained(data, TWINS, **TINY)
    monkeypatch.setattr(recipes, "train", None)
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", None)
    assert recipes.all_trained(data, TWINS, **TINY) == first


def test_one_by_one_with_cuda(data, monkeypatch):
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs = recipes.all_trained(data, TWINS, **TINY, seed=1, device="cpu")
    assert all(recipes._finished(run) for run in runs.values())


def test_an_error_of_one_is_shown_whole(data):
    with pytest.raises(BitbyteError, match="dtype"):
        recipes.all_trained(data, TWINS, **TINY, seed=2, dtype="fp99")
