"""Commands about one checkpoint, for every family: what they print, refuse and write."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support import FOX, brief_run

from bitbyte import vocab
from bitbyte.cli import dispatch
from bitbyte.cli.dispatch import main
from bitbyte.device import settings_kept
from bitbyte.evaluate import bootstrap


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One briefly trained model a family, and the bytes it was trained on."""
    folder = tmp_path_factory.mktemp("families")
    data = folder / "text.bin"
    data.write_bytes(FOX)
    found = {"data": str(data)}
    for family in ("ar", "mamba", "diffusion"):
        found[family] = brief_run(family, data, folder / family, steps=4, linear="dense")
    found["blocks"] = brief_run("diffusion", data, folder / "blocks", steps=4, block=4)
    return found


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("family", ["ar", "mamba", "diffusion", "blocks"])
def test_sample_and_infill(runs, family, capsys, tmp_path):
    words = (runs[family], "--prompt", "the ", "--max_new_tokens", "40", "--seed", "3")
    code, first, _ = run(capsys, "sample", *words, "--out", tmp_path / "new.bin")
    assert code == 0 and first.startswith("the ")
    assert len((tmp_path / "new.bin").read_bytes()) == 40
    assert run(capsys, "sample", *words)[1] == first
    with settings_kept():
        assert run(capsys, "sample", *words, "--threads", "2")[1] == first
    code, _, err = run(capsys, "sample", *words, "--threads", "0")
    assert code == 2 and "threads is 0; it must be at least 1" in err
    code, out, err = run(
        capsys, "infill", runs[family], "--text", "th_ quick", "--sign", "_",
        "--metrics_json", tmp_path / "m.json", "--out", tmp_path / "filled.bin",
    )  # fmt: skip
    assert code == 0 and out.startswith("th_ quick\n") and "1 of 9 bytes filled" in err
    filled = (tmp_path / "filled.bin").read_bytes()
    assert len(filled) == 9 and filled[:2] == b"th" and filled[3:] == b" quick"
    assert json.loads((tmp_path / "m.json").read_text())["hidden_bytes"] == 1


def test_a_model_of_blocks_writes_both_ways(runs, capsys, tmp_path):
    words = ("sample", runs["blocks"], "--prompt", "the ", "--max_new_tokens", "12")
    words += ("--allow_overwrite", "--out", tmp_path / "new.bin", "--metrics")
    new = {}
    for options in (
        (), ("--order", "causal"), ("--per_pass", "2"), ("--threshold", "0.5"),
        ("--order", "causal", "--slide", "block"),
    ):  # fmt: skip
        code, _, err = run(capsys, *words, *options)
        assert code == 0 and ('"torch (blocks)"' in err) is ("causal" not in options), err
        new[options] = (tmp_path / "new.bin").read_bytes()
        assert len(new[options]) == 12
    assert new["--order", "causal"] == new["--order", "causal", "--slide", "block"]
    code, _, err = run(capsys, *words, "--order", "causal", "--steps", "2")
    assert code == 2 and "the order causal has no --steps" in err
    code, _, err = run(capsys, *words, "--slide", "block")
    assert code == 2 and "of family diffusion has no --slide" in err
    code, _, err = run(capsys, *words, "--steps", "2", "--per_pass", "2")
    assert code == 2 and "steps or per_pass, not both" in err


def test_a_model_of_blocks_fills_in_three_ways(runs, capsys):
    words = ("infill", runs["blocks"], "--text", "th_ quick", "--sign", "_")
    for options, method in (
        ((), "confidence denoising in blocks of 4:"), (("--candidates", "3"), "of 4, best of 3:"),
        (("--order", "causal", "--candidates", "3"), "suffix-scored search, 3 candidates:"),
        (("--order", "causal"), "suffix-scored search, 8 candidates:"),
    ):  # fmt: skip
        code, _, err = run(capsys, *words, *options)
        assert code == 0 and method in err, err
    code, _, err = run(capsys, *words, "--order", "causal", "--steps", "2")
    assert code == 2 and "has no --steps" in err
    code, _, err = run(capsys, "infill", runs["diffusion"], *words[2:], "--candidates", "3")
    assert code == 2 and "of family diffusion has no --candidates" in err


