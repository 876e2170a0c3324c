"""Packed models: what comes back, damage, names, and that every command takes them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from support import CONFIGS, FOX, save_run, sharp

from bitbyte import checkpoint, models, packed, runs
from bitbyte.bitlinear import BitLinear
from bitbyte.cli.dispatch import main
from bitbyte.evaluate import listing
from bitbyte.files import BitbyteError
from bitbyte.kernels.fixed import exact_ternary

PRIOR = {"prior": "counts", "prior_orders": 2, "prior_rows": 64, "prior_rank": 8}
KINDS = CONFIGS | {"prior": dataclasses.replace(CONFIGS["ar"], **PRIOR)}
HEADER = 6000  # bytes at most of names, meta data, and lengths


def model_of(kind):
    model = sharp(KINDS[kind])
    if model.prior:
        model.prior.codes.random_(0, 256, generator=torch.Generator().manual_seed(0))
        model.prior.scale.fill_(0.25)
    return model


@pytest.fixture
def places(tmp_path, monkeypatch):
    """artifacts, with an empty folder of checkpoints."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "a"))
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    return tmp_path / "a"


def exported(kind, folder):
    model = model_of(kind)
    save_run(folder / "run", model)
    size = checkpoint.export_packed(folder / "run", folder / "m.bbm")
    return model, folder / "m.bbm", size


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back(kind, tmp_path):
    model, path, size = exported(kind, tmp_path)
    assert size == path.stat().st_size
    assert 0 < size - models.packed_bytes(model) < HEADER
    back, meta = checkpoint.load_model(path)
    assert back.config == model.config and meta["model_family"] == model.config.family
    layers = [n for n, m in model.named_modules() if isinstance(m, BitLinear)]
    for name in layers:
        (q, scales), (r, again) = (
            exact_ternary(m.get_submodule(name).matrices().detach()) for m in (model, back)
        )
        assert torch.equal(q, r)
        assert np.allclose([float(s) for s in scales], [float(s) for s in again], rtol=1e-6)
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in layers:
            rounded = tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor
            same = rounded if name in dict(model.named_parameters()) else tensor
            assert torch.equal(back.state_dict()[name], same), name


@pytest.mark.parametrize("kind", ["ar", "prior"])
def test_packing_again_changes_nothing(kind, tmp_path):
    """Neither the weights nor the hash that names the model in compressed files."""
    _, path, _ = exported(kind, tmp_path)
    back, _ = checkpoint.load_model(path)
    checkpoint.export_packed(path, tmp_path / "again.bbm")
    again, _ = checkpoint.load_model(tmp_path / "again.bbm")
    for a, b in zip(back.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


def test_weights_that_are_all_zero(tmp_path):
    model = model_of("ar")
    with torch.no_grad():
        model.body.blocks[0].mlp.down.weight.zero_()
    save_run(tmp_path / "run", model)
    checkpoint.export_packed(tmp_path / "run", tmp_path / "m.bbm")
    back, _ = checkpoint.load_model(tmp_path / "m.bbm")
    assert not back.body.blocks[0].mlp.down.weight.any()


def test_damage_is_an_error(tmp_path):
    """A changed byte anywhere, a missing end, bytes too many: one line, and no model."""
    _, path, size = exported("ar", tmp_path)
    good, bad = path.read_bytes(), tmp_path / "bad.bbm"
    random = np.random.default_rng(0)
    places = {*range(0, 200, 7), *random.integers(0, size, 150).tolist(), size - 1}
    for place in places:
        raw = bytearray(good)
        raw[place] ^= 1 << int(random.integers(8))
        bad.write_bytes(raw)
        with pytest.raises(BitbyteError):
            checkpoint.load_model(bad)
    for raw in (good[: size // 2], good[:-1], good + b"x", good[:8], b"", b"\0" * 64, FOX):
        bad.write_bytes(raw)
        with pytest.raises(BitbyteError):
            checkpoint.load_model(bad)


def rewritten(path, target, change):
    """A file with a valid seal whose meta data and tensors were changed by ``change``."""
    meta = checkpoint.read_meta(path)
    tensors = packed.read(path, meta["files"][checkpoint.MODEL]["sha256"])
    change(meta, tensors)
    plain = {k: v for k, v in meta.items() if k not in ("sha256", "files")}

    def seal(size, sha256):
        files = {checkpoint.MODEL: {"bytes": size, "sha256": sha256}}
        return checkpoint.seal(plain | {"files": files})

    target.write_bytes(packed.content(tensors, seal))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, t: t.pop("norm.weight"), "lacks 'norm.weight'"),
        (lambda meta, t: t.update(more=torch.zeros(3)), "unknown 'more'"),
        (lambda meta, t: t.update({"norm.weight": torch.ones(7)}), "norm.weight does not fit"),
        (
            lambda meta, t: t.update(
                {
                    "norm.weight": torch.zeros(7, dtype=torch.uint8),
                    "norm.weight" + packed.SCALE: torch.zeros(0),
                }
            ),
            "norm.weight does not fit",
        ),
        (lambda meta, t: t["norm.weight"].fill_(float("nan")), "NaN or infinity"),
        (lambda meta, t: meta["config"].update(n_layer=4000), "numbers in"),
        (lambda meta, t: meta["config"].update(d_model=2**15), "numbers in|memory"),
        (lambda meta, t: meta.update(format=2), "newer bitbyte"),
    ],
)
def test_lies_are_refused(change, message, tmp_path):
    _, path, _ = exported("ar", tmp_path)
    rewritten(path, tmp_path / "lie.bbm", change)
    with pytest.raises(BitbyteError, match=message):
        checkpoint.load_model(tmp_path / "lie.bbm")


