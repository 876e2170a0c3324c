"""The command line as a user meets it: the whole path, and one clear line for every mistake."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitbyte import checkpoint
from bitbyte.cli import COMMANDS, main

SMALL = ["--n_layer=1", "--d-model=32", "--d_ff=32", "--n_head=2", "--seq_len=32", "--steps=6"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A packed data set and a trained run, made through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "in").mkdir()
    for i in range(40):
        (folder / "in" / f"{i:02}.txt").write_bytes(b"the cat sat on the mat. %d\n" % i * 40)
    assert main(["pack", str(folder / "in"), "--out", str(folder / "packed")]) == 0
    run = ["train", "ar", "--data", str(folder / "packed"), "--out", str(folder / "run")]
    assert main([*run, *SMALL, "--device", "cpu"]) == 0
    return folder


def fails(capsys, *arguments, code=2) -> str:
    """Run a command that must fail; returns its one line."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    text = capsys.readouterr().err
    line = [part for part in text.splitlines() if part.startswith(("error: ", "failed: "))]
    assert len(line) == 1 and "Traceback" not in text, text
    return line[0]


def test_usage_lists_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: bitbyte {name}" in capsys.readouterr().out


def test_pack_made_both_splits(world, capsys):
    manifest = json.loads((world / "packed" / "manifest.json").read_text())
    assert {shard["split"] for shard in manifest["shards"]} == {"train", "val"}
    assert main(["info", str(world / "packed"), "--verify"]) == 0
    assert "all hashes match" in capsys.readouterr().out


