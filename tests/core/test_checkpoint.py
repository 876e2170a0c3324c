"""Checkpoints: round trips, what must be refused, flipped bits, hostile files, wrong models."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CONFIG, assert_loads, exit_code, in_child, meta_for, save, tensors_of

from bitbyte import checkpoint, config, files, models, runs
from bitbyte.checkpoint import MODEL, OPTIM, SaveError
from bitbyte.evaluate import evaluation
from bitbyte.files import BitbyteError
from bitbyte.runs import META


def save_model(run: Path, change=None, **fields) -> Path:
    tensors = {k: v.clone() for k, v in models.build(CONFIG).state_dict().items()}
    if change:
        change(tensors)
    return checkpoint.save_step(run, 1, tensors, {}, meta_for(**fields))


def reseal(folder: Path, **changes) -> None:
    """Rewrite meta.json as someone who knows its checksum would; None drops a field."""
    meta = json.loads((folder / META).read_bytes()) | changes
    dropped = {"sha256", *(name for name, value in changes.items() if value is None)}
    meta = {k: v for k, v in meta.items() if k not in dropped}
    (folder / META).write_bytes(checkpoint.seal(meta))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and its entry in meta.json, so that only its content is wrong."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / META).read_bytes())["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder, files=files)


def test_round_trip(tmp_path):
    model, optim = tensors_of(7)
    model["half"] = torch.arange(6).reshape(2, 3).bfloat16().T  # not contiguous
    model["none"] = torch.empty(0, 4)
    optim["count"] = torch.tensor(3.0)
    extra = {"kernels": {"attention": "sdpa"}}
    folder = checkpoint.save_step(tmp_path, 7, model, optim, meta_for(extra=extra))
    assert folder == tmp_path / "step_0000007"
    assert (tmp_path / "latest").read_text() == "step_0000007\n"
    assert sorted(p.name for p in folder.iterdir()) == sorted([META, MODEL, OPTIM])
    meta, model2, optim2 = checkpoint.load_step(folder, with_optim=True)
    for have, want in ((model2, model), (optim2, optim)):
        assert have.keys() == want.keys()
        for name in want:
            assert have[name].dtype == want[name].dtype and torch.equal(have[name], want[name])
    assert meta["step"] == 7 and meta["format"] == 1 and meta["extra"] == extra
    assert meta["config"] == config.config_to_dict(CONFIG) and meta["bytes_seen"] == 12345
    assert set(meta["versions"]) == {"python", "torch", "bitbyte"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", meta["created"])
    assert meta["files"][MODEL]["bytes"] == (folder / MODEL).stat().st_size
    assert checkpoint.load_step(folder)[2] is None
    assert checkpoint.read_meta(folder) == meta


def test_without_optimizer_state(tmp_path):
    folder = checkpoint.save_step(tmp_path, 0, tensors_of(0)[0], {}, meta_for())
    assert not (folder / OPTIM).exists()
    assert checkpoint.load_step(folder, with_optim=True)[2] == {}


def test_same_weights_same_bytes(tmp_path):
    one, two = save(tmp_path, 5), save(tmp_path / "step_0000005", 5)
    assert (one / MODEL).read_bytes() == (two / MODEL).read_bytes()


def test_a_saved_step_is_never_overwritten(tmp_path):
    folder = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BitbyteError, match="never overwritten"):
        save(tmp_path, 1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_shared_tensors_are_refused(tmp_path):
    a = torch.zeros(4, 4)
    for other in (a, a.T, a[1:]):
        with pytest.raises(AssertionError, match="a and b share memory"):
            checkpoint.save_step(tmp_path, 1, {"a": a, "b": other}, {}, meta_for())
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save_step(tmp_path, 1, *tensors_of(1), meta_for(rng=[float("nan")]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_modes_follow_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "latest").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_left_by_a_process_of_the_same_id(tmp_path):
    left = tmp_path / f".tmp-step_0000001-{os.getpid()}"
    left.mkdir()
    (left / MODEL).write_bytes(b"half")
    assert_loads(save(tmp_path, 1))
    assert not left.exists()


def test_keep_last(tmp_path):
    save(tmp_path, 1)
    runs.set_pointer(tmp_path, "best", 1)
    for step in (2, 3, 4, 5):
        save(tmp_path, step, keep_last=2, protect=iter([3]))
    assert runs.complete_steps(tmp_path) == [1, 3, 4, 5]
    assert runs.prune(tmp_path, 1) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best", "latest", "step_0000001", "step_0000005",
    ]  # fmt: skip


def test_tight_space_is_said_once(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=32_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    save(tmp_path, 1)  # two tensors of 64 x 32 floats and one int64
    assert re.search(r"warning: 32,000 bytes are free .* takes 16,392;", capsys.readouterr().err)
    save(tmp_path, 2)
    assert capsys.readouterr().err == ""


def test_no_folder_sync_and_patient_rename_on_windows(tmp_path, monkeypatch):
    real, calls = os.rename, []

    def busy(source, target):
        calls.append(source)
        if len(calls) < 4:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SaveError, match="EACCES"):
        save(tmp_path, 1)
    assert len(calls) == 1
    calls.clear()
    with monkeypatch.context() as windows:
        windows.setattr(files.os, "name", "nt")
        files.patiently(os.rename, str(tmp_path), str(tmp_path) + "-moved")
    assert len(calls) == 4


BAD_META = {
    "newer": ({"format": 2}, "made by a newer bitbyte"),
    "no format": ({"format": None}, "no format number"),
    "format true": ({"format": True}, "no format number"),
    "format 0": ({"format": 0}, "no format number"),
    "missing": ({"config": None}, "missing field 'config'"),
    "unknown": ({"colour": 1}, "unknown field 'colour'"),
    "rng": ({"rng": [1]}, "mistyped field 'rng'"),
    "seed": ({"rng": {"seed": "x"}}, "mistyped field 'rng.seed'"),
    "data.files": ({"data": {"files": 3}}, "mistyped field 'data.files'"),
    "file": ({"data": {"files": [{}]}}, "mistyped field 'data.files'"),
    "data.train": ({"data": {"train": None}}, "mistyped field 'data.train'"),
    "seconds": ({"extra": {"seconds": True}}, "mistyped field 'extra.seconds'"),
    "long": ({"extra": {"seconds": 10**400}}, "mistyped field 'extra.seconds'"),
    "kernels": ({"extra": {"kernels": "fast"}}, "mistyped field 'extra.kernels'"),
    "init": ({"extra": {"init": [1]}}, "mistyped field 'extra.init'"),
    "init bytes": ({"extra": {"init": {"bytes_seen": "x"}}}, "field 'extra.init.bytes_seen'"),
    "init run": ({"extra": {"init": {"run": 7}}}, "mistyped field 'extra.init.run'"),
    "init data": ({"extra": {"init": {"data": {"init": {"sketch": [3]}}}}}, "data.init.sketch'"),
    "data init": ({"data": {"init": 3}}, "mistyped field 'data.init'"),
    "data deep": ({"data": functools.reduce(lambda d, _: {"init": d}, range(200), {})}, "init'"),
    "float step": ({"step": 1.0}, "mistyped field 'step'"),
    "negative": ({"bytes_seen": -1}, "bad number for bytes_seen"),
    "huge": ({"bytes_seen": 2**63}, "mistyped field 'bytes_seen'"),
    "renamed": ({"step": 2}, "holds step 2"),
    "no model": ({"files": {}}, "is not in files"),
    "outside": ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "bad entry"),
    "hidden": ({"files": {".x": {"bytes": 1, "sha256": "0" * 64}}}, "bad entry"),
    "itself": ({"files": {META: {"bytes": 1, "sha256": "0" * 64}}}, "bad entry"),
    "no hash": ({"files": {MODEL: {"bytes": 1}}}, "bad entry"),
    "bad hash": ({"files": {MODEL: {"bytes": 1, "sha256": "0"}}}, "bad sha256"),
    "bad size": ({"files": {MODEL: {"bytes": True, "sha256": "0" * 64}}}, "bad number"),
    "absent": ({"files": {MODEL: {"bytes": 1, "sha256": "0" * 64}, "z": {"bytes": 1, "sha256":
               "0" * 64}}}, "does not belong|is missing|has "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_META)
def test_bad_meta(tmp_path, name):
    changes, message = BAD_META[name]
    folder = save(tmp_path, 1)
    reseal(folder, **changes)
    with pytest.raises(BitbyteError, match=message) as caught:
        checkpoint.load_step(folder, with_optim=True)
    assert META in str(caught.value) or str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 200_000, b"9" * 5000,
        b'{"format": NaN}', b'{"format": 1, "format": 1}', b'{"format": 1e400}',
        b'{"format": "1"}', b'{"format": 1, "\\ud800": 0}',
    ],
)  # fmt: skip
def test_meta_that_is_not_ours(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / META).write_bytes(text)
    with pytest.raises(BitbyteError, match="meta"):
        checkpoint.load_step(folder)


@pytest.mark.parametrize("value", [b"1e400", b'"\\ud800"'])
def test_values_that_json_writes_differently(tmp_path, value):
    folder = save(tmp_path, 1)
    text = (folder / META).read_bytes()
    (folder / META).write_bytes(text.replace(b'"steps": 100', b'"steps": ' + value))
    with pytest.raises(BitbyteError, match=r"damaged or edited|not a number"):
        checkpoint.read_meta(folder)


def test_files_that_are_not_right(tmp_path):
    folder = save(tmp_path, 1)
    good = (folder / MODEL).read_bytes()

    def refused(message):
        with pytest.raises(BitbyteError, match=message):
            checkpoint.load_step(folder, with_optim=True)

    (folder / "model.pt").write_bytes(b"")
    refused("'model.pt' does not belong there")
    (folder / "model.pt").rename(folder / ".DS_Store")  # file managers leave hidden files
    (folder / MODEL).write_bytes(good[:-1])
    refused(f"{MODEL} has {len(good) - 1} bytes, meta.json says {len(good)}")
    (folder / MODEL).unlink()
    refused(f"{MODEL} is missing")
    (folder / MODEL).symlink_to(tmp_path / "latest")
    refused("not a plain file")
    (folder / MODEL).unlink()
    os.mkfifo(folder / MODEL)
    refused("not a plain file")
    (folder / MODEL).unlink()
    (folder / MODEL).write_bytes(good)
    assert_loads(folder)
    (folder / META).unlink()
    refused("meta.json is missing")


def test_bit_flips(tmp_path):
    """300 single bits over all files of a step: each one is noticed, and the file is named."""
    folder, rng = save(tmp_path, 1), random.Random(0)
    for path in (folder / name for name in rng.choices([META, MODEL, OPTIM], k=300)):
        data = path.read_bytes()
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(BitbyteError, match=r"meta\.json|" + re.escape(path.name)):
            checkpoint.load_step(folder, with_optim=True)
        path.write_bytes(data)
    assert_loads(folder)


def safetensors_file(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


BAD_TENSORS = {
    "empty": (b"", "does not fit"),
    "short": (b"1234567", "does not fit"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "does not fit"),
    "11 MB header": (safetensors_file(b"{" + b" " * 11_000_000 + b"}"), "over the limit"),
    "many": (
        safetensors_file(
            json.dumps(
                {
                    str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                    for i in range(10**4 + 1)
                }
            ).encode()
        ),
        "more than 10000 tensors",
    ),
    "list": (safetensors_file(b"[]"), "no header"),
    "not json": (safetensors_file(b"{]"), "not valid JSON"),
    "deep": (safetensors_file(b"[" * 100_000), "not valid JSON"),
    "twice": (
        safetensors_file(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "occurs twice",
    ),
    "overflow": (
        safetensors_file(
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', bytes(4)
        ),
        "not a valid safetensors",
    ),
    "no such dtype": (
        safetensors_file(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "not a valid safetensors",
    ),
    "tail": (safetensors_file(b"{}", bytes(4)), "not a valid safetensors"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_hostile_safetensors(tmp_path, name):
    data, message = BAD_TENSORS[name]
    folder = save(tmp_path, 1)
    replace_file(folder, MODEL, data)
    with pytest.raises(BitbyteError, match=message) as caught:
        checkpoint.load_step(folder)
    assert MODEL in str(caught.value)


def test_edited_safetensors_never_crash(tmp_path):
    """Hashes made to fit, so that only the reader stands between the bytes and torch."""
    folder, rng, loaded = save(tmp_path, 1), random.Random(1), 0
    good = (folder / MODEL).read_bytes()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(200)] = rng.randrange(256)
        replace_file(folder, MODEL, bytes(data[: rng.choice([len(data), rng.randrange(300)])]))
        with contextlib.suppress(BitbyteError):
            checkpoint.load_step(folder)
            loaded += 1
    assert loaded < 200


def test_load_model(tmp_path):
    model = models.build(CONFIG, seed=3)
    checkpoint.save_step(tmp_path, 4, model.state_dict(), {}, meta_for())
    loaded, meta = checkpoint.load_model(tmp_path, family="ar")
    assert meta["step"] == 4 and loaded.config == CONFIG and not loaded.training
    ids_BT = torch.arange(20).reshape(2, 10)
    assert torch.equal(loaded(ids_BT), model(ids_BT))
    assert all(p.device.type == "cpu" and p.requires_grad for p in loaded.parameters())
    state = torch.random.get_rng_state()
    checkpoint.load_model(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrong_family(tmp_path):
    save_model(tmp_path, model_family="mamba")
    with pytest.raises(BitbyteError, match="a checkpoint of family mamba, wanted ar"):
        checkpoint.load_model(tmp_path, family="ar")
    with pytest.raises(BitbyteError, match="config is not of family 'mamba'"):
        checkpoint.load_model(tmp_path)


FAMILYLESS = {k: v for k, v in config.config_to_dict(CONFIG).items() if k != "d_ff"}
BAD_MODELS = {
    "nan": (lambda t: t["norm.weight"].fill_(float("nan")), {}, "NaN or infinity in 'norm.weight'"),
    "inf": (lambda t: t["embed"][0].fill_(-float("inf")), {}, "NaN or infinity in 'embed'"),
    "key": (lambda t: t.pop("norm.weight"), {}, r"holds .* numbers|lacks 'norm.weight'"),
    "extra": (lambda t: t.update(zzz=torch.zeros(1)), {}, "has unknown 'zzz'"),
    "path": (lambda t: t.update({"../../x": torch.zeros(1)}), {}, r"has unknown '\.\./\.\./x'"),
    "shape": (
        lambda t: t.update(embed=torch.zeros(300, 16)), {}, r"embed is \(300, 16\).*\(257, 16\)"
    ),
    "dtype": (lambda t: t.update(embed=t["embed"].int()), {}, "embed is .*int32.*float32"),
    "config key": (None, {"config": FAMILYLESS}, "missing field 'd_ff'"),
    "config type": (
        None, {"config": config.config_to_dict(CONFIG) | {"d_ff": 16.0}}, "mistyped field 'd_ff'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(tmp_path, name):
    change, fields, message = BAD_MODELS[name]
    save_model(tmp_path, change=change, **fields)
    with pytest.raises(BitbyteError, match=message) as caught:
        checkpoint.load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [{"d_model": 10**9}, {"d_model": 2**14}, {"n_layer": 10**6}])
def test_a_config_too_big_for_its_file(tmp_path, size):
    """Refused before the model is built: the child may take 400 MB more than it has."""
    resource = pytest.importorskip("resource", reason="no memory limits here")
    folder = save_model(tmp_path)
    reseal(folder, config=config.config_to_dict(CONFIG) | size)

    def load():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
        models.build = None
        with pytest.raises(BitbyteError, match=r"more than bitbyte|the config needs"):
            checkpoint.load_model(folder)

    assert exit_code(in_child(load)) == 0


@pytest.mark.parametrize("seq_len", [10**9, 2**62])
def test_a_context_that_no_machine_holds(seq_len, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "memory", lambda: 16 * 2**30)
    folder = save_model(tmp_path)
    reseal(folder, config=config.config_to_dict(CONFIG) | {"seq_len": seq_len})
    with pytest.raises(BitbyteError, match=r"needs [\d,]+ bytes of memory, this machine has 17,1"):
        checkpoint.load_model(folder)
    reseal(folder, config=config.config_to_dict(CONFIG) | {"seq_len": 10**5})
    checkpoint.load_model(folder)


def test_tables_that_no_machine_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "memory", lambda: 16 * 2**30)
    prior = {"prior": "counts", "prior_orders": 12, "prior_rank": 256, "prior_bits": 8}
    wide = config.dataclasses.replace(CONFIG, **prior, prior_rows=2**24)
    assert wide.table_bytes == 13 * 2**24 * 256
    folder = save_model(tmp_path)
    reseal(folder, config=config.config_to_dict(wide))
    monkeypatch.setattr(checkpoint.models, "build", lambda config: pytest.fail("it was built"))
    with pytest.raises(
        BitbyteError, match=r"tables of n-grams, .* needs 55,8[\d,]+ bytes of memory"
    ):
        checkpoint.load_model(folder)


def test_memory_is_that_of_a_computer():
    assert 2**28 < checkpoint.memory() <= 2**44


def places(value, path=()):
    """The paths of all values inside of JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


