"""The command train.

A function whose parameters are the options.  Heavy imports happen inside.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from bitbyte.config import TrainConfig
from bitbyte.files import (
    shown,
)

Flat = functools.partial(tyro.conf.arg, name="")


def train(config: Annotated[TrainConfig, Flat()], smoke_test: bool = False) -> None:
    """Train a model: bitbyte train ar --data DIR --steps 1000.

    Args:
        smoke_test: ten steps of the smallest model on synthetic bytes, on the CPU.
    """
    from bitbyte.train import train as run

    if not smoke_test:
        result = run(config)
        if os.environ.get("RANK", "0") == "0":
            _report_training(result)
        return
    import dataclasses

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "bytes.bin")
        data.write_bytes(bytes((i * i // 7 + i) % 251 for i in range(65536)))
        small = dataclasses.replace(
            config, preset="nano", seq_len=128, steps=10, minutes=None, epochs=None,
            curriculum=(), data=str(data), device="cpu", out=config.out or str(Path(folder, "run")),
        )  # fmt: skip
        result = run(small)
    print(f"smoke test passed: {result.step} steps, {result.bpb:.3f} bits per byte")


def _report_training(result) -> None:
    exact = result.val_kind == "exact"
    sign, unit = ("", "bits per byte") if exact else ("<= ", "bits per masked byte")
    val = "" if result.val_bpb is None else f", validation {sign}{result.val_bpb:.4f}"
    rate = result.bytes_seen / max(result.seconds, 1e-9) / 1000
    print(
        f"step {result.step}: {result.bytes_seen:,} bytes in {result.seconds:.0f} s "
        f"({rate:.1f} kB/s), training {result.bpb:.4f} {unit}{val}\n{shown(result.run)}"
    )
