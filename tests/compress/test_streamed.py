"""A model in the mixer: the same counts for encoder and decoder, files, refusals."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from support import FOX, save_run
from test_compress import TERNARY, built, drawn
from test_integer import by_formula

from bitbyte.cli.dispatch import main
from bitbyte.compress import mixed, streamed
from bitbyte.compress.mixer import codec
from bitbyte.compress.mixer.shapes import Shape
from bitbyte.config import DiffusionConfig, MambaConfig
from bitbyte.files import BitbyteError
from bitbyte.kernels import engine
from bitbyte.models import build
from bitbyte.vocab import START

WINDOW = TERNARY.seq_len
SIZES = (1 << 12, 14)  # buckets and ring bits of small mixers
MAMBA = MambaConfig(n_layer=1, d_model=64, seq_len=32, d_state=16)
TEXT = drawn(built(TERNARY), 700)
GOLDEN = {("ar", 2): "77f93dee", ("ar", 4): "6788dc82", ("mamba1", 4): "359daa89"}


@pytest.fixture(scope="module")
def model():
    return built(TERNARY)


NAMED = streamed.NAMED


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """The toy models save less of a short text than their name costs; here they may join anyway."""
    monkeypatch.setattr(streamed, "NAMED", 0)


def expert_of(model):
    return streamed.Expert(model)


@pytest.mark.parametrize("config", [TERNARY, MAMBA], ids=["ar", "mamba"])
@pytest.mark.parametrize("cuts", [(700,), (1, 2, 31, 32, 33, 64, 500, 700), (16, 48, 700)], ids=str)
def test_known_bytes_cost_what_unknown_ones_do(config, cuts):
    model = built(config)
    one, other, made = expert_of(model), expert_of(model), []
    for start, stop in zip((0, *cuts), cuts, strict=False):
        made += list(one.known(np.frombuffer(TEXT[start:stop], np.uint8)))
    made = np.concatenate(made)
    assert made.shape == (700, 256) and made.dtype == np.int32 and made.min() >= 1
    for i, byte in enumerate(TEXT):
        assert np.array_equal(other.next()[0], made[i]), i
        other.take(byte)


@pytest.mark.parametrize("kept", [2, 4])
def test_what_a_transformer_sees(model, kept):
    """START and all bytes of its window, which begins anew with the newest ones when it is full."""
    expert = streamed.Expert(model, None, kept)
    counts = np.concatenate(list(expert.known(np.frombuffer(TEXT, np.uint8))))
    with torch.no_grad():
        native = engine.engine_for(model)
    new = WINDOW - WINDOW // kept  # bytes of a window after the first
    for i in (0, 1, WINDOW - 1, WINDOW, WINDOW + 5, WINDOW + new - 1, WINDOW + new, 3 * WINDOW):
        begin = ((i - WINDOW) // new + 1) * new if i >= WINDOW else 0
        ids = torch.tensor([[START, *TEXT[begin:i]]])
        assert np.array_equal(native.counts(ids)[0, -1], counts[i].view(np.uint32)), i


@pytest.mark.parametrize("config", [
    TERNARY, dataclasses.replace(TERNARY, linear="dense"), MAMBA,
    dataclasses.replace(MAMBA, prior="counts", prior_rows=1024),
])  # fmt: skip
def test_files_come_back(config, tmp_path):
    model, source, packed, back = built(config), *(tmp_path / name for name in "spb")
    source.write_bytes(drawn(model, 3000))
    done = mixed.compress([source], packed, expert=expert_of(model))
    assert done.with_model and done.size < 2400
    again = mixed.decompress(
        packed, back, expert=lambda h: streamed.expert_for(h, model, None, "p")
    )
    assert back.read_bytes() == source.read_bytes() and again.with_model


@pytest.mark.parametrize("config", [TERNARY, MAMBA], ids=["ar", "mamba"])
@pytest.mark.parametrize("kept", [2, 4])
def test_one_loop_of_machine_code_decodes(config, kept, monkeypatch):
    """What is decoded byte by byte in Python comes from one call per window, too."""
    model, data = built(config), np.frombuffer(drawn(built(config), 900), np.uint8)
    code = codec.Codec(*SIZES, streamed.Expert(model, None, kept)).encode(data, Shape())
    one, ticks = codec.Codec(*SIZES, streamed.Expert(model, None, kept)), []
    with monkeypatch.context() as patch:
        patch.setattr(streamed.Expert, "next", None)  # would raise
        assert np.array_equal(one.decode(code, len(data), Shape(), ticks.append), data)
    assert sum(ticks) == len(data) and len(ticks) < 60
    monkeypatch.setattr(streamed.Expert, "follow", property())  # raises AttributeError
    two = codec.Codec(*SIZES, streamed.Expert(model, None, kept))
    assert np.array_equal(two.decode(code, len(data), Shape()), data)
    again = one.encode(data[:200], Shape())  # what comes next costs both the same
    assert again == two.encode(data[:200], Shape())


def test_a_broken_model_ends_decoding(monkeypatch):
    model, data = built(TERNARY), np.frombuffer(TEXT[:100], np.uint8)
    code = codec.Codec(*SIZES, expert_of(model)).encode(data, Shape())
    broken = expert_of(model)
    broken._state.engine.head.packed[:] = np.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        codec.Codec(*SIZES, broken).decode(code, len(data), Shape())


def test_a_model_that_does_not_help_is_left_out(model, tmp_path):
    source, packed = tmp_path / "s", tmp_path / "p"
    source.write_bytes(np.random.default_rng(0).bytes(4000))
    done = mixed.compress([source], packed, expert=expert_of(model))
    assert not done.with_model
    mixed.decompress(packed, tmp_path / "b")  # needs none
    assert (tmp_path / "b").read_bytes() == source.read_bytes()


def test_a_file_with_a_model_is_never_longer(model, tmp_path, monkeypatch):
    """What a model saves of little text may be less than its name takes in the header."""
    monkeypatch.setattr(streamed, "NAMED", NAMED)
    expert, used, text = expert_of(model), [], drawn(model, 5000)
    for n in (9, 30, 60, 90, 120, 200, 700, 5000):
        (tmp_path / "s").write_bytes(text[:n])
        one, other = (
            mixed.compress([tmp_path / "s"], tmp_path / "p", expert=e, allow_overwrite=True)
            for e in (None, expert)
        )
        assert other.size < one.size if other.with_model else other.size == one.size, n
        used.append(other.with_model)
    assert used[-1] and not used[0]


def test_the_right_model_is_needed(model, tmp_path, monkeypatch):
    source, packed, back = (tmp_path / name for name in "spb")
    source.write_bytes(TEXT)
    mixed.compress([source], packed, expert=expert_of(model))
    with pytest.raises(BitbyteError, match=r"needs the model .*name it with --ckpt"):
        mixed.decompress(packed, back)
    with pytest.raises(BitbyteError, match="made with another model"):
        mixed.decompress(
            packed, back, expert=lambda h: streamed.expert_for(h, built(TERNARY, 1), None, "p")
        )
    monkeypatch.setattr(streamed.NativePredictor, "__init__", _another_fingerprint)
    with pytest.raises(BitbyteError, match="the numbers differ"):
        mixed.decompress(packed, back, expert=lambda h: streamed.expert_for(h, model, None, "p"))
    assert not back.exists()


_init = streamed.NativePredictor.__init__


def _another_fingerprint(self, model):
    _init(self, model)
    self.fingerprint = bytes(16)


@pytest.mark.parametrize(("kind", "kept"), GOLDEN)
def test_golden_files(kind, kept, tmp_path, monkeypatch):
    """The bytes of a file are the same on every machine, and files of both kinds come back."""
    shape = {"d_model": 64, "n_head": 8} if kind != "ar" else {}
    source, packed = tmp_path / "s", tmp_path / "p"
    source.write_bytes(FOX[:900] + bytes(range(256)) + FOX[:100])
    model = by_formula(kind, **shape)
    expert = streamed.Expert(model, None, kept)
    name = expert.names[0]
    expert.names = (bytes(16),)
    monkeypatch.setattr(streamed, "helps", lambda expert, sample: True)
    mixed.compress([source], packed, expert=expert)
    data = packed.read_bytes()
    assert hashlib.sha256(data).hexdigest()[:8] == GOLDEN[kind, kept]
    monkeypatch.setattr(streamed, "model_names", lambda model, meta: (bytes(16), name))
    mixed.decompress(
        packed, tmp_path / "b", expert=lambda h: streamed.expert_for(h, model, None, "p")
    )
    assert (tmp_path / "b").read_bytes() == source.read_bytes()


def test_why_not(model):
    assert streamed.problem(model) is None
    diffusion = build(DiffusionConfig(n_layer=1, d_model=64, d_ff=64, n_head=2, seq_len=32))
    assert "no next byte" in streamed.problem(diffusion)
    engine.choose(model, "torch")
    try:
        assert "native engine" in streamed.problem(model)
        with pytest.raises(BitbyteError, match="cannot be mixed here"):
            expert_of(model)
    finally:
        engine.choose(model, "auto")


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    model = built(TERNARY)
    save_run(tmp_path / "a" / "checkpoints" / "run", model)
    (tmp_path / "folder").mkdir()
    for name in "xy":
        (tmp_path / "folder" / name).write_bytes(drawn(model, 900, seed=ord(name)))
    assert main(["compress", "run", "folder/x", "packed"]) == 0
    assert "with the model" in capsys.readouterr().out
    assert main(["test", "packed"]) == 0
    assert main(["decompress", "packed", "back"]) == 0  # finds the model
    assert (tmp_path / "back").read_bytes() == (tmp_path / "folder" / "x").read_bytes()
    assert main(["compress", "run", "folder", "archive", "--memory", "16"]) == 0
    assert main(["decompress", "archive", "out", "--ckpt", "run"]) == 0
    assert (tmp_path / "out" / "y").read_bytes() == (tmp_path / "folder" / "y").read_bytes()
    assert main(["compress", "run", "folder/x", "one", "--mode", "native"]) == 0
    assert main(["decompress", "one", "two"]) == 0
    capsys.readouterr()
    for words in (["--mode", "native", "--memory", "16"], ["--lanes", "3", "--memory", "16"]):
        assert main(["compress", "run", "folder/x", "no", *words]) == 2
        assert "--memory need" in capsys.readouterr().err
    assert main(["compress", "run", "folder/x", "no", "--mode", "mixed", "--lanes", "4"]) == 2
    assert "--lanes: no effect with --mode mixed" in capsys.readouterr().err
    save_run(tmp_path / "a" / "checkpoints" / "other", built(TERNARY, 1))
    assert main(["decompress", "packed", "no", "--ckpt", "other"]) == 2
    assert "made with another model" in capsys.readouterr().err


def test_an_archive_is_judged_by_its_files(model, tmp_path):
    """Not by the table of names in front of them."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(TEXT)
    done = mixed.compress([tmp_path / "d"], tmp_path / "p", expert=expert_of(model))
    assert done.with_model
    mixed.decompress(
        tmp_path / "p", tmp_path / "b",
        expert=lambda h: streamed.expert_for(h, model, None, "p"),
    )  # fmt: skip
    assert (tmp_path / "b" / "x").read_bytes() == TEXT
    (tmp_path / "empty").write_bytes(b"")
    assert not mixed.compress(
        [tmp_path / "empty"], tmp_path / "q", expert=expert_of(model)
    ).with_model
