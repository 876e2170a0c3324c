"""Every form that `export` writes is read again, and gives the same numbers."""

import dataclasses
import importlib.util
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import CONFIGS, save_run, sharp, some_ids

from bitbyte import checkpoint, models
from bitbyte.cli.dispatch import main
from bitbyte.files import BitbyteError
from bitbyte.interop import export, importer
from bitbyte.models import preceding
from bitbyte.vocab import MASK

KINDS = ("ar", "ar dense", "mamba1", "mamba2", "diffusion")
GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not GGUF, reason="needs gguf")


def small(kind: str, **changes):
    return sharp(dataclasses.replace(CONFIGS[kind], **changes), by=8.0)


def filled(model):
    """The same model with random tables, of which a fresh one has none."""
    random = torch.Generator().manual_seed(1)
    prior = model.prior
    prior.codes.random_(0, 256, generator=random)
    prior.scale.fill_(0.2)
    with torch.no_grad():
        for parameter in (prior.direct, prior.gate, prior.match):
            parameter.normal_(0, 0.3, generator=random)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids_BT = some_ids(2, 24)
    model.engine = "torch"
    if model.exact:
        return model.logits(preceding(ids_BT))
    return model.logits(ids_BT.masked_fill(torch.arange(24) % 3 == 0, MASK))


