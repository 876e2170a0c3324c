"""Models exported for transformers and llama.cpp give our numbers there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import CONFIGS, save_run, sharp, some_ids

from bitbyte import checkpoint, models
from bitbyte.cli.dispatch import main
from bitbyte.config import preset
from bitbyte.files import BitbyteError
from bitbyte.interop import export, importer
from bitbyte.models import preceding, use_kernels
from bitbyte.passport.issue import passport

HF = importlib.util.find_spec("transformers") is not None
LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
needs_hf = pytest.mark.skipif(not HF, reason="needs transformers")
ACCELERATE = HF and importlib.util.find_spec("accelerate") is not None
needs_accelerate = pytest.mark.skipif(not ACCELERATE, reason="needs transformers and accelerate")
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


@needs_hf
@pytest.mark.parametrize("kind", ["ar dense", "diffusion"])
@pytest.mark.parametrize("code", [False, True])
def test_no_text_names_the_special_id_by_chance(kind, code, tmp_path):
    """Names that texts hold, such as <|start|>, are bytes; the tokenizer's own is id 256."""
    import tokenizers
    import transformers

    config = dataclasses.replace(CONFIGS[kind], linear="dense")
    model, folder = sharp(config, by=8.0), tmp_path / "hf"
    export.write_hf(model, folder, code=code)
    whole = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "write <|start|> here <|mask|> <s> <start> <mask> [MASK] <|endoftext|> \ufffd\U0010ffff"
    for ids in (whole(text)["input_ids"], alone.encode(text, add_special_tokens=False).ids):
        assert bytes(ids) == text.encode()
        assert whole.decode(ids) == alone.decode(ids) == text
    name = export.START_NAME if model.exact else export.MASK_NAME
    token = whole.bos_token if model.exact else whole.mask_token
    assert token == name and not name.isprintable() and len(whole) == 257
    assert whole(name + "a")["input_ids"] == [256, 97]
    assert ascii(name)[1:-1] in export.described(model, "hf-code" if code else "hf")
    whole.save_pretrained(tmp_path / "again")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert again(name + "a")["input_ids"] == [256, 97]


@pytest.mark.parametrize("kind", ["ar dense", "diffusion"])
def test_folders_with_the_old_name_of_the_special_id_can_be_imported(kind, tmp_path):
    config = dataclasses.replace(CONFIGS[kind], linear="dense")
    model = sharp(config, by=8.0)
    export.write_hf(model, tmp_path)
    for file in (tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"):
        new, old = ("\\ufdd0start", "|start|") if model.exact else ("\\ufdd0mask", "|mask|")
        assert new in file.read_text()
        file.write_text(file.read_text().replace(new, old))
    again, _ = importer.read_model(tmp_path)
    assert torch.equal(again.embed[:256], model.embed[:256])


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
    with pytest.raises(BitbyteError, match="use --to hf-code"):
        config = dataclasses.replace(CONFIGS["ar"], prior="counts")
        export.write_hf(models.build(config), tmp_path / "hf")
    for code in (False, True):
        with pytest.raises(BitbyteError, match="other engines"):
            export.write_hf(models.build(CONFIGS["blocks"]), tmp_path / "hf", code=code)
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
        (["--to", "hf-ternary"], "drop -ternary"),
        (["--to", "onnx"], "no format 'onnx'"), (["--to", "gguf"], "must end in .gguf"),
    ):  # fmt: skip
        assert main(["export", "mine", str(tmp_path / "x"), *words]) == 2
        assert said in capfd.readouterr().err


# --- ternary weights that stay ternary


@needs_accelerate
@pytest.mark.parametrize("kind", ["ar", "diffusion"])
@torch.no_grad()
def test_transformers_computes_packed_ternary_layers(kind, tmp_path):
    from bitbyte.interop.hf import HuggingFace

    model = sharp(dataclasses.replace(CONFIGS[kind], n_layer=1, seq_len=32), by=8.0)
    export.write_hf(model, tmp_path / "hf", ternary=True)
    subject, ids_BT = HuggingFace(tmp_path / "hf"), some_ids(2, 32)
    inputs_BT = preceding(ids_BT) if model.exact else ids_BT.masked_fill(ids_BT % 3 == 0, 256)
    use_kernels(model, linear="reference")
    got = subject.model(input_ids=inputs_BT).logits[..., :256]
    torch.testing.assert_close(got, model.logits(inputs_BT), rtol=0, atol=1e-5)
    plain = export.write_hf(model, tmp_path / "plain")
    assert export.write_hf(model, tmp_path / "hf", ternary=True) < plain


