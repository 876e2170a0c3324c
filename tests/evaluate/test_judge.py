"""How models write and fill holes under a judge: what is measured, its record and its tables."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from support import Bytes, brief_run, sharp, words

from bitbyte import infill
from bitbyte.cli.dispatch import main
from bitbyte.config import DiffusionConfig, MambaConfig, SamplingConfig, TransformerConfig
from bitbyte.evaluate import judge, records
from bitbyte.files import BitbyteError
from bitbyte.scoring import Uniform
from bitbyte.vocab import MASK

SMALL = {"n_layer": 1, "d_model": 32, "seq_len": 256, "linear": "dense"}
SHAPE = {"d_ff": 48, "n_head": 2}
CONFIGS = {
    "ar": TransformerConfig(**SMALL, **SHAPE),
    "mamba": MambaConfig(**SMALL),
    "diffusion": DiffusionConfig(**SMALL, **SHAPE),
    "blocks": DiffusionConfig(**SMALL, **SHAPE, block=4),
}
DATA = Bytes(bytes(range(97, 123)) * 40)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_way_of_a_family_is_measured(family):
    model = sharp(CONFIGS[family])
    made = judge.judged(model, Uniform(), DATA, samples=2, holes=3, length=8)
    writes, fills = ({row["way"] for row in made[part]} for part in ("writing", "filling"))
    causal = {"search, 1", "search, 8", "search, 32"}
    blocks = {"by confidence, best of 8"} if family == "blocks" else set()
    assert fills == (causal if family != "diffusion" else set()) | (
        {"by confidence", "left to right"} | blocks if family in ("diffusion", "blocks") else set()
    )
    assert ("byte by byte" in writes) is (family != "diffusion")
    assert ("4 a pass" in writes) is (family in ("diffusion", "blocks"))
    assert ("8 a pass" in writes) is (family == "diffusion")  # a block has four
    # Everything costs a judge without knowledge the same.
    assert made["truth_bpb"] == pytest.approx(8)
    for row in made["writing"]:
        assert row["bpb"] == pytest.approx(8) and row["bytes_per_cpu_second"] > 0
    for row in made["filling"]:
        assert row["excess_bits"] == pytest.approx(0) and 0 <= row["right"] <= 1
    # The prompts stand in the data.
    assert {len(texts) for texts in made["texts"].values()} == {2} == {len(made["prompts"])}
    assert all(prompt.encode() in bytes(DATA.read(0, 1040)) for prompt in made["prompts"])


class Knows(torch.nn.Module):
    """Predicts the alphabet; a model that needs a seed for nothing."""

    exact = True

    def __init__(self):
        super().__init__()
        self.config, self.context = CONFIGS["ar"], 256

    def logits(self, ids_BT):
        return 50.0 * torch.nn.functional.one_hot((ids_BT - 96) % 26 + 97, 256)

    def init_state(self, batch):
        return None

    def step(self, ids_B, state):
        return self.logits(ids_B[:, None])[:, 0], state

    def forward(self, ids_BT, noise_B=None, fold_BT=None):
        before_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=122)
        logits_BTV = self.logits(before_BT).log_softmax(-1)
        return -logits_BTV.gather(-1, ids_BT[..., None])[..., 0]


def test_a_clock_that_does_not_move_gives_a_rate(monkeypatch):
    monkeypatch.setattr(judge.time, "process_time", lambda: 7.0)
    made = judge.judged(Knows(), Uniform(), DATA, samples=1, holes=0, length=8)
    (row,) = made["writing"]
    assert row["bytes_per_cpu_second"] == 8 / judge.TICK and math.isfinite(8 / judge.TICK)


def test_what_is_right_is_counted_as_right(monkeypatch):
    knows = Knows()
    made = judge.judged(knows, knows, DATA, samples=0, holes=24)
    assert [row["right"] for row in made["filling"]] == [1, 1, 1]
    assert all(row["excess_bits"] == pytest.approx(0) for row in made["filling"])
    assert made["writing"] == [] and made["texts"] is made["truth_bpb"] is None
    few = Bytes(bytes(range(97, 123)) * 8)
    assert judge.judged(knows, knows, few, samples=0, holes=1)["filling"]
    other = sharp(CONFIGS["ar"])
    made = judge.judged(other, knows, DATA, samples=0, holes=8)
    worst = made["filling"][0]
    # Each wrong byte, and the byte after it, costs 50 nats.
    assert worst["right"] == 0 and worst["excess_bits"] > 50 / math.log(2)


def test_few_bytes_are_refused():
    with pytest.raises(BitbyteError, match="230 bytes are too few"):
        judge.judged(Knows(), Uniform(), Bytes(bytes(230)))


def test_what_cannot_be_judged_is_refused():
    model = sharp(CONFIGS["ar"])
    for options in ({"samples": 0, "holes": 0}, {"samples": -1}, {"holes": -5}, {"length": 0}):
        with pytest.raises(BitbyteError, match="there must be something to judge"):
            judge.judged(model, Uniform(), DATA, **options)
    with pytest.raises(BitbyteError, match="must have exact costs"):  # its costs are drawn
        judge.judged(model, sharp(CONFIGS["diffusion"]), DATA, samples=1, holes=0)
    short = sharp(dataclasses.replace(CONFIGS["ar"], seq_len=64))
    for pair, name in (((short, model), "model"), ((model, short), "judge")):
        with pytest.raises(BitbyteError, match=f"the {name} sees 64 bytes; .* need 72"):
            judge.judged(*pair, DATA, samples=1, holes=0, length=8)


def test_the_best_of_several_fills_is_the_one_of_least_causal_cost(monkeypatch):
    model = sharp(CONFIGS["blocks"])
    ids = torch.from_numpy(DATA.read(0, 60).astype(np.int64))
    ids[[20, 21, 40]] = MASK
    config, shown = SamplingConfig(temperature=1.5, seed=3), []
    made = infill.infill(model, ids, config, candidates=5, on_reveal=lambda *r: shown.append(r))
    assert made.method == "confidence denoising in blocks of 4, best of 5"
    configs = [SamplingConfig(temperature=0.0)]
    configs += [SamplingConfig(temperature=1.5, seed=3 + i) for i in range(1, 5)]
    fills = [infill.infill(model, ids, one).ids_T for one in configs]
    costs = [model(fill[None]).sum().item() for fill in fills]
    assert model(made.ids_T[None]).sum().item() == pytest.approx(min(costs))
    assert max(costs) > min(costs) + 1
    assert {p: byte for p, byte, _ in shown} == {p: int(made.ids_T[p]) for p in (20, 21, 40)}
    # Asked byte by byte it searches like a causal model.
    search = infill.infill(model, ids, config, order="causal", candidates=3)
    assert search.method == "suffix-scored search, 3 candidates"
    with pytest.raises(BitbyteError, match="no order 'causal'"):
        infill.infill(sharp(CONFIGS["diffusion"]), ids, config, order="causal")


def test_the_command_writes_a_record_and_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    path = tmp_path / "text.bin"
    path.write_bytes(words(3000))
    run = brief_run("diffusion", str(path), tmp_path / "run", steps=2, block=4)
    small = ("--samples", "12", "--holes", "1", "--seed", "5", "--name", "a|b", "--by", str(run))
    small = (*small, "--length", "6")
    monkeypatch.setattr(judge, "PROMPT", 8)
    monkeypatch.setattr(judge, "BEFORE", 8)
    monkeypatch.setattr(judge, "AFTER", 4)
    assert main(["judge", str(run), "--data", str(path), *small]) == 0
    out = capsys.readouterr().out
    assert "bits per byte under the judge" in out and "worse than the truth" in out
    (made,) = records.read_records("judged")
    page = tmp_path / "page.md"
    page.write_text("x\n<!-- judged -->\n<!-- end of judged -->\ny\n")
    assert main(["results", "--readme", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "| a&#124;b | by confidence |" in text and "seeds 5 and on" in text
    assert "\n| 14 | `" in text and "\n| 15 |" not in text  # ten samples of twelve
    made["writing"][0]["bpb"] = None
    (file,) = (tmp_path / "artifacts" / "results").glob("judged-*.json")
    file.write_text(json.dumps(made))
    with pytest.raises(BitbyteError, match=r"writing.*bitbyte judge"):
        records.read_records("judged")