GOOD_META = meta_for(
    data={"path": "/d", "train": "0" * 64, "val": None, "bytes": 9, "files": ["0" * 64]},
    extra={"seconds": 1.5, "val_bpb": 2.5, "best": None, "finished": True, "global_batch": 8,
           "world": 1, "dtype": "fp32", "kernels": {"attention": "sdpa"}},
)  # fmt: skip
ANYTHING = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 10**9, 2**62, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x",
     "\x00", "0" * 64, [], [[]], [{}], ["x"], [None], {}, {"": {}}, {"seed": []}]
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_meta_of_another_shape_only_raises_bitbyte_errors(data):
    """With a right checksum: in reading it, in loading the model, and in scoring with both."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "memory", lambda: 2**33)
        folder = save_model(Path(name), **{k: GOOD_META[k] for k in ("data", "extra")})
        (Path(name) / "data").write_bytes(bytes(range(256)))
        meta = {k: v for k, v in json.loads((folder / META).read_bytes()).items() if k != "sha256"}
        for _ in range(data.draw(st.integers(1, 2))):
            *way, last = data.draw(st.sampled_from([path for path in places(meta) if path]))
            inside = meta
            for key in way:
                inside = inside[key]
            if data.draw(st.booleans()):
                inside[last] = copy.deepcopy(data.draw(ANYTHING))
            else:
                del inside[last]
        (folder / META).write_bytes(checkpoint.seal(meta))
        try:
            model, meta = checkpoint.load_model(folder)
            evaluation.evaluate(
                model, Path(name) / "data", name="x", meta=meta, window=8, limit=16, progress=False
            )
        except BitbyteError as error:
            assert "\n" not in str(error)


def test_pickle_is_never_used(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in (
        (torch, "load"), (torch, "save"), (pickle, "Unpickler"), (pickle, "Pickler"),
        (pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    model = models.build(CONFIG)
    folder = checkpoint.save_step(tmp_path, 1, model.state_dict(), tensors_of(1)[1], meta_for())
    checkpoint.load_model(tmp_path)
    checkpoint.load_step(folder, with_optim=True)


def test_loading_needs_only_the_core(tmp_path):
    """A fresh process that never saw the writer loads the model."""
    save_model(tmp_path)
    code = f"from bitbyte import checkpoint as c; print(c.load_model({str(tmp_path)!r})[1]['step'])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_file_is_plain_safetensors(tmp_path):
    folder = save_model(tmp_path)
    tensors = safetensors.torch.load_file(folder / MODEL)
    assert tensors.keys() == models.build(CONFIG).state_dict().keys()
