"""bitbyte: a research workbench for tiny byte-level language models."""

import os

__version__ = "0.1.0"

# Threads of PyTorch that wait for each other spin, for 100 ms by default on Linux.  With another
# busy process on the machine that made training ten times slower; the short spin costs a few per
# cent on an idle one.  libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