# By place and by name, with their defaults: scripts of users count on these.
SAMPLING = {
    "temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "repetition_window": 64, "max_new_tokens": 256, "seed": 0,
}  # fmt: skip
FILES = {
    "out": None, "device": "auto", "engine": "auto", "metrics_json": None, "allow_overwrite": False,
}  # fmt: skip
OPTIONS = {
    "sample": SAMPLING | FILES | {
        "prompt": "", "prompt_file": None, "slide": None, "order": None, "steps": None,
        "per_pass": None, "threshold": None, "threads": None, "metrics": False, "json": False,
    },
    "infill": {name: value for name, value in SAMPLING.items() if name != "max_new_tokens"} | FILES
    | {
        "text": "", "text_file": None, "sign": None, "share": 0.15, "order": None, "steps": None,
        "per_pass": None, "threshold": None, "candidates": None, "json": False,
    },
    "chat": SAMPLING | {"slide": "exact", "device": "auto", "engine": "auto", "threads": None},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_write_text(name, capsys):
    """All have one set of sampling options, of the same meaning."""
    call = dispatch._parse(name, ["some run"])
    assert call.args == ("some run",)
    config = dataclasses.asdict(call.keywords.pop("config"))
    assert config == SAMPLING
    options = {k: v for k, v in config.items() if k in OPTIONS[name]} | call.keywords
    assert options == OPTIONS[name]
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert {*re.findall(r"^  --(\w+)", said, re.MULTILINE)} == {*OPTIONS[name]}
    for option in OPTIONS[name].keys() & SAMPLING.keys():
        changed = dispatch._parse(name, ["some run", f"--{option}", "1"]).keywords["config"]
        assert getattr(changed, option) == 1
    assert main([name, "some run", "--top_p", "2"]) == 2
    assert "top_p is 2.0; it must be above 0" in capsys.readouterr().err


def test_infill_knows_the_penalty_of_repetition_and_makes_as_many_bytes_as_are_hidden(runs, capsys):
    words = ("infill", runs["ar"], "--text", "the the the t\u25a1\u25a1\u25a1\u25a1\u25a1\u25a1")
    _, plain, _ = run(capsys, *words, "--temperature", "0")
    _, penalised, _ = run(capsys, *words, "--temperature", "0", "--repetition_penalty", "9")
    assert plain != penalised
    code, _, err = run(capsys, *words, "--max_new_tokens", "3")
    assert code == 2 and "--max_new_tokens" in err


def test_without_a_sign_random_bytes_are_hidden_and_it_is_said(runs, capsys):
    code, out, err = run(capsys, "infill", runs["diffusion"], "--text", "the quick brown fox")
    assert code == 0 and "3 random bytes of it are hidden" in err and "\u25a1" in out


TEXT = "f(x)\t{\u25a1}\r\n\u0646\u200c\u062f \u00adx \x1b[2J"


@pytest.mark.parametrize("on_terminal", [False, True])
def test_filled_text_can_be_piped_and_does_nothing_to_a_terminal(
    runs, on_terminal, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    (tmp_path / "text").write_bytes(TEXT.encode())
    options = ("--text_file", tmp_path / "text", "--out", tmp_path / "out")
    code, out, _ = run(capsys, "infill", runs["diffusion"], *options, "--seed", "3")
    assert code == 0
    filled = (tmp_path / "out").read_bytes().decode("utf-8", "replace")
    if on_terminal:
        assert out == f"{vocab.on_terminal(TEXT)}\n{vocab.on_terminal(filled)}\n"
        assert "\x1b" not in out and "\r" not in out
        assert "\t" in out and "\u0646\u200c\u062f \u00adx" in out
    else:
        assert out == f"{TEXT}\n{filled}\n"


def test_a_terminal_gets_no_control_characters():
    kept = "\n\ta\u0915\u094d\u200d\u0937 \u0646\u200c\u062f co\u00adop \U0001f469\u200d\U0001f467"
    assert vocab.on_terminal(kept) == kept
    for control in "\r\x1b\x07\x7f\x9b\u202e\u2066":
        assert control not in vocab.on_terminal(f"a{control}b")


@pytest.mark.skipif(os.name == "nt", reason="locales of a shell")
def test_infill_in_a_locale_without_the_default_sign(runs):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    call = [sys.executable, "-m", "bitbyte", "infill", runs["diffusion"], "--text"]
    for text, hidden in (
        (b"a b", b"1 of 3 bytes"),
        (b"\xe2\x96\xa1\xe2\x96\xa1x", b"2 of 3 bytes"),
    ):
        done = subprocess.run(
            [*call, text], env=os.environ | environment, capture_output=True, check=False
        )
        assert done.returncode == 0 and hidden in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "diffusion", "--slide", "exact"), "of family diffusion has no --slide"),
        (("sample", "mamba", "--order", "confidence"), "of family mamba has no --order"),
        (("infill", "ar", "--text", "a\u25a1", "--steps", "3"), "of family ar has no --steps"),
        (("infill", "ar"), "give the text to fill as either --text or --text_file"),
        (("infill", "diffusion", "--text", "\u25a1" * 33), "32"),
        # Every word that an option takes is in its error.
        (("infill", "diffusion", "--text", "\u25a1", "--order", "x"), "left_to_right, or, for a m"),
        (("sample", "diffusion", "--order", "x"), "for a model trained in blocks, causal"),
        (("eval", "ar", "--data", "data", "--kind", "x"), "chain_rule:confidence, exact:mixed"),
        (("eval", "none", "--data", "data", "--kind", "x"), "chain_rule:confidence, exact:mixed"),
        (("eval", "none", "--data", "data", "--kind", "exact"), "has no kind but exact:mixed"),
        (("compress", "none", "x", "y", "--mode", "x"), "portable, float, blocks, mixed"),
        (("compress", "ar", "x", "y", "--mode", "x"), "portable, float, blocks, mixed"),
        (("certify", "ar", "data", "--mode", "x"), "portable, float, blocks, mixed"),
        (("eval", "diffusion", "--data", "data", "--kind", "exact"), "has no exact cost"),
        (("eval", "ar", "--data", "data", "--kind", "chain_rule:oracle"), "no kind"),
        (("eval", "mamba", "--data", "data", "--kind", "upper_bound"), "has no upper_bound cost"),
        (("eval", "diffusion", "--data", "data", "--draws", "0"), "draws is 0"),
        (("eval", "ar", "--data", "data", "--draws", "4"), "--draws belongs to the upper bound"),
        (("eval", "ar", "--data", "data", "--per_pass", "4"), "--per_pass belongs to the chain"),
        (
            (
                "eval",
                "diffusion",
                "--data",
                "data",
                "--kind",
                "chain_rule:confidence",
                "--per_pass",
                "33",
            ),
            "per_pass is 33; a window has fewer bytes",
        ),
        (("eval", "ar", "--data", "data", "--limit", "0"), "limit is 0"),
        (("sample", "ar", "--prompt_file", "nope.txt"), "there is no file nope.txt"),
        (("compare", "nothing", "nowhere"), "there is no record nothing"),
        (("tag", "data"), "is not a checkpoint written by torch"),
        (("train", "--ssm", "mamba1", "--data", "data"), "ar models have no ssm"),
        (("train", "--d_state", "0"), "d_state is 0"),
        (("train", "--family=diffusion", "--max_mask_prob", "0.5"), "belongs to --diffusion_steps"),
        (("train", "--scan", "fast"), "family ar has no scan"),
        (("train", "--linear", "dense", "--no_act_quant"), "drop --no_act_quant"),
    ],
)
def test_mistakes_are_one_line(runs, words, said, capsys):
    code, _, err = run(capsys, *(runs.get(word, word) for word in words))
    assert code == 2
    assert said in err and err.count("\n") == 1


