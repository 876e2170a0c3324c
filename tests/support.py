"""What several test files use: places, small data and models, checkpoints, child processes."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from bitbyte import checkpoint, models, runs
from bitbyte.config import (
    DiffusionConfig,
    MambaConfig,
    SamplingConfig,
    TrainConfig,
    TransformerConfig,
    config_to_dict,
    preset,
)
from bitbyte.data import corpora
from bitbyte.train import train

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

# --- bytes

FOX = b"the quick brown fox jumps over the lazy dog. " * 60


class Bytes:
    """Bytes in memory with the interface of a data set."""

    def __init__(self, data: bytes):
        self.array, self.n_bytes = np.frombuffer(data, np.uint8), len(data)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


def words(n: int) -> bytes:
    """Text of n words from a list of 60."""
    rng = np.random.default_rng(0)
    listed = [bytes(rng.integers(97, 123, rng.integers(2, 7)).tolist()) for _ in range(60)]
    return b" ".join(listed[i] for i in rng.integers(0, 60, n))


def stories_in(n_bytes: int, seed: int = 0, split: str = "train") -> list[bytes]:
    documents = corpora.stories_documents(n_bytes, seed, split)
    return [b"".join(document.chunks) for document in documents]


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


# --- models

SMALL = {"n_layer": 2, "d_model": 32, "seq_len": 24}
TINY = TransformerConfig(**SMALL, d_ff=48, n_head=2)
CONFIGS = {
    "ar": TINY,
    "ar dense": dataclasses.replace(TINY, linear="dense"),
    "mamba1": MambaConfig(**SMALL, ssm="mamba1", d_state=4),
    "mamba2": MambaConfig(**SMALL, ssm="mamba2", n_head=2, d_state=4),
    "diffusion": DiffusionConfig(**SMALL, d_ff=48, n_head=2),
    "blocks": DiffusionConfig(**SMALL, d_ff=48, n_head=2, block=4),
}


def sharp(config, seed: int = 0, by: float = 20.0) -> torch.nn.Module:
    """An untrained model, sharper than at initialization, so that differences show."""
    model = models.build(config, seed)
    with torch.no_grad():
        model.embed.mul_(by)
        if hasattr(model, "around"):
            model.around.mul_(by)
    return model.eval()


def assert_causal(model: torch.nn.Module, ids_BT: torch.Tensor, t: int) -> None:
    """Byte t has a say in its own cost and in what is predicted after it, and in nothing before."""
    changed_BT = ids_BT.clone()
    changed_BT[:, t] = (changed_BT[:, t] + 77) % 256
    a, b = model(ids_BT), model(changed_BT)
    assert torch.equal(a[:, :t], b[:, :t])
    assert (a[:, t] != b[:, t]).all()
    a, b = model.logits(ids_BT), model.logits(changed_BT)
    assert torch.equal(a[:, :t], b[:, :t])
    assert (a[:, t] != b[:, t]).any()


def sampling(**changes) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, "max_new_tokens": 20} | changes)


# --- checkpoints and records

CONFIG = TransformerConfig(n_layer=1, d_model=16, d_ff=16, n_head=2, seq_len=32)


def meta_for(config=CONFIG, /, **changes) -> dict:
    """What a run notes about a checkpoint of such a model."""
    return {
        "model_family": config.family, "variant": config.linear, "config": config_to_dict(config),
        "train": {"steps": 100}, "bytes_seen": 12345, "rng": {"seed": 0},
        "data": {"fingerprint": "0" * 64},
    } | changes  # fmt: skip


def save_run(folder: Path, model: torch.nn.Module, step: int = 1, **meta) -> Path:
    """A run with one checkpoint of this model."""
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint.save_step(
        folder, step, model.state_dict(), {}, meta_for(model.config, **meta)
    )


def save_bold(
    folder: Path, family: str = "ar", step: int = 1, seed: int = 0, **changes: int
) -> Path:
    """A run of a small model that was never trained, but prefers some bytes; the folder."""
    config = preset("nano", family, n_layer=1, d_model=64, seq_len=32, linear="dense", **changes)
    model = models.build(config, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_run(folder, model, step, extra={"val_bpb": 2.345})
    return folder


def brief_run(family: str, data: Path, out: Path, **changes) -> str:
    """Train a small model for two steps; the run's folder."""
    fields = {
        "family": family, "data": str(data), "out": str(out), "n_layer": 1, "d_model": 64,
        "seq_len": 32, "batch_size": 4, "steps": 2, "progress": False, "device": "cpu",
    }  # fmt: skip
    return str(train(TrainConfig(**fields | changes)).run)


def tensors_of(step: int, rows: int = 64) -> tuple[dict, dict]:
    """Model and optimizer tensors that differ from step to step."""
    noise = torch.Generator().manual_seed(step)
    model = {"a": torch.randn(rows, 32, generator=noise), "b.c": torch.tensor([step])}
    return model, {"a/momentum": torch.randn(rows, 32, generator=noise)}


def save(run: Path, step: int, rows: int = 64, **options) -> Path:
    return checkpoint.save_step(run, step, *tensors_of(step, rows), meta_for(), **options)


def assert_loads(folder: Path, rows: int = 64) -> None:
    meta, model, optim = checkpoint.load_step(folder, with_optim=True)
    want_model, want_optim = tensors_of(meta["step"], rows)
    assert folder.name == runs.step_name(meta["step"])
    for have, want in ((model, want_model), (optim, want_optim)):
        assert have.keys() == want.keys()
        assert all(torch.equal(have[k], want[k]) and have[k].dtype == want[k].dtype for k in want)


def record(**changes) -> dict:
    """A result of ``bitbyte eval``."""
    return {
        "format": 1, "model": "tiny", "kind": "exact", "bpb": 2.5, "interval": [2.4, 2.6],
        "bits": 2.5e6, "bytes": 1_000_000, "trained_on_it": False, "parameters": 123,
        "packed_bytes": 45, "bytes_seen": 6000, "train_seconds": 3.0, "train_seed": 0,
        "checkpoint": "a", "context": {"window": 256, "stride": 256}, "dtype": "fp32",
        "data": {"path": "text", "split": "val", "sha256": "ab" * 32}, "draws": None,
    } | changes  # fmt: skip


# --- folders, processes, pages, figures


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process; returns its pid.  Exit 0, 3 = OSError, 1 = anything."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except OSError:
            code = 3
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mount(*words: object) -> None:
    """Mount, or skip the test with the reason."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *map(str, words)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


def until(
    condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120
) -> None:
    """Wait until it holds; only a fault reaches the limit, or ends the process before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Page(HTMLParser):
    """Elements and text of a page, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.text = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag = self.tags[-1] if self.tags else ""
        self.texts[tag] = self.texts.get(tag, "") + data
        self.text += data


def texts_in(figure) -> list[str]:
    """All texts of a Matplotlib figure."""
    figure.draw_without_rendering()
    return [found.get_text() for found in figure.findobj(lambda one: hasattr(one, "get_text"))]


def with_features(
    features: str, code: str, tests: Path, cache: Path, cpu: str = "x86-64"
) -> str:  # fmt: skip
    """What a process prints whose native engine may only use these features of the processor.

    ``code`` may import the tests in the folder ``tests``.
    """
    here = {"PYTHONPATH": os.pathsep.join([*sys.path, str(tests)])}
    there = {
        "BITBYTE_ENGINE_CPU": cpu, "BITBYTE_ENGINE_FEATURES": features,
        "XDG_CACHE_HOME": str(cache),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | here | there, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout
