"""Processes and devices: rank and world, device and dtype choice, seeds, data-parallel wrap.

One process is the normal case and needs none of torch.distributed.  Under ``torchrun`` the group
is gloo on CPU and nccl on CUDA.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitbyte.files import BitbyteError

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all processes, the same number on each."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any process: so that all stop or save at the same step."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.bool().tolist()


@contextlib.contextmanager
def setup_ddp(device: str = "auto"):
    """Join the process group that ``torchrun`` announces, if any; yields a `World`.

    The group is left after a barrier, and not at all after an exception, when the peers would never
    arrive at it.  Leaving ends gloo's threads only if nothing else holds the group by then.  A
    thread that outlives it may let go of a tensor while Python shuts down, which aborts the
    process after all its work is done; and a DDP module that is the last to hold the group waits
    for that thread with Python's lock held, which the thread wants too (a hang).
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")), size)
    if size == 1:
        yield World(device=place)
        return
    # The group becomes a default argument of this module's functions, for good, if DDP is the first
    # to import it: see above.
    importlib.import_module("torch.distributed.nn.functional")
    # A store of our own with a prefix per attempt: after an elastic restart the agent's store
    # still holds the addresses of the dead processes.
    # Processes that were announced by hand have no agent, and the first of them keeps the store.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = "TORCHELASTIC_RUN_ID" in os.environ
    store = dist.TCPStore(host, port, size, is_master=rank == 0 and not agent)
    store = dist.PrefixStore("try" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    limit = timedelta(seconds=600 if place.type == "cuda" else 120)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    world = World(rank=rank, size=size, device=place)
    yield world
    world.barrier()
    dist.destroy_process_group()


def choose_device(name: str = "auto", local_rank: int = 0, world: int = 1) -> torch.device:
    """The named device; "auto" = CUDA, else CPU.  Absent ones raise BitbyteError.

    Apple's GPU is taken by name only (mps): this package was not run on one yet.  One of ``world``
    processes on a machine takes the CUDA device of its ``local_rank``.
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
        raise BitbyteError(f"there is no cuda:{index}; {torch.cuda.device_count()} are here")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Compute dtype; "auto" = bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name != "auto":
        if name not in DTYPES:
            raise BitbyteError(f"no dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere; T4 only emulates it
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def prepare_process(threads: int | None, deterministic: bool) -> None:
    """Thread count, reproducible kernels on request, and an allocator that keeps its pages.

    glibc returns large blocks to the system at every free, and touching fresh pages then costs as
    much as an int8 matrix product; two settings stop that.  Raises BitbyteError for no threads.
    """
    if threads is not None:
        if threads < 1:
            raise BitbyteError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def settings_kept():
    """Puts the thread count and determinism back on leaving: a notebook goes on with its own."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        yield
    finally:
        threads, deterministic, warn_only, fill = before
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def wrap(model: nn.Module, world: World, mode: str = "ddp") -> nn.Module:
    """Wrap for data-parallel training; "none" or one process returns the model itself."""
    if world.size == 1 or mode == "none":
        return model
    if mode != "ddp":
        raise BitbyteError(f"no parallel mode {mode!r}; choose from none, ddp")
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def peak_memory(device: torch.device) -> int | None:
    """Largest memory this process has held, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
