"""Old checkpoints: hostile files, layouts, what is known and what is not, tags, conversion."""

import argparse
import collections
import contextlib
import hashlib
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbyte import checkpoint, models, runs
from bitbyte.config import TransformerConfig, family_config
from bitbyte.files import BitbyteError
from bitbyte.legacy import reader
from bitbyte.legacy.convert import convert

CONFIG = TransformerConfig(n_layer=2, d_model=16, d_ff=24, n_head=2, seq_len=32)
AR = {"n_head": 2, "seq_len": 32, "linear": "ternary", "causal": True}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a model in which every tensor is random, even the norms."""
    model = models.build(CONFIG, seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return dict(model.state_dict())


def llama_names(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The same weights as an earlier script might have named them, in separate matrices."""
    old = {"tok_emb.weight": state["embed"], "norm_f.weight": state["norm.weight"]}
    qkv = [f"self_attn.{letter}_proj.weight" for letter in "qkv"]
    for i in range(CONFIG.n_layer):
        new, block = f"transformer.blocks.{i}", f"layers.{i}"
        old[f"{block}.ln1.weight"] = state[f"{new}.attn_norm.weight"]
        old[f"{block}.ln2.weight"] = state[f"{new}.mlp_norm.weight"]
        parts = state[f"{new}.attn.qkv.weight"].chunk(3)
        old |= {f"{block}.{name}": part for name, part in zip(qkv, parts, strict=True)}
        gate, up = state[f"{new}.mlp.gate_up.weight"].chunk(2)
        old[f"{block}.self_attn.o_proj.weight"] = state[f"{new}.attn.out.weight"]
        old |= {f"{block}.mlp.w1.weight": gate, f"{block}.mlp.w3.weight": up}
        old[f"{block}.mlp.w2.weight"] = state[f"{new}.mlp.down.weight"]
    old["lm_head.weight"] = old["tok_emb.weight"]
    return {prefix + name: tensor for name, tensor in old.items()}


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def image(folder: Path) -> dict:
    """Everything about the files below a folder that writing would change."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- hostile files


class Evil:
    """Its pickle runs a shell command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def zipped(path: Path, pickled: bytes, entries=(), method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in (("data.pkl", pickled), ("version", b"3"), *entries):
            archive.writestr(f"archive/{name}", data)
    return path


def text(word: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(word)) + word.encode()


def tuple_of(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def number(n: int) -> bytes:
    return pickle.LONG1 + b"\x0a" + n.to_bytes(10, "little", signed=True)


def one_tensor(held: int, shape: tuple, stride: tuple, offset: int = 0, key: str = "0") -> bytes:
    """The pickle of {"w": tensor}, making any claims about a storage of ``held`` floats."""
    kind = b"ctorch\nFloatStorage\n"
    storage = tuple_of(text("storage"), kind, text(key), text("cpu"), number(held))
    hooks = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    shapes = tuple_of(*map(number, shape)), tuple_of(*map(number, stride))
    values = tuple_of(storage + pickle.BINPERSID, number(offset), *shapes, pickle.NEWFALSE, hooks)
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + values + pickle.REDUCE
    return b"\x80\x02" + pickle.EMPTY_DICT + text("w") + rebuilt + pickle.SETITEM + pickle.STOP


FOUR = (("data/0", struct.pack("<4f", 1, 2, 3, 4)),)


def test_the_forged_pickle_is_read_when_it_is_honest(tmp_path):
    path = zipped(tmp_path / "x.pt", one_tensor(4, (2, 2), (2, 1)), FOUR)
    assert torch.equal(reader.read(path).state["w"], torch.tensor([[1.0, 2], [3, 4]]))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("inside", ["plain", "zip", "object in a checkpoint"])
def test_a_pickle_that_runs_something(tmp_path, protocol, inside):
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    if inside == "plain":
        path.write_bytes(pickle.dumps(Evil(marker), protocol))
    elif inside == "zip":
        zipped(path, pickle.dumps({"model": Evil(marker)}, protocol))
    elif protocol < 2:
        pytest.skip("torch writes from protocol 2 on")
    else:
        saved(path, {"model": {"w": torch.ones(2)}, "opt": Evil(marker)}, pickle_protocol=protocol)
    with pytest.raises(BitbyteError, match=r"asks for (posix|os|nt)\.system") as caught:
        reader.read(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    if inside == "plain":
        pickle.loads(path.read_bytes())
        assert marker.exists()  # the file does do harm where it is loaded


def jit(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"abcd"))


def set_item_on_a_list(path: Path) -> None:
    pickled = b"\x80\x02" + pickle.EMPTY_LIST + pickle.BININT1 + b"\0" + text("x")
    zipped(path, pickled + pickle.SETITEM + pickle.STOP)


def truncated(path: Path) -> None:
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])


