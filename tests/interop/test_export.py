"""Models exported for transformers and llama.cpp give our numbers there."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from support import CONFIGS, save_run, sharp, some_ids

from bitbyte import models
from bitbyte.cli.dispatch import main
from bitbyte.config import preset
from bitbyte.files import BitbyteError
from bitbyte.interop import export
from bitbyte.models import preceding
from bitbyte.passport.issue import passport

HF = importlib.util.find_spec("transformers") is not None
LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
needs_hf = pytest.mark.skipif(not HF, reason="needs transformers")
needs_llama_cpp = pytest.mark.skipif(not LLAMA_CPP, reason="needs llama-cpp-python and gguf")
KINDS = ("ar dense", "ar ternary", "mamba1", "mamba2")
ANY = bytes(range(256)) + "Stra\u00dfe \u2603\n".encode() + b"\xff\xfe\xc3"


def plain(kind: str):
    """A small model whose activations are not rounded, as they are not in what is exported."""
    name = {"ar ternary": "ar"}.get(kind, kind)
    linear = "ternary" if kind == "ar ternary" else "dense"
    config = dataclasses.replace(CONFIGS[name], linear=linear, act_quant=False, seq_len=32)
    return sharp(config, by=8.0)


@pytest.fixture(params=KINDS)
def model(request):
    return plain(request.param)


def of_bytes(logprobs_BTV: np.ndarray) -> np.ndarray:
    """ln p among bytes: untrained models do not keep the start symbol away."""
    rows = logprobs_BTV[..., :256].astype(np.float64)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


@torch.no_grad()
def ours(model, ids_BT) -> np.ndarray:
    return model.logits(preceding(ids_BT)).double().log_softmax(-1).numpy()


@needs_hf
def test_transformers_computes_the_same(model, tmp_path):
    from bitbyte.interop.hf import HuggingFace

    export.write_hf(model, tmp_path / "hf")
    subject, ids_BT = HuggingFace(tmp_path / "hf"), some_ids(2, 32)
    got = of_bytes(subject.logprobs(ids_BT.numpy()))
    assert np.abs(got - ours(model, ids_BT)).max() < 2e-5
    assert subject.encode(ANY).tolist() == list(ANY) and subject.decode(np.array([*ANY])) == ANY
    assert subject.prefix == 256 and subject.overlaps is False
    assert subject.tokenizer("ab\u00e9")["input_ids"] == [97, 98, 0xC3, 0xA9]
    assert subject.tokenizer.decode([97, 98]) == "ab"
    if model.config.family == "ar":
        assert subject.longest == model.config.seq_len


@needs_llama_cpp
def test_llama_cpp_computes_the_same(model, tmp_path):
    from bitbyte.interop.gguf import Gguf

    export.write_gguf(model, tmp_path / "model.gguf")
    subject, ids_BT = Gguf(tmp_path / "model.gguf", threads=1), some_ids(2, 32)
    try:
        got = of_bytes(subject.logprobs(ids_BT.numpy()))
        assert np.abs(got - ours(model, ids_BT)).max() < 5e-5
        by_step = subject.steps(ids_BT[0].numpy())
        assert np.abs(by_step - subject.logprobs(ids_BT[:1].numpy())[0]).max() < 1e-3
        assert subject.encode(ANY).tolist() == list(ANY)
        assert subject.decode(np.array([*ANY])) == ANY
        assert subject.prefix == 256
        if model.config.family == "ar":
            assert subject.longest == model.config.seq_len
    finally:
        subject.close()


@needs_hf
def test_a_diffusion_model_is_a_masked_model_there(tmp_path):
    from bitbyte.interop.hf import HuggingFace
    from bitbyte.passport.subjects import OfModel

    config = dataclasses.replace(CONFIGS["diffusion"], linear="dense", seq_len=20)
    model = sharp(config, by=8.0)
    export.write_hf(model, tmp_path / "hf")
    subject, ids_BT = HuggingFace(tmp_path / "hf"), some_ids(2, 20)
    assert (subject.mask, subject.prefix, subject.longest) == (256, None, 20)
    got = of_bytes(subject.logprobs(ids_BT.numpy()))
    assert np.abs(got - OfModel(model, "x").logprobs(ids_BT.numpy())).max() < 2e-5
    if LLAMA_CPP:
        with pytest.raises(BitbyteError, match="use --to hf"):
            export.write_gguf(model, tmp_path / "model.gguf")


def trained(seed: int = 0):
    """A model whose hidden states have a direction in common, as training gives them."""
    model = models.build(preset("nano", "ar", linear="dense", seq_len=64, n_layer=1), seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    text = torch.tensor([*(b"a word and another word, " * 12)])
    for step in range(40):
        starts = torch.arange(8) * 7 + step
        ids_BT = torch.stack([text[s : s + 64] for s in starts.tolist()])
        optimizer.zero_grad()
        model(ids_BT).mean().backward()
        optimizer.step()
    return model.eval()


@needs_hf
def test_three_paths_one_number(tmp_path):
    """The bits of a file by our engine, by transformers and, where it is here, by llama.cpp."""
    from bitbyte.interop.gguf import Gguf
    from bitbyte.interop.hf import HuggingFace
    from bitbyte.passport.subjects import OfModel

    (tmp_path / "text").write_bytes(b"a word and another word; another one, too. " * 20)
    model = trained()
    export.write_hf(model, tmp_path / "hf")
    subjects = [OfModel(model, "ours"), HuggingFace(tmp_path / "hf")]
    if LLAMA_CPP:
        export.write_gguf(model, tmp_path / "model.gguf")
        subjects.append(Gguf(tmp_path / "model.gguf", threads=1))
    records = [passport(subject, tmp_path / "text", window=64) for subject in subjects]
    assert [r["verdict"] for r in records] == ["pass"] * len(records), records[-1]["audits"]
    assert max(r["bpb"] for r in records) - min(r["bpb"] for r in records) < 1e-3
    if LLAMA_CPP:
        subjects[-1].close()


def test_the_start_symbol_is_kept_away():
    model = trained()
    head_VD = export.head(model)
    assert torch.equal(head_VD[:256], model.embed.detach()[:256])
    text = torch.tensor([*(b"another word, " * 9)])[None, :64]
    assert export.special_probability(model, head_VD, text) < 1e-3


def test_what_other_engines_do_not_know_is_refused(tmp_path):
    with pytest.raises(BitbyteError, match="--prior none"):
        config = dataclasses.replace(CONFIGS["ar"], prior="counts")
        export.write_hf(models.build(config), tmp_path / "hf")
    model = models.build(CONFIGS["ar"])
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(BitbyteError, match=r"this model has extra, which"):
        export.tensors(model)
    assert not (tmp_path / "hf").exists() or not list((tmp_path / "hf").iterdir())


def test_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    save_run(tmp_path / "artifacts" / "checkpoints" / "mine", models.build(CONFIGS["ar dense"]))
    folder = tmp_path / "hf"
    assert main(["export", "mine", str(folder), "--to", "hf"]) == 0
    assert "the start symbol's probability" in capfd.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["vocab_size"] == 257
    assert main(["export", "mine", str(folder), "--to", "hf"]) == 2
    assert "holds files" in capfd.readouterr().err
    assert main(["export", "mine", str(folder), "--to", "hf", "--allow_overwrite", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bytes"] > 1000
    for words, said in (
        (["--to", "onnx"], "no format 'onnx'"), (["--to", "gguf"], "must end in .gguf"),
    ):  # fmt: skip
        assert main(["export", "mine", str(tmp_path / "x"), *words]) == 2
        assert said in capfd.readouterr().err


@needs_llama_cpp
def test_gguf_files_that_are_none(tmp_path):
    from bitbyte.bench import peers
    from bitbyte.interop.gguf import Gguf

    with pytest.raises(BitbyteError, match="there is no file"):
        Gguf(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"PK")
    with pytest.raises(BitbyteError, match=r"is not a GGUF file"):
        Gguf(tmp_path / "bad.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(BitbyteError, match=r"llama\.cpp cannot load"):
        Gguf(tmp_path / "cut.gguf")
    peers._write_gguf(tmp_path / "ids.gguf", preset("micro", "ar"), "Q8_0")
    with pytest.raises(BitbyteError, match="has no vocabulary"):
        Gguf(tmp_path / "ids.gguf")
