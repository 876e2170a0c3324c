"""Commands that compress files: compress, decompress, test, certify.

Their options are the parameters of functions, which import heavy modules inside.
"""

import functools
import os
import sys
from pathlib import Path

from bitbyte.cli.options import NO_MODEL, Ckpt, File, Json, argument, refuse
from bitbyte.files import BitbyteError, is_stdout, output_folder, shown, user_path

MIXED = "mixed"


def compress(
    ckpt: argument(str, "MODEL"),
    files: argument(tuple[str, ...], "FILE [FILE ...] OUT"),
    /,
    mode: str = "auto",
    lanes: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Compress files with a model, or with none.

    MODEL none mixes the predictions of many contexts and learns as it goes; the result can be
    restored on any machine. A model that predicts the next byte joins them, if that saves
    anything; then restoring needs the same model, and llvmlite. Several files and folders become an
    archive; - is standard input or output.

    With --mode native, portable, float or blocks the model works alone, on one file: this shows its
    bits per byte as a file. In float mode a file can only be decoded on a machine that computes the
    same numbers, which is checked first.

    Args:
        ckpt: none, or a run or packed model of family ar or mamba, or trained in blocks.
        files: any files and folders, and last the file to write.
        mode: mixed, or the model alone: native (needs llvmlite) or portable (ternary models), which
            any machine can read back, or float. auto: the first of these that works. blocks: of a
            diffusion model trained in blocks, as it fills them.
        lanes: of a model alone: maximum number of windows coded side by side, 1 to 4096 (default:
            128); more takes more memory.
        memory: of the mixer: MB for what is learnt, 16 to 1024 (default: 120); restoring takes as
            much.
        device: auto, cpu, cuda, mps.
        threads: CPU threads; a file in float mode needs as many to be decoded.
        allow_overwrite: replace OUT if it exists.
    """
    if len(files) < 2:
        raise BitbyteError("name a file to compress and a file to write")
    *sources, out = files
    _check_mode(mode)
    if ckpt == NO_MODEL:
        if mode not in ("auto", MIXED):
            raise BitbyteError(f"--mode {mode} needs a model; {NO_MODEL} is always {MIXED}")
        refuse(
            "without a model", lanes=lanes is not None, device=device not in ("auto", "cpu"),
            threads=threads is not None,
        )  # fmt: skip
        _compress_mixed(sources, out, memory, allow_overwrite)
        return
    from bitbyte.compress import codec

    refuse(f"with --mode {MIXED}", lanes=mode == MIXED and lanes is not None)
    model, meta = _load(ckpt, device, threads)
    if mode in (MIXED, "auto") and lanes is None:
        from bitbyte.compress import streamed

        why = streamed.problem(model)
        if why is None or mode == MIXED:
            _compress_mixed(sources, out, memory, allow_overwrite, streamed.Expert(model, meta))
            return
    if len(sources) > 1 or memory is not None:
        raise BitbyteError(f"several files and --memory need --mode {MIXED}, or MODEL {NO_MODEL}")
    source, target = user_path(sources[0]), user_path(out)
    done = codec.compress_file(
        source, target, model, meta, mode=mode, lanes=codec.LANES if lanes is None else lanes,
        allow_overwrite=allow_overwrite, progress=True,
    )  # fmt: skip
    n, threads = done.header.length, done.header.threads
    bpb = f"{8 * done.size / n:.4f} bits per byte, " if n else ""
    _report(target, f"{n:,} -> {done.size:,} bytes, {bpb}{_how(done)}")
    if done.header.threads:
        needs = f"{threads} CPU thread{'s' * (threads > 1)} (decompress sets that) on"
        if done.kernels.get("engine") == "native":  # the same bits with any number of threads
            needs = "llvmlite on"
        _report(
            target,
            f"float mode: it can only be decoded with {needs} a machine that computes the same "
            "numbers",
        )


def _compress_mixed(
    sources: list[str], out: str, memory: int | None, overwrite: bool, expert=None
) -> None:
    from bitbyte.compress import mixed
    from bitbyte.compress.mixer.codec import MEMORY

    target = _place(out)
    done = mixed.compress(
        [_place(source) for source in sources], target,
        memory=MEMORY if memory is None else memory, expert=expert, allow_overwrite=overwrite,
        progress=True,
    )  # fmt: skip
    left_out = expert is not None and not done.with_model
    note = "; without the model, which would not help" if left_out else ""
    _report(target, f"{_files(done.files)}{done.described()}{note}")


def decompress(
    file: File,
    back: argument(str, "BACK"),
    /,
    ckpt: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Restore what bitbyte compress has written.

    BACK is written only if its SHA-256 is that of the original. (A pipe gets the bytes as they are
    decoded, and an error only at the end.) The files of an archive go to a new folder BACK.

    Args:
        file: compressed file; - is standard input.
        back: file or folder to write; - is standard output.
        ckpt: run folder, step folder or run name; default: found by its hash in
            artifacts/checkpoints.
        device: auto, cpu, cuda, mps.
        threads: CPU threads; float mode uses as many as made the file, even if there are fewer
            processors (which is slow).
        allow_overwrite: replace BACK if it is a file.
    """
    from bitbyte.compress import mixed

    source, target = _place(file), _place(back)
    if mixed.version_of(source) == 1:
        done = _decode_with_model(source, user_path(back), ckpt, device, threads, allow_overwrite)
        sizes = f"{done.size:,} -> {done.header.length:,} bytes"
        _report(target, f"{sizes}, the SHA-256 is that of the original, {_how(done)}")
        return
    done = mixed.decompress(
        source, target, expert=_finder(source, ckpt, device, threads),
        allow_overwrite=allow_overwrite, progress=True,
    )  # fmt: skip
    what = f"{_files(done.files)}{done.described()}"
    _report(target, f"{what}, the SHA-256 is that of the original")


def verify(
    file: File,
    /,
    ckpt: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Check that a compressed file can be restored.

    It is decoded in full, and nothing is written.

    Args:
        file: compressed file; - is standard input.
        ckpt: run folder, step folder or run name; default: found by its hash in
            artifacts/checkpoints.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
    """
    from bitbyte.compress import mixed

    source = _place(file)
    if mixed.version_of(source) == 1:
        done = _decode_with_model(source, Path(os.devnull), ckpt, device, threads, True)
        print(f"{shown(source)}: undamaged, {done.header.length:,} bytes, {_how(done)}")
        return
    done = mixed.verify(source, expert=_finder(source, ckpt, device, threads), progress=True)
    print(f"{shown(source)}: undamaged, {_files(done.files)}{done.described()}")


def _finder(source: str | Path, ckpt: str | None, device: str, threads: int | None):
    """Finds the model of a header, see `mixed.decompress`."""

    def find(header):
        from bitbyte.compress import codec, streamed

        model, meta = _load(ckpt or codec.checkpoint_for(header), device, threads)
        return streamed.expert_for(header, model, meta, shown(source))

    return find


def _decode_with_model(source, target: Path, ckpt, device: str, threads: int | None, overwrite):
    from bitbyte.compress import codec, container

    ckpt = codec.checkpoint_for(container.read_header(source)) if ckpt is None else ckpt
    model, meta = _load(ckpt, device, threads)
    return codec.decompress_file(
        source, target, model, meta, allow_overwrite=overwrite, progress=True
    )


def _place(text: str) -> str | Path:
    """The path that a user means; ``-`` stays as it is."""
    return text if text == "-" else user_path(text)


def _check_mode(mode: str) -> None:
    from bitbyte.compress.predictors import MODES

    if mode not in (*MODES, MIXED):
        raise BitbyteError(f"no mode {mode!r}; choose from {', '.join((*MODES, MIXED))}")


def _files(n: int) -> str:
    return f"{n:,} files, " if n != 1 else ""


def certify(
    ckpt: Ckpt,
    files: argument(tuple[str, ...], "FILE [FILE ...]"),
    /,
    mode: str = "auto",
    lanes: int | None = None,
    others: bool = False,
    out: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    json: Json = False,
) -> dict:
    """Prove bits per byte by compressing and restoring files.

    Decoding runs in a separate process. The record of each file, in artifacts/results, has the
    bits promised and paid, speeds, and the size including weights and code.

    With --mode mixed the files go through the mixer, without the model and with it, and one record
    holds all of them: sizes, the promise of bitbyte eval --mix, speeds, memory, the model's gain.

    Args:
        ckpt: run folder, step folder or run name, of family ar or mamba; or none: the mixer alone.
        files: files to certify.
        mode: native (needs llvmlite) or portable (ternary models), which any machine can read back,
            float, or auto: the first of these that works; blocks: of a diffusion model trained in
            blocks, as it fills them; or mixed.
        lanes: of a model alone: maximum number of windows coded side by side, 1 to 4096 (default:
            128).
        others: compare with gzip, bzip2, xz, zstd, brotli, ppmd, zpaq and, unless it is certified
            itself, bitbyte's mixer, without and with the model, on the same files.
        out: folder for the records; default: artifacts/results.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
    """
    from bitbyte.compress import baselines, codec
    from bitbyte.compress import certify as certificates
    from bitbyte.compress.container import plain_file
    from bitbyte.device import environment
    from bitbyte.evaluate.records import write_record

    if not files:
        raise BitbyteError("name the files to certify")
    _check_mode(mode)
    paths = [plain_file(user_path(file)) for file in files]
    folder, records = None if out is None else output_folder(out), []
    if mode == MIXED or ckpt == NO_MODEL:
        if mode not in ("auto", MIXED) or device not in ("auto", "cpu"):
            raise BitbyteError(f"{NO_MODEL} and --mode {MIXED} have no other mode or device")
        refuse(f"with {NO_MODEL} or --mode {MIXED}", lanes=lanes is not None,
               threads=threads is not None)  # fmt: skip
        return {"mixer": _certify_mixed(None if ckpt == NO_MODEL else ckpt, paths, others, folder)}
    if others:
        baselines.check_names(paths)
    for file in paths:
        record = certificates.certify(
            ckpt, file, mode=mode, lanes=codec.LANES if lanes is None else lanes, device=device,
            threads=threads, folder=folder, progress=True,
        )  # fmt: skip
        print(certificates.summary(record), flush=True)
        records.append(record)
    compared = None
    if others:
        compared = baselines.comparison(records, paths, _expert(ckpt))
        compared["environment"] = environment()
        path = write_record(compared, folder)
        print(f"\n{baselines.table(compared)}\n\n{shown(path)}")
        for name, what in compared["missing"].items():
            print(f"left out: {name}; it needs {what}")
    return {"certificates": records, "others": compared}


def _certify_mixed(ckpt: str | None, paths: list[Path], others: bool, folder: Path | None) -> dict:
    from bitbyte.compress import mixtable
    from bitbyte.evaluate.records import write_record

    say = functools.partial(print, flush=True)
    record = mixtable.measure(paths, ckpt, others=others, say=say)
    path = write_record(record, folder)
    print(f"\n{mixtable.table(record)}\n\n{shown(path)}")
    for name, what in record["missing"].items():
        print(f"left out: {name}; it needs {what}")
    return record


def _expert(ckpt: str):
    """A model as an expert of the mixer; None if it cannot be one here."""
    from bitbyte.compress import streamed

    model, meta = _load(ckpt, "cpu", None)
    return None if streamed.problem(model) else streamed.Expert(model, meta)


def _report(target: str | Path, text: str) -> None:
    """Report on a file that was written, on standard error if that file is standard output."""
    piped = target == "-" or is_stdout(Path(target))
    print(f"{shown(target)}: {text}", file=sys.stderr if piped else sys.stdout)


def _load(ckpt, device: str, threads: int | None):
    from bitbyte import checkpoint
    from bitbyte.device import choose_device, prepare_process

    prepare_process(threads, deterministic=False)
    model, meta = checkpoint.load_model(ckpt, device=choose_device(device))
    model.threads = threads or 1
    return model, meta


def _how(done) -> str:
    rate = done.header.length / max(done.seconds, 1e-9) / 1000
    n = done.header.lanes
    return f"{rate:.2f} kB/s, {done.header.mode}, {n} lane{'s' if n > 1 else ''}"
