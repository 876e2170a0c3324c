"""How a model writes and fills holes: what another model, the judge, makes of it, and the time.

Bits per byte under the judge compare ways of writing, for one model or several, where a model's own
cost does not: drawing bytes independently of each other is fast and hurts the text, and so does
drawing only what is likely.  Text that is too simple is cheap, so the judge's cost of the true
continuations is shown beside it.

Time is of the processor, summed over threads, so that other work on the machine matters little.
"""

import html
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

from bitbyte.config import SamplingConfig
from bitbyte.device import environment
from bitbyte.evaluate.records import FORMATS
from bitbyte.files import BitbyteError
from bitbyte.generate import generate
from bitbyte.infill import infill, sample
from bitbyte.shards import open_dataset
from bitbyte.vocab import MASK, printable

PROMPT, NEW = 64, 160  # bytes of a prompt and of a sample
BEFORE, LONGEST, AFTER = 128, 8, 64  # bytes around a hole, and of the longest
SEEDS = 10  # samples that a record holds
SHOWN = ("byte by byte", "by confidence", "2 a pass", "4 a pass")  # side by side in a document
SHOWN_BYTES = 48
# Shorter times cannot be told from 0: Windows counts clock ticks, whatever resolution it reports.
TICK = max(time.get_clock_info("process_time").resolution, 1 / 64 if os.name == "nt" else 0)
Write = Callable[[object, bytes, SamplingConfig], bytes]


def ways_to_write(model) -> dict[str, Write]:
    """Names of the ways in which a model can continue a prompt, and how."""
    ways: dict[str, Write] = {}
    if hasattr(model, "step"):
        ways["byte by byte"] = _generated
    block = getattr(model, "block", 0)
    if block:  # the other ways have no native engine
        ways["byte by byte in PyTorch"] = _generated_by_torch
    if model.config.family == "diffusion":
        ways["left to right"] = _sampled(order="left_to_right")
        ways["by confidence"] = _sampled()
        for n in (2, 4, 8):
            if not block or n <= block:
                ways[f"{n} a pass"] = _sampled(per_pass=n)
        for least in (0.9, 0.7, 0.5):
            ways[f"all above {least}"] = _sampled(threshold=least)
    return ways


def _generated(model, prompt: bytes, config: SamplingConfig) -> bytes:
    return generate(model, prompt, config).bytes


def _generated_by_torch(model, prompt: bytes, config: SamplingConfig) -> bytes:
    before, model.engine = model.engine, "torch"
    try:
        return _generated(model, prompt, config)
    finally:
        model.engine = before


def _sampled(**schedule) -> Write:
    return lambda model, prompt, config: sample(model, prompt, config, **schedule)


def ways_to_fill(model) -> dict[str, dict]:
    """Names of the ways in which a model can fill a hole, and options of `infill.infill`."""
    ways: dict[str, dict] = {}
    if model.config.family == "diffusion":
        ways["by confidence"] = {"order": "confidence", "candidates": 1}
        ways["left to right"] = {"order": "left_to_right", "candidates": 1}
        if getattr(model, "block", 0):
            ways["by confidence, best of 8"] = {"order": "confidence", "candidates": 8}
    if hasattr(model, "step"):
        order = {"order": "causal"} if model.config.family == "diffusion" else {}
        for n in (1, 8, 32):
            ways[f"search, {n}"] = order | {"candidates": n}
    return ways


