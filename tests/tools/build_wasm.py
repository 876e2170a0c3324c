"""Compile the native engine's kernels to WebAssembly, for pages that hold a model.

    python tests/tools/build_wasm.py

Writes bitbyte/plots/engine.wasm.gz; to be run again after a kernel has changed (a test says so).
Needs wasm-ld (Debian: lld).  No intrinsic of a processor is used, so the bits are those of others.
"""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm

from bitbyte.kernels.native.engine import KERNELS
from bitbyte.kernels.native.machine import Machine, sources_hash
from bitbyte.plots.model_page import WASM


def build() -> bytes:
    """The module, which imports its memory and exports the kernels and their table."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = Machine.__new__(Machine)
    target = llvm.Target.from_triple("wasm32-unknown-unknown")
    machine.target = target.create_target_machine(cpu="generic", features="+simd128", opt=3)
    machine.arguments = Machine(KERNELS).arguments
    exports = [f"--export={write.__name__}" for write in KERNELS]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "kernels.wasm")
        code = machine.target.emit_object(machine._compiled(KERNELS, frozenset({"simd128"})))
        made.with_suffix(".o").write_bytes(code)
        subprocess.run(
            ["wasm-ld", made.with_suffix(".o"), "-o", made, "--no-entry", "--export=run_program",
             "--import-memory", "--export-table", "--growable-table", "--strip-all", *exports],
            check=True,
        )  # fmt: skip
        return made.read_bytes()


if __name__ == "__main__":
    data = build()
    WASM.write_bytes(gzip.compress(data, 9, mtime=0))
    WASM.with_suffix("").with_suffix(".sha256").write_text(sources_hash(KERNELS) + "\n")
    print(f"{WASM}: {WASM.stat().st_size:,} bytes, {len(data):,} unpacked")
    sys.exit(0)
