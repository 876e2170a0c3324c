"""Compiles kernels once, keeps the machine code in a folder of the user, and runs programs.

A `Program` is a list of operations, each a kernel and up to 15 numbers.  One call of native code
walks the list, so a model's step has no Python inside.
"""

import contextlib
import ctypes
import hashlib
import inspect
import os
import struct
from collections.abc import Callable
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from bitbyte.files import write_atomic
from bitbyte.kernels.native.threads import Crew, Division
from bitbyte.kernels.native.vector import Kernel

PACK = [struct.Struct(f"{n}q") for n in range(8)]  # faster than assigning to an array
WIDTH = 16  # numbers of an operation: its kernel's address and its arguments
# Numbers that all operations of a call share.
CONTEXT = ("rows", "start", "length", "last", "drawn", "ids")


class Processor:
    """What code is compiled for; ``cpu`` and ``features`` default to this processor's."""

    def __init__(self, cpu: str | None = None, features: str | None = None):
        for start in ("initialize_native_target", "initialize_native_asmprinter"):
            getattr(llvm, start)()
        cpu = cpu or os.environ.get("BITBYTE_ENGINE_CPU") or llvm.get_host_cpu_name()
        features = features or os.environ.get("BITBYTE_ENGINE_FEATURES")
        features = features or llvm.get_host_cpu_features().flatten()
        self.present = frozenset(f[1:] for f in features.split(",") if f.startswith("+"))
        features += ",-prefer-256-bit"  # some processors would be given registers of half the size
        target = llvm.Target.from_default_triple()
        self.target = target.create_target_machine(cpu=cpu, features=features, opt=3)
        triple = llvm.get_default_triple()
        self.facts = llvmlite.__version__, llvm.llvm_version_info, triple, cpu, features

    def load(self, sources: str, make: Callable[[], llvm.ModuleRef]) -> llvm.ExecutionEngine:
        """Machine code, kept in a folder of the user; ``sources`` names what it is made from."""
        made = hashlib.sha256(repr(self.facts).encode() + sources.encode())
        key = made.hexdigest()[:32]
        code = _stored(key)
        if code is None:
            code = self.target.emit_object(make())
            _store(key, code)
        # The engine is given an empty module, and the machine code as what that compiles to.
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self.target)
        engine.set_object_cache(getbuffer_func=lambda module: code)
        engine.finalize_object()
        return engine


class Machine:
    """Kernels in machine code for one processor (see `Processor`).

    ``kernels`` are functions (see `vector`); arguments named in CONTEXT come from the call, the
    others from the operation.
    """

    def __init__(
        self, kernels: list[Callable], cpu: str | None = None, features: str | None = None
    ):
        processor = Processor(cpu, features)
        self.target = processor.target
        self.arguments = {f.__name__: list(inspect.signature(f).parameters)[1:] for f in kernels}
        self.engine = processor.load(
            sources_hash(kernels), lambda: self._compiled(kernels, processor.present)
        )
        self.addresses = {name: self.engine.get_function_address(name) for name in self.arguments}
        run = self.engine.get_function_address("run_program")
        assert run and all(self.addresses.values())
        # Where the operations of kernels that can be divided have their part and parts.
        self.shares = {
            self.addresses[name]: 1 + self.numbers(name).index("part")
            for name, arguments in self.arguments.items()
            if "part" in arguments
        }
        self.run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(run)

    def numbers(self, kernel: str) -> list[str]:
        """Names of what an operation passes to a kernel."""
        return [n for n in self.arguments[kernel] if n not in CONTEXT]

    def _compiled(self, kernels: list[Callable], present: frozenset[str]) -> llvm.ModuleRef:
        module = ir.Module("bitbyte")
        module.triple = self.target.triple
        for write in kernels:
            k = Kernel(module, write.__name__, present)
            operation = iter(range(WIDTH - 1))
            write(k, *(
                k.context(CONTEXT.index(name)) if name in CONTEXT else k.argument(next(operation))
                for name in self.arguments[write.__name__]
            ))  # fmt: skip
            k.builder.ret_void()
        _write_runner(module)
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        return parsed


