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
from bitbyte.files import BitbyteError, output, output_folder, shown, write_atomic
from bitbyte.interop.hf import need
from bitbyte.models import preceding
from bitbyte.vocab import N_BYTES

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


def write_task(
    data: bytes, folder: str | Path, name: str, *, window: int = WINDOW, overwrite: bool = False
) -> Path:
    """Write NAME.yaml and NAME.jsonl, a task of the harness over ``data``; returns the former.

    Raises BitbyteError, for example for bytes that are not text, or for files that exist.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise BitbyteError(f"{shown(name)} is not a task's name: letters, digits, _ . - only")
    if window < 4:
        raise BitbyteError(f"window is {window}; it must be at least 4, as characters have 4 bytes")
    if not data:
        raise BitbyteError("there are no bytes to make a task of")
    lines = [json.dumps({"text": text}) + "\n" for text in pieces(data, window)]
    folder = output_folder(folder).absolute()
    documents, task = (
        output(folder / f"{name}.{suffix}", overwrite=overwrite) for suffix in ("jsonl", "yaml")
    )
    # In quotes: 123, null and true are names, too.
    text = TASK.format(name=json.dumps(name), data=json.dumps(str(documents)))
    write_atomic(documents, "".join(lines).encode(), overwrite=overwrite)
    write_atomic(task, text.encode(), overwrite=overwrite)
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

    def until(self, context: str, options: dict, draw: int = 0) -> str:
        """Text that goes on from a context, up to one of ``until``.

        Each ``draw`` has random numbers of its own, which the option ``seed`` determines, or else
        PyTorch's seed, which the harness sets by its --seed.
        """
        options = {name: value for name, value in options.items() if value is not None}
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = float(options.get("temperature", 1.0))
        # As the harness has it: a temperature alone asks for draws.
        sample = options.get("do_sample", "temperature" in options)
        top_k = int(options.get("top_k", 0))  # elsewhere -1 means off, too
        longest = options.get("max_gen_toks", options.get("max_new_tokens", 256))
        seed = int(options.get("seed", torch.initial_seed())) % 2**64
        # Mixed, not added: else the draws of seed 1 would be those of seed 0, moved by one.
        mixed = np.random.SeedSequence((seed, draw)).generate_state(1, np.uint64)
        sampling = SamplingConfig(
            temperature=temperature if sample else 0.0,
            top_k=top_k if 0 < top_k <= N_BYTES else 0,
            top_p=float(options.get("top_p", 1.0)),
            min_p=float(options.get("min_p", 0.0)),
            max_new_tokens=int(longest),
            seed=int(mixed[0]) >> 1,
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

        def __init__(
            self, pretrained: str, device=None, batch_size=1, max_batch_size=None,
            trust_remote_code=None, **unknown,
        ):  # fmt: skip
            # The harness passes the last two; they change nothing for these models.
            super().__init__()
            if unknown:
                raise BitbyteError(
                    f"--model_args has {shown(', '.join(sorted(unknown)))}; the model bitbyte "
                    "takes pretrained, device, batch_size"
                )
            size = int(batch_size) if str(batch_size).isdigit() else 1
            self.scorer = Scorer(pretrained, device, size)

        def loglikelihood(self, requests):
            return [self.scorer.continuation(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [self.scorer.rolling(request.args[0]) for request in requests]

        def generate_until(self, requests):
            return [self.scorer.until(*r.args, draw) for draw, r in enumerate(requests)]

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
