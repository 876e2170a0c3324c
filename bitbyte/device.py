"""This machine: device, dtype, threads, allocator, optional packages, facts for records."""

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bitbyte import __version__
from bitbyte.files import BitbyteError

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str = "auto", local_rank: int = 0, world: int = 1) -> torch.device:
    """The named device; "auto" = CUDA, else CPU.  Raises BitbyteError if it is not available.

    Apple's GPU must be asked for (mps), as this package has not been run on one yet.  Of several
    (``world``) processes each takes the CUDA device of its ``local_rank``.
    """
    have = {
        "cuda": torch.cuda.is_available(),
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
    }
    kind, _, number = name.partition(":")
    kind = next(k for k in have if have[k]) if name == "auto" else kind
    if kind not in have or (number and (kind != "cuda" or not number.isdecimal())):
        raise BitbyteError(f"no device {name!r}; choose from auto, cpu, cuda, cuda:N, mps")
    if not have[kind]:
        raise BitbyteError(f"device {name!r} is not available here; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    if number and world > 1:
        raise BitbyteError(
            f"{world} processes cannot share {name}; use --device cuda, and CUDA_VISIBLE_DEVICES "
            "for a choice of cards"
        )
    index = int(number or local_rank)
    if index >= torch.cuda.device_count():
        raise BitbyteError(f"there is no cuda:{index}; {torch.cuda.device_count()} are available")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Compute dtype; "auto" = bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name != "auto":
        if name not in DTYPES:
            raise BitbyteError(f"no dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere; a T4 emulates it
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def prepare_process(threads: int | None, deterministic: bool) -> None:
    """Set the thread count, deterministic kernels if asked for, and an allocator that keeps pages.

    glibc returns large blocks to the system at every free, and touching fresh pages then costs as
    much as an int8 matrix product; two settings stop that.  Raises BitbyteError on threads < 1.
    """
    if threads is not None:
        if threads < 1:
            raise BitbyteError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            libc = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD: at most 32 MiB before glibc 2.35.  The second alone slows all down.
            if libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25):
                libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


@contextlib.contextmanager
def settings_kept():
    """Restore the thread count and determinism on exit, for the notebook that called us."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore
    )
    try:
        yield
    finally:
        threads, deterministic, warn_only, fill = before
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process (on CUDA, of the device) in bytes; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> int:
    """Bytes of memory of this machine; 2^44 where it cannot be determined."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        found = 0
    return found if found > 0 else 2**44


def device_of(model) -> torch.device:
    """The device of the model's parameters; the CPU if it has none."""
    return next((p.device for p in model.parameters()), CPU)


def environment() -> dict:
    """Where a record was made: versions, commit, platform, CPU, threads."""
    about = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bitbyte": __version__,
        },
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_initialized():
        about["gpu"] = torch.cuda.get_device_name()
    return about


@functools.cache
def _commit() -> str | None:
    """Git commit of this package, with "+changes" if its files differ; None if not in git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in a venv in a repository
        changed = git("--no-optional-locks", "status", "--porcelain", "-uno", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