def judged(
    model, judge, data, *, temperature: float = 0.8, samples: int = 20, length: int = NEW,
    holes: int = 200, ways: Collection[str] | None = None, seed: int = 0,
) -> dict:  # fmt: skip
    """The measured part of a record.

    ``ways`` (default: all) are the names of those in which to write.  Prompts and holes are spread
    evenly over ``data``, so they are the same for every model.
    """
    if min(samples, holes) < 0 or not samples + holes or length < 1:
        raise BitbyteError(
            f"samples {samples}, holes {holes}, length {length}: there must be something to judge"
        )
    if judge.exact is False:
        raise BitbyteError("a judge must have exact costs, and this one has bounds")
    long = max(PROMPT + length if samples else 0, BEFORE + LONGEST + AFTER if holes else 0)
    for name, one in (("model", model), ("judge", judge)):
        sees = one.config.seq_len if hasattr(one, "config") else long
        if long > sees:
            raise BitbyteError(
                f"the {name} sees {sees} bytes; these samples of {PROMPT} + {length} "
                f"bytes and holes need {long}"
            )
    stop = data.n_bytes - long
    if stop < max(samples, holes):
        raise BitbyteError(f"{data.n_bytes} bytes are too few for so many samples or holes")
    starts = _starts(stop, samples)
    prompts = [_read(data, start, PROMPT) for start in starts]
    truth = [_read(data, start + PROMPT, length) for start in starts]
    truth_bits = _judged_bits(judge, prompts, truth) if samples else 0.0
    config = SamplingConfig(temperature=temperature, max_new_tokens=length)
    writing, texts = [], {}
    for name, write in ways_to_write(model).items() if samples else ():
        if ways is not None and name not in ways:
            continue
        write(model, prompts[0], config)  # builds what is built once
        clock, made = time.process_time(), []
        for i, prompt in enumerate(prompts):
            made.append(write(model, prompt, _seeded(config, seed + i)))
        seconds = max(time.process_time() - clock, TICK)
        bits = _judged_bits(judge, prompts, made)
        writing.append({
            "way": name, "bytes_per_cpu_second": len(made) * length / seconds,
            "bpb": bits / (len(made) * length),
        })  # fmt: skip
        texts[name] = [text.decode("utf-8", "replace") for text in made[:SEEDS]]
    texts_of_holes = [
        _read(data, start, BEFORE + _hole(i) + AFTER)
        for i, start in enumerate(_starts(stop, holes))
    ]
    costs = [_judged_bits(judge, [text[:BEFORE]], [text[BEFORE:]]) for text in texts_of_holes]
    filling = [
        {"way": name, **_filled(model, judge, texts_of_holes, costs, options, seed)}
        for name, options in (ways_to_fill(model).items() if holes else ())
    ]
    return {
        "truth_bpb": truth_bits / (samples * length) if samples else None,
        "writing": writing, "filling": filling, "holes": holes,
        "samples": samples, "length": length, "temperature": temperature, "seed": seed,
        "prompts": [prompt.decode("utf-8", "replace") for prompt in prompts[:SEEDS]],
        "texts": texts or None,
    }  # fmt: skip


def _hole(i: int) -> int:
    """Size of a hole."""
    return i % LONGEST + 1


def _filled(model, judge, texts: list[bytes], costs: list[float], options: dict, seed: int) -> dict:
    """How holes are filled, the likeliest byte first; ``costs`` are those of the true texts."""
    right, seconds, excess = 0, 0.0, 0.0
    for i, (text, cost) in enumerate(zip(texts, costs, strict=True)):
        ids_T = torch.tensor(list(text))
        ids_T[BEFORE : BEFORE + _hole(i)] = MASK
        config = SamplingConfig(temperature=0.7 if options["candidates"] > 1 else 0, seed=seed + i)
        clock = time.process_time()
        made = infill(model, ids_T, config, **options).data
        seconds += time.process_time() - clock
        if made == text:
            right += 1
        else:
            excess += _judged_bits(judge, [text[:BEFORE]], [made[BEFORE:]]) - cost
    n = len(texts)
    return {"right": right / n, "excess_bits": excess / n, "cpu_ms": 1e3 * seconds / n}


def _seeded(config: SamplingConfig, seed: int) -> SamplingConfig:
    return SamplingConfig(
        temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=seed
    )


def _starts(stop: int, n: int) -> list[int]:
    return np.linspace(0, stop, n, endpoint=False).astype(np.int64).tolist()


def _read(data, start: int, n: int) -> bytes:
    return data.read(start, start + n).tobytes()