def test_eval_writes_a_record(world, tmp_path, capsys):
    arguments = [str(world / "run"), "--data", str(world / "packed"), "--out", str(tmp_path)]
    assert main(["eval", *arguments, "--stride", "16", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert f"{record['bpb']:.4f} bits per byte" in text and record["model"] == "run"
    assert record["checkpoint"] and record["data"]["split"] == "val"


def test_sample_is_repeatable_and_measured(world, tmp_path, capfdbinary):
    out, numbers = tmp_path / "bytes", tmp_path / "deep" / "metrics.json"
    command = ["sample", str(world / "run"), "--prompt", "the cat", "--max_new_tokens", "50"]
    command += ["--top_k", "20", "--device", "cpu"]
    texts = []
    for extra in (["--out", str(out), "--metrics_json", str(numbers)], ["--metrics"]):
        assert main([*command, *extra]) == 0
        texts.append(capfdbinary.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith(b"the cat")
    assert len(out.read_bytes()) == 50
    assert json.loads(numbers.read_text())["new_bytes"] == 50


def test_prompts_of_no_bytes_and_of_all_bytes(world, tmp_path):
    every = tmp_path / "prompt"
    every.write_bytes(bytes(range(256)))
    for prompt in (["--prompt", ""], ["--prompt_file", str(every)]):
        command = ["sample", str(world / "run"), *prompt, "--max-new-tokens", "40"]
        out = tmp_path / "out"
        assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
        assert len(out.read_bytes()) == 40


def test_smoke_test_passes(capsys):
    assert main(["train", "ar", "--smoke_test"]) == 0
    assert "smoke test passed" in capsys.readouterr().out


def test_mistakes_are_one_line(world, tmp_path, capsys):
    run, packed = world / "run", world / "packed"
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.bin").touch()
    (tmp_path / "short.bin").write_bytes(b"123")
    train = ["train", "ar", *SMALL, "--out", str(tmp_path / "r"), "--device", "cpu", "--data"]
    for arguments, word in (
        (["paint"], "no command 'paint'"),
        (["train", "ar"], "no training data"),
        (["train", "rnn", "--data", packed], "no model family 'rnn'"),
        (["train", "ar", "--lr", "fast"], "lr"),
        (["train", "ar", "--stepz", "3"], "--stepz"),
        ([*train, tmp_path / "absent"], "absent"),
        ([*train, tmp_path / "empty"], "empty"),
        ([*train, tmp_path / "nothing.bin"], "nothing.bin"),
        ([*train, tmp_path / "short.bin"], "its 3 bytes are fewer"),
        (["sample", run, "--temperature", "-1"], "temperature is -1"),
        (["sample", run, "--top_p", "0"], "top_p is 0"),
        (["sample", tmp_path / "absent"], "absent"),
        (["eval", run, "--data", packed, "--stride", "0"], "stride"),
        (["eval", run, "--data", packed, "--split", "test"], "test"),
        (["eval", run, "--data", packed, "--dtype", "int3"], "int3"),
        (["eval", run, "--data", packed, "--device", "tpu"], "no device 'tpu'"),
        (["pack", tmp_path / "empty"], "empty"),
        (["pack"], "nothing to pack"),
        (["run", "--set", "corpus"], "not NAME=VALUE"),
        (["corpus", "poems", "--out", tmp_path / "x.json"], "no built-in corpus 'poems'"),
    ):
        assert word in fails(capsys, *arguments), arguments


def damaged(world: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the run of its own."""
    import shutil

    return Path(shutil.copytree(world / "run", tmp_path / name))


def test_damaged_checkpoints_are_refused_by_name(world, tmp_path, capsys):
    from bitbyte.runs import read_plain_json

    def edit(name, change):
        run = damaged(world, tmp_path, name)
        path = checkpoint.resolve(run) / "meta.json"
        _, meta = read_plain_json(path)
        meta.pop("sha256")
        path.write_bytes(checkpoint.seal(change(meta)))
        return run

    flipped = damaged(world, tmp_path, "flipped")
    model = checkpoint.resolve(flipped) / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-5] ^= 1
    model.write_bytes(raw)
    assert "model.safetensors is damaged" in fails(capsys, "sample", flipped)
    future = edit("future", lambda meta: meta | {"format": 99})
    assert "made by a newer bitbyte" in fails(capsys, "sample", future)
    missing = edit("missing", lambda meta: {k: v for k, v in meta.items() if k != "data"})
    assert "missing field 'data'" in fails(capsys, "sample", missing)
    family = edit("family", lambda meta: meta | {"model_family": "mamba"})
    assert "of family 'mamba'" in fails(capsys, "sample", family)


def test_nan_weights_are_refused(world, tmp_path, capsys):
    meta, tensors, _ = checkpoint.load_step(checkpoint.resolve(world / "run"))
    tensors["embed"][3, 4] = math.nan
    keep = ("model_family", "variant", "config", "train", "bytes_seen", "rng", "data", "extra")
    run = tmp_path / "nan"
    run.mkdir()
    checkpoint.save_step(run, 6, tensors, {}, {key: meta[key] for key in keep})
    assert "NaN" in fails(capsys, "sample", run)


def test_edited_and_truncated_shards_are_refused(world, tmp_path, capsys):
    import shutil

    for name, change in (("cut", lambda raw: raw[:-1]), ("edit", lambda raw: b"X" + raw[1:])):
        copy = Path(shutil.copytree(world / "packed", tmp_path / name))
        shard = copy / "shard_00000.bin"
        shard.write_bytes(change(shard.read_bytes()))
        arguments = ["train", "ar", *SMALL, "--out", tmp_path / f"run-{name}", "--device", "cpu"]
        assert "shard_00000.bin" in fails(capsys, *arguments, "--data", copy)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux",
    reason="needs root on Linux to mount a tmpfs",
)
@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_full_or_read_only_disk_fails_cleanly(world, tmp_path, capsys, options):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=False, stderr=-3
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        arguments = ["train", "ar", *SMALL, "--data", world / "packed", "--device", "cpu"]
        line = fails(capsys, *arguments, "--out", place / "run", code=1)
        assert ("ENOSPC" in line or "No space" in line) if "size" in options else "ead-only" in line
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_uniform_checkpoint_scores_eight(world, tmp_path, capsys):
    meta, tensors, _ = checkpoint.load_step(checkpoint.resolve(world / "run"))
    keep = ("model_family", "variant", "config", "train", "bytes_seen", "rng", "data", "extra")
    run = tmp_path / "uniform"
    run.mkdir()
    blank = tensors | {"embed": torch.zeros_like(tensors["embed"])}
    checkpoint.save_step(run, 6, blank, {}, {key: meta[key] for key in keep})
    data = str(world / "packed")
    assert main(["eval", str(run), "--data", data, "--no_record", "--device", "cpu"]) == 0
    assert "8.0000 bits per byte (95 % 8.0000 to 8.0000)" in capsys.readouterr().out
