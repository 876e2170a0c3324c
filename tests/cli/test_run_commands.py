"""bitbyte runs, runs rm, train --like; what a failed start leaves; names of runs and data sets."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import FOX, names, record

from bitbyte import checkpoint, runs
from bitbyte.cli.dispatch import main
from bitbyte.data.readers import find_data
from bitbyte.evaluate import listing
from bitbyte.evaluate.records import write_record
from bitbyte.files import BitbyteError, folder_lock
from bitbyte.shards import open_dataset

SMALL = ["--n_layer=1", "--d_model=64", "--seq_len=32", "--batch_size=4", "--device=cpu"]


def run(capsys, *words: object, code: int = 0) -> str:
    """What a command prints; its one line of error where it must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code, capsys.readouterr().err
    said = capsys.readouterr()
    if code:
        assert said.err.count("\n") == 1 and said.out == ""
    return said.err if code else said.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Artifacts with a data set and three runs of it, made by name."""
    folder = tmp_path_factory.mktemp("world")
    for name, text in (("mine", FOX), ("held_out", FOX[::-1])):
        (folder / name).mkdir()
        (folder / name / "text.txt").write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITBYTE_ARTIFACTS", str(folder / "artifacts"))
        patch.chdir(folder)
        assert main(["pack", "mine", "--val_inputs", "held_out"]) == 0
        for name, family, steps in (("one", "ar", 3), ("two", "mamba", 2), ("fog", "diffusion", 2)):
            out = str(folder / "artifacts" / "checkpoints" / name)
            words = ["train", family, *SMALL, "--data", "mine", "--out", out]
            assert main([*words, "--steps", str(steps), "--no_progress", "--seed", "7"]) == 0
    return folder


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy to change, whose parent of artifacts is the working folder."""
    shutil.copytree(trained / "artifacts", tmp_path / "artifacts")
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifacts" / "checkpoints"


# --- runs


def test_runs_lists_what_is_there(world, capsys):
    when = time.time() - 3 * 86400
    os.utime(world / "one" / "step_0000003" / "meta.json", (when, when))
    (world / "empty").mkdir()
    lines = run(capsys, "runs").splitlines()
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows)[2:] == ["one", "empty"]  # the oldest, and what cannot be used
    bpb = checkpoint.read_meta(world / "one" / "step_0000003")["extra"]["val_bpb"]
    assert f"{bpb:.4f}" in rows["one"] and " <= " not in rows["one"] and " <= " in rows["fog"]
    assert "ar ternary" in rows["one"] and " 3 d " in rows["one"] and " new " in rows["two"]
    assert "mine" in rows["one"] and "holds no complete step" in rows["empty"]
    with folder_lock(world / "two"):
        assert "training now" in run(capsys, "runs")
    facts = {row["name"]: row for row in json.loads(run(capsys, "runs", "--json"))}
    assert facts["one"]["step"] == 3 and facts["one"]["bpb"] == bpb
    assert {name: facts[name]["kind"] for name in facts} == {
        "one": "exact", "two": "exact", "fog": "upper_bound", "empty": None,
    }  # fmt: skip
    size = sum(path.stat().st_size for path in (world / "one").rglob("*") if path.is_file())
    assert facts["one"]["disk_bytes"] >= size > 10_000 and not facts["one"]["in_use"]
    assert facts["one"]["preset"] is None  # its shape is its own
    assert facts["one"]["parameters"] == listing.describe(world / "one").parameters > 10_000


def test_no_runs_is_said_and_an_empty_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    assert "holds no runs" in run(capsys, "runs")
    assert json.loads(run(capsys, "runs", "--json")) == []


def test_only_an_unchanged_shape_has_the_name_of_its_preset():
    assert listing._preset({"preset": "tiny", "n_layer": None, "d_ff": None}) == "tiny"
    assert listing._preset({"preset": "tiny", "n_layer": 3}) == listing._preset({}) == ""


# --- runs rm


def test_rm_removes_runs_by_name_and_by_path(world, capsys):
    (world / "empty").mkdir()  # left by a start that failed at once
    assert "would remove" in run(capsys, "runs", "rm", "one", "empty", "--dry_run")
    assert names(world) == ["empty", "fog", "one", "two"] and ".lock" in names(world / "one")
    said = run(capsys, "runs", "rm", "one", world / "empty", "one")
    assert said.count("removed ") == 2 and names(world) == ["fog", "two"]
    document = json.loads(run(capsys, "runs", "rm", "two", "--json"))
    assert [(row["name"], row["removed"]) for row in document] == [("two", True)]
    assert names(world) == ["fog"]


