"""Make a passport: score a subject on data, audit it, and write down what was found.

The number is bits of the whole file over bytes of the file.  If an audit fails there is no number:
`record["bpb"]` is None, and what was added up is only kept under ``refused``.
"""

import time
from collections.abc import Callable
from pathlib import Path

from bitbyte import __version__, shards
from bitbyte.device import environment
from bitbyte.evaluate.bootstrap import bootstrap_interval
from bitbyte.evaluate.evaluation import sha256_of, trained_on
from bitbyte.evaluate.records import FORMATS
from bitbyte.evaluate.subject import Subject
from bitbyte.files import BitbyteError
from bitbyte.passport import audits, coders, tokenizations
from bitbyte.passport.audits import PASS, Case
from bitbyte.passport.coders import Coder
from bitbyte.passport.scored import FaultError, pieces, score
from bitbyte.passport.subjects import Function
from bitbyte.shards import open_dataset


def passport(
    subject: Subject | Coder | object, data: str | Path, *, split: str = "val",
    window: int | None = None, stride: int | None = None, limit: int | None = None,
    batch_size: int | None = None, claim: float | None = None, known: str | Path | None = None,
    marginal: int | None = None, name: str | None = None, seed: int = 0, progress: bool = False,
) -> dict:  # fmt: skip
    """The record of a passport (see `evaluate.records`) of a subject on ``data``.

    ``subject`` may be any object with ``logprobs(ids)``, see `subjects.Function`.  ``data`` is a
    file, a packed folder or one of .bin files; ``limit`` scores its first bytes only, which the
    record says.  ``window`` and ``stride`` are in ids.  ``claim`` is a BPB that somebody reports,
    which then must be the number measured.  ``known``: data that the model was trained on.
    ``marginal``: also say what other tokens for so many first bytes would save.
    Raises BitbyteError.
    """
    if not isinstance(subject, Subject | Coder):
        subject = Function(subject, name or "")
    for option, value in (("limit", limit), ("window", window), ("stride", stride),
                          ("batch_size", batch_size), ("marginal", marginal)):  # fmt: skip
        if value is not None and value < 1:
            raise BitbyteError(f"{option} is {value}; it must be at least 1")
    if claim is not None and not 0 <= claim < 1e6:
        raise BitbyteError(f"claim is {claim}; it must be a number of bits per byte")
    source = open_dataset(data, 1, split=split)
    n_bytes = source.n_bytes if limit is None else min(limit, source.n_bytes)
    case = {
        "read": source.read, "n_bytes": n_bytes, "on_disk": source.on_disk(),
        "whole": n_bytes == source.n_bytes,
    }  # fmt: skip
    clock, context, ids = time.perf_counter(), None, None
    if isinstance(subject, Coder):
        if claim is not None or known is not None or marginal is not None:
            raise BitbyteError(
                "a claim, training data and tokens belong to a model, not to a compressor"
            )
        whole = source.read(0, n_bytes).tobytes()
        size, _, found = coders.measure(subject, whole, case["on_disk"], case["whole"], seed)
        bits, spread, kind, seen = 8.0 * size, None, "code", None
    else:
        window, stride = window_and_stride(subject, window, stride)
        faults: list[FaultError] = []
        if marginal is not None:
            sums = tokenizations.measure(subject, source.read, min(marginal, n_bytes))
            subject.facts["tokenizations"] = str(sums)
        try:
            scored = score(
                subject, pieces(source.read, n_bytes), window=window, stride=stride,
                batch_size=batch_size or subject.batch_size, total=n_bytes, progress=progress,
            )  # fmt: skip
        except FaultError as fault:
            faults, scored = [fault], None
        training = _training(subject, source, n_bytes, known)
        found = audits.run(
            Case(subject=subject, window=window, stride=stride, scored=scored, claim=claim,
                 seed=seed, training=training, **case),
            faults,
        )  # fmt: skip
        bits = None if scored is None else scored.bits
        spread = None if scored is None else bootstrap_interval(scored)
        kind, ids = subject.kind, None if scored is None else scored.n_ids
        context = {"window": window, "stride": stride, "start": subject.first}
        seen = training and training()[0]
    verdict, why = audits.verdict(found)
    passed = verdict == PASS
    return {
        "format": FORMATS["passport"],
        "model": name or subject.name,
        "mode": subject.source,
        "kind": kind,
        "verdict": verdict,
        "why": why,
        "bpb": bits / n_bytes if passed else None,
        "interval": list(spread) if passed and spread else None,
        "bits": bits if passed else None,
        "bytes": n_bytes,
        "refused": None if passed else {"bits": bits},
        "claim": claim,
        "audits": [audit._asdict() for audit in found],
        "data": {
            "path": Path(data).absolute().name,
            "split": source.split,
            "whole": case["whole"],
            "sha256": sha256_of(source, limit),
        },
        "context": context,
        "ids": ids,
        "seed": seed,
        "draws": getattr(subject, "draws", None),
        "trained_on_it": bool(seen),
        "parameters": getattr(subject, "parameters", None),
        "sizes": subject.sizes,
        "facts": getattr(subject, "facts", {}),
        "seconds": round(time.perf_counter() - clock, 3),
        "bitbyte": __version__,
        "environment": environment(),
    }


def window_and_stride(subject: Subject, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride) in ids, with defaults.  Raises BitbyteError."""
    window = min(subject.window, subject.longest or subject.window) if window is None else window
    if subject.longest is not None and window > subject.longest:
        raise BitbyteError(f"window is {window}; this model sees {subject.longest} ids at most")
    most = window - 1 if subject.overlaps else window
    stride = most if stride is None else stride
    if not 1 <= stride <= most:
        more = "; this model has no start symbol and needs an id of context" * subject.overlaps
        raise BitbyteError(f"stride is {stride}; it must be from 1 to {most}{more}")
    return window, stride


def _training(subject: Subject, source, n_bytes: int, known) -> Callable | None:
    """A function that says whether the scored bytes were trained on; None if nothing is known."""
    seen = subject.seen
    if known is not None:
        data = open_dataset(known, 1, split="train")
        seen = {"train": data.fingerprint, "files": data.hashes, "sketch": data.sketch}
    if not seen:
        return None

    def check() -> tuple[bool, str]:
        result = trained_on(source, n_bytes, seen)
        if result["trained_on_it"]:
            share = result["overlap"]
            part = "the same file" if share is None else f"{share:.0%} of their content"
            return True, f"it was trained on these bytes: {part} is in its training data"
        if result["trained_on_it_test"] != "content":
            return False, ""
        limit = f"below the limit of {shards.SEEN:.0%}"
        return False, f"{result['overlap']:.1%} of 32-byte pieces are in its training data, {limit}"

    return check