def test_eval_all_kinds_and_compare(runs, capsys, tmp_path):
    options = ("--data", runs["data"], "--limit", "640", "--out", tmp_path)
    kinds = ("upper_bound", "chain_rule:left_to_right", "chain_rule:confidence")
    code, out, _ = run(
        capsys, "eval", runs["diffusion"], *options, "--per_pass", "8", "--kind", *kinds
    )
    assert code == 0 and out.count("bits per byte") == 3 and out.count("<= ") == 1
    assert run(capsys, "eval", runs["ar"], *options)[0] == 0
    records = {}
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        records[record["family"], record["kind"]] = path
        assert (record["leaks"] is not None) == (record["kind"] == "exact")
    code, out, _ = run(
        capsys, "compare", records["ar", "exact"], records["diffusion", "upper_bound"]
    )
    assert code == 0 and "bits per byte (no interval): 640 bytes are too few to tell" in out
    code, out, _ = run(capsys, "eval", "uniform", *options, "--kind", "exact", *kinds)
    assert code == 0 and out.count(" 8.0000 bits per byte") == 4


def test_compare_knows_models_by_name(runs, capsys):
    for name, family, limit in (("one", "ar", 640), ("two", "mamba", 640), ("two", "mamba", 960)):
        words = ("--data", runs["data"], "--name", name, "--limit", limit)
        assert run(capsys, "eval", runs[family], *words)[0] == 0
    code, _, err = run(capsys, "compare", "one", "two")
    assert code == 2 and "two has several: two-text.bin-all-" in err
    assert "one - one: +0.0000" in run(capsys, "compare", "one", "one")[1]


