"""lm-evaluation-harness: models of ours in it, and tasks whose number is the one of bitbyte."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from support import CONFIGS, FOX, Bytes, save_run, sharp

from bitbyte import models, scoring
from bitbyte.cli.dispatch import main
from bitbyte.files import BitbyteError
from bitbyte.interop import export, lm_eval

HARNESS = importlib.util.find_spec("lm_eval") is not None
HF = importlib.util.find_spec("transformers") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="needs lm-eval")
FOXES = FOX[: 24 * 110]  # whole windows
TEXT = FOX[:400] + "Stra\u00dfe \u2603 \U0001f600\r\n\tend".encode()


@pytest.fixture
def run(tmp_path):
    model = sharp(CONFIGS["ar dense"], by=8.0)  # where no rounding depends on the batch
    save_run(tmp_path / "run", model)
    return tmp_path / "run"


@pytest.mark.parametrize("window", [4, 5, 17, 1024])
def test_pieces_are_the_text_cut_between_characters(window):
    parts = list(lm_eval.pieces(TEXT, window))
    assert "".join(parts).encode() == TEXT
    assert all(window - 3 <= len(part.encode()) <= window for part in parts[:-1])


def test_what_is_no_text_is_one_line(tmp_path):
    for data, said in (
        (b"abc\xff", "byte 3 .0xff. is not UTF-8"), (b"x" * 30 + b"\xc3", "byte 30 .0xc3."),
        (b"abcdefg\x80h", "byte 7 .0x80."), (b"", "no bytes"),
    ):  # fmt: skip
        with pytest.raises(BitbyteError, match=said):
            lm_eval.write_task(data, tmp_path, "task", window=8)
    for name, window, said in (("a/b", 8, "not a task's name"), ("ab", 3, "at least 4")):
        with pytest.raises(BitbyteError, match=said):
            lm_eval.write_task(b"abc", tmp_path, name, window=window)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_task(tmp_path, capfd):
    (tmp_path / "my text.txt").write_bytes(TEXT)
    limit = TEXT.index(b"\x98")  # within the snowman
    folder = tmp_path / "tasks"
    assert main(["tasks", str(tmp_path / "my text.txt"), str(folder), "--limit", str(limit)]) == 0
    assert f"{limit - 1:,} bytes" in capfd.readouterr().out
    lines = (folder / "my_text.jsonl").read_text().splitlines()
    assert "".join(json.loads(line)["text"] for line in lines).encode() == TEXT[: limit - 1]
    assert 'task: "my_text"\n' in (folder / "my_text.yaml").read_text()
    (tmp_path / "llama-3.1").mkdir()
    (tmp_path / "llama-3.1" / "val_00000.bin").write_bytes(FOX)
    assert main(["tasks", str(tmp_path / "llama-3.1"), str(folder)]) == 0
    assert (folder / "llama-3.1.yaml").is_file()
    (tmp_path / "binary").write_bytes(b"\x00\xff")
    assert main(["tasks", str(tmp_path / "binary"), str(folder)]) == 2
    assert "is not UTF-8 text" in capfd.readouterr().err


def test_tasks_are_not_overwritten_unasked(tmp_path, capfd):
    folder = tmp_path / "tasks"
    for name, data in (("one", b"first text"), ("two", b"another")):
        (tmp_path / name).write_bytes(data)
    command = ["tasks", str(tmp_path / "two"), str(folder), "--name", "val"]
    assert main(["tasks", str(tmp_path / "one"), str(folder), "--name", "val"]) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capfd.readouterr()
    assert main(command) == 2
    assert "--allow_overwrite" in capfd.readouterr().err
    (folder / "val.jsonl").unlink()
    assert main(command) == 2  # one of the two files is enough
    assert list(folder.iterdir()) == [folder / "val.yaml"]
    assert (folder / "val.yaml").read_bytes() == before[folder / "val.yaml"]
    assert main([*command, "--allow_overwrite"]) == 0
    assert json.loads((folder / "val.jsonl").read_text()) == {"text": "another"}


@pytest.mark.parametrize("name", ["123", "null", "true", "1.5", "1e5", "0x1f", "2024-01-01", "no"])
def test_any_name_stays_a_string_in_the_task(name, tmp_path):
    yaml = pytest.importorskip("yaml")
    facts = yaml.safe_load(lm_eval.write_task(b"abc", tmp_path, name).read_text())
    assert facts["task"] == name


def test_a_scorer_gives_our_numbers(run):
    scorer = lm_eval.Scorer(str(run))
    bits = scoring.score(scorer.model, Bytes(FOX)).bits
    assert scorer.rolling(FOX.decode()) == pytest.approx(-bits * np.log(2), rel=1e-9)
    assert scorer.rolling("") == 0.0
    ids = torch.tensor([[*b"the quick brown"]])
    nats = float(scorer.model(ids)[0, 9:].sum().detach())
    value, greedy = scorer.continuation("the quick", " brown")
    assert value == pytest.approx(-nats, abs=1e-5) and greedy is False
    longest = scorer.continuation("x" * 100, "y" * 24)[0]
    assert longest == pytest.approx(scorer.continuation("", "y" * 24)[0], abs=1e-5)
    assert scorer.continuation("a", "") == (0.0, True)
    with pytest.raises(BitbyteError, match="a continuation of 25 bytes"):
        scorer.continuation("", "y" * 25)


def test_text_goes_on_until_a_stop(run):
    scorer = lm_eval.Scorer(str(run))
    whole = scorer.until("the ", {"until": [], "max_gen_toks": 30})
    assert scorer.until("the ", {"until": "\ufffe", "max_gen_toks": 30}) == whole
    first = next(c for c in whole if c != "\ufffd")
    cut = scorer.until("the ", {"until": [first], "max_gen_toks": 30})
    assert cut == whole[: whole.index(first)]
    next_byte, greedy = None, [scorer.continuation("the ", chr(i))[1] for i in range(128)]
    if any(greedy):
        next_byte = chr(greedy.index(True))
        assert whole.startswith(next_byte)


def test_draws_follow_the_options_of_a_task(run):
    scorer = lm_eval.Scorer(str(run))
    greedy = scorer.until("the ", {"max_gen_toks": 20})
    draws = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
    drawn = scorer.until("the ", draws)
    assert drawn != greedy == scorer.until("the ", draws | {"do_sample": False})
    assert greedy == scorer.until("the ", draws | {"temperature": 0.0, "do_sample": None})
    assert drawn == scorer.until("the ", {"temperature": 3.0, "max_new_tokens": 20, "top_k": None})
    for one in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert scorer.until("the ", draws | one) == greedy
    for off in ({"top_k": -1}, {"top_k": 0}, {"top_k": 1000}, {"top_p": 1.0}):
        assert scorer.until("the ", draws | off) == drawn


def test_each_draw_has_a_seed_that_the_seed_of_the_task_determines(run):
    scorer = lm_eval.Scorer(str(run))
    draws = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 20}

    def texts(**more):
        return [scorer.until("the ", draws | more, draw) for draw in range(3)]

    seeds = [texts(seed=0), texts(seed=1)]
    assert len({*seeds[0], *seeds[1]}) == 6 and texts(seed=0) == seeds[0]
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)  # as the harness does by its --seed
        assert texts() == seeds[1]
    finally:
        torch.set_rng_state(state)


@needs_harness
def test_the_harness_repeats_a_request_with_other_draws(run):
    from lm_eval.api.instance import Instance

    model = lm_eval.register()(pretrained=str(run), device="cpu", batch_size="auto")
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
    request = Instance("generate_until", {}, ("the ", options), 0)
    assert len({*model.generate_until([request] * 3)}) == 3


@needs_harness
def test_unknown_model_arguments_are_refused(run):
    made = lm_eval.register()
    extra = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}  # the harness's own
    assert made.create_from_arg_obj({"pretrained": str(run), "trust_remote_code": True}, extra)
    with pytest.raises(BitbyteError, match="--model_args has dtype, window; the model"):
        made.create_from_arg_string(f"pretrained={run},window=3,dtype=float16", extra)


def test_diffusion_models_are_refused(tmp_path):
    save_run(tmp_path / "run", models.build(CONFIGS["diffusion"]))
    with pytest.raises(BitbyteError, match="is a diffusion model"):
        lm_eval.Scorer(str(tmp_path / "run"))


def harness(tmp_path, monkeypatch, model: str, arguments: dict) -> float:
    """bits_per_byte of the task in tmp_path / "tasks", without a network."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import lm_eval as theirs
    from lm_eval.tasks import TaskManager

    lm_eval.register()
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = theirs.simple_evaluate(
        model=model, model_args=arguments, tasks=["fox"], task_manager=manager, device="cpu",
        batch_size=4, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return found["results"]["fox"]["bits_per_byte,none"]


@needs_harness
@pytest.mark.parametrize("size", [24, 1024])  # documents of one window, and of many
def test_the_harness_gives_our_number(size, run, tmp_path, monkeypatch):
    lm_eval.write_task(FOXES, tmp_path / "tasks", "fox", window=size - size % 24)
    got = harness(tmp_path, monkeypatch, "bitbyte", {"pretrained": str(run)})
    want = scoring.score(lm_eval.Scorer(str(run)).model, Bytes(FOXES)).bpb
    assert got == pytest.approx(want, abs=1e-5)


@needs_harness
@pytest.mark.skipif(not HF, reason="needs transformers")
def test_the_harness_gives_our_number_for_an_exported_model(run, tmp_path, monkeypatch):
    model = lm_eval.Scorer(str(run)).model
    export.write_hf(model, tmp_path / "hf", code=True)
    lm_eval.write_task(FOXES, tmp_path / "tasks", "fox", window=24)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    arguments = {
        "pretrained": str(tmp_path / "hf"), "dtype": "float32", "trust_remote_code": True
    }  # fmt: skip
    got = harness(tmp_path, monkeypatch, "hf", arguments)
    assert got == pytest.approx(scoring.score(model, Bytes(FOXES)).bpb, abs=1e-5)
