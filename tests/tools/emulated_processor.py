"""Run the native engine's kernels on an emulated ARM processor and compare the bits with ours.

    python tests/tools/emulated_processor.py

The kernels are compiled for AArch64, linked with a small program in C that puts a model's memory at
the addresses it has here, and run by QEMU.  Needs Linux on x86-64 and Debian's packages
gcc-aarch64-linux-gnu and qemu-user-static.
"""

# ruff: noqa: E402 - the tests are not a package

import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("compress", ".")]

from test_integer import formula_ids
from test_native import GOLDEN, model_of

from bitbyte.kernels.native.engine import KERNELS, Engine
from bitbyte.kernels.native.machine import WIDTH, Machine

PAGE = 4096
SOURCE = """
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
%(declared)s
extern void run_program(int64_t, int64_t, int64_t, int64_t);
static void *kernels[] = {%(names)s};
static int64_t number(FILE *f) { int64_t n = 0; return fread(&n, 8, 1, f) == 1 ? n : -1; }
int main(int argc, char **argv) {
    FILE *f = fopen(argv[1], "rb");
    for (int64_t n = number(f); n > 0; n--) {  /* pages */
        int64_t at = number(f), size = number(f);
        void *got = mmap((void *)at, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (got != (void *)at) return 2;
    }
    for (int64_t n = number(f); n > 0; n--) {  /* what lies on them */
        int64_t at = number(f), size = number(f);
        if (fread((void *)at, 1, size, f) != (size_t)size) return 3;
    }
    int64_t operations = number(f), n = number(f), context = number(f);
    int64_t out = number(f), size = number(f);
    for (int64_t i = 0; i < n; i++) {
        int64_t *row = (int64_t *)operations + i * %(width)d;
        row[0] = (int64_t)kernels[row[0]];
    }
    run_program(operations, n, context, 1);
    return fwrite((void *)out, 1, size, stdout) != (size_t)size;
}
"""


def executable(folder: Path) -> Path:
    """The kernels and the program above, for AArch64."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = Machine.__new__(Machine)
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    machine.target = target.create_target_machine(cpu="generic", opt=3, reloc="pic")
    machine.arguments = Machine(KERNELS).arguments
    (folder / "kernels.o").write_bytes(
        machine.target.emit_object(machine._compiled(KERNELS, frozenset()))
    )
    names = [write.__name__ for write in KERNELS]
    declared = "\n".join(f"extern void {name}(int64_t *, int64_t *);" for name in names)
    source = SOURCE % {"declared": declared, "names": ", ".join(names), "width": WIDTH}
    (folder / "main.c").write_text(source)
    subprocess.run(
        ["aarch64-linux-gnu-gcc", "-static", "-O1", "main.c", "kernels.o", "-o", "main", "-lm"],
        cwd=folder, check=True,
    )  # fmt: skip
    return folder / "main"


def pages_of(arrays: list[np.ndarray]) -> list[tuple[int, int]]:
    """(address, size) of the pages that arrays lie on, joined where they touch."""
    spans = sorted(
        (a.ctypes.data // PAGE * PAGE, -(-(a.ctypes.data + a.nbytes) // PAGE) * PAGE)
        for a in arrays
    )
    joined = [spans[0]]
    for start, stop in spans[1:]:
        if start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return [(start, stop - start) for start, stop in joined]


def compare(name: str, program: Path, folder: Path) -> bool:
    """Whether the counts of a model are the same, bit for bit."""
    with torch.no_grad():
        engine = Engine(model_of(name))
    ids_ST, state = formula_ids(3, 32).numpy(), None
    state = engine.state(len(ids_ST))
    want_MV = state.run(ids_ST, kind=np.uint32).copy()
    state.clear()
    run, counts_MV = state.step._counting
    counts_MV[:] = 0
    run.context[:4] = ids_ST.size, 0, ids_ST.shape[1], 0
    kernels = [run.machine.addresses[write.__name__] for write in KERNELS]
    operations = run.operations.copy()
    operations[:, 0] = [kernels.index(address) for address in operations[:, 0]]
    arrays = [*state.step.program.kept, *run.kept, run.context, operations]
    pages = pages_of(arrays)
    with open(folder / "memory", "wb") as file:

        def write(*numbers: int) -> None:
            file.write(np.array(numbers, np.int64).tobytes())

        write(len(pages), *(number for page in pages for number in page), len(arrays))
        for array in arrays:
            write(array.ctypes.data, array.nbytes)
            file.write(array.tobytes())
        write(operations.ctypes.data, len(operations), run.context.ctypes.data)
        write(counts_MV.ctypes.data, counts_MV.nbytes)
    ran = subprocess.run(
        ["qemu-aarch64-static", program, folder / "memory"], check=True, capture_output=True
    )
    return np.array_equal(np.frombuffer(ran.stdout, np.uint32).reshape(want_MV.shape), want_MV)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        program = executable(Path(place))
        same = {name: compare(name, program, Path(place)) for name in GOLDEN}
    for name, equal in same.items():
        print(f"{name}: {'the same bits' if equal else 'OTHER BITS'}")
    sys.exit(not all(same.values()))
