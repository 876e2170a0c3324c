"""Files coded with a causal model: compress and decompress.

A file is cut into windows as `scoring.windows` cuts it without overlap (``window`` bytes, each
starting from START with no earlier context), so its size is what the model's bits per byte promise.
Blocks of windows are coded one after another, so memory is bounded.  Within a block, ``lanes``
windows are coded side by side as one batch: in group g, lane s codes window g * lanes + s of the
block.  Windows are independent, so this loses no context.  The last group is filled up with lanes
that are computed but not coded, so that all groups of a file have the same batch size.

`container` describes the file format and the order in which symbols go to the coder (`rans`); a
predictor (`predictors`) provides the tables.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bitbyte.checkpoint import MODEL, read_meta
from bitbyte.compress import rans
from bitbyte.compress.container import (
    FINGERPRINT_BYTES,
    HASH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_LANES,
    Header,
    check_file,
    mode_of,
    no_dash,
    pack_block,
    plain_file,
    progress_bar,
    read_block,
)
from bitbyte.compress.predictors import Predictor, predictor_for, weights_hash
from bitbyte.files import BitbyteError, artifacts, replacing
from bitbyte.kernels import engine
from bitbyte.runs import PACKED, complete_steps, step_name, zoo
from bitbyte.vocab import N_BYTES, START

LANES = 128  # windows side by side, if the file has that many
CODED_BLOCK_BYTES = 1 << 20  # roughly: a block is a whole number of groups
MOST_THREADS = 512  # CPU threads in float mode; more threads than processors slow all of them down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded:
    """Result of compressing or decompressing a file."""

    header: Header
    size: int  # bytes of the container
    payload: int  # of them, bytes of coder states and words, and of stored blocks
    stored: int  # bytes of the original in blocks that coding would not have shortened
    table_bits: float  # cost of the bytes under the integer tables; nan after decompressing
    seconds: float
    coder_seconds: float  # of these, in the coder
    kernels: dict  # which code computed each part of the model


def model_names(model, meta: dict | None) -> tuple[bytes, ...]:
    """Names for this model in a header: 16 bytes of the hash of its file, and of its weights."""
    names = [weights_hash(model)]
    checkpoint = (meta or {}).get("files", {}).get(MODEL, {}).get("sha256")
    if checkpoint:
        names.insert(0, bytes.fromhex(checkpoint))
    return tuple(name[:FINGERPRINT_BYTES] for name in names)


def checkpoint_for(header: Header, folder: Path | None = None) -> Path:
    """The model of a file: a step below ``folder`` (artifacts/checkpoints), or a packed model.

    Raises BitbyteError if no model has its hash.
    """
    folder = artifacts("checkpoints") if folder is None else Path(folder)
    places = [
        run / step_name(step)
        for run in (sorted(folder.iterdir()) if folder.is_dir() else ())
        for step in (reversed(complete_steps(run)) if run.is_dir() else ())
    ]
    for place in places + [path for models in zoo() for path in sorted(models.glob("*" + PACKED))]:
        with contextlib.suppress(BitbyteError, OSError):
            if read_meta(place)["files"][MODEL]["sha256"].startswith(header.model.hex()):
                return place
    raise BitbyteError(
        f"no checkpoint below {folder} has the hash {header.model.hex()} that the file needs; name "
        "one with --ckpt"
    )


def lanes_for(n_bytes: int, window: int, most: int = LANES) -> int:
    """Windows side by side: at most ``most``, and such that all groups are about equally full."""
    n_windows = max(1, -(-n_bytes // window))
    n_groups = -(-n_windows // most)
    return -(-n_windows // n_groups)


def _groups(n_bytes: int, header: Header) -> Iterator[np.ndarray]:
    """lengths_S of the windows of each group of a block, never increasing from lane to lane."""
    T, S = header.window, header.lanes
    for start in range(0, n_bytes, S * T):
        yield np.clip(n_bytes - start - np.arange(S) * T, 0, T)


def _lay_out(data: np.ndarray, header: Header) -> np.ndarray:
    """bytes_ST of a group, padded with zeros."""
    flat = np.zeros(header.lanes * header.window, np.int64)
    flat[: len(data)] = data
    return flat.reshape(header.lanes, header.window)


def _all_counts(predictor: Predictor, bytes_ST: np.ndarray, n_steps: int) -> Iterator[np.ndarray]:
    """counts_SV for each position of a group whose bytes are known."""
    before_ST = np.empty((len(bytes_ST), n_steps), np.int64)
    before_ST[:, 0] = START
    before_ST[:, 1:] = bytes_ST[:, : n_steps - 1]
    counts_STV = predictor.windows(before_ST)
    if counts_STV is not None:
        yield from counts_STV.swapaxes(0, 1)
        return
    state = predictor.start(len(bytes_ST))
    for ids_S in before_ST.T:
        counts_SV, state = predictor.step(ids_S, state)
        yield counts_SV


def encode_block(
    data: bytes, header: Header, predictor: Predictor, tick: Callable[[int, float], None]
) -> tuple[bytes, int, float, float]:
    """(payload, number of coder states, bits under the tables, seconds in the coder).

    A block that coding would not shorten is stored: it has 0 states, and its payload is ``data``.
    ``tick`` is called at every step with the bytes coded in it and the bits of the block so far.
    """
    values = np.frombuffer(data, np.uint8)
    starts, freqs, steps, done, seconds = [], [], [], 0, 0.0
    bits = 0.0
    for lengths_S in _groups(len(data), header):
        n_here = int(lengths_S.sum())
        bytes_ST = _lay_out(values[done : done + n_here], header)
        done += n_here
        for t, counts_SV in enumerate(_all_counts(predictor, bytes_ST, int(lengths_S[0]))):
            clock = time.perf_counter()
            n = int(np.count_nonzero(lengths_S > t))
            symbols = bytes_ST[:n, t]
            below_nV = np.arange(N_BYTES) < symbols[:, None]
            freqs.append(counts_SV[np.arange(n), symbols])
            starts.append(np.where(below_nV, counts_SV[:n], 0).sum(1, dtype=np.uint32))
            bits += rans.TOTAL_BITS * n - float(np.log2(freqs[-1]).sum())
            steps.append(n)
            seconds += time.perf_counter() - clock
            tick(n, bits)
    clock = time.perf_counter()
    n_states = rans.n_states_for(len(data), header.lanes)
    states_K, words = rans.encode(np.concatenate(starts), np.concatenate(freqs), steps, n_states)
    payload = states_K.astype("<u8").tobytes() + words.astype("<u4").tobytes()
    if len(payload) >= len(data):
        payload, n_states = data, 0
    return payload, n_states, bits, seconds + time.perf_counter() - clock


def decode_block(
    payload: bytes, n_states: int, n_bytes: int, header: Header, predictor: Predictor,
    tick: Callable[[int], object],
) -> tuple[bytes, float]:  # fmt: skip
    """(the ``n_bytes`` bytes, seconds in the coder).  Raises BitbyteError on damage."""
    if not n_states:
        tick(n_bytes)
        return payload, 0.0
    states_K = np.frombuffer(payload, "<u8", n_states)
    coder = rans.Decoder(states_K, np.frombuffer(payload, "<u4", offset=8 * n_states))
    groups, seconds = [], 0.0
    for lengths_S in _groups(n_bytes, header):
        bytes_ST = np.zeros((header.lanes, header.window), np.int64)
        state, ids_S = predictor.start(header.lanes), np.full(header.lanes, START)
        for t in range(int(lengths_S[0])):
            counts_SV, state = predictor.step(ids_S, state)
            clock = time.perf_counter()
            n = int(np.count_nonzero(lengths_S > t))
            bytes_ST[:n, t] = coder.step(counts_SV[:n].cumsum(1, dtype=np.int64))
            ids_S = bytes_ST[:, t]
            seconds += time.perf_counter() - clock
            tick(n)
        groups.append(bytes_ST.astype(np.uint8).tobytes())
    coder.finish()
    return b"".join(groups)[:n_bytes], seconds


def compress_file(
    source: Path, target: Path, model, meta: dict | None = None, *, mode: str = "auto",
    lanes: int = LANES, block: int = CODED_BLOCK_BYTES, allow_overwrite: bool = False,
    progress=False,
) -> Coded:  # fmt: skip
    """Compress ``source`` to ``target`` with ``model``.

    ``model, meta`` are what `checkpoint.load_model` returns; without ``meta`` the file names the
    model by the hash of its weights, and `checkpoint_for` cannot find it.
    At most ``lanes`` windows are coded side by side; ``block`` is the size of a block in bytes,
    rounded down to whole groups, but at least one.  Raises BitbyteError, and OSError naming the
    target if the disk is full.
    """
    source, target, clock = plain_file(source), no_dash(target), time.perf_counter()
    if not 1 <= lanes <= MAX_LANES:
        raise BitbyteError(f"lanes is {lanes}; it must be between 1 and {MAX_LANES}")
    made = replacing(target, overwrite=allow_overwrite, mode=mode_of(source))
    with open(source, "rb") as file, made as sink:
        length = os.fstat(file.fileno()).st_size
        window = getattr(getattr(model, "config", None), "seq_len", 0)
        lanes = lanes_for(length, window, lanes) if window else lanes
        predictor = predictor_for(model, meta, mode, lanes=lanes)
        group = lanes * predictor.window
        if group > MAX_BLOCK_BYTES:
            raise BitbyteError(f"{lanes} windows of {window} bytes are too many; use fewer --lanes")
        floats = predictor.kernels.get("arithmetic") == "float"
        threads = torch.get_num_threads() if floats else 0
        if threads > most_threads():
            raise BitbyteError(
                f"float mode with {threads} threads: few machines could read the file back; use "
                f"--threads {most_threads()} or fewer"
            )
        header = Header(
            mode=predictor.mode, lanes=lanes, window=predictor.window,
            block=group * min(max(1, block // group), MAX_BLOCK_BYTES // group), length=length,
            model=model_names(model, meta)[0], fingerprint=predictor.fingerprint,
            threads=threads,
        )  # fmt: skip
        size = sink.write(header.pack())
        digest, done, paid, stored, bits, seconds = hashlib.sha256(), 0, 0, 0, 0.0, 0.0
        with progress_bar(length, "compress", progress) as bar:

            def tick(n, block_bits):
                nonlocal done
                done += n
                bar.set_postfix_str(f"{(bits + block_bits) / 8 / done:.3f} of size", refresh=False)
                bar.update(n)

            while data := file.read(header.block):
                digest.update(data)
                payload, n_states, cost, spent = encode_block(data, header, predictor, tick)
                size += sink.write(pack_block(len(data), n_states, payload))
                paid += len(payload)
                stored += 0 if n_states else len(data)
                bits, seconds = bits + cost, seconds + spent
        if done != length:
            raise BitbyteError(f"{source} changed while it was being read; compress it again")
        size += sink.write(digest.digest())
    return Coded(
        header=header, size=size, payload=paid, stored=stored, table_bits=bits,
        seconds=time.perf_counter() - clock, coder_seconds=seconds, kernels=predictor.kernels,
    )  # fmt: skip


def decompress_file(
    source: Path, target: Path, model, meta: dict | None = None, *, allow_overwrite: bool = False,
    progress=False,
) -> Coded:  # fmt: skip
    """Restore what `compress_file` compressed; ``target`` appears only if its SHA-256 is right.

    (A pipe gets the bytes before that is known; the error follows.)  ``model, meta`` are what
    `checkpoint.load_model` returns for the checkpoint that made it.  In float mode as many threads
    are used as when the file was made, even if that is more than there are processors.  Raises
    BitbyteError on damage, for another model, and if the model computes different numbers here.
    """
    source, target, clock = plain_file(source), no_dash(target), time.perf_counter()
    name = str(source)
    with open(source, "rb") as file, contextlib.ExitStack() as stack:
        header = check_file(file, name)
        stack.enter_context(_threads(header.threads, name))
        if hasattr(model, "engine"):  # `checked_predictor` may choose another
            stack.callback(setattr, model, "engine", model.engine)
        predictor = checked_predictor(header, model, meta, name)
        made = replacing(
            target, overwrite=allow_overwrite, need=header.length, mode=mode_of(source)
        )  # fmt: skip
        with made as sink:
            digest, paid, stored, seconds = hashlib.sha256(), 0, 0, 0.0
            with progress_bar(header.length, "decompress", progress) as bar:
                for start in range(0, header.length, header.block):
                    expected = header.block_at(start)
                    payload, n_states = read_block(file, start, header, name)
                    paid += len(payload)
                    stored += 0 if n_states else expected
                    try:
                        out, spent = decode_block(
                            payload, n_states, expected, header, predictor, bar.update
                        )
                    except BitbyteError as error:
                        raise BitbyteError(f"{name} does not decode: {error}") from None
                    bar.set_postfix_str(
                        f"{file.tell() / (start + expected):.3f} of size", refresh=False
                    )
                    digest.update(out)
                    sink.write(out)
                    seconds += spent
            if digest.digest() != file.read(HASH_BYTES):
                raise BitbyteError(
                    f"{name}: the result is not the original (SHA-256 differs); the file is "
                    "damaged, or this machine computes other numbers than the one that made it"
                )
    return Coded(
        header=header, size=source.stat().st_size, payload=paid, stored=stored, table_bits=math.nan,
        seconds=time.perf_counter() - clock, coder_seconds=seconds, kernels=predictor.kernels,
    )  # fmt: skip


def most_threads() -> int:
    """Most CPU threads that a float-mode file may be made or read with here."""
    return max(MOST_THREADS, os.cpu_count() or 1)


@contextlib.contextmanager
def _threads(n: int, name: str):
    """Run with ``n`` CPU threads; 0 leaves their number as it is.  BitbyteError if too many."""
    if n > most_threads():
        raise BitbyteError(
            f"{name} was made with {n} CPU threads and needs as many; at most {most_threads()} can "
            "be used here, so decompress it where it was made"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checked_predictor(header: Header, model, meta: dict | None, name: str) -> Predictor:
    """The predictor that decodes a file with this header.  Raises BitbyteError if none can.

    In float mode it chooses the model's engine: the native one or PyTorch, whichever made the file.
    """
    names = model_names(model, meta)
    if header.model not in names:
        raise BitbyteError(
            f"{name} was made with another model: it needs {header.model.hex()}, this is "
            f"{names[0].hex()}; without --ckpt bitbyte looks for it below artifacts/checkpoints"
        )
    predictor = predictor_for(model, meta, header.mode, lanes=header.lanes)
    if predictor.window != header.window:
        raise BitbyteError(
            f"{name} has windows of {header.window} bytes, this model {predictor.window}"
        )
    if predictor.fingerprint != header.fingerprint and header.mode == "float":
        engine.choose(model, "torch")  # where the file may have been made
        predictor = predictor_for(model, meta, header.mode, lanes=header.lanes)
    if predictor.fingerprint != header.fingerprint:
        why = "the processor, libraries and device must match those that made it"
        if not header.threads:
            why = f"it was made by another version of the {header.mode} arithmetic"
        raise BitbyteError(f"{name} cannot be decoded here because the numbers differ: {why}")
    return predictor