DOWN = "transformer.blocks.0.mlp.down.weight"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (DOWN + packed.SCALE, lambda scale: scale.repeat(7)),
        (DOWN + packed.SCALE, lambda scale: -scale),
        (DOWN + packed.SCALE, lambda scale: scale.long()),
        (DOWN + packed.SCALE, lambda scale: scale[0]),
        (DOWN, lambda trits: trits[None]),
        (DOWN, lambda trits: trits.to(torch.bfloat16)),
        (DOWN, lambda trits: torch.zeros(trits.shape, dtype=torch.bool)),
    ],
)
def test_ternary_tensors_of_another_kind(name, change, tmp_path, places, capsys):
    """A file that cannot be loaded stays a line of the list."""
    _, path, _ = exported("ar", tmp_path)
    lie = places / "models" / "lie.bbm"
    lie.parent.mkdir()
    rewritten(path, lie, lambda meta, t: t.update({name: change(t[name]).clone()}))
    with pytest.raises(BitbyteError, match=f"{DOWN} does not fit the config"):
        checkpoint.load_model(lie)
    assert main(["models"]) == 0 and "does not fit the config" in capsys.readouterr().out


def test_trits_of_another_length(tmp_path):
    _, path, _ = exported("ar", tmp_path)
    name = DOWN
    rewritten(path, tmp_path / "lie.bbm", lambda meta, t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(BitbyteError, match=r"ternary values need|does not fit"):
        checkpoint.load_model(tmp_path / "lie.bbm")
    rewritten(path, tmp_path / "lie.bbm", lambda meta, t: t[name].fill_(250))
    with pytest.raises(BitbyteError, match="does not hold 5 ternary values"):
        checkpoint.load_model(tmp_path / "lie.bbm")


def test_names(places, tmp_path):
    """A run hides a packed model of its name; the user's models hide those of the package."""
    exported("ar", tmp_path)
    with pytest.raises(BitbyteError, match="no checkpoint 'mine'"):
        runs.resolve("mine")
    (places / "models").mkdir()
    shutil.copy(tmp_path / "m.bbm", places / "models" / "mine.bbm")
    found = runs.resolve("mine")
    assert found == places / "models" / "mine.bbm"
    assert (runs.model_name(found), runs.short_name(found)) == ("mine", "mine")
    assert runs.resolve(tmp_path / "m.bbm") == tmp_path / "m.bbm"
    assert runs.short_name(tmp_path / "m.bbm") == str(tmp_path / "m.bbm")
    shutil.copytree(tmp_path / "run", places / "checkpoints" / "mine")
    assert runs.resolve("mine").parent == places / "checkpoints" / "mine"
    ours = runs.resolve("wiki-small")
    shutil.copy(tmp_path / "m.bbm", places / "models" / "wiki-small.bbm")
    assert runs.resolve("wiki-small") != ours


def test_the_list_finds_every_flipped_bit(places, tmp_path, capsys):
    """In meta data, names, and weights: the list says so of whatever could not be loaded."""
    exported("ar", tmp_path)
    whole = (tmp_path / "m.bbm").read_bytes()
    (places / "models").mkdir()
    path = places / "models" / "mine.bbm"
    head = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    flips = [*rng.integers(head * 8, size=60), *rng.integers(head * 8, len(whole) * 8, size=20)]
    found = 0
    for flip in flips:
        edited = bytearray(whole)
        edited[flip // 8] ^= 1 << flip % 8
        path.write_bytes(edited)
        facts = listing.describe(path)
        try:
            checkpoint.load_model(path)
        except BitbyteError:
            assert facts.problem and facts.parameters is None, flip
            found += 1
        else:
            assert not facts.problem, flip  # a blank in the header, say
    assert found >= len(flips) - 5
    edited = bytearray(whole)
    edited[-5] ^= 4
    path.write_bytes(edited)
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert "is damaged" in rows["mine"]["problem"] and rows["wiki-small"]["problem"] is None
    assert main(["models"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
    assert "is damaged: get it again" in line


def test_the_commands_take_it(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exported("ar", tmp_path)
    (places / "models").mkdir()
    assert main(["export", "run", "a/models/fox.bbm"]) == 0
    assert main(["export", "run", "a/models/fox.bbm"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", "run", "fox.pt"]) == 2
    assert "must end in .bbm" in capsys.readouterr().err
    assert main(["export", "run", "new/folder/fox.bbm"]) == 0
    shutil.copy("new/folder/fox.bbm", "fox.other")
    assert main(["sample", "fox.other"]) == 2
    assert "a packed model (*.bbm)" in capsys.readouterr().err
    assert main(["sample", "wikismall"]) == 2
    assert "did you mean wiki-small?" in capsys.readouterr().err
    assert main(["info", "new/folder/fox.bbm"]) == 0
    assert '"model_family": "ar"' in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"fox", *(path.stem for folder in runs.zoo() for path in folder.glob("*.bbm"))} == {
        row["name"] for row in rows
    }
    (tmp_path / "fox.txt").write_bytes(FOX)
    for words in (
        ["info", "fox", "--verify"], ["sample", "fox", "--max-new-tokens", "5"],
        ["eval", "fox", "--data", "fox.txt", "--split", "train"],
        ["entropy", "fox", "fox.txt"], ["compress", "fox", "fox.txt", "c"],
        ["decompress", "c", "back"],
        ["certify", "fox", "fox.txt", "--out", "."],
    ):  # fmt: skip
        assert main(words) == 0, words
    assert (tmp_path / "back").read_bytes() == FOX
    records = [json.loads(path.read_bytes()) for path in (places / "results").glob("*.json")]
    assert [record["model"] for record in records] == ["fox"]
    capsys.readouterr()
    assert main(["results", "a/models/fox.bbm", "--json"]) == 0
    assert [row["model"] for row in json.loads(capsys.readouterr().out)] == ["fox"]
    assert main(["results", "owl"]) == 2
    assert "no results of owl" in capsys.readouterr().err


def test_a_packed_model_names_no_folder_of_its_maker(places, tmp_path):
    exported("ar", tmp_path)
    text = (tmp_path / "m.bbm").read_bytes().decode("latin-1")
    assert str(tmp_path) not in text and str(places) not in text
    kept = checkpoint.without_folders(
        {"data": {"path": "/home/me/x"}, "out": "C:\\me\\y", "a": "b/c",
         "init": "/me/z/step_0000007", "run": "/latest"}
    )  # fmt: skip
    assert kept == {
        "data": {"path": "x"}, "out": "y", "a": "b/c", "init": "z/step_0000007", "run": "latest",
    }  # fmt: skip


def test_a_packed_model_is_not_trained_on(places, tmp_path, capsys):
    exported("ar", tmp_path)
    (tmp_path / "fox.bin").write_bytes(FOX)
    words = ["--data", str(tmp_path / "fox.bin"), "--out", str(tmp_path / "m.bbm"), "--resume"]
    assert main(["train", "ar", *words]) == 2
    assert "m.bbm" in capsys.readouterr().err


def test_the_models_of_the_package():
    """They are whole, and small."""
    paths = sorted(runs.zoo()[-1].glob("*.bbm"))
    assert "wiki-small" in [path.stem for path in paths]
    assert sum(path.stat().st_size for path in paths) < 4_000_000
    for path in paths:
        model, meta = checkpoint.load_model(path)
        assert meta["extra"]["packed_from"]
        assert models.packed_bytes(model) <= path.stat().st_size
        assert safetensors.torch.load(path.read_bytes()).keys() >= {"embed", "norm.weight"}
