"""Commands that code files with a model: compress, decompress, certify.

Their options are the parameters of functions, which import heavy modules inside.
"""

import sys
from pathlib import Path

from bitbyte.cli.options import Ckpt, File, Json, argument
from bitbyte.files import BitbyteError, is_stdout, output_folder, shown, user_path


def compress(
    ckpt: Ckpt,
    file: File,
    out: argument(str, "OUT"),
    /,
    mode: str = "auto",
    lanes: int = 128,
    device: str = "cpu",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Compress a file with a model.

    Decoding needs the same checkpoint. A file in float mode can only be decoded on a machine that
    computes the same numbers, which is checked first, and if PyTorch computed them with the same
    number of CPU threads (decompress sets it). Portable mode computes in integers, the same
    everywhere (tested on x86 processors).

    Args:
        ckpt: run folder, step folder or run name, of family ar or mamba.
        file: any file.
        out: file to write.
        mode: native (needs llvmlite) or portable (ternary models), which any machine can read back,
            float, or auto: the first of these that works.
        lanes: maximum number of windows coded side by side (1 to 4096); more is faster but takes
            more memory.
        device: auto, cpu, cuda, mps.
        threads: CPU threads; a file in float mode needs as many to be decoded.
        allow_overwrite: replace OUT if it exists.
    """
    from bitbyte.compress import codec

    source, target = user_path(file), user_path(out)
    model, meta = _load(ckpt, device, threads)
    done = codec.compress_file(
        source, target, model, meta, mode=mode, lanes=lanes, allow_overwrite=allow_overwrite,
        progress=True,
    )  # fmt: skip
    n, threads = done.header.length, done.header.threads
    bpb = f"{8 * done.size / n:.4f} bits per byte, " if n else ""
    _report(target, f"{n:,} -> {done.size:,} bytes, {bpb}{_how(done)}")
    if done.header.mode == "float":
        needs = f"{threads} CPU thread{'s' * (threads > 1)} (decompress sets that) on"
        if done.kernels.get("engine") == "native":  # the same bits with any number of threads
            needs = "llvmlite on"
        _report(
            target,
            f"float mode: it can only be decoded with {needs} a machine that computes the same "
            "numbers",
        )


def decompress(
    file: File,
    back: argument(str, "BACK"),
    /,
    ckpt: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    allow_overwrite: bool = False,
) -> None:
    """Restore a file that bitbyte compress has written.

    BACK is written only if its SHA-256 is that of the original. (A pipe gets the bytes as they are
    decoded, and an error only at the end.)

    Args:
        file: compressed file.
        back: file to write.
        ckpt: run folder, step folder or run name; default: found by its hash in
            artifacts/checkpoints.
        device: auto, cpu, cuda, mps.
        threads: CPU threads; float mode uses as many as made the file, even if there are fewer
            processors (which is slow).
        allow_overwrite: replace BACK if it exists.
    """
    from bitbyte.compress import codec, container

    source, target = user_path(file), user_path(back)
    header = container.read_header(source)
    ckpt = codec.checkpoint_for(header) if ckpt is None else ckpt
    model, meta = _load(ckpt, device, threads)
    done = codec.decompress_file(
        source, target, model, meta, allow_overwrite=allow_overwrite, progress=True
    )
    sizes = f"{done.size:,} -> {header.length:,} bytes"
    _report(target, f"{sizes}, the SHA-256 is that of the original, {_how(done)}")


def certify(
    ckpt: Ckpt,
    files: argument(tuple[str, ...], "FILE [FILE ...]"),
    /,
    mode: str = "auto",
    lanes: int = 128,
    others: bool = False,
    out: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    json: Json = False,
) -> dict:
    """Prove a model's bits per byte by compressing and restoring files.

    Decoding runs in a separate process. The record of each file, in artifacts/results, has the
    bits promised and paid, speeds, and the size including weights and code.

    Args:
        ckpt: run folder, step folder or run name, of family ar or mamba.
        files: files to certify.
        mode: native (needs llvmlite) or portable (ternary models), which any machine can read back,
            float, or auto: the first of these that works.
        lanes: maximum number of windows coded side by side (1 to 4096).
        others: compare with gzip, bzip2, xz, zstd, brotli, ppmd and zpaq on the same files.
        out: folder for the records; default: artifacts/results.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
    """
    from bitbyte.compress import baselines
    from bitbyte.compress import certify as certificates
    from bitbyte.compress.container import plain_file
    from bitbyte.device import environment
    from bitbyte.evaluate.records import write_record

    if not files:
        raise BitbyteError("name the files to certify")
    paths = [plain_file(user_path(file)) for file in files]
    folder, records = None if out is None else output_folder(out), []
    for file in paths:
        record = certificates.certify(
            ckpt, file, mode=mode, lanes=lanes, device=device, threads=threads, folder=folder,
            progress=True,
        )  # fmt: skip
        print(certificates.summary(record), flush=True)
        records.append(record)
    compared = None
    if others:
        compared = baselines.comparison(records, paths)
        compared["environment"] = environment()
        path = write_record(compared, folder)
        print(f"\n{baselines.table(compared)}\n\n{shown(path)}")
        for name, what in compared["missing"].items():
            print(f"left out: {name}; it needs {what}")
    return {"certificates": records, "others": compared}


def _report(target: Path, text: str) -> None:
    """Report on a file that was written, on standard error if that file is standard output."""
    print(f"{shown(target)}: {text}", file=sys.stderr if is_stdout(target) else sys.stdout)


def _load(ckpt, device: str, threads: int | None):
    from bitbyte import checkpoint
    from bitbyte.device import choose_device, prepare_process

    prepare_process(threads, deterministic=False)
    return checkpoint.load_model(ckpt, device=choose_device(device))


def _how(done) -> str:
    rate = done.header.length / max(done.seconds, 1e-9) / 1000
    n = done.header.lanes
    return f"{rate:.2f} kB/s, {done.header.mode}, {n} lane{'s' if n > 1 else ''}"
