"""Devices by name, dtypes by hardware, and processes without torchrun."""

import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from bitbyte import distributed
from bitbyte.device import DTYPES, choose_device, choose_dtype, dtype_name
from bitbyte.distributed import announced, setup_ddp
from bitbyte.files import BitbyteError


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


def test_devices_by_name(two_cards, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda", local_rank=1, world=2) == torch.device("cuda", 1)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(BitbyteError, match="there is no cuda:2; 2 are available"):
        choose_device("cuda:2")
    with pytest.raises(BitbyteError, match="2 processes cannot share cuda:1; use --device cuda"):
        choose_device("cuda:1", local_rank=0, world=2)
    for name in ("tpu", "cuda:x", "cuda:-1", "cpu:0", "mps:1"):
        with pytest.raises(BitbyteError, match=f"no device '{name}'; choose from auto"):
            choose_device(name)


def test_an_apple_gpu_is_taken_by_name_only(monkeypatch):
    """Nothing was run on one yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"
    assert choose_device("mps").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BitbyteError, match="'mps' is not available here; use --device cpu"):
        choose_device("mps")


def test_dtypes_by_hardware(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert choose_dtype("auto", cuda) == dtype
    for has, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda it=has: it)
        assert choose_dtype("auto", cpu) == dtype
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    for name, dtype in DTYPES.items():
        assert choose_dtype(name, cuda) == dtype and dtype_name(dtype) == name


ANNOUNCED = {
    "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in ANNOUNCED:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(*item) for item in values.items()]


def test_what_torchrun_announces(environment):
    assert announced() == (1, 0, 0, "", 0)
    environment(RANK="3")  # of some other launcher: this process is alone
    assert announced() == (1, 0, 0, "", 0)
    environment(**ANNOUNCED)
    assert announced() == (4, 2, 1, "10.0.0.1", 29500)


@pytest.mark.parametrize("name", ANNOUNCED)
@pytest.mark.parametrize("value", ["", "x", "-1", "4.0", "999999"])
def test_a_variable_that_cannot_be_is_named(name, value, environment, monkeypatch):
    if (name, value) == ("WORLD_SIZE", "999999"):
        value = "0"
    environment(**ANNOUNCED | {name: value})
    if name != "MASTER_ADDR" or not value:  # any text may be a host
        with pytest.raises(BitbyteError, match=f"{name} is '{value}'; .* with torchrun"):
            announced()
    monkeypatch.delenv(name)
    if name != "WORLD_SIZE":
        with pytest.raises(BitbyteError, match=f"{name} is not set; .* with torchrun"):
            next(setup_ddp.__wrapped__("cpu"))


def test_a_start_takes_no_name_of_an_earlier_one():
    """The store outlives a start; whoever comes first may find an old name, with its answer."""
    store, names = dist.HashStore(), []
    for late in (1, 0):
        found = {}

        def join(rank, found=found):
            found[rank] = distributed._attempt(store, rank, 3)

        ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for rank in (late, 2, 1 - late):
            ranks[rank].start()
            ranks[rank].join(0.2)
        for rank in ranks:
            rank.join(60)
        assert len(found) == 3 and len({*found.values()}) == 1
        names.append(found[0])
    assert names[0] != names[1]


PROGRAM = """
from bitbyte.distributed import setup_ddp
with setup_ddp("cpu") as world:
    print(world.any_rank(world.rank == 1, world.rank == 5, False), world.size)
"""


def test_processes_that_were_announced_by_hand():
    """Without torchrun nobody else keeps the store: the first process does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == ["[True, False, False] 2\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
