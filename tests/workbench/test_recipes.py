"""Recipes: a run is made once, alone or side by side with others, and found again."""

import configparser
import math
import re

import pytest
import torch
from support import ROOT

from bitbyte.files import BitbyteError
from bitbyte.runs import read_metrics
from bitbyte.shards import manifest_of
from bitbyte.workbench import recipes

TINY = {"n_layer": 1, "d_model": 32, "seq_len": 32, "batch_size": 2, "steps": 4, "log_every": 1}
TWINS = {"ternary": {"linear": "ternary"}, "dense": {"linear": "dense"}}


@pytest.fixture(scope="module")
def data():
    return recipes.dataset("stories", n_bytes=20_000)


def test_a_built_in_corpus_has_the_size_asked_for():
    for n in (30_000, 50_000):
        manifest = manifest_of(recipes.dataset("stdlib", n_bytes=n))
        assert manifest.bytes_of("train") + manifest.bytes_of("val") == n


def sanitized(text: str) -> str:
    """What the comparison of stored outputs sees of it."""
    rules = configparser.RawConfigParser()
    rules.read(ROOT / "tests" / "nbval_sanitize.cfg")
    for name in rules.sections():
        text = re.sub(rules.get(name, "regex"), rules.get(name, "replace"), text)
    return text


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


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


def test_two_names_of_one_recipe_are_one_run(data, monkeypatch):
    """Also if there is another run, so that they are trained side by side."""
    same = {"a": {}, "b": {"steps": TINY["steps"]}, "c": {"seed": 4}}
    runs = recipes.all_trained(data, same, **TINY | {"seed": 3})
    assert runs["a"] == runs["b"] != runs["c"]
    assert all(recipes.finished(run) for run in runs.values())


def test_one_by_one_with_cuda(data, monkeypatch):
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs = recipes.all_trained(data, TWINS, **TINY, seed=1, device="cpu")
    assert all(recipes.finished(run) for run in runs.values())


def test_an_error_of_one_is_shown_whole(data):
    with pytest.raises(BitbyteError, match="dtype"):
        recipes.all_trained(data, TWINS, **TINY, seed=2, dtype="fp99")


def test_a_measured_number_is_shown_with_its_check():
    assert recipes.within(3.4531, 3.49, 0.08) == "3.453 (expected 3.49 +- 0.08: ok)"
    assert recipes.within(12345, 12000, 500) == "12,345 (expected 12000 +- 500: ok)"
    assert recipes.within(3.4531, None, 0.08) == "3.453"
    assert recipes.at_most(0.0, 0.01) == "0 (at most 0.01: ok)"
    for value in (3.58, 3.4, math.nan, math.inf):
        with pytest.raises(AssertionError, match=r"is not within 0\.08 of 3\.49"):
            recipes.within(value, 3.49, 0.08)
    for value in (0.0101, math.nan):
        with pytest.raises(AssertionError, match=r"is more than 0\.01"):
            recipes.at_most(value, 0.01)


def test_stored_outputs_are_compared_but_for_numbers_that_were_checked():
    within, at_most = recipes.within, recipes.at_most
    for one, two in [
        (within(3.45, 3.49, 0.08), within(3.5, 3.49, 0.08)),
        (within(-2e-7, 0, 1), within(0.5, 0, 1)),
        (f"size {within(1234, 1000, 300)} bytes", f"size {within(990, 1000, 300)} bytes"),
        (at_most(3e-5, 1), at_most(0.0, 1)),
    ]:
        assert one != two and sanitized(one) == sanitized(two) and "MEASURED" in sanitized(one)
    assert sanitized(within(3.45, 3.49, 0.08)) != sanitized(within(3.45, 3.4, 0.08))
    assert sanitized(at_most(1, 2)) != sanitized(at_most(1, 3))
    for text in (
        "3.5 s, 0:01:02, 12 kB/s, 2026-11-26 12:00:00, 0x7f12ab34, 3.123456789",
        "100%|###| 3/3 [00:01<00:00, 2.9it/s]", "3.5 (expected 3.49 +- 0.08)", "3.5 (ok)",
        "a 3.45 within 0.08", "step 3.4 then 4 steps (expected 5: bad)",
    ):  # fmt: skip
        assert sanitized(text) == text


CELL = """
import tempfile
from bitbyte.workbench import recipes
recipes.EVERY = 0.01
data = recipes.dataset("stories", n_bytes=60_000)
plan = {"preset": "nano", "prior": "none", "d_model": 64, "seq_len": 64, "batch_size": 1}
run = recipes.trained(data, steps=30, log_every=1, **plan)
print("trained")
"""


def test_a_notebook_shows_how_far_a_training_is_and_keeps_nothing_of_it(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    said = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            said.append(str(message["content"].get("text", "")))
            return super().process_message(message, cell, cell_index)

    Client(node, timeout=600, kernel_name="python3", coalesce_streams=True).execute()
    state = r"^ar-nano-ternary-\w+: (beginning|done|step \d+, \d\.\d{3} bits per byte)$"
    assert any(re.search(state, text, re.MULTILINE) for text in said)
    assert [output["text"] for output in node.cells[0].outputs] == ["trained\n"]
