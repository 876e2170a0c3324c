"""The command line as a user meets it: the whole path, and one clear line for every mistake."""

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bitbyte import checkpoint, files, runs, shards
from bitbyte.cli import dispatch
from bitbyte.cli.dispatch import COMMANDS, main
from bitbyte.data import corpora, pack
from bitbyte.evaluate import records, tables
from bitbyte.files import BitbyteError
from bitbyte.legacy import convert
from bitbyte.legacy.reader import read, scan, tag_all
from bitbyte.papers import build
from bitbyte.workbench import notebooks, recipes, runner

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


def test_usage_lists_every_command_beside_what_it_does(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80  # columns of a terminal
    found = list(re.finditer(r"^  (\w+(?: \w+)?)  +(\S.*)$", out, re.MULTILINE))
    summaries = {name: dispatch.summary(function) for name, function in COMMANDS.items()}
    assert {line[1]: line[2] for line in found} == summaries and len(found) == len(summaries)
    assert len({line.start(2) - line.start() for line in found}) == 1  # one column
    assert all(text[0].isupper() and text[-1] not in ".;:" for text in summaries.values())
    assert main(["--version"]) == 0


def test_the_first_steps_of_the_usage_work(tmp_path, monkeypatch, capsys):
    """Word for word, but for less training; each finds what the one before has made by its name."""
    monkeypatch.delenv("BITBYTE_ARTIFACTS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    for i in range(40):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(f"Once upon a time, {i} " * 40)
    lines = [line for line in dispatch.FIRST_STEPS.splitlines() if line.startswith("  ")]
    steps = [shlex.split(line)[1:] for line in lines]
    assert [words[0] for words in steps] == ["sample", "pack", "train", "runs", "sample"]
    for words in steps:
        if words[0] == "train":
            words[words.index("--minutes") :] = [*SMALL, "--device", "cpu"]
        if "NAME_OF_THE_RUN" in words:
            (run,) = (tmp_path / "artifacts" / "checkpoints").iterdir()
            assert run.name in capsys.readouterr().out
            words[words.index("NAME_OF_THE_RUN")] = run.name
        assert main(words) == 0, words


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: bitbyte {name}" in capsys.readouterr().out


@pytest.mark.parametrize("group", dispatch.GROUPS)
def test_help_does_without_torch(group):
    """It takes seconds to import; so the list of commands, and all that a parser needs, lack it."""
    code = f"""
import sys
from bitbyte.cli.dispatch import main
main([])
for name in {[*dispatch.GROUPS[group]]}:
    try:
        main([*name.split(), "--help"])
    except SystemExit:
        print(sorted({{"torch", "numpy"}} & sys.modules.keys()), file=sys.stderr)
"""
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, check=True, text=True)
    assert done.stderr == "[]\n" * len(dispatch.GROUPS[group])
    assert all(f"usage: bitbyte {name}" in done.stdout for name in dispatch.GROUPS[group])


def test_config_does_without_torch():
    code = "import sys, bitbyte.config; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "set()\n"


def test_a_misspelt_command_gets_the_one_meant(capsys):
    assert fails(capsys, "trian", "ar").endswith("no command 'trian'; did you mean train?")
    assert "no command 'paint'; choose from pack, " in fails(capsys, "paint")


def test_help_in_the_narrowest_terminal_ends():
    environment = os.environ | {"COLUMNS": "1"}
    call = [sys.executable, "-m", "bitbyte", "pack", "--help"]
    done = subprocess.run(call, env=environment, capture_output=True, check=True, timeout=120)
    assert b"usage" in done.stdout


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
        assert main([*command, "--out", str(out), "--device", "cpu", "--allow_overwrite"]) == 0
        assert len(out.read_bytes()) == 40


def test_a_prompt_from_standard_input(world, tmp_path, monkeypatch, capfdbinary):
    command = ["sample", str(world / "run"), "--max_new_tokens", "9", "--device", "cpu"]
    assert main([*command, "--prompt", "the cat"]) == 0
    wanted = capfdbinary.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert main([*command, "--prompt_file", "-"]) == 0
    assert capfdbinary.readouterr().out == wanted
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b"the cat"))
        writer.start()
        assert main([*command, "--prompt_file", str(tmp_path / "pipe")]) == 0
        writer.join(30)
        assert capfdbinary.readouterr().out == wanted


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


