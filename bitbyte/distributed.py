"""Several processes: rank and world, the process group of ``torchrun``, the data-parallel wrapper.

A single process, the normal case, needs none of torch.distributed.  Under ``torchrun`` the group
is gloo on CPU and nccl on CUDA.
"""

import contextlib
import dataclasses
import importlib
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitbyte.device import CPU, choose_device
from bitbyte.files import BitbyteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all processes; every process gets the same number."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def share(self, value: Tensor) -> Tensor:
        """The main process's ``value`` on all, written in place."""
        if self.size > 1:
            moved = value.to(self.device)
            dist.broadcast(moved, 0)
            value.copy_(moved)
        return value

    def any_rank(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any process, so that all stop or save at the same step."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.bool().tolist()


class Announced(NamedTuple):
    """What ``torchrun`` tells a process through its environment."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    host: str = ""
    port: int = 0


def announced() -> Announced:
    """This process's place, from the environment; a process alone needs none of the variables.

    Raises BitbyteError that names a variable that is missing or is not such a number.
    """

    def number(name: str, default: str = "", below: int = 2**31) -> int:
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdecimal() and int(text) < below):
            raise _not_announced(name)
        return int(text)

    size = number("WORLD_SIZE", "1")
    if size < 1:
        raise _not_announced("WORLD_SIZE")
    if size == 1:
        return Announced(local_rank=number("LOCAL_RANK", "0"))
    rank, local = number("RANK", below=size), number("LOCAL_RANK", below=size)
    host, port = os.environ.get("MASTER_ADDR"), number("MASTER_PORT", below=2**16)
    if not host:
        raise _not_announced("MASTER_ADDR")
    return Announced(size, rank, local, host, port)


def _not_announced(name: str) -> BitbyteError:
    value = f"is {os.environ[name]!r}" if name in os.environ else "is not set"
    return BitbyteError(
        f"the environment variable {name} {value}; start several processes with torchrun, or unset "
        "WORLD_SIZE"
    )


@contextlib.contextmanager
def setup_ddp(device: str = "auto"):
    """Join the process group that ``torchrun`` announces, if any; yields a `World`.

    On exit the group is left after a barrier; after an exception it is not left at all, as the
    peers would never reach the barrier.  Leaving ends gloo's threads only if nothing else holds a
    reference to the group by then.  A thread that outlives the group may free a tensor while
    Python shuts down, which aborts a process whose work is done; and a DDP module that holds the
    last reference waits for that thread while holding the GIL, which the thread needs: a deadlock.

    Raises BitbyteError as `announced` does.
    """
    size, rank, local_rank, host, port = announced()
    place = choose_device(device, local_rank, size)
    if size == 1:
        yield World(device=place)
        return
    # If DDP is the first to import this module, the group becomes a default argument of its
    # functions: a reference that is never dropped, see above.
    importlib.import_module("torch.distributed.nn.functional")
    # A store of our own with a prefix per attempt: after an elastic restart the agent's store
    # still holds the addresses of the dead processes.  Processes started by hand have no agent;
    # rank 0 then hosts the store.
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


def wrap(model: nn.Module, world: World, mode: str = "ddp") -> nn.Module:
    """Wrap for data-parallel training; with "none" or one process, return the model itself."""
    if world.size == 1 or mode == "none":
        return model
    if mode != "ddp":
        raise BitbyteError(f"no parallel mode {mode!r}; choose from none, ddp")
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