@torch.no_grad()
def _judged_bits(judge, before: list[bytes], texts: list[bytes]) -> float:
    """What the judge pays for the texts, given what stands before them."""
    bits = 0.0
    for past, text in zip(before, texts, strict=True):
        nats_BT = judge(torch.tensor([list(past + text)]))
        bits += float(nats_BT[0, len(past) :].double().sum()) / math.log(2)
    return bits


def record(model, judge, path: str, *, name: str, judge_name: str, meta: dict, **options) -> dict:
    """A record of `judged` on the validation part of ``path``."""
    data = open_dataset(path, 1, split="val")
    return {
        "format": FORMATS["judged"], "model": name, "family": model.config.family,
        "mode": f"by {judge_name}", "judge": judge_name,
        "data": {"path": Path(path).absolute().name, "split": data.split},
        "checkpoint": meta.get("files", {}).get("model.safetensors", {}).get("sha256"),
        **judged(model, judge, data, **options), "environment": environment(),
    }  # fmt: skip


WRITES = ("model", "writes", "bytes per CPU second", "bits per byte under the judge")
FILLS = ("model", "fills", "exactly right", "worse than the truth", "CPU, a hole")


def rows_of(*records: dict) -> list[list[tuple[str, ...]]]:
    """Cells of two tables, how these models write and how they fill, each with its head."""
    writing = [
        (r["model"], w["way"], f"{w['bytes_per_cpu_second']:,.0f}", f"{w['bpb']:.3f}")
        for r in records
        for w in r["writing"]
    ]
    filling = [
        (r["model"], f["way"], f"{100 * f['right']:.1f} %", f"{f['excess_bits']:.2f} bits",
         f"{f['cpu_ms']:.0f} ms")
        for r in records
        for f in r["filling"]
    ]  # fmt: skip
    return [[head, *rows] for head, rows in ((WRITES, writing), (FILLS, filling)) if rows]


def tables(records: list[dict]) -> str:
    """Markdown: how the models of these records write and fill, and samples side by side."""
    groups: dict[tuple, list[dict]] = {}
    for r in sorted(records, key=lambda r: r["model"]):
        groups.setdefault((r["data"]["path"], r["judge"], r["temperature"]), []).append(r)
    return "\n\n".join(_group(*key, group) for key, group in groups.items())


def _group(path: str, judge: str, temperature: float, records: list[dict]) -> str:
    one = records[0]
    truth, cost = one["truth_bpb"], ""
    if truth is not None:
        cost = f"; the true continuations cost the judge {truth:.3f} bits per byte"
    about = (
        f"The judge is `{judge}`. Prompts and holes are from the validation part of {path}. "
        f"{one['samples']} samples of {one['length']} bytes follow prompts of {PROMPT}, at "
        f"temperature {temperature:g}{cost}. The {one['holes']} holes have 1 to {LONGEST} "
        f"bytes, with {BEFORE} bytes before and {AFTER} after them; *worse than the truth* is what "
        "the fill and the following bytes cost the judge above the original, per hole."
    )
    parts = [_cell(about)]
    for head, *rows in rows_of(*records):
        lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 2)]
        parts.append("\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]))
    for r in records:
        ways = [way for way in SHOWN if way in (r["texts"] or ())]
        if len(ways) > 1:
            parts += [f"The first samples of {_cell(r['model'])}, seeds {r['seed']} and on:"]
            parts += [_texts(r, ways)]
    return "\n\n".join(parts)


def _texts(record: dict, ways: list[str]) -> str:
    """Samples of one model side by side, by seed."""
    lines = [f"| seed | {' | '.join(ways)} |", "|--:|" + "---|" * len(ways)]
    for i, texts in enumerate(zip(*(record["texts"][way] for way in ways), strict=True)):
        cells = " | ".join(f"`{_code(text[:SHOWN_BYTES])}`" for text in texts)
        lines.append(f"| {record['seed'] + i} | {cells} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Text for a code span in a cell of a table, which knows no escapes."""
    plain = printable(text.encode("utf-8", "replace"))
    return plain.replace("`", "'").replace("|", "\u00a6") or " "


def _cell(text: str) -> str:
    return html.escape(printable(text.encode("utf-8", "replace")), quote=False).replace(
        "|", "&#124;"
    )