@pytest.mark.parametrize(
    "call",
    [
        runs.resolve, read, scan, recipes.dataset, notebooks.find_notebooks,
        lambda path: list(tag_all(path, write=True)),
        lambda path: convert.convert("x.pt", path),
        lambda path: pack.pack([b"x"], path),
        lambda path: runner.run_notebooks([], out=path),
    ],
)  # fmt: skip
def test_an_empty_path_is_not_the_folder_here(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "01_x.ipynb").write_text("{}")
    with pytest.raises(BitbyteError, match="an empty name is not a file or folder"):
        call("")
    assert [path.name for path in tmp_path.iterdir()] == ["01_x.ipynb"]


def test_memory_that_torch_does_not_get_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(dispatch.COMMANDS, "info", lambda: torch.empty(2**55))
    assert "out of memory: " in fails(capsys, "info", code=1)

    def bug():
        raise RuntimeError("shapes do not fit")

    monkeypatch.setitem(dispatch.COMMANDS, "info", bug)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["info"])


def damaged(world: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the run of its own."""
    return Path(shutil.copytree(world / "run", tmp_path / name))


def test_damaged_checkpoints_are_refused_by_name(world, tmp_path, capsys):
    from bitbyte.runs import read_plain_json

    def edit(name, change):
        run = damaged(world, tmp_path, name)
        path = runs.resolve(run) / "meta.json"
        _, meta = read_plain_json(path)
        meta.pop("sha256")
        path.write_bytes(checkpoint.seal(change(meta)))
        return run

    flipped = damaged(world, tmp_path, "flipped")
    model = runs.resolve(flipped) / "model.safetensors"
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
    meta, tensors, _ = checkpoint.load_step(runs.resolve(world / "run"))
    tensors["embed"][3, 4] = math.nan
    keep = ("model_family", "variant", "config", "train", "bytes_seen", "rng", "data", "extra")
    run = tmp_path / "nan"
    run.mkdir()
    checkpoint.save_step(run, 6, tensors, {}, {key: meta[key] for key in keep})
    assert "NaN" in fails(capsys, "sample", run)


def test_edited_and_truncated_shards_are_refused(world, tmp_path, capsys):
    for name, change in (("cut", lambda raw: raw[:-1]), ("edit", lambda raw: b"X" + raw[1:])):
        copy = Path(shutil.copytree(world / "packed", tmp_path / name))
        shard = copy / "shard_00000.bin"
        shard.write_bytes(change(shard.read_bytes()))
        arguments = ["train", "ar", *SMALL, "--out", tmp_path / f"run-{name}", "--device", "cpu"]
        assert "shard_00000.bin" in fails(capsys, *arguments, "--data", copy)


@pytest.mark.root
@pytest.mark.parametrize(
    ("small_disk", "said"),
    [("size=64k", "No space left"), ("ro", "ead-only")],
    indirect=["small_disk"],
)
def test_full_or_read_only_disk_fails_cleanly(world, small_disk, capsys, said):
    arguments = ["train", "ar", *SMALL, "--data", world / "packed", "--device", "cpu"]
    assert said in fails(capsys, *arguments, "--out", small_disk / "run", code=1)


def test_uniform_checkpoint_scores_eight(world, tmp_path, capsys):
    meta, tensors, _ = checkpoint.load_step(runs.resolve(world / "run"))
    keep = ("model_family", "variant", "config", "train", "bytes_seen", "rng", "data", "extra")
    run = tmp_path / "uniform"
    run.mkdir()
    blank = tensors | {"embed": torch.zeros_like(tensors["embed"])}
    checkpoint.save_step(run, 6, blank, {}, {key: meta[key] for key in keep})
    data = str(world / "packed")
    assert main(["eval", str(run), "--data", data, "--no_record", "--device", "cpu"]) == 0
    assert "8.0000 bits per byte (too few bytes for an interval)" in capsys.readouterr().out


# --- outputs


def test_results_are_refused_before_the_work_and_written_through_links(
    world, tmp_path, capsys, monkeypatch
):
    run, text = world / "run", world / "in" / "00.txt"
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "curve.png").write_bytes(b"mine")
    commands = (
        ("sample", run, "--out", mine),
        ("sample", run, "--metrics_json", mine),
        ("infill", run, "--text", "abc", "--out", mine),
        ("infill", run, "--text", "abc", "--metrics_json", mine),
        ("entropy", run, text, "--out", mine),
        ("bench", "loader", "--out", mine),
        ("corpus", "stories", "--out", mine),
        ("results", run, "--plot", tmp_path / "curve"),
    )
    with monkeypatch.context() as patch:
        for module, name in ((checkpoint, "load_model"), (checkpoint, "read_metrics")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("it worked before it looked"))
        patch.setattr(tables, "bpb_table", lambda _: "")
        for words in commands:
            assert "exists; choose another name, or --allow_overwrite" in fails(capsys, *words)
    assert mine.read_bytes() == b"mine" == (tmp_path / "curve.png").read_bytes()
    if os.name != "nt":
        (tmp_path / "link").symlink_to(mine)
        (tmp_path / "curve.png").unlink()
        (tmp_path / "curve.png").symlink_to(tmp_path / "far.png")
        assert main(["results", str(run), "--plot", str(tmp_path / "curve")]) == 0
        assert (tmp_path / "curve.png").is_symlink() and (tmp_path / "far.png").is_file()
        mine.chmod(0o600)
        link = ["--out", str(tmp_path / "link"), "--allow_overwrite"]
        for words in (
            ["sample", run, "--max_new_tokens", "3"],
            ["infill", run, "--text", "abc"],
            ["entropy", run, text, "--limit", "9"],
            ["corpus", "stories", "--n_bytes", "300"],
        ):
            before = mine.read_bytes()
            assert main([*map(str, words), *link]) == 0
            assert (tmp_path / "link").is_symlink() and mine.read_bytes() != before
            assert mine.stat().st_mode & 0o777 == 0o600


def test_the_prompt_is_not_printed_before_an_error(world, capsys):
    fails(capsys, "sample", world / "run", "--prompt", "the cat", "--slide", "nosuch")
    assert main(["sample", str(world / "run"), "--prompt", "the cat", "--slide", "nosuch"]) == 2
    assert capsys.readouterr().out == ""


def test_readme_keeps_all_that_is_not_the_table(world, tmp_path, capsys):
    path = tmp_path / "R.md"
    head = "\ufeff# caf\u00e9\r\n<!-- results -->"
    tail = "<!-- end of results -->\r\nthe end"
    path.write_bytes(f"{head}\r\nold\r\n{tail}".encode())
    command = ["results", "--readme", str(path)]
    if os.name != "nt":
        path.chmod(0o640)
        (tmp_path / "link").symlink_to(path)
        command[-1] = str(tmp_path / "link")
    for _ in range(2):
        assert main(command) == 0
        text = path.read_bytes().decode()
        assert text.startswith(head) and text.endswith(tail) and "old" not in text
        assert text.count("\n") == text.count("\r\n") > 2
    if os.name != "nt":
        assert (tmp_path / "link").is_symlink() and path.stat().st_mode & 0o777 == 0o640
    path.write_bytes(b"a\n<!-- results -->\n<!-- end of results -->\n")
    assert main(command) == 0 and b"\r" not in path.read_bytes()
    path.write_bytes(b"caf\xe9")
    assert "R.md is not UTF-8 text" in fails(capsys, *command[:2], path)
    assert "there is no file" in fails(capsys, *command[:2], tmp_path / "no.md")


@pytest.mark.parametrize("long", ["n" * 300, "\u00e9" * 300, "caf\udce9"])
def test_a_score_is_not_lost_for_a_name(world, tmp_path, capsys, long):
    data = tmp_path / ("d" * 250)
    data.write_bytes(b"the cat sat on the mat. " * 20)
    words = ["eval", str(world / "run"), "--data", str(data), "--name", long]
    assert main([*words, "--out", str(tmp_path / "records"), "--device", "cpu"]) == 0
    (path,) = (tmp_path / "records").iterdir()
    assert len(path.name) < 143 and str(path) in capsys.readouterr().out
    record = json.loads(path.read_bytes())
    assert record["data"]["path"] == data.name and record["model"] == files.shown(long)
    assert f"there is no record {files.shown(long)}" in fails(capsys, "compare", long, long)
    paths = [records.write_record(record | {"bpb": bpb}, tmp_path) for bpb in (1.0, 2.0)]
    assert paths[0] != paths[1]
    records.write_record(record)  # to artifacts/results, where models are found by name
    assert main(["compare", str(path), long]) == 0


def test_eval_refuses_a_file_for_its_records_and_an_empty_one_for_its_data(world, tmp_path, capsys):
    (tmp_path / "empty").touch()
    eval_run = ("eval", world / "run", "--data")
    line = fails(capsys, *eval_run, world / "packed", "--out", tmp_path / "empty")
    assert "is not a folder" in line
    line = fails(capsys, *eval_run, tmp_path / "empty")
    assert "empty is empty" in line and "seq_len" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_text(world, tmp_path, monkeypatch, capsys):
    """In data, run, records and the working folder; and the run can go on."""
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / odd).mkdir()
    monkeypatch.chdir(tmp_path / odd)
    shutil.copy(world / "in" / "00.txt", odd)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / odd / "artifacts"))
    train = ["train", "ar", "--out", odd + "-run", "--device", "cpu"]
    assert main([*train, "--data", odd, *SMALL, "--stop_after", "3"]) == 0
    assert main([*train, "--resume"]) == 0
    assert runs.latest_step(Path(odd + "-run")) == 6
    assert capsys.readouterr().out.endswith("caf\\xe9-run\n")
    assert main(["eval", odd + "-run", "--data", odd, "--device", "cpu"]) == 0
    assert main(["results", odd + "-run", "--plot", "curve"]) == 0
    assert "caf\\xe9-run" in capsys.readouterr().out
    assert list(json.loads(Path("curve.json").read_bytes())["rows"]) == [odd + "-run"]


# --- paths


NOBODY = "~nobody-of-this-name/x"


@pytest.mark.skipif(os.name == "nt", reason="Windows makes up a home for any name")
def test_the_home_of_nobody_is_one_line_everywhere(world, capsys, monkeypatch):
    run = str(world / "run")
    for words in (
        ("sample", NOBODY),
        ("sample", run, f"--prompt_file={NOBODY}"),
        ("sample", run, f"--out={NOBODY}"),
        ("infill", run, f"--text_file={NOBODY}"),
        ("eval", run, f"--data={NOBODY}"),
        ("eval", run, "--data=x", f"--out={NOBODY}"),
        ("train", "ar", f"--data={NOBODY}"),
        ("train", "ar", f"--data={world / 'packed'}", f"--val_data={NOBODY}"),
        ("train", "ar", f"--data={world / 'packed'}", f"--out={NOBODY}"),
        ("train", "ar", f"--out={NOBODY}", "--resume"),
        ("pack", NOBODY),
        ("pack", run, f"--val_inputs={NOBODY}"),
        ("pack", run, f"--out={NOBODY}"),
        ("corpus", "stories", f"--out={NOBODY}"),
        ("results", f"--readme={NOBODY}"),
        ("results", run, f"--plot={NOBODY}"),
        ("results", NOBODY, "--plot=x"),
        ("run", NOBODY),
        ("run", f"--out={NOBODY}"),
        ("run", f"--resume={NOBODY}"),
        ("bench", f"--out={NOBODY}"),
        ("compare", NOBODY, "x"),
        ("tag", NOBODY),
        ("tag", run, f"--convert={NOBODY}"),
        ("info", NOBODY),
        ("entropy", run, NOBODY),
        ("entropy", run, __file__, f"--out={NOBODY}"),
        ("chat", NOBODY),
        ("papers", f"{NOBODY}.md"),
        ("compress", run, NOBODY, "x"),
        ("compress", run, __file__, NOBODY),
        ("decompress", NOBODY, "x"),
        ("certify", run, NOBODY),
        ("certify", run, __file__, f"--out={NOBODY}"),
    ):
        assert "no home folder is known for ~nobody-of-this-name" in fails(capsys, *words), words
    monkeypatch.setenv("BITBYTE_ARTIFACTS", NOBODY)
    assert "no home folder" in fails(capsys, "results")


def test_a_path_is_not_the_name_of_a_corpus(world, tmp_path, monkeypatch, capsys):
    """Nor a name that has a meaning of its own elsewhere, of a run, say."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("stories", b"mine"), ("stdlib", b"ours"), ("a.txt", b"theirs")):
        Path(name).mkdir()
        Path(name, "x.txt").write_bytes(data)
    Path("hf:x.jsonl").write_text('{"text": "records"}')
    for i, (words, split, data) in enumerate((
        (["./stories"], "shard", b"mine"), (["stories/"], "shard", b"mine"),
        ([str(tmp_path / "stories")], "shard", b"mine"), (["./stdlib"], "shard", b"ours"),
        (["./hf:x.jsonl"], "shard", b"records\0"),
        (["a.txt", "--val_inputs", "./stories"], "val", b"mine"),
        (["stories", "a.txt"], "shard", b"mine" + b"theirs"),  # a mix is of files
    )):  # fmt: skip
        assert main(["pack", *words, "--out", f"out{i}", "--val_fraction", "0"]) == 0
        assert Path(f"out{i}", f"{split}_00000.bin").read_bytes() == data, words
    assert main(["pack", "stories", "--max_bytes", "5000", "--out", "out"]) == 0
    assert "write ./stories" in capsys.readouterr().err
    assert json.loads(Path("out", "manifest.json").read_bytes())["source"]["kind"] == "stories"
    Path("latest").mkdir()
    line = fails(capsys, "run", "--resume", "./latest")
    assert f"{tmp_path / 'latest'}: no run to resume" in line
    assert "./01: no notebook found" in fails(capsys, "run", "./01")


def test_options_that_would_be_ignored_are_refused(world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text, other = (world / "in" / name for name in ("00.txt", "01.txt"))
    held_out = ["pack", text, "--val_inputs", other]
    for words, said in (
        ([*held_out, "--val_fraction", "0.5"], "--val_fraction: no effect with --val_inputs"),
        ([*held_out, "--whole_files"], "--whole_files: no effect with --val_inputs"),
        (["pack", text, "--seed", "9"], "--seed: no effect without the built-in stories"),
        (["pack", "stdlib", "--seed", "9"], "--seed: no effect without the built-in stories"),
        (["pack", text, "--include", "*"], "--include: no effect without a folder to look into"),
        (["pack", "stories", "--workers", "7"], "--workers: no effect without files"),
        (["pack", "stdlib", "--max_unpacked", "7"], "--max_unpacked: no effect without files"),
    ):
        assert said in fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []
    Path("held").mkdir()
    Path("held", "a.txt").write_bytes(b"held out " * 99)
    for i, words in enumerate((  # what is used by one of two
        ["stories", "--max_bytes", "3000", "--seed", "9", "--workers", "2", "--val_inputs", text],
        [text, "--workers", "2", "--max_unpacked", "999999", "--val_fraction", "0.5"],
        [text, "--val_inputs", "held", "--include", "a*"],
        [text, "--val_inputs", other, "--val_fraction", "0.05", "--seed", "0", "--workers", "1"],
    )):  # fmt: skip
        assert main(["pack", *map(str, words), "--out", str(i)]) == 0, words


def test_an_empty_argument_is_not_the_folder_here(world, capsys, monkeypatch, tmp_path):
    run, packed = str(world / "run"), str(tmp_path / "packed")
    monkeypatch.chdir(world / "in")
    assert main(["compress", run, "00.txt", packed]) == 0
    inside = sorted(path.name for path in (world / "in").iterdir())
    for words in (
        ("sample", ""), ("sample", run, "--out="), ("sample", run, "--prompt_file="),
        ("eval", run, "--data="), ("train", "ar", "--data="), ("pack", "", "--out", tmp_path),
        ("pack", "00.txt", "--val_inputs", ""), ("tag", ""), ("tag", "--ckpt="),
        ("entropy", run, ""), ("compress", run, "00.txt", ""), ("results", "--readme="),
        ("train", "ar", "--data", "00.txt", "--out="), ("train", "ar", "--smoke_test", "--out="),
        ("train", "ar", "--out=", "--resume"), ("entropy", run, "00.txt", "--against="),
        ("info", ""), ("decompress", packed, "back", "--ckpt="), ("pack", "--hf="),
        ("papers", "--out="), ("run", "--out="), ("run", "--resume="),
        ("tag", run, "--convert="), ("certify", run, "00.txt", "--out="),
    ):  # fmt: skip
        assert "an empty name is not a file or folder" in fails(capsys, *words), words
    for words, said in (
        (("eval", run, "--data", "00.txt", "--name="), "empty name is not that of a model"),
        (("pack", "00.txt", "--hf="), "give inputs or --hf, not both"),
        (("pack", "00.txt", "--name="), "name '' is a configuration of a Hugging Face set"),
        (("pack", "00.txt", "--field="), "has no field ''"),
        (("sample", run, "--slide="), "slide"), (("papers", "--format="), "no format"),
    ):  # fmt: skip
        assert said in fails(capsys, *words), words
    assert sorted(path.name for path in (world / "in").iterdir()) == inside


@pytest.mark.parametrize("place", ["file", "file/inside", "device"])
def test_an_output_folder_that_is_none_is_the_users_mistake(
    world, tmp_path, capsys, monkeypatch, place
):
    for module, name, inputs in (
        (build, "need_extra", None), (build, "find_papers", []), (runner, "need_workbench", None),
        (runner, "find_notebooks", []),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, inputs=inputs: inputs)
    (tmp_path / "file").touch()
    out = Path(os.devnull) if place == "device" else tmp_path / place
    wrong = out.parent if place == "file/inside" else out
    text = world / "in" / "00.txt"
    for words in (
        ("pack", text), ("train", "ar", *SMALL, "--data", text, "--allow_overwrite"),
        ("eval", "uniform", "--data", text), ("run", "01"), ("papers", "x", "--format", "md"),
        ("certify", world / "run", text),
    ):  # fmt: skip
        line = fails(capsys, *words, "--out", out)
        assert f"{wrong} is not a folder" in line or f"{wrong} exists and is not a run" in line


def test_home_of_a_data_set_is_found(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"text": "records"}')
    assert main(["pack", "--hf=~/x.jsonl", "--val_fraction=0", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "shard_00000.bin").read_bytes() == b"records\0"
    assert b"".join(next(corpora.hf_documents("~/x.jsonl")).chunks) == b"records"
    for place in ("~/x.jsonl", "~/out"):
        assert shards.open_dataset(place, 1).n_bytes
    assert shards.verify("~/out") == shards.manifest_of("~/out")


def test_home_is_found_behind_an_equals_sign_too(world, tmp_path, monkeypatch, capsys):
    """A shell only expands it at the beginning of a word."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(world))
    train = ["train", "ar", "--data=~/packed", "--val_data=~/packed", "--out=~/at-home"]
    assert main([*train, *SMALL, "--device=cpu"]) == 0
    config = checkpoint.read_meta(runs.resolve(world / "at-home"))["train"]
    assert config["data"] == str(world / "packed") == config["val_data"]
    words = ["eval", "~/at-home", "--data=~/packed", "--out=~/records", "--device=cpu"]
    assert main(words) == 0 and list((world / "records").iterdir())


# --- streams


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe whose reader has ended."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output")])
def test_training_goes_on_when_nobody_watches(world, tmp_path, monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Gone(error))
    monkeypatch.setattr(dispatch.os, "dup2", lambda *_: None)
    monkeypatch.setattr(Gone, "fileno", lambda _: 2)
    words = ["train", "ar", "--data", world / "packed", "--out", tmp_path / "run", *SMALL]
    assert main([*map(str, words), "--device", "cpu"]) == 0
    assert runs.latest_step(tmp_path / "run") == 6
    assert isinstance(sys.stderr, Gone)  # as before


def bitbyte(*words, unbuffered="", **streams) -> subprocess.CompletedProcess:
    """``bitbyte`` in a process of its own, for what happens on the way out."""
    return subprocess.run(
        [sys.executable, "-m", "bitbyte", *map(str, words)], check=False, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, **streams,
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="pipes of a shell")
@pytest.mark.parametrize(("word", "unbuffered"), [("--help", ""), ("--help", "1"), ("pack", "")])
def test_a_reader_that_has_gone(word, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    words = [word] if word == "--help" else [word, "--help"]
    done = bitbyte(*words, unbuffered=unbuffered, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [("--help",), ("pack", "--help"), ("sample", "--max_new_tokens=3")]
)
def test_standard_output_on_a_full_disk(world, words, unbuffered):
    words = [*words, world / "run"] if words[0] == "sample" else words
    with open("/dev/full", "w") as full:
        done = bitbyte(*words, unbuffered=unbuffered, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == "failed: No space left on device: standard output\n"


@pytest.mark.skipif(os.name == "nt", reason="streams by number")
def test_streams_that_are_not_there(world, tmp_path):
    words = ("train", "ar", "--data", world / "packed", "--out", tmp_path / "run", *SMALL)
    done = bitbyte(
        *words, "--device", "cpu", stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)
    )
    assert done.returncode == 0 and done.stdout.endswith(f"{tmp_path / 'run'}\n")

    def close_all():
        for number in range(3):
            os.close(number)

    words = ("sample", tmp_path / "run", "--max_new_tokens", "5", "--out", tmp_path / "new")
    assert bitbyte(*words, preexec_fn=close_all).returncode == 0
    assert len((tmp_path / "new").read_bytes()) == 5
    code = (
        "import sys; from bitbyte.cli import dispatch\n"
        "with dispatch._streams(), open(sys.argv[1], 'wb') as file: sys.exit(file.fileno())"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(call, check=False, preexec_fn=close_all).returncode > 2


def test_a_name_in_an_error_does_nothing_to_the_terminal(capsys):
    assert "a\\x1bc: no such file" in fails(capsys, "train", "ar", "--data", "a\x1bc")


def test_the_next_step_is_suggested_on_a_terminal(tmp_path, monkeypatch, capsys):
    """By name where that is enough, by path elsewhere; not into pipes."""
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"the old mill " * 900)
    elsewhere, known = tmp_path / "a b", tmp_path / "artifacts" / "datasets" / "mill"
    assert main(["pack", "text", "--out", str(known)]) == 0
    assert "next:" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["pack", "text", "--out", str(elsewhere)]) == 0
    assert f"next: bitbyte train ar --data '{elsewhere}'" in capsys.readouterr().out
    words = ["train", "ar", "--data", "mill", "--out", "run", *SMALL, "--device", "cpu"]
    assert main([*map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "next: bitbyte sample run --prompt" in out and "bitbyte eval run --data mill" in out