def unrounded(model):
    """The model without rounded activations, whatever its weights are."""
    config = dataclasses.replace(model.config, act_quant=False)
    other = models.build(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_folder_comes_back(kind, tmp_path):
    model = small(kind)
    export.write_hf(model, tmp_path / "hf")
    back, note = importer.read_model(tmp_path / "hf")
    assert back.config == dataclasses.replace(model.config, linear="dense") and note == ""
    assert torch.equal(logits(back), logits(unrounded(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", ["none", "counts"])
def test_a_folder_with_code_comes_back(kind, prior, tmp_path):
    shape = {"prior": prior, "prior_rows": 64, "prior_rank": 8, "prior_orders": 3}
    model = small(kind, **(shape if prior == "counts" else {}))
    model = filled(model) if prior == "counts" else model
    export.write_hf(model, tmp_path / "hf", code=True)
    back, _ = importer.read_model(tmp_path / "hf")
    assert back.config == model.config
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_packed_ternary_weights_come_back(kind, tmp_path):
    model = small(kind)
    export.write_hf(model, tmp_path / "hf", ternary=True)
    back, _ = importer.read_model(tmp_path / "hf")
    assert back.config == model.config
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=2e-5)
    stored = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight"].shape == (8, 32)


@needs_gguf
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_gguf_file_comes_back(kind, tmp_path):
    model = small(kind)
    export.write_gguf(model, tmp_path / "model.gguf")
    back, _ = importer.read_model(tmp_path / "model.gguf")
    assert back.config == dataclasses.replace(model.config, linear="dense")
    torch.testing.assert_close(logits(back), logits(unrounded(model)), rtol=0, atol=1e-5)


@needs_gguf
def test_a_gguf_file_with_ternary_weights_comes_back(tmp_path):
    model = small("ar", d_model=256, d_ff=256)
    export.write_gguf(model, tmp_path / "model.gguf", ternary=True)
    back, _ = importer.read_model(tmp_path / "model.gguf")
    assert back.config == model.config
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-4)
    with pytest.raises(BitbyteError, match="must be multiples of it, not 32 and 48"):
        export.write_gguf(small("ar"), tmp_path / "small.gguf", ternary=True)


def test_ternary_forms_are_for_ternary_transformers(tmp_path):
    for kind in ("ar dense", "mamba2"):
        with pytest.raises(BitbyteError, match="drop -ternary"):
            export.write_hf(small(kind), tmp_path / "hf", ternary=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a dense transformer, not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export.write_hf(small("ar dense"), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of `exported`."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def edit(folder, **changes):
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def retensor(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_a_folder_of_256_ids_gets_a_start_byte(folder):
    """Transformers' own form: bfloat16, tied, no start symbol."""
    edit(folder, vocab_size=256, bos_token_id=None, tie_word_embeddings=True)
    (folder / "tokenizer.json").unlink()

    def halve(tensors):
        del tensors["lm_head.weight"]
        for name, value in tensors.items():
            tensors[name] = value.bfloat16()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:256].clone()

    retensor(folder, halve)
    with pytest.raises(BitbyteError, match="no start symbol; name the byte"):
        importer.read_model(folder)
    back, note = importer.read_model(folder, start=10, seq_len=16)
    assert back.config.seq_len == 16 and note == "byte 10 stands before every window"
    assert torch.equal(back.embed[256], back.embed[10])
    for start, said in ((256, "must be a byte"), (-1, "must be a byte")):
        with pytest.raises(BitbyteError, match=said):
            importer.read_model(folder, start=start)


def swap(tensors):
    tensors["lm_head.weight"][:2] = tensors["lm_head.weight"][:2].flip(0)


def break_shape(tensors):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].clone()


def only(name, value):
    return lambda tensors: tensors.update({name: value})


QUERY = "model.layers.0.self_attn.q_proj.weight"
MISSHAPEN = "hf is damaged: a tensor or a number in it is missing or misshapen"
CASES = {
    "another kind": ({"model_type": "gpt2"}, None, "a model of type gpt2; llama, eurobert"),
    "no kind": ({"model_type": None}, None, "does not say what kind of model"),
    "tokens": ({"vocab_size": 32000}, None, "32,000 ids; a vocabulary of bytes"),
    "eps": ({"rms_norm_eps": 1e-6}, None, "its rms_norm_eps is 1e-06"),
    "gelu": ({"hidden_act": "gelu"}, None, "its hidden_act is gelu"),
    "shared": ({"num_key_value_heads": 1}, None, "share keys and values"),
    "wide": ({"head_dim": 64}, None, "heads have width 64"),
    "scaled": ({"rope_scaling": {"rope_type": "linear"}}, None, "positions are scaled"),
    "rope list": ({"rope_parameters": [1]}, None, r"positions are \[1\]; they must be fields"),
    "rope text": ({"rope_scaling": "yarn"}, None, "positions are yarn; they must be fields"),
    "theta": ({"rope_parameters": {"rope_theta": 10**400}}, None, MISSHAPEN),
    "bos": ({"bos_token_id": 1}, None, "its bos_token_id is 1; it must be 256"),
    "text": ({"hidden_size": "32"}, None, "its hidden_size is 32; it must be a number"),
    "endless": ({"max_position_embeddings": 1 << 40}, None, "name --seq_len"),
    "huge": ({"num_hidden_layers": 4000}, None, "its config needs"),
    "deep": ({"num_hidden_layers": 3}, None, "its config needs"),
    "shallow": ({"num_hidden_layers": 1}, None, r"it has model\.layers\.1"),
    "4 bits": ({"quantization_config": {"quant_method": "gptq"}}, None, "quantized in a way"),
    "untied": ({}, swap, "its head is not its embedding"),
    "shape": ({}, break_shape, "would be"),
    "query 0": ({}, only(QUERY, torch.tensor(1.0)), MISSHAPEN),
    "query 1": ({}, only(QUERY, torch.ones(32 * 32)), MISSHAPEN),
    "query columns": ({}, only(QUERY, torch.ones(32, 16)), MISSHAPEN),
    "query byte": ({}, only(QUERY, torch.tensor(1, dtype=torch.uint8)), MISSHAPEN),
    "query scale": ({}, only(f"{QUERY}_scale", torch.ones(32)), "_scale holds 32 numbers, not one"),
    "embedding 0": ({}, only("model.embed_tokens.weight", torch.tensor(1.0)), MISSHAPEN),
    "head 0": ({}, only("lm_head.weight", torch.tensor(1.0)), MISSHAPEN),
    "lost": ({}, lambda t: t.pop("model.norm.weight"), r"it has no model\.norm\.weight"),
    "more": ({}, lambda t: t.update(x=torch.ones(1)), "it has x, which models of bitbyte"),
    "nan": ({}, lambda t: t["model.norm.weight"].fill_(float("nan")), "NaN or infinity in norm"),
}


@pytest.mark.parametrize("name", CASES)
def test_folders_that_cannot_be_read_are_one_line(name, folder):
    changes, change, said = CASES[name]
    edit(folder, **changes)
    if change:
        retensor(folder, change)
    with pytest.raises(BitbyteError, match=said) as caught:
        importer.read_model(folder)
    assert "\n" not in str(caught.value)


def test_limits_of_time_steps(tmp_path):
    export.write_hf(small("mamba2"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    facts = json.loads(path.read_text())
    for limit in ([0.0, math.inf], [0, {"__float__": "Infinity"}]):
        path.write_text(json.dumps(facts | {"time_step_limit": limit}))
        importer.read_model(tmp_path / "hf")
    for limit in (
        [0.0, 0.01], [0.001, math.inf], [0.0, -math.inf], [0.0, {"__float__": "NaN"}], [0.0], 7,
        "a\nb",
    ):  # fmt: skip
        path.write_text(json.dumps(facts | {"time_step_limit": limit}))
        with pytest.raises(BitbyteError, match=r"time_step_limit is .*; models") as caught:
            importer.read_model(tmp_path / "hf")
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(facts | {"state_size": math.inf}))
    with pytest.raises(BitbyteError, match="must be a number above 0"):
        importer.read_model(tmp_path / "hf")


@pytest.mark.parametrize("change", [
    lambda trits: {"scale": torch.tensor(1.0)}, lambda trits: {"trits": trits.view(1, -1)},
])  # fmt: skip
def test_misshapen_folders_with_code_are_one_line(change, tmp_path):
    export.write_hf(small("ar"), tmp_path / "hf", code=True)
    name = "transformer.blocks.0.mlp.down"

    def edit_layer(tensors):
        parts = change(tensors[f"{name}.trits"])
        tensors.update({f"{name}.{part}": value for part, value in parts.items()})

    retensor(tmp_path / "hf", edit_layer)
    with pytest.raises(BitbyteError, match=MISSHAPEN):
        importer.read_model(tmp_path / "hf")


def test_no_memory_is_not_a_damaged_folder(exported, monkeypatch):
    def build(config):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(models, "build", build)
    with pytest.raises(RuntimeError, match="allocate memory"):
        importer.read_model(exported)


def test_folders_that_are_none_are_one_line(exported, tmp_path):
    folder = tmp_path / "hf"
    for name, content, said in (
        ("config.json", b"{", "config.json"), ("config.json", b"[]", "what kind of model"),
        ("model.safetensors", b"abc", "not a valid safetensors file"),
        ("tokenizer.json", b"{}", "not a tokenizer that bitbyte knows"),
    ):  # fmt: skip
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(BitbyteError, match=said):
            importer.read_model(folder)
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] |= {"a": 98, "b": 97}
    path.write_text(json.dumps(facts))
    with pytest.raises(BitbyteError, match="ids are not bytes"):
        importer.read_model(folder)
    (folder / "model.safetensors").unlink()
    path.unlink()
    with pytest.raises(BitbyteError, match="holds no weights"):
        importer.read_model(folder)
    with pytest.raises(BitbyteError, match="neither a folder of transformers"):
        importer.read_model(tmp_path / "none")


@needs_gguf
def test_gguf_files_that_cannot_be_read_are_one_line(tmp_path):
    from bitbyte.bench import peers
    from bitbyte.config import preset

    export.write_gguf(small("ar dense"), tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    named = whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.wei\xffht")  # is not UTF-8
    typed = whole.replace(b"block_count", b"blocks_hold")  # an important number is missing
    for damaged in (named, typed, *(whole[:n] for n in (6, 20, 600, len(whole) // 2))):
        (tmp_path / "model.gguf").write_bytes(damaged)
        with pytest.raises(BitbyteError, match=r"model\.gguf is (cut off or )?damaged") as error:
            importer.read_model(tmp_path / "model.gguf")
        for inner in ("Error(", "b'", "array", "np."):  # nothing of Python's
            assert inner not in str(error.value)
    peers._write_gguf(tmp_path / "ids.gguf", preset("micro", "ar"), "Q8_0")
    (tmp_path / "other.gguf").write_bytes(b"PK")
    for name, said in (
        ("ids.gguf", "ids are not bytes"),
        ("other.gguf", "is not a GGUF file"), ("no.gguf", "there is no file"),
    ):  # fmt: skip
        with pytest.raises(BitbyteError, match=said):
            importer.read_model(tmp_path / name)


@needs_gguf
def test_lengths_in_a_gguf_file_end_with_it(tmp_path):
    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    fields = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    fields += text("x") + struct.pack("<IIQ", 9, 0, 1 << 16)  # an array that is not there
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + fields)
    with pytest.raises(BitbyteError, match="is cut off or damaged"):
        importer.read_model(tmp_path / "bad.gguf")


@needs_gguf
@pytest.mark.parametrize(("fields", "said"), [
    ({}, ""), ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, ""),
    ({"rope.scaling.type": "yarn"}, "positions are scaled"),
    ({"rope.scaling.factor": 8.0}, "positions are scaled"),
    ({"rope.scale_linear": 4.0}, "positions are scaled"),
    ({"rope.dimension_count": 8}, "positions turn 8 of the 16 numbers of a head"),
])  # fmt: skip
def test_rotary_positions_of_gguf_files(fields, said, tmp_path, monkeypatch):
    model = small("ar dense")
    export.write_gguf(model, tmp_path / "model.gguf")
    real = importer._facts_of_gguf
    monkeypatch.setattr(importer, "_facts_of_gguf", lambda kind, have: real(kind, have | fields))
    if not said:
        assert importer.read_model(tmp_path / "model.gguf")[0].config == model.config
        return
    with pytest.raises(BitbyteError, match=said):
        importer.read_model(tmp_path / "model.gguf")


def test_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    runs = tmp_path / "artifacts" / "checkpoints"
    save_run(runs / "mine", models.build(CONFIGS["ar dense"]))
    folder = tmp_path / "llama-3.1"
    assert main(["export", "mine", str(folder), "--to", "hf"]) == 0
    assert main(["import", str(folder)]) == 0
    assert "ar dense, " in capfd.readouterr().out
    back, meta = checkpoint.load_model("llama-3.1")
    mine, _ = checkpoint.load_model("mine")
    assert all(torch.equal(back.state_dict()[n], t) for n, t in mine.state_dict().items())
    assert meta["extra"]["converted_from"] == "llama-3.1"
    assert main(["import", str(folder)]) == 2
    assert "holds checkpoints; --allow_overwrite" in capfd.readouterr().err
    assert main(["import", str(folder), "--allow_overwrite", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["family"] == "ar"
    assert main(["import", str(tmp_path)]) == 2
    assert "is neither a folder of transformers" in capfd.readouterr().err


def test_a_run_can_start_from_what_was_read(exported, tmp_path):
    back, _ = importer.read_model(exported)
    importer.write_run(back, tmp_path / "run", "hf")
    model = models.build(back.config, seed=5)
    checkpoint.take_weights(model, tmp_path / "run")
    assert np.array_equal(model.embed.detach().numpy(), back.embed.detach().numpy())