@needs_llama_cpp
@torch.no_grad()
def test_llama_cpp_computes_packed_ternary_layers(tmp_path):
    """It rounds activations in other steps, so distributions are close, and not equal."""
    from bitbyte.interop.gguf import Gguf

    shape = {"d_model": 256, "d_ff": 256, "n_layer": 1, "seq_len": 32}
    model = sharp(dataclasses.replace(CONFIGS["ar"], **shape), by=8.0)
    size = export.write_gguf(model, tmp_path / "model.gguf", ternary=True)
    assert size < export.write_gguf(model, tmp_path / "plain.gguf") / 2
    subject, ids_BT = Gguf(tmp_path / "model.gguf", threads=1), some_ids(2, 32)
    try:
        got = of_bytes(subject.logprobs(ids_BT.numpy()))
    finally:
        subject.close()
    want = ours(model, ids_BT)
    kl_BT = (np.exp(want) * (want - got)).sum(-1)
    assert 0 <= kl_BT.mean() < 1e-3
    uniform = np.full_like(want, -np.log(256))
    assert (np.exp(want) * (want - uniform)).sum(-1).mean() > 0.05  # it could have been far off


# --- folders that bring their code

ELSEWHERE = """
import pathlib, sys
sys.modules["bitbyte"] = None  # importing it raises ImportError
import torch, transformers
transformers.logging.set_verbosity_error()
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    ids, want = torch.load(folder.with_suffix(".pt")) if folder.is_dir() else (None, None)
    if ids is None:
        continue
    kind = "AutoModelForMaskedLM" if "diffusion" in folder.name else "AutoModelForCausalLM"
    model, report = getattr(transformers, kind).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    off = float((logits[..., :256] - want).abs().max())
    assert off < 1e-5, (folder.name, off)
    assert float(logits.softmax(-1)[..., 256].max()) == 0
    if kind == "AutoModelForCausalLM":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        inputs = tokenizer(["ab\u00e9"], return_tensors="pt")
        assert inputs["input_ids"].tolist() == [[97, 98, 0xC3, 0xA9]]
        text = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0].tolist()
        assert text[:4] == [97, 98, 0xC3, 0xA9] and len(text) == 34 and max(text) < 256
    print(folder.name)
"""


def with_tables(config):
    """A model whose tables are random; a fresh one has none."""
    changes = {"prior": "counts", "prior_rows": 64, "prior_rank": 8, "prior_orders": 3}
    model = sharp(dataclasses.replace(config, **changes), by=8.0)
    random = torch.Generator().manual_seed(1)
    model.prior.codes.random_(0, 256, generator=random)
    model.prior.scale.fill_(0.2)
    with torch.no_grad():
        for parameter in (model.prior.direct, model.prior.gate, model.prior.match):
            parameter.normal_(0, 0.3, generator=random)
    return model


@needs_hf
@torch.no_grad()
def test_folders_with_code_need_no_bitbyte(tmp_path):
    """All families, with and without tables, and a packed model, by their own code alone."""
    chosen = {"ar dense": sharp(CONFIGS["ar dense"], by=8.0)} | {
        f"{kind} tables": with_tables(CONFIGS[kind])
        for kind in ("ar", "mamba1", "mamba2", "diffusion")
    }
    chosen["ar tables of 8 bits"] = with_tables(
        dataclasses.replace(CONFIGS["ar"], prior_bits=8, seq_len=32)
    )
    chosen["wiki-small"] = checkpoint.load_model("wiki-small")[0]
    for name, model in chosen.items():
        # The same order of sums as there, so that no value is rounded to another integer.
        transformer = model.config.family != "mamba"
        use_kernels(model, attention="sdpa" if transformer else "auto",
                    scan="auto" if transformer else "reference")  # fmt: skip
        model.engine = "torch"
        ids_BT = some_ids(2, 24)
        ids_BT[1, 12:] = ids_BT[1, :12]  # so that there are matches
        inputs_BT = preceding(ids_BT) if model.exact else ids_BT.masked_fill(ids_BT % 3 == 0, 256)
        folder = tmp_path / "models" / name
        export.write_hf(model, folder, code=True)
        torch.save((inputs_BT, model.logits(inputs_BT)), folder.with_suffix(".pt"))
    there = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    there["PYTHONPATH"] = os.pathsep.join(p for p in paths if not os.path.isdir(f"{p}/bitbyte"))
    process = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "models")], cwd=tmp_path, text=True,
        capture_output=True, env=os.environ | there, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert sorted(process.stdout.split("\n")[:-1]) == sorted(chosen)


@needs_hf
def test_a_folder_with_code_gives_the_same_number(tmp_path, monkeypatch):
    from bitbyte.interop.hf import HuggingFace
    from bitbyte.passport.subjects import OfModel

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "c")])
    (tmp_path / "text").write_bytes(b"a word and another word; another one, too. " * 20)
    model = with_tables(CONFIGS["ar"])
    export.write_hf(model, tmp_path / "hf", code=True)
    with pytest.raises(BitbyteError, match="only with --trust_remote_code"):
        HuggingFace(tmp_path / "hf")
    there = passport(HuggingFace(tmp_path / "hf", trust=True), tmp_path / "text", window=24)
    here = passport(OfModel(model, "ours"), tmp_path / "text", window=24)
    assert there["verdict"] == here["verdict"] == "pass", there["audits"]
    assert there["bpb"] == pytest.approx(here["bpb"], abs=1e-4)


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
