"""lm-evaluation-harness: models of ours in it, and tasks that measure what bitbyte measures.

The harness finds models by name in its own registry and loads no plugins, so

    python -m bitbyte.interop.lm_eval run --model bitbyte --model_args pretrained=RUN --tasks ...

is its command with one more model.  `write_task` writes a task over the bytes of a file.  A task
needs no bitbyte: ``lm_eval run --model hf --include_path FOLDER`` scores exported models on it.

A task's documents are pieces of the file of at most ``window`` bytes, cut between characters.  Each
is scored as a window of its own after the start symbol, so ``bits_per_byte`` is the number of
`bitbyte eval`, but for two things: there a window may cut through a character, and the last one is
as long as the others, with context.  (The harness itself would give later windows of a longer
document a byte of context in place of the start symbol.)
"""

import functools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bitbyte import checkpoint, generate, scoring
from bitbyte.config import SamplingConfig
from bitbyte.device import choose_device, device_of
from bitbyte.files import BitbyteError, output_folder, shown, write_atomic
from bitbyte.interop.hf import need
from bitbyte.models import preceding

WINDOW = 1024  # bytes
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1.0
"""


def whole_characters(data: bytes) -> bytes:
    """``data`` without a character that is cut off at its end."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return data[: error.start]
    return data


def pieces(data: bytes, window: int) -> Iterator[str]:
    """Text of at most ``window`` bytes each, cut between characters.  Raises BitbyteError."""
    start = 0
    while start < len(data):
        part = data[start : start + window]
        if start + len(part) < len(data):
            part = whole_characters(part)
        try:
            yield part.decode()
        except UnicodeDecodeError as error:
            raise BitbyteError(
                f"byte {start + error.start:,} (0x{part[error.start]:02x}) is not UTF-8 text, as "
                "lm-eval needs it"
            ) from None
        start += len(part)


def write_task(data: bytes, folder: str | Path, name: str, *, window: int = WINDOW) -> Path:
    """Write NAME.yaml and NAME.jsonl, a task of the harness over ``data``; returns the former.

    Raises BitbyteError, for example for bytes that are not text.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise BitbyteError(f"{shown(name)} is not a task's name: letters, digits, _ . - only")
    if window < 4:
        raise BitbyteError(f"window is {window}; it must be at least 4, as characters have 4 bytes")
    if not data:
        raise BitbyteError("there are no bytes to make a task of")
    lines = [json.dumps({"text": text}) + "\n" for text in pieces(data, window)]
    folder = output_folder(folder).absolute()
    documents, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    write_atomic(documents, "".join(lines).encode())
    write_atomic(task, TASK.format(name=name, data=json.dumps(str(documents))).encode())
    return task


class Bytes:
    """Bytes in memory as a data set."""

    def __init__(self, data: bytes):
        self.array, self.n_bytes = np.frombuffer(data, np.uint8), len(data)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


class Scorer:
    """What the harness asks of a model, in bytes.  Raises BitbyteError for diffusion models."""

    def __init__(self, pretrained: str, device: str | None = None, batch_size: int = 1):
        # The harness says cuda:0 where nobody named a device.
        missing = str(device).startswith("cuda") and not torch.cuda.is_available()
        place = "auto" if device is None or missing else str(device)
        self.model, _ = checkpoint.load_model(pretrained, device=choose_device(place))
        if not self.model.exact:
            raise BitbyteError(
                f"{shown(pretrained)} is a diffusion model, which lm-eval has no question for; see "
                "bitbyte eval"
            )
        self.batch_size = batch_size

    def rolling(self, text: str) -> float:
        """ln p of a text, in windows of the model's own length."""
        data = Bytes(text.encode())
        if not data.n_bytes:
            return 0.0
        return -math.log(2) * scoring.score(self.model, data, batch_size=self.batch_size).bits

    @torch.no_grad()
    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        """(ln p of a text after a context, whether each of its bytes is the likeliest)."""
        before, after = context.encode(), text.encode()
        if not after:
            return 0.0, True
        room = self.model.config.seq_len - len(after)
        if room < 0:
            raise BitbyteError(
                f"a continuation of {len(after):,} bytes: this model sees "
                f"{self.model.config.seq_len:,} at most"
            )
        ids = torch.tensor([[*before[max(0, len(before) - room) :], *after]])
        ids = ids.to(device_of(self.model))
        rows = self.model.logits(preceding(ids))[0, -len(after) :].double().log_softmax(-1)
        chosen = ids[0, -len(after) :]
        picked = rows.gather(-1, chosen[:, None])
        return float(picked.sum()), bool((rows.argmax(-1) == chosen).all())

    def until(self, context: str, options: dict) -> str:
        """Text that goes on from a context, up to one of ``until``."""
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        greedy = not options.get("do_sample", False)
        sampling = SamplingConfig(
            temperature=0.0 if greedy else float(options.get("temperature", 1.0)),
            max_new_tokens=int(options.get("max_gen_toks", 256)),
        )
        text = bytearray()
        for byte in generate.stream(self.model, context.encode(), sampling):
            text.append(byte)
            ends = [text.find(stop.encode()) for stop in stops if stop]
            if found := [end for end in ends if end >= 0]:
                return text[: min(found)].decode("utf-8", "replace")
        return text.decode("utf-8", "replace")


@functools.cache
def register() -> type:
    """The class that the harness knows as "bitbyte" from now on."""
    need("lm_eval", extra="eval")
    import lm_eval.models  # noqa: F401 - before ours: it is filled only while it is empty
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    @register_model("bitbyte")
    class BitbyteLM(LM):
        """``pretrained``: run, step folder or packed model."""

        def __init__(self, pretrained: str, device=None, batch_size=1, **others):
            super().__init__()
            size = int(batch_size) if str(batch_size).isdigit() else 1
            self.scorer = Scorer(pretrained, device, size)

        def loglikelihood(self, requests):
            return [self.scorer.continuation(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [self.scorer.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests):
            return [self.scorer.until(*request.args) for request in requests]

    return BitbyteLM


def main() -> None:
    """The harness's own command line, which knows the model bitbyte."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except BitbyteError as error:
        sys.exit(f"bitbyte: {error}")


if __name__ == "__main__":
    main()