def _write_runner(module: ir.Module) -> None:
    """``run_program(operations, n, context, times)``: call the kernels of n operations, in turn."""
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 4), "run_program")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    kind = ir.FunctionType(ir.VoidType(), [i64.as_pointer()] * 2)
    operations, n, context, times = function.args
    context = build.inttoptr(context, i64.as_pointer())
    head, body, after = (function.append_basic_block(name) for name in ("head", "body", "after"))
    entry = build.block
    build.branch(head)
    build.position_at_end(head)
    i = build.phi(i64)
    i.add_incoming(ir.Constant(i64, 0), entry)
    build.cbranch(build.icmp_signed("<", i, build.mul(n, times)), body, after)
    build.position_at_end(body)
    place = build.add(operations, build.mul(build.urem(i, n), ir.Constant(i64, 8 * WIDTH)))
    pointer = build.inttoptr(place, i64.as_pointer())
    kernel = build.inttoptr(build.load(pointer, typ=i64), kind.as_pointer())
    arguments = build.inttoptr(build.add(place, ir.Constant(i64, 8)), i64.as_pointer())
    build.call(kernel, [arguments, context])
    i.add_incoming(build.add(i, ir.Constant(i64, 1)), body)
    build.branch(head)
    build.position_at_end(after)
    build.ret_void()


def sources_hash(kernels: list[Callable]) -> str:
    """SHA-256 (hex) of the code that the kernels are written in."""
    made = hashlib.sha256(repr([write.__name__ for write in kernels]).encode())
    folder = Path(__file__).parent
    for path in sorted({write.__code__.co_filename for write in kernels}):
        made.update(Path(path).read_bytes().replace(b"\r\n", b"\n"))
    for path in sorted(folder.glob("*.py")):
        made.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return made.hexdigest()


def _folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bitbyte" / "engine"


def _stored(key: str) -> bytes | None:
    """Machine code that was kept, if it is whole and nobody else could have written it."""
    path = _folder() / f"{key}.o"
    with contextlib.suppress(OSError, RuntimeError):
        facts = path.stat(), path.parent.stat()
        mine = not hasattr(os, "getuid") or all(f.st_uid == os.getuid() for f in facts)
        shared = os.name == "posix" and any(f.st_mode & 0o022 for f in facts)
        content = path.read_bytes()
        digest, code = content[:32], content[32:]
        if mine and not shared and hashlib.sha256(code).digest() == digest:
            return code
    return None


def _store(key: str, code: bytes) -> None:
    """Keep machine code; where that is not possible, the next process compiles again."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(folder / f"{key}.o", hashlib.sha256(code).digest() + code)


class Program:
    """Operations in order, and the arrays they work on."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.rows: list[list[int]] = []
        self.kept: list = []  # arrays whose addresses are in the program
        self.context = np.zeros(len(CONTEXT), np.int64)

    def add(self, kernel: Callable, **arguments: "int | np.ndarray") -> None:
        """Append an operation; arrays are passed by address."""
        names = self.machine.numbers(kernel.__name__)
        if "part" in names:
            arguments |= {"part": 0, "parts": 1}
        assert names == list(arguments), f"{kernel.__name__} takes {names}, not {[*arguments]}"
        numbers = [
            self.address(v) if isinstance(v, np.ndarray) else int(v) for v in arguments.values()
        ]
        row = [self.machine.addresses[kernel.__name__], *numbers]
        self.rows.append(row + [0] * (WIDTH - len(row)))

    def address(self, array: np.ndarray) -> int:
        """Where an array lies; it is kept alive as long as the program."""
        assert array.flags.c_contiguous
        self.kept.append(array)
        return array.ctypes.data

    def finish(self, crew: Crew | None = None) -> None:
        """Make the program callable, by a crew if there is one; nothing can be added any more."""
        self.operations = np.array(self.rows, np.int64)
        self.call = (self.operations.ctypes.data, len(self.rows), self.context.ctypes.data)
        self.division = Division(crew, self.machine, self.rows) if crew else None

    def __call__(self, *context: int, times: int = 1) -> None:
        """Run it so many times, with the first numbers of the context set to these."""
        PACK[len(context)].pack_into(self.context, 0, *context)  # pyright: ignore
        if self.division:
            self.division(self.call, int(self.context[0]), times)
        else:
            self.machine.run(*self.call, times)
