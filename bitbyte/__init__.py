"""bitbyte: a research workbench for tiny byte-level language models.

The core lies here, from `vocab` to `train`; each subpackage builds on the core.  README.md shows
the tree.
"""

import importlib
import os
import warnings
from collections.abc import Callable

__version__ = "0.1.0"

# Threads of PyTorch that wait for each other spin, for 100 ms by default on Linux.  With another
# busy process on the machine that made training ten times slower; the short spin costs a few per
# cent on an idle one.  libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def face(package: str, homes: dict[str, str], renamed: str = "") -> Callable[[str], object]:
    """A module's ``__getattr__`` that takes names from the modules they live in, at first use.

    ``homes`` maps a module of bitbyte to the names offered from it, separated by blanks, and
    ``renamed`` has pairs "old:new" of names that changed, the new ones from ``homes`` or the
    module's own: an old one warns for one version.
    """
    where = {name: f"bitbyte.{home}" for home, names in homes.items() for name in names.split()}
    new = dict(pair.split(":") for pair in renamed.split())

    def take(name: str) -> object:
        home = where.get(name)
        if name in new:
            text = f"{package}.{name} is called {new[name]} now"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            name = new[name]
            home = where.get(name, package)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)

    return take


# Modules that lay here before they had a floor of their own.
_MOVED = {
    "analysis": "evaluate.analysis",
    "analysis_plots": "plots.analysis",
    "certify": "compress.certify",
    "compress_plots": "plots.compress",
    "compressors": "compress.baselines",
    "entropy": "evaluate.entropy",
    "leaks": "evaluate.leaks",
    "legacy_convert": "legacy.convert",
    "paper_source": "papers.source",
    "recipes": "workbench.recipes",
    "report": "evaluate.tables",
}


def __getattr__(name: str) -> object:
    if name not in _MOVED:
        raise AttributeError(f"module 'bitbyte' has no attribute {name!r}")
    return importlib.import_module(f"bitbyte.{_MOVED[name]}")
