"""Several processes: rank and world, the group of ``torchrun``, whole or sharded weights in each.

A single process, the normal case, needs none of torch.distributed.  Under ``torchrun`` the group
is gloo on CPU and nccl on CUDA.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import secrets
import time
import warnings
import weakref
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitbyte.device import CPU, choose_device, memory
from bitbyte.files import BitbyteError, RunError

JOIN = timedelta(seconds=120)  # for all processes to be there
LIMIT = timedelta(hours=6)  # to wait while the main process counts n-grams or saves


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
    # Processes started by hand have no agent; rank 0 then hosts the store.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, size, is_master=rank == 0 and not agent)
    store = dist.PrefixStore(_attempt(store, rank, size), store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LIMIT)
    world = World(rank=rank, size=size, device=place)
    yield world
    gc.collect()  # the hooks of FSDP2 are circles
    world.barrier()
    dist.destroy_process_group()


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name that the processes of this start share, and those of an earlier one did not.

    After an elastic restart the agent's store still holds the addresses of the dead processes, and
    the agents of several machines count restarts differently.  So rank 0 makes up a name, and the
    others accept it once rank 0 has repeated what they made up themselves.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set("attempt", own)
        keys = [f"{own}/{other}" for other in range(1, size)]
        store.wait(keys, JOIN)
        store.set(own, " ".join(store.get(key).decode() for key in keys))
        return own
    deadline = time.monotonic() + JOIN.total_seconds()
    while True:
        name = store.get("attempt").decode()  # perhaps of an earlier start, with an old answer
        store.set(f"{name}/{rank}", own)
        if store.check([name]) and own in store.get(name).decode().split():
            return name
        time.sleep(0.05)
        if time.monotonic() > deadline:
            raise RunError(f"rank {rank} has not heard from rank 0 for {JOIN.seconds} seconds")


def restarts() -> bool:
    """Whether ``torchrun --max-restarts`` will start this command again if a process dies."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def parallel_mode(asked: str, n_parameters: int, world: World) -> str:
    """What `wrap` does: none for one process, else ddp or fsdp2.

    "auto" is ddp while that takes at most half the memory: it keeps 16 bytes a parameter, for the
    weight, its gradient and the optimizer's state.
    """
    if world.size == 1:
        return "none"
    if asked != "auto":
        return asked
    needed = needs_shares(n_parameters, world.size, world.device)
    return "fsdp2" if world.any_rank(needed)[0] else "ddp"


def needs_shares(n_parameters: int, size: int, device: torch.device) -> bool:
    """Whether "auto" is fsdp2 for ``size`` processes: each has a card, or its part of memory."""
    has = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory() // size
    return 16 * n_parameters > has / 2


def wrap(model: nn.Module, world: World, mode: str) -> nn.Module:
    """Make a model train on several processes, see `parallel_mode`; "none" is the model itself.

    fsdp2 changes the model in place: its parameters become DTensors, each process keeps a share of
    every one, and a block is gathered while it is computed.  In float32, before anything is
    rounded: a ternary weight depends on the mean of its whole matrix.
    """
    if mode == "none":
        return model
    if mode == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        # Without views, gradients would be held twice.
        parallel = nn.parallel.DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
        parallel.broadcast_buffers = False  # they are tables, which training does not change
        return parallel
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    # Nothing works in place on a model's output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = DeviceMesh.from_group(dist.group.WORLD, world.device.type)  # pyright: ignore
    if hasattr(mesh, "_pg_registry"):  # caches of DTensor keep the mesh: not the group, too
        mesh._pg_registry = weakref.WeakValueDictionary(mesh._pg_registry)  # pyright: ignore
    for block in model.body.blocks:  # pyright: ignore
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every process, all of which call this; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """`whole` tensors on the main process; those that were sharded go to the CPU one by one."""
    content = {}
    for name, tensor in sorted(tensors.items()):  # read from a file, their order is random
        full = whole(tensor)
        if world.is_main:
            content[name] = full if full is tensor else full.cpu()
    return content


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that all hold, on the device and divided as ``like``."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # pyright: ignore