@pytest.mark.parametrize("name", ["k" * 250, "\U0001f600" * 62])
def test_rm_takes_a_run_of_a_long_name(world, capsys, name):
    shutil.move(world / "one", world / name)
    run(capsys, "runs", "rm", name)
    assert names(world) == ["fog", "two"]


def test_rm_takes_what_is_damaged_and_all_that_runs_write(world, capsys):
    (world / "one" / "step_0000003" / "meta.json").write_text("{")
    (world / "one" / "step_0000009").mkdir()
    (world / "one" / "step_0000009" / "model.safetensors").write_text("torn")
    for name in ("tensorboard", "damaged-step_0000001-12", ".tmp-step_0000004-1"):
        (world / "one" / name).mkdir()
    (world / "one" / "STOP").touch()
    shutil.move(world / "two" / "step_0000002", world / "lonely")
    run(capsys, "runs", "rm", "one", "lonely")
    assert names(world) == ["fog", "two"]


def test_rm_refuses_all_if_one_may_not_be_removed(world, capsys, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "poem.txt").write_text("mine")
    (world / "two" / "notes.txt").write_text("mine")
    (world / "fog" / "step_0000002" / "poem").write_text("mine")
    (world / "link").symlink_to(world / "one", target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    for name, said in (
        ("texts", "there is no run 'texts', neither here nor in "),
        (texts, "there is no run"),
        ("nothing", "bitbyte runs lists them"),
        ("two", "holds files that no bitbyte run wrote (notes.txt)"),
        ("fog", "holds files that no bitbyte run wrote (step_0000002)"),
        ("one/step_0000003", "is one step of a run"),
        (world / "one" / "step_0000003", "is one step of a run"),
        ("link", "is a link"),
        ("", "an empty name"),
    ):
        assert said in run(capsys, "runs", "rm", "one", name, code=2), name
    assert "name the runs to remove" in run(capsys, "runs", "rm", code=2)
    with folder_lock(world / "one"):
        assert "one is in use" in run(capsys, "runs", "rm", "one", code=2)
        assert "one is in use" in run(capsys, "runs", "rm", "one", "--dry_run", code=2)
    shutil.copytree(world / "one", "one")
    assert "give the full path" in run(capsys, "runs", "rm", "one", code=2)
    shutil.rmtree("one")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_kill_while_removing_leaves_no_part_of_a_run(world, capsys):
    code = """
import os, shutil, signal, sys
from bitbyte.cli.dispatch import main
whole = shutil.rmtree
def cut(path, **options):
    whole(sorted(path.glob("step_*"))[0])
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = cut
main(["runs", "rm", "one"])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode < 0, done.stderr
    (left,) = world.glob(".trash-one-*")
    assert [row["name"] for row in json.loads(run(capsys, "runs", "--json"))] == ["fog", "two"]
    (world / ".trash-mine").mkdir()  # is not the name of one
    (world / ".trash--123").mkdir()  # of a run whose name has no character that is text
    run(capsys, "runs", "rm", "two")
    assert not left.exists() and names(world) == [".trash-mine", "fog"]


# --- train --like


def config_of(run: Path) -> dict:
    return checkpoint.read_meta(runs.resolve(run))["train"]


def test_like_begins_a_new_run_of_the_same_configuration(world, capsys, tmp_path):
    run(capsys, "train", "--like", "one", "--seed", "8", "--out", "new", "--no_progress")
    old, new = config_of(world / "one"), config_of(tmp_path / "new")
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"seed", "out", "dtype"} and new["seed"] == 8
    # What "auto" was there is the type of numbers here, on whatever machine this is.
    assert old["dtype"] == "auto" and new["dtype"] == json.loads(
        (world / "one" / "run.json").read_text()
    )["dtype"]  # fmt: skip
    run(capsys, "train", "--like=one", "--out", "same", "--no_progress")
    for name in ("model", "optim"):
        file = f"step_0000003/{name}.safetensors"
        assert (tmp_path / "same" / file).read_bytes() == (world / "one" / file).read_bytes()


def test_like_takes_the_whole_configuration_and_named_options_win(world, capsys, tmp_path):
    words = ("train", "mamba", *SMALL[:2], "--device=cpu", "--ssm", "mamba1", "--data", "mine")
    run(capsys, *words, "--steps", 4, "--curriculum", 16, 32, "--linear", "dense", "--out", "a")
    run(capsys, "train", "--like", "a", "--scan", "reference", "--seq_len", 16, "--out", "b")
    config = config_of(tmp_path / "b")
    assert config["scan"] == "reference" and config["ssm"] == "mamba1"  # checked together
    assert config["linear"] == "dense" and config["steps"] == 4
    assert config["seq_len"] == 16 and config["curriculum"] == []
    run(capsys, "train", "--like", "b", "--curriculum", 8, 16, "--steps", 2, "--out", "c")
    assert config_of(tmp_path / "c")["curriculum"] == [8, 16]
    assert config_of(tmp_path / "c")["seq_len"] is None
    run(capsys, "train", "--like", "b", "--epochs", 0.1, "--out", "d")
    assert config_of(tmp_path / "d")["steps"] is None and config_of(tmp_path / "d")["epochs"] == 0.1


def test_like_a_record_repeats_the_training(world, capsys, tmp_path):
    run(capsys, "eval", "one", "--data", "mine", "--device", "cpu")
    (path,) = (world.parent / "results").glob("*.json")
    text = path.read_text()
    command = json.loads(text)["training"]["command"].split()
    assert str(tmp_path) not in text and command[:2] == ["bitbyte", "train"]
    assert "--data mine" in " ".join(command) and "--steps 3" in " ".join(command)
    before = (world / "one" / "step_0000003" / "model.safetensors").read_bytes()
    shutil.rmtree(world / "one")  # the record is enough
    for words in (("train", "--like", path), ("train", "--like", path.stem), command[1:]):
        run(capsys, *words, "--out", "again", "--no_progress", "--allow_overwrite")
        assert (tmp_path / "again/step_0000003/model.safetensors").read_bytes() == before
    run(capsys, "train", "--like", path.name, "--steps", 1, "--out", "b", "--no_progress")
    assert config_of(tmp_path / "b")["steps"] == 1 and config_of(tmp_path / "b")["seed"] == 7


def test_like_a_packed_model(world, capsys, tmp_path):
    run(capsys, "export", "one", "one.bbm")
    run(capsys, "train", "--like", "one.bbm", "--steps", 1, "--out", "b", "--no_progress")
    assert config_of(tmp_path / "b")["seed"] == 7 and config_of(tmp_path / "b")["n_layer"] == 1


def test_like_a_record_that_does_not_say(world, capsys, tmp_path):
    folder = world.parent / "results"
    old = write_record(record())
    assert "an earlier version" in run(capsys, "train", "--like", old.stem, code=2)
    Path("list.json").write_text("[]")
    assert "is not a result record" in run(capsys, "train", "--like", "list.json", code=2)
    said = run(capsys, "train", "--like", "gone.json", code=2)
    assert said == f"error: there is no record gone.json, neither here nor in {folder}\n"


def test_like_a_run_that_saved_nothing(world, capsys, tmp_path):
    shutil.rmtree(world / "one" / "step_0000003")
    (world / "one" / "latest").unlink()
    run(capsys, "train", "--like", "one", "--out", "new", "--no_progress")
    assert config_of(tmp_path / "new")["n_layer"] == 1


def test_what_like_cannot_read_is_one_line(world, capsys):
    for words, said in (
        (("--like", "three"), "there is no run 'three', neither here nor in "),
        (("--like", "one", "--resume", "--out", world / "one"), "drop one of them"),
        (("--like", "one", "--out", world / "one"), "exists; choose another --out"),
        (("--like",), "--like"),
        (("--like", "one", "--family", "diffusion", "--scan", "fast"), "has no scan"),
    ):
        assert said in run(capsys, "train", *words, code=2), words
    shutil.rmtree(world / "one" / "step_0000003")
    (world / "one" / "latest").unlink()
    file = world / "one" / "run.json"
    good = json.loads(file.read_text())
    for change, said in (
        ({"steps": "3"}, "a steps of the wrong type"),
        ({"curriculum": ["x"]}, "a curriculum of the wrong type"),
        ({"deterministic": 1}, "a deterministic of the wrong type"),
        ({"warp": 9}, "the unknown field warp"),
    ):
        file.write_text(json.dumps(good | {"config": good["config"] | change}))
        assert said in run(capsys, "train", "--like", "one", code=2)
    for text, said in (("[]", "is not what a bitbyte run wrote"), ("{}", "does not say how")):
        file.write_text(text)
        assert said in run(capsys, "train", "--like", "one", code=2)
    file.write_text('{"config": {"lr": 1e999}}')
    assert "not valid JSON" in run(capsys, "train", "--like", "one", code=2)


# --- a start that fails leaves no trap


def test_a_tracker_that_is_missing_is_said_before_there_is_a_run(
    world, capsys, tmp_path, monkeypatch
):
    words = ("train", "ar", *SMALL, "--data", "mine", "--steps", 2, "--out", "new")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
        said = run(capsys, *words, "--tracker", "tensorboard", code=2)
    assert "tensorboard is not installed" in said and not (tmp_path / "new").exists()
    run(capsys, *words)


def test_a_run_without_a_saved_step_can_be_begun_anew(world, capsys, tmp_path, monkeypatch):
    words = ("train", "ar", *SMALL, "--data", "mine", "--steps", 2, "--no_progress", "--out", "new")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_step", fails)
        run(capsys, *words, code=1)
    assert names(tmp_path / "new") == [".lock", "metrics.jsonl", "run.json"]
    with folder_lock(tmp_path / "new"), pytest.raises(BitbyteError, match="exists"):
        runs.refuse_used(tmp_path / "new")  # it may be about to save its first step
    (tmp_path / "new" / "notes.txt").write_text("mine")
    assert "exists; choose another" in run(capsys, *words, code=2)
    (tmp_path / "new" / "notes.txt").unlink()
    run(capsys, *words)
    assert len(runs.read_metrics(tmp_path / "new")) == 1
    assert "exists; choose another" in run(capsys, *words, code=2)  # now there is something to lose
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "wandb").mkdir()  # of somebody else
    with pytest.raises(BitbyteError, match="exists"):
        runs.refuse_used(tmp_path / "other")


# --- names


def test_data_are_found_by_name(world, capsys, tmp_path):
    (tmp_path / "mine").mkdir()  # the folder of texts that was packed
    (tmp_path / "mine" / "text.txt").write_bytes(FOX)
    said = run(capsys, "train", "ar", *SMALL, "--data", "mine", "--steps", 1, "--out", "new")
    assert config_of(tmp_path / "new")["data"] == str(tmp_path / "artifacts" / "datasets" / "mine")
    assert said.endswith("new\n")
    assert "bits per byte" in run(capsys, "eval", "one", "--data", "mine", "--no_record")
    assert "mine: train 2,700 bytes" in run(capsys, "info", "mine")
    shutil.copytree(world / "one", world / "mine")
    capsys.readouterr()
    assert main(["info", "mine"]) == 0  # a run comes first, and the other is mentioned
    said = capsys.readouterr()
    assert json.loads(said.out)["step"] == 3 and "there is a data set of that name" in said.err
    assert "bits per byte" in run(capsys, "eval", "mine", "--data", "mine", "--no_record")


def test_what_is_no_data_is_said_with_both_places(world, capsys, tmp_path):
    (tmp_path / "yours").mkdir()
    places = f"and {tmp_path / 'artifacts' / 'datasets' / 'yours'} is not a data set either"
    for words in (("train", "ar", "--data", "yours"), ("eval", "one", "--data", "yours")):
        said = run(capsys, *words, code=2)
        assert "yours: holds no .bin files" in said and places in said
    (tmp_path / "yours").rmdir()
    assert "yours: no such file or folder" in run(capsys, "train", "ar", "--data=yours", code=2)
    said = run(capsys, "info", "yours", code=2)
    assert "no checkpoint 'yours' here; in " in said
    assert "nor is there a data set of that name in " in said
    assert "\n" not in said.rstrip("\n")


def test_places_of_data(tmp_path, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    packed = tmp_path / "artifacts" / "datasets" / "a"
    for folder in (packed, tmp_path / "b", tmp_path / "notebooks" / "a"):
        folder.mkdir(parents=True)
        (folder / "x.bin").write_bytes(b"x")
    assert find_data("a") == Path("a")  # here comes first
    (tmp_path / "notebooks" / "a" / "x.bin").unlink()
    assert find_data("a") == packed and find_data("b") == tmp_path / "b"
    assert find_data("b/*.bin") == Path("b/*.bin") and find_data(packed) == packed
    if os.name != "nt":  # as a shell's <(command) is
        os.mkfifo(tmp_path / "pipe")
        for reader in (find_data, lambda path: open_dataset(path, 1)):
            with pytest.raises(BitbyteError, match="pipe: it is a pipe or a device, not a file; s"):
                reader(tmp_path / "pipe")
    with pytest.raises(BitbyteError) as caught:
        find_data(tmp_path / "nowhere")
    assert "either" not in str(caught.value)  # a whole path is one place