def test_compare_says_what_its_interval_covers(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK_BYTES", 64)
    options = ("--data", runs["data"], "--limit", "1280", "--out", tmp_path)
    assert "95 % interval of these bytes " in run(capsys, "eval", runs["ar"], *options)[1]
    assert run(capsys, "eval", "uniform", "--kind", "exact", "--window", "32", *options)[0] == 0
    assert run(capsys, "eval", runs["mamba"], *options)[0] == 0
    paths = {json.loads(path.read_text())["family"]: path for path in tmp_path.glob("*.json")}
    # Intervals of so few bytes are not read back, but made again from the sums of blocks.
    worse = json.loads(paths["mamba"].read_text())
    worse |= {"blocks": [bits + 40 for bits in worse["blocks"]], "bpb": worse["bpb"] + 40 / 32}
    paths["mamba"].write_text(json.dumps(worse))
    said = run(capsys, "compare", paths["mamba"], paths["ar"])[1]
    assert "(95 % interval of these bytes +1." in said and "ar is better" in said
    assert said.endswith("(one training run each: another seed may reverse this)\n")
    said = run(capsys, "compare", paths["mamba"], paths["uniform"])[1]
    assert "uniform is better" in said and "seed" not in said


def test_bytes_that_were_trained_on_are_said_however_they_lie(capsys, tmp_path):
    text = np.random.default_rng(0).bytes(6000)
    for name, data in (("text", text), ("shifted", b"?" + text[1:]), ("other", text[::-1])):
        (tmp_path / name).write_bytes(data)
    words = ("--n_layer", "1", "--d_model", "64", "--seq_len", "32", "--steps", "1")
    words += ("--data", tmp_path / "text", "--eval_bytes", "320")
    note = "100% of the validation bytes are in the training data"
    for val, out, said in (("shifted", "a", True), ("other", "b", False)):
        options = ("--val_data", tmp_path / val, "--out", tmp_path / out, "--no_progress")
        assert (note in run(capsys, "train", *words, *options)[2]) is said
        assert json.loads((tmp_path / out / "run.json").read_text())["val_overlap"] == said
        options = ("--data", tmp_path / val, "--out", tmp_path / "r" / val, "--limit", "900")
        _, printed, _ = run(capsys, "eval", tmp_path / "a", *options)
        assert ("note: the model was trained on these bytes" in printed) is said
        (path,) = (tmp_path / "r" / val).glob("*.json")
        assert json.loads(path.read_text())["trained_on_it"] is said
    assert ' hashes"' in run(capsys, "info", tmp_path / "a")[1]  # and not one of them


def test_training_says_what_kind_of_number_it_has(runs, capsys, tmp_path):
    words = (
        "--data",
        runs["data"],
        "--val_data",
        runs["data"],
        "--n_layer",
        "1",
        "--d_model",
        "64",
    )
    words += ("--seq_len", "32", "--steps", "2", "--out")
    said = run(capsys, "train", "diffusion", *words, tmp_path / "d")[1]
    assert "bits per masked byte, validation <= " in said
    assert "bits per byte, validation " in run(capsys, "train", "ar", *words, tmp_path / "a")[1]