def traversal(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../42/evil.pt", "x")


def bomb(path: Path) -> None:
    zipped(path, one_tensor(4, (4,), (1,)), [("data/0", bytes(10**6))], zipfile.ZIP_DEFLATED)


def before_zip(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def deep_key(path: Path) -> None:
    nested = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 500_000  # hashing it overflows the C stack
    zipped(path, b"\x80\x02" + pickle.EMPTY_DICT + nested + pickle.NONE + pickle.SETITEM + b".")


def archive(path: Path, *entries: tuple[str, bytes]) -> None:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as made:
        for name, data in entries:  # zipfile warns of equal names
            made.writestr(name, data)


BENIGN = ("a/data.pkl", pickle.dumps({"model": {}}, 2))


def second_pickle(path: Path) -> None:
    nested = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 500_000
    pickled = b"\x80\x02" + pickle.EMPTY_DICT + nested + pickle.NONE + pickle.SETITEM + b"."
    archive(path, BENIGN, ("a/DATA.PKL", pickled))


HOSTILE = {
    "TorchScript": jit,
    "tar archive": tar,
    "Can only SETITEM": set_item_on_a_list,
    "damaged": truncated,
    "no data.pkl": traversal,
    "compressed": bomb,
    "tuples": deep_key,
    "two entries of one name": second_pickle,
    "one name, or two top folders": lambda path: archive(path, BENIGN, BENIGN),
    "or two top folders": lambda path: archive(path, ("b/data.pkl", b"."), BENIGN),
    "not a checkpoint written by torch": lambda path: path.write_text("hello\n" * 9),
    "is empty": lambda path: path.write_bytes(b""),
    "before 1.6": before_zip,
    "argparse.Namespace": lambda path: saved(
        path, {"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)}
    ),
    "Linear": lambda path: saved(path, torch.nn.Linear(2, 2)),
    "holds a list": lambda path: saved(path, [torch.ones(2)]),
    "holds a Tensor": lambda path: saved(path, torch.ones(2)),
    "no state dict; at its top level: 'step', 'best'": lambda path: saved(
        path, {"step": 3, "best": 1.0}
    ),
    "several state dicts": lambda path: saved(path, {"model": {}, "state_dict": {}}),
    "'w', a int": lambda path: saved(path, {"model": {"w": 3}}),
    "'model' is empty": lambda path: saved(path, {"model": {}}),
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, message):
    path = tmp_path / "x.pt"
    HOSTILE[message](path)
    before = image(tmp_path)
    with pytest.raises(BitbyteError, match=message) as caught:
        reader.read(path)
    assert "\n" not in str(caught.value) and "x.pt" in str(caught.value)
    assert image(tmp_path) == before


def test_the_pickle_that_is_looked_through_is_the_one_that_torch_reads(tmp_path):
    """Of two joined archives, zipfile reads the last and torch, by its offset, the first."""
    evil = pickle.dumps({"model": Evil(tmp_path / "marker")}, 2)
    good = one_tensor(4, (4,), (1,))
    size = max(len(evil), len(good))  # what is after the end of a pickle is not read
    first = zipped(tmp_path / "first.pt", evil.ljust(size), FOUR).read_bytes()
    last = zipped(tmp_path / "last.pt", good.ljust(size), FOUR).read_bytes()
    (tmp_path / "x.pt").write_bytes(first + last)
    with zipfile.ZipFile(tmp_path / "x.pt") as both:
        assert both.read("archive/data.pkl") == good.ljust(size)
    assert reader.read(tmp_path / "last.pt").state["w"].tolist() == [1, 2, 3, 4]
    with pytest.raises(BitbyteError, match=r"asks for (posix|os|nt)\.system, more than tensors"):
        reader.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("held", "shape", "stride", "offset", "key"),
    [
        (4000, (4000,), (1,), 0, "0"),  # the storage is larger than the file
        (10**13, (10**13,), (1,), 0, "0"),
        (-4, (4,), (1,), 0, "0"),
        (4, (400,), (1,), 0, "0"),  # the tensor is larger than the storage
        (4, (10**12,), (0,), 0, "0"),  # the same number a million million times
        (4, (2**62, 8), (8, 1), 0, "0"),
        (4, (4,), (-1,), 0, "0"),
        (4, (4,), (1,), 100, "0"),
        (4, (4,), (1,), -3, "0"),
        (4, (4,), (1,), 0, "9"),  # no such record
        (4, (4,), (1,), 0, "../../x"),
    ],
)
def test_tensors_that_are_not_in_the_file(tmp_path, held, shape, stride, offset, key):
    path = zipped(tmp_path / "x.pt", one_tensor(held, shape, stride, offset, key), FOUR)
    with pytest.raises(BitbyteError, match=r"damaged|claim"):
        reader.read(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Truncated anywhere or with one byte changed: refused, or the weights are the same."""
    folder, w = tmp_path_factory.getbasetemp(), torch.arange(9.0)
    whole = saved(folder / "whole.pt", {"model": {"w": w}, "step": 3}).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        broken = whole[:at]
    else:
        broken = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    (folder / "broken.pt").write_bytes(broken)
    with contextlib.suppress(BitbyteError):
        assert torch.equal(reader.read(folder / "broken.pt", verify=True).state["w"], w)


def test_a_flipped_weight_is_found_by_verify(tmp_path):
    path = saved(tmp_path / "x.pt", {"w": torch.full((4,), 1.25)})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<f", 1.25), struct.pack("<f", 1.5), 1))
    assert reader.read(path).state["w"].tolist() == [1.5, 1.25, 1.25, 1.25]
    with pytest.raises(BitbyteError, match="checksum"):
        reader.read(path, verify=True)
    with pytest.raises(BitbyteError, match="checksum"):
        reader.tag(path, "ar", "bitbyte")


def test_an_old_torch_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(2)})
    for version in ("2.9.1+cu124", "1.13.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(BitbyteError, match=r"2\.10"):
            reader.read(path)
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git")
    reader.read(path)


def test_size_limit_folders_and_missing_files(tmp_path):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(2)})
    size = path.stat().st_size
    reader.read(path, limit=size)
    for wrong, options, message in (
        (path, {"limit": size - 1}, "more than the limit"),
        (tmp_path, {}, "not a plain file"),
        (tmp_path / "none.pt", {}, "no file"),
        (path / "below", {}, "no file"),
    ):
        with pytest.raises(BitbyteError, match=message):
            reader.read(wrong, **options)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        with pytest.raises(BitbyteError, match="not a plain file"):
            reader.read(tmp_path / "pipe.pt")


def test_file_names_of_any_bytes(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\n\x1b[31m.pt"))
    with open(path, "wb") as file:
        torch.save({"w": torch.ones(2)}, file)
    assert reader.read(path).state["w"].tolist() == [1, 1]
    shown = reader.table(reader.scan(tmp_path))
    assert "a\\xff\\n\\x1b[31m.pt" in shown and len(shown.splitlines()) == 2


# --- layouts


@pytest.mark.parametrize("key", ["bare", "model", "model_state", "model_state_dict", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_layouts(tmp_path, key, prefix):
    state = {f"{prefix}embed": torch.ones(3, 2), f"{prefix}norm.weight": torch.zeros(2)}
    rest = {"config": {"seq_len": 8}, "optimizer": {"lr": [1.0]}, "step": 7, "variant": "ar"}
    content = state if key == "bare" else {key: state, **rest}
    read = reader.read(saved(tmp_path / "x.pt", content))
    assert read.layout == key and list(read.state) == ["embed", "norm.weight"]
    assert torch.equal(read.state["embed"], torch.ones(3, 2))
    assert (read.config, read.tags, read.step) == (
        ({}, {}, None) if key == "bare" else ({"seq_len": 8}, {"variant": "ar"}, 7)
    )
    stripped = [word for word in ("module.", "_orig_mod.") if word in prefix]
    assert [repr(word) in note for word, note in zip(stripped, read.notes, strict=True)] == [
        True
    ] * len(stripped)


def test_a_prefix_of_only_some_names_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    read = reader.read(saved(tmp_path / "x.pt", state))
    assert list(read.state) == ["module.a", "b"] and read.notes == ()


def convertible(**more) -> dict:
    return {"model": llama_names(weights()), "config": AR, **more}


def same_model(run: Path) -> bool:
    state = checkpoint.load_model(run)[0].state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in weights().items())


MASKS = ("self_attn.mask", "attn.bias", "self_attn.bias", "attention.bias", "attention_mask",
         "attn_bias", "causal", "causal_mask")  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "name"), [(1, MASKS[0]), (40, MASKS[0]), *((8, n) for n in MASKS)]
)
def test_masks_that_blocks_share_or_that_are_expanded_are_no_claim(tmp_path, layers, name):
    mask = torch.tril(torch.ones(256, 256)).bool().view(1, 1, 256, 256)
    content = convertible()
    for i in range(layers):
        content["model"][f"layers.{i}.{name}"] = mask
        content["model"][f"layers.{i}.wide.{name}"] = mask.expand(64, 1, 256, 256)
        content["model"][f"layers.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    path = saved(tmp_path / "x.pt", content)
    assert path.stat().st_size < 300_000
    (row,) = reader.scan(path)
    assert row.problem == "" and row.parameters < path.stat().st_size
    convert(path, tmp_path / "run")
    assert same_model(tmp_path / "run")
    for wide in ("weight", "attn.bias"):  # not of a mask's name, not of a mask's shape
        more = mask.expand(64, 1, 256, 256)
        more = {f"layers.0.{wide}": more if wide == "weight" else more[:, 0]}
        with pytest.raises(BitbyteError, match="claim more numbers"):
            reader.read(saved(path, content | {"model": content["model"] | more}))


def test_what_was_learned_is_not_taken_for_a_mask():
    for name, shape in (("attn.bias", (8,)), ("attn_bias", (1, 4, 8, 8)), ("causal", (8, 8))):
        assert not reader.recomputed(f"h.0.{name}", torch.zeros(shape)), name


def test_names_around_single_modules_are_taken_out(tmp_path):
    state = {}
    for name, tensor in llama_names(weights(), "module.").items():
        new = name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn.")
        state[new.replace("layers.0.", "layers.0._orig_mod._fsdp_wrapped_module.")] = tensor
    read = reader.read(saved(tmp_path / "x.pt", {"model": state, "config": AR}))
    assert list(read.state) == list(llama_names(weights()))
    assert [note for note in read.notes if "_orig_mod." in note] and len(read.notes) == 4
    convert(tmp_path / "x.pt", tmp_path / "run")
    assert same_model(tmp_path / "run")
    both = {"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}
    with pytest.raises(BitbyteError, match=r"removed '_orig_mod\.' .* then the same"):
        reader.read(saved(tmp_path / "x.pt", both))


@pytest.mark.parametrize("copy", ["ema.", "ema_model.module.", "model_ema.", "net.ema.", "flat"])
def test_an_average_among_the_weights_is_left_out_and_said(tmp_path, copy, capsys):
    """As Lightning saves it; one kind of copy has names without their dots."""
    state = llama_names(weights(), "model.")
    for name, tensor in llama_names(weights(1)).items():
        flat = f"model_ema.{name.replace('.', '')}"
        state[flat if copy == "flat" else copy + name] = tensor
    state["model_ema.decay"] = torch.tensor(0.99)
    content = {"state_dict": state, "hyper_parameters": AR, "global_step": 9}
    folder = convert(saved(tmp_path / "x.ckpt", content), tmp_path / "run")
    assert folder.name == "step_0000009" and same_model(tmp_path / "run")
    assert "left out " in capsys.readouterr().err


def test_weights_beside_the_ones_that_are_taken_are_said(tmp_path, capsys):
    content = convertible(ema=llama_names(weights(1)), optimizer={"state": {}})
    path = saved(tmp_path / "x.pt", content)
    assert "took the weights of 'model', not those of 'ema'" in reader.table(reader.scan(path))
    convert(path, tmp_path / "run")
    assert same_model(tmp_path / "run")
    assert "not those of 'ema'" in capsys.readouterr().err


def test_the_layout_of_nanogpt(tmp_path):
    content = convertible(iter_num=2000, best_val_loss=torch.tensor(1.5))
    content |= {"config": {"batch_size": 12, "causal": True, "linear": "dense"}}
    content |= {"model_args": {"n_head": 2, "block_size": 32, "linear": "ternary"}}
    folder = convert(saved(tmp_path / "x.pt", content), tmp_path / "run")
    meta = checkpoint.read_meta(folder)
    assert meta["step"] == 2000 and meta["config"]["seq_len"] == 32
    assert meta["config"]["linear"] == "dense"  # the first of the two counts


def test_counters_are_read_and_what_is_refused_has_a_way_out(tmp_path):
    path = saved(tmp_path / "x.pt", convertible(seen=collections.Counter("aab")))
    assert reader.read(path).content["seen"] == {"a": 2, "b": 1}
    for odd in (argparse.Namespace(lr=1), Path("x")):
        with pytest.raises(
            BitbyteError, match=r"refused; if you trust it, .*torch\.save\(\{'model'"
        ):
            reader.read(saved(path, convertible(args=odd)))


def test_optimizer_state_parameters_and_rng_are_plain_enough(tmp_path):
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0, 1], "amsgrad": False}]
    content = {
        "model": {"w": torch.ones(2)}, "optimizer": {"state": {0: moments}, "param_groups": groups},
        "bytes": b"\xff", "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2).bfloat16(), "rng": torch.get_rng_state(), "set": {1, 2},
        "dtype": torch.float16, "size": torch.Size([2]), "big": 2**70,
    }  # fmt: skip
    read = reader.read(saved(tmp_path / "x.pt", content))
    assert read.content["bytes"] == b"\xff" and read.content["big"] == 2**70


def test_attributes_that_hide_the_methods_of_a_dict(tmp_path):
    state = collections.OrderedDict(w=torch.ones(2))
    config, top = collections.OrderedDict(causal=True), collections.OrderedDict()
    top |= {"model": state, "config": config}
    for content in (state, config, top):
        vars(content).update({"itemS": 1, "valueS": 1, "geT": 1})
    with zipfile.ZipFile(saved(tmp_path / "x.pt", top)) as archive:
        pickled, data = archive.read("x/data.pkl"), archive.read("x/data/0")
    for word in (b"items", b"values", b"get"):
        pickled = pickled.replace(word[:-1] + word[-1:].upper(), word)
    path = zipped(tmp_path / "x.pt", pickled, [("data/0", data)])
    read = reader.read(path)
    assert reader.guess(read)[:3] == ("ar", None, "ambiguous") and list(read.state) == ["w"]
    assert read.config == {"causal": True} and read.content.get == 1
    with pytest.raises(BitbyteError, match="cannot be saved again"):
        reader.tag(path, "ar", "bitbyte")


def test_values_that_have_no_truth_and_keys_that_have_no_text(tmp_path):
    deep = ()
    for _ in range(300):
        deep = (deep,)
    config = {"mask_prob": torch.ones(2), "variant": torch.ones(2), deep: 1, "n_head": [2]}
    read = reader.read(saved(tmp_path / "x.pt", {"model": names(ATTENTION), "config": config}))
    assert reader.guess(read).certainty == "ambiguous"
    for content in ({deep: 1}, {"model": {deep: 1}}):
        with pytest.raises(BitbyteError, match="a tuple"):
            reader.read(saved(tmp_path / "y.pt", content))


# --- guesses


def names(*words: str, rows: int = 257) -> dict[str, torch.Tensor]:
    return {word: torch.ones(rows, 2) for word in ("embed.weight", *words)}


ATTENTION, MAMBA = "blocks.0.attn.qkv.weight", "layers.0.mixer.A_log"


@pytest.mark.parametrize(
    ("state", "extra", "expected"),
    [
        (names(ATTENTION), {}, (None, None, "ambiguous")),
        (names("blocks.0.fc.weight"), {}, (None, None, "ambiguous")),
        (names(ATTENTION, rows=256), {}, ("ar", "bitbyte", "guessed")),
        (names(MAMBA), {}, ("ar", "mamba", "found")),
        (names("backbone.layers.0.conv1d.weight"), {}, ("ar", "mamba", "found")),
        (names(ATTENTION, "time_emb.weight"), {}, ("diffusion", "diffusion", "found")),
        (
            names(ATTENTION),
            {"config": {"diffusion_steps": 64}},
            ("diffusion", "diffusion", "found"),
        ),
        (names(ATTENTION), {"args": {"min_mask_prob": 0.1}}, ("diffusion", "diffusion", "found")),
        (names(ATTENTION), {"config": {"diffusion": False}}, (None, None, "ambiguous")),
        (names(ATTENTION), {"config": {"causal": True}}, ("ar", "bitbyte", "found")),
        (names(ATTENTION), {"config": {"causal": False}}, ("diffusion", "diffusion", "found")),
        (names(ATTENTION), {"config": {"variant": "ar"}}, ("ar", "bitbyte", "found")),
        (names(ATTENTION), {"variant": "ar"}, ("ar", "bitbyte", "found")),
        (names(ATTENTION), {"model_family": "bitbyte"}, (None, "bitbyte", "ambiguous")),
        (names(ATTENTION), {"model_family": "diffusion"}, ("diffusion", "diffusion", "found")),
        (names(MAMBA), {"model_family": "mamba"}, ("ar", "mamba", "found")),
        (names(ATTENTION), {"model_family": "mamba"}, (None, "mamba", "ambiguous")),
        (names(MAMBA), {"model_family": "gpt2"}, (None, None, "ambiguous")),
        (
            names(ATTENTION),
            {"variant": "diffusion", "model_family": "bitbyte"},
            ("diffusion", "bitbyte", "tagged"),
        ),
        (
            names(ATTENTION),
            {"config": {"variant": "ar", "model_family": "bitbyte"}},
            ("ar", "bitbyte", "found"),
        ),
    ],
)
def test_guess(tmp_path, state, extra, expected):
    found = reader.guess(reader.read(saved(tmp_path / "x.pt", {"model": state, **extra})))
    assert found[:3] == expected
    assert found.reasons


def test_the_name_of_a_folder_is_only_a_guess(tmp_path):
    (tmp_path / "diffusion").mkdir()
    path = saved(tmp_path / "diffusion/x.pt", names(ATTENTION))
    assert reader.guess(reader.read(path))[:3] == ("diffusion", "diffusion", "guessed")


# --- tags


def full(path: Path, **extra) -> Path:
    """A checkpoint with optimizer state and step that does not say its family."""
    content = {"model": names(ATTENTION), "optimizer": {"exp_avg": [torch.ones(3)]}, "step": 5}
    return saved(path, content | extra)


def test_tag_keeps_everything_else(tmp_path):
    path = full(tmp_path / "ckpt.pt")
    before = image(tmp_path)
    made = reader.tag(path, "ar", "bitbyte")
    assert made == tmp_path / "ckpt.tagged.pt"
    assert image(tmp_path)[path] == before[path]
    content = torch.load(made, weights_only=True)
    assert list(content) == ["model", "optimizer", "step", "variant", "model_family"]
    assert torch.equal(content["optimizer"]["exp_avg"][0], torch.ones(3)) and content["step"] == 5
    assert (content["variant"], content["model_family"]) == ("ar", "bitbyte")
    assert reader.guess(reader.read(made)).certainty == "tagged"


def test_tag_of_a_bare_state_dict(tmp_path):
    state = {"module.embed": torch.ones(3, 2), "module.w": torch.arange(4.0)}
    made = reader.tag(saved(tmp_path / "a.pth", state), "ar", "mamba", out=tmp_path / "b.pt")
    content = torch.load(made, weights_only=True)
    assert list(content) == ["model", "variant", "model_family"]
    assert list(content["model"]) == list(state)  # as they were
    assert content["model"]["module.w"].tolist() == [0, 1, 2, 3]


def test_tied_tensors_are_written_once(tmp_path):
    tied = torch.randn(257, 64)
    path = saved(tmp_path / "x.pt", {"model": {"emb.weight": tied, "head.weight": tied}})
    made = reader.tag(path, "ar", "bitbyte")
    assert made.stat().st_size < path.stat().st_size + 2000
    assert reader.scan(made)[0].parameters == 257 * 64


def test_in_place(tmp_path):
    path = full(tmp_path / "ckpt.pt")
    path.chmod(0o640)
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    with pytest.raises(BitbyteError, match="allow_overwrite"):
        reader.tag(link, "ar", "bitbyte", inplace=True)
    made = reader.tag(link, "ar", "bitbyte", inplace=True, allow_overwrite=True)
    assert made == path.resolve() and link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert reader.read(path).tags == {"variant": "ar", "model_family": "bitbyte"}
    before = image(tmp_path)
    reader.tag(path, "ar", "bitbyte", inplace=True, allow_overwrite=True)
    assert image(tmp_path) == before  # nothing to do


def test_nothing_is_replaced_unasked(tmp_path):
    path, other = full(tmp_path / "x.pt", variant="diffusion"), tmp_path / "x.tagged.pt"
    other.write_bytes(b"mine")
    before = image(tmp_path)
    for options, message in (
        ({}, "exists"),
        ({"inplace": True}, "exists"),
        ({"out": other}, "exists"),
        ({"out": tmp_path / "new.pt"}, "is tagged variant 'diffusion'"),
        ({"out": other, "inplace": True, "allow_overwrite": True}, "not both"),
    ):
        with pytest.raises(BitbyteError, match=message):
            reader.tag(path, "ar", "bitbyte", **options)
    for words in (("gpt", "bitbyte"), ("ar", "gpt")):
        with pytest.raises(BitbyteError, match="choose from"):
            reader.tag(path, *words, allow_overwrite=True)
    assert image(tmp_path) == before
    reader.tag(path, "ar", "bitbyte", allow_overwrite=True)
    assert reader.read(other).tags == {"variant": "ar", "model_family": "bitbyte"}


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "torch.save"])
def test_a_write_that_fails_leaves_the_original_and_nothing_else(tmp_path, monkeypatch, call):
    path = full(tmp_path / "x.pt")
    before = image(tmp_path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr({"os": os, "torch": torch}[call.split(".")[0]], call.split(".")[1], fail)
    with pytest.raises(KeyboardInterrupt):
        reader.tag(path, "ar", "bitbyte", inplace=True, allow_overwrite=True)
    assert image(tmp_path) == before


def test_what_cannot_be_read_again_is_not_written(tmp_path, monkeypatch):
    path = full(tmp_path / "x.pt")
    before = image(tmp_path)
    good = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: good([content], file))
    with pytest.raises(BitbyteError, match="holds a list"):
        reader.tag(path, "ar", "bitbyte", inplace=True, allow_overwrite=True)
    assert image(tmp_path) == before


def mixed(folder: Path) -> Path:
    """A folder with one file of each kind."""
    (folder / "deep/er").mkdir(parents=True)
    full(folder / "unclear.pt")
    full(folder / "deep/er/told.ckpt", config={"causal": True})
    full(folder / "deep/ready.PT", variant="ar", model_family="bitbyte")
    saved(folder / "deep/mamba.pth", {"model": names(MAMBA)})
    (folder / "notes.pt").write_text("not a checkpoint")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "deep/loop").symlink_to(folder, target_is_directory=True)
    (folder / "deep/link.pt").symlink_to(folder / "unclear.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.pt")
    return folder


def test_scan(tmp_path):
    rows = {row.path.name: row for row in reader.scan(mixed(tmp_path))}
    assert set(rows) == {"unclear.pt", "told.ckpt", "ready.PT", "mamba.pth", "notes.pt"}
    told = {name: row.guess.certainty for name, row in rows.items() if row.guess}
    assert told == {
        "unclear.pt": "ambiguous", "told.ckpt": "found", "ready.PT": "tagged", "mamba.pth": "found"
    }  # fmt: skip
    assert "not a checkpoint" in rows["notes.pt"].problem
    row = rows["told.ckpt"]
    assert (row.layout, row.parameters) == ("model", 2 * 257 * 2)
    assert row.bytes == row.path.stat().st_size
    lines = reader.table(list(rows.values())).splitlines()
    assert lines[0].split() == [
        "path", "layout", "MB", "parameters", "variant", "model_family", "certainty", "why"
    ]  # fmt: skip
    at = lines[0].index("certainty")
    assert "".join(line[at] for line in lines[1:]) == "fftra"


def test_a_dry_run_changes_nothing_and_a_folder_is_tagged_where_certain(tmp_path):
    mixed(tmp_path)
    before = image(tmp_path)
    said = list(reader.tag_all(tmp_path))
    assert image(tmp_path) == before
    would = [line for line in said if line.startswith("would tag")]
    assert len(would) == 2 and any("model_family mamba" in line for line in would)
    assert [line for line in said if line.startswith("left alone, ambiguous")]

    list(reader.tag_all(tmp_path, write=True))
    after = image(tmp_path)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == {"told.ckpt", "mamba.pth"} and after.keys() == before.keys()
    assert reader.read(tmp_path / "deep/mamba.pth").tags == {
        "variant": "ar", "model_family": "mamba"
    }  # fmt: skip
    assert reader.read(tmp_path / "unclear.pt").tags == {}

    list(reader.tag_all(tmp_path, "diffusion", "diffusion", write=True))  # said in so many words
    assert reader.read(tmp_path / "unclear.pt").tags["variant"] == "diffusion"
    assert reader.read(tmp_path / "deep/ready.PT").tags["variant"] == "ar"


def test_tagging_that_can_do_nothing_says_so(tmp_path):
    path = full(tmp_path / "x.pt")
    before = image(tmp_path)
    list(reader.tag_all(path))
    for place in (path, tmp_path):
        with pytest.raises(BitbyteError, match="nothing is certain"):
            list(reader.tag_all(place, write=True))
    with pytest.raises(BitbyteError, match="together"):
        list(reader.tag_all(path, "ar", write=True))
    with pytest.raises(BitbyteError, match=r"no \.pt"):
        list(reader.tag_all(tmp_path / "none"))
    (tmp_path / "y.pt").write_bytes(b"")
    with pytest.raises(BitbyteError, match="is empty"):
        list(reader.tag_all(tmp_path / "y.pt", "ar", "bitbyte", write=True))
    (tmp_path / "y.pt").unlink()
    assert image(tmp_path) == before


def test_the_flags_of_the_old_script(tmp_path):
    path = full(tmp_path / "ckpt.pt")
    options = {"write": True, "inplace": True, "allow_overwrite": True}
    lines = list(reader.tag_all(path, "ar", "bitbyte", **options))
    assert lines[-1] == f"tagged variant ar, model_family bitbyte: {path}"
    assert reader.read(path).tags == {"variant": "ar", "model_family": "bitbyte"}
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_folder_is_never_rewritten_in_place_of_a_copy(tmp_path):
    mixed(tmp_path)
    before = image(tmp_path)
    for options, message in (
        ({"out": tmp_path / "copies"}, "name one, or use --inplace --allow_overwrite"),
        ({"inplace": True}, "needs --allow_overwrite"),
    ):
        for write in (False, True):
            with pytest.raises(BitbyteError, match=message) as caught:
                list(reader.tag_all(tmp_path, write=write, **options))
            assert "\n" not in str(caught.value)
    assert image(tmp_path) == before
    list(reader.tag_all(tmp_path, write=True, inplace=True, allow_overwrite=True))
    assert reader.read(tmp_path / "deep/mamba.pth").tags["model_family"] == "mamba"


def test_a_different_tag_in_a_folder_is_changed_only_when_asked(tmp_path):
    path = full(tmp_path / "x.pt", model_family="gpt2")
    words = ("ar", "bitbyte")
    before = image(tmp_path)
    (said,) = list(reader.tag_all(tmp_path, *words))[1:]
    assert said.startswith("left alone") and "is tagged model_family 'gpt2'" in said
    with pytest.raises(BitbyteError, match="nothing is certain"):
        list(reader.tag_all(tmp_path, *words, write=True))
    assert image(tmp_path) == before
    list(reader.tag_all(tmp_path, *words, write=True, allow_overwrite=True))
    assert reader.read(path).tags == {"variant": "ar", "model_family": "bitbyte"}


def test_a_tagged_file_is_copied_where_out_says(tmp_path):
    path, copy = full(tmp_path / "x.pt", variant="ar", model_family="bitbyte"), tmp_path / "copy.pt"
    before = image(tmp_path)
    for write in (False, True):
        said = list(reader.tag_all(path, write=write))
        assert said[1:] == [f"already tagged: {path}"] and image(tmp_path) == before
    what = f"variant ar, model_family bitbyte: {copy}"
    assert list(reader.tag_all(path, out=copy))[1:] == [f"would tag {what}"]
    assert image(tmp_path) == before
    assert list(reader.tag_all(path, write=True, out=copy))[1:] == [f"tagged {what}"]
    assert image(tmp_path)[path] == before[path]
    assert reader.read(copy).tags == {"variant": "ar", "model_family": "bitbyte"}


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("words", [("foo", "bitbyte"), ("ar", "bar"), ("", "")])
def test_a_dry_run_promises_nothing_that_is_refused(tmp_path, words, write):
    path = full(tmp_path / "x.pt")
    for place in (path, tmp_path):
        with pytest.raises(BitbyteError, match="choose from"):
            list(reader.tag_all(place, *words, write=write))
    (tmp_path / "x.tagged.pt").write_bytes(b"mine")
    said = list(reader.tag_all(path, "ar", "bitbyte"))
    assert said[1:] == [
        f"left alone: {tmp_path / 'x.tagged.pt'} exists; --allow_overwrite replaces it"
    ]


# --- conversion


def old_file(path: Path, config: dict | None = AR, change=None, **extra) -> Path:
    state = llama_names(weights(), "module.")
    if change:
        change(state)
    content = {"model_state": state, "step": 1200, **extra}
    return saved(path, content if config is None else content | {"config": config})


def logits(model) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) * 7 % 256
    ids[:, 0] = 256
    with torch.no_grad():
        return model.eval().logits(ids)


@pytest.mark.parametrize("linear", ["ternary", "dense"])
@pytest.mark.parametrize("family", ["ar", "diffusion"])
def test_a_converted_model_gives_the_logits_of_its_weights(tmp_path, linear, family):
    config = {"n_head": 2, "seq_len": 32, "causal": family == "ar"}
    folder = convert(old_file(tmp_path / "x.pt", config), tmp_path / "run", linear=linear)
    assert folder == tmp_path / "run/step_0001200"
    model, meta = checkpoint.load_model(tmp_path / "run", family=family)
    assert (meta["variant"], meta["step"], meta["config"]["d_ff"]) == (linear, 1200, 24)
    by_hand = models.build(type(model.config)(**config_fields(linear)), seed=9)
    by_hand.load_state_dict(weights())
    assert torch.equal(logits(model), logits(by_hand))
    assert checkpoint.load_step(folder, with_optim=True)[2] == {}


def config_fields(linear: str) -> dict:
    return {
        "n_layer": 2, "d_model": 16, "d_ff": 24, "n_head": 2, "seq_len": 32, "linear": linear
    }  # fmt: skip


OTHER_NAMES = {
    r"transformer.blocks.0.attn.qkv": "h.0.attn.c_attn",
    r"transformer.blocks.0.attn.out": "h.0.attn.c_proj",
    r"transformer.blocks.0.attn_norm": "h.0.ln_1",
    r"transformer.blocks.0.mlp_norm": "h.0.ln_2",
    r"transformer.blocks.0.mlp.gate_up": "h.0.mlp.gate_up_proj",
    r"transformer.blocks.0.mlp.down": "h.0.mlp.down_proj",
    r"transformer.blocks.1.attn.qkv": "blocks.1.attention.wqkv",
    r"transformer.blocks.1.attn.out": "blocks.1.attention.wo",
    r"transformer.blocks.1.attn_norm": "blocks.1.attention_norm",
    r"transformer.blocks.1.mlp_norm": "blocks.1.ffn_norm",
    r"transformer.blocks.1.mlp.down": "blocks.1.feed_forward.w2",
}


def test_other_names_of_the_same_weights(tmp_path):
    state = {}
    for name, tensor in weights().items():
        stem = name.removesuffix(".weight")
        state[OTHER_NAMES[stem] + ".weight" if stem in OTHER_NAMES else name] = tensor
    state["model.embed_tokens.weight"] = state.pop("embed")
    state["model.ln_f.weight"] = state.pop("norm.weight")
    assert "transformer.blocks.1.mlp.gate_up.weight" in state  # today's names are also known
    convert(saved(tmp_path / "x.pt", {"model": state, "hparams": AR}), tmp_path / "run")
    tensors = checkpoint.load_step(tmp_path / "run/step_0000000")[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in weights().items())


def test_half_precision_is_widened(tmp_path):
    def half(state):
        state.update({name: tensor.bfloat16() for name, tensor in state.items()})

    convert(old_file(tmp_path / "x.pt", change=half), tmp_path / "run")
    tensors = checkpoint.load_model(tmp_path / "run")[0].state_dict()
    for name, tensor in weights().items():
        assert torch.equal(tensors[name], tensor.bfloat16().float())


def test_what_the_file_does_not_tell_is_asked_for(tmp_path, capsys):
    path, run = old_file(tmp_path / "x.pt", None), tmp_path / "run"
    words = {"variant": "ar", "model_family": "bitbyte"}
    with pytest.raises(BitbyteError, match=r"ambiguous.*--variant and --model_family"):
        convert(path, run)
    with pytest.raises(BitbyteError, match="--linear, --seq_len, --n_head"):
        convert(path, run, **words)
    with pytest.raises(BitbyteError, match=r"give --seq_len$"):
        convert(path, run, linear="dense", n_head=2, **words)
    with pytest.raises(BitbyteError, match="choose from"):
        convert(path, run, linear="binary", n_head=2, seq_len=32, **words)
    with pytest.raises(BitbyteError, match="3 heads"):
        convert(path, run, linear="dense", n_head=3, seq_len=32, **words)
    assert not run.exists()
    capsys.readouterr()
    convert(path, run, linear="dense", n_head=2, seq_len=32, **words)
    assert "act_quant (taken as True), rope_theta (taken as 10000.0)" in capsys.readouterr().err
    old = {"block_size": 64, "n_heads": 4, "linear": "ternary", "rope_theta": 50}
    old["no_act_quant"] = True
    convert(old_file(tmp_path / "y.pt", old), tmp_path / "y", n_head=2, **words)
    config = checkpoint.load_model(tmp_path / "y")[0].config
    assert (config.seq_len, config.n_head) == (64, 2)
    assert (config.act_quant, config.rope_theta) == (False, 50.0)


def swap(old: str, new: str, tensor: torch.Tensor | None = None):
    def change(state):
        value = state.pop(f"module.{old}")
        state[f"module.{new}"] = value if tensor is None else tensor

    return change


def add(name: str, *shape: int):
    return lambda state: state.update({f"module.{name}": torch.randn(shape)})


E, Q = "tok_emb.weight", "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap(E, E, torch.ones(256, 16)), r"embedding is \(256, 16\); the models have 257 rows"),
        (swap(E, "mystery"), "no tensor is named like an embedding"),
        (add("lm_head.weight", 257, 16), "head differs from the embedding"),
        (add("layers.0.self_attn.q_proj.bias", 16), r"0\.self_attn\.q_proj\.bias has no place"),
        (add("layers.1.ln1.bias", 16), r"layers\.1\.ln1\.bias|blocks\.1\.ln1\.bias has no place"),
        (add("pos_emb.weight", 32, 16), r"pos_emb\.weight has no place"),
        (add("layers.0.attn.q_proj.weight", 16, 16), "two tensors are"),
        (swap("norm_f.weight", "mystery"), r"mystery has no place; norm\.weight is missing"),
        (swap("norm_f.weight", "norm_f.weight", torch.ones(8)), r"norm\.weight is \(8,\)"),
        (swap(Q, Q, torch.ones(8, 16)), r"qkv\.weight is \(40, 16\) .* instead of \(48, 16\)"),
        (swap(Q, Q, torch.ones(16, 8)), "do not fit together"),
        (swap(Q, Q, torch.full((16, 16), torch.nan)), "NaN or infinity in transformer"),
        (
            lambda s: s.update({k: v.long() for k, v in s.items()}),
            r"int64 instead of .* and 11 more",
        ),
        (add("layers.9999.ln1.weight", 16), "10000 layers, but too few tensors"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(BitbyteError, match=message) as caught:
        convert(old_file(tmp_path / "x.pt", change=change), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_buffers_that_are_computed_are_left_out(tmp_path, capsys):
    def rotary(state):
        state["module.rotary.inv_freq"] = 500.0 ** -(torch.arange(0, 8, 2) / 8)

    convert(old_file(tmp_path / "x.pt", change=rotary), tmp_path / "run")
    said = capsys.readouterr().err
    assert "left out rotary.inv_freq" in said and "rope_theta" not in said
    assert checkpoint.load_model(tmp_path / "run")[0].config.rope_theta == 500.0


def test_a_run_is_replaced_only_when_asked(tmp_path):
    path, run = old_file(tmp_path / "x.pt"), tmp_path / "run"
    convert(path, run)
    before = image(run / "step_0001200")
    with pytest.raises(BitbyteError, match="allow_overwrite"):
        convert(path, run)
    assert image(run / "step_0001200") == before and runs.latest_step(run) == 1200
    convert(old_file(path, step=3), run, allow_overwrite=True)
    assert runs.complete_steps(run) == [3]


@pytest.mark.parametrize("name", ["latest", "best", "metrics.jsonl", "step_0001200/poem.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_user_is_in_the_way(name, overwrite, tmp_path):
    """In a folder that is not a run, but where a file has a name that a run uses."""
    path, folder = old_file(tmp_path / "x.pt"), tmp_path / "folder"
    for mine in ("notes.txt", name):
        (folder / mine).parent.mkdir(parents=True, exist_ok=True)
        (folder / mine).write_text("mine")
    with pytest.raises(BitbyteError, match="is in the way: it is not"):
        convert(path, folder, allow_overwrite=overwrite)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {".lock", "notes.txt", name} and (folder / name).read_text() == "mine"


def test_a_file_is_no_run_folder(tmp_path):
    path, other = old_file(tmp_path / "x.pt"), tmp_path / "notes.txt"
    other.write_text("mine")
    before = image(tmp_path)
    for run in (other, other / "run"):
        with pytest.raises(BitbyteError, match=r"notes\.txt is a file: name a new folder"):
            convert(path, run, allow_overwrite=True)
    assert image(tmp_path) == before


def test_a_converted_run_has_no_seed(tmp_path):
    convert(old_file(tmp_path / "x.pt"), tmp_path / "run")
    assert checkpoint.load_model(tmp_path / "run")[1]["rng"] == {}


def test_mamba_keeps_its_names(tmp_path):
    config = family_config("mamba")(n_layer=2, d_model=64, seq_len=32, linear="dense")
    state = models.build(config).state_dict()
    old = {n.replace("mamba.blocks", "backbone.layers"): t for n, t in state.items()}
    old["backbone.embedding.weight"] = old.pop("embed")
    content = {"model": old, "model_family": "mamba", "config": {"seq_len": 32, "linear": "dense"}}
    convert(saved(tmp_path / "x.pt", content), tmp_path / "run")
    model, _ = checkpoint.load_model(tmp_path / "run", family="mamba")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    old["backbone.layers.0.mixer.A_log"] = torch.ones(3)
    with pytest.raises(BitbyteError, match=r"mamba\.blocks\.0\.mixer\.A_log has no place"):
        convert(saved(tmp_path / "y.pt", content), tmp_path / "y")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("overwrite", [False, True])
def test_tags_are_written_to_files_only(overwrite, tmp_path):
    path, pipe = full(tmp_path / "x.pt"), tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    before = image(tmp_path)
    for out in (pipe, tmp_path):
        with pytest.raises(BitbyteError, match="is not a plain file"):
            reader.tag(path, "ar", "bitbyte", out=out, allow_overwrite=overwrite)
    assert image(tmp_path) == before and pipe.is_fifo()
