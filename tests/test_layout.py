"""The house: who may import whom, how large the core is, what a bare installation imports."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

PACKAGE = ROOT / "bitbyte"
TEMPLATE = PACKAGE / "interop" / "modeling_bitbyte.py"  # copied into folders, never imported
FILES = sorted({*PACKAGE.rglob("*.py")} - {TEMPLATE})
CORE_LINES = 7_850

FLOORS = {  # a floor may use itself, the core (the root and kernels/), and these
    "stories": "",
    "data": "stories",
    "evaluate": "stories",
    "compress": "evaluate",
    "interop": "evaluate",
    "passport": "evaluate compress interop",
    "legacy": "",
    "bench": "data compress",
    "plots": "evaluate",
    "papers": "evaluate plots",
    "widgets": "data evaluate plots compress",
    "workbench": "data evaluate",
}
FLOORS["cli"] = " ".join(FLOORS)
OWN = {"widgets": {"anywidget", "ipywidgets", "traitlets"}, "cli": {"tyro"}}  # at module level
NATIVE = "bitbyte.kernels.native"  # needs llvmlite; kernels/engine.py asks before it imports it


def name_of(path: Path) -> str:
    """bitbyte.widgets.lens; a package by its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> str:
    """The floor a module is on; the root, but for __main__, and kernels/ are the core."""
    if module == "bitbyte.__main__":
        return "cli"
    return next((part for part in module.split(".")[1:2] if part in FLOORS), "core")


MODULES = {name_of(path): path for path in FILES}
FACES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(tree: ast.AST) -> set[str]:
    """The modules of bitbyte that code imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return {name for name in found if name.split(".")[0] == "bitbyte"}


def problems(module: str, source: str) -> list[str]:
    """What one module's imports do that they may not."""
    tree, found = ast.parse(source), []
    for target in imports(tree):
        if target in FACES and not (target == "bitbyte" and bare(tree)):
            found.append(f"{target} is a face: import from the module that owns the name")
        elif floor(target) not in {"core", floor(module), *FLOORS.get(floor(module), "").split()}:
            found.append(f"{module} may not import {target}")
    allowed = {"torch", "numpy", "safetensors", "tqdm", "bitbyte", *sys.stdlib_module_names}
    allowed |= OWN.get(floor(module), set())
    allowed |= {"llvmlite"} if module.startswith(NATIVE) else set()
    for node in at_import(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"{name} is imported at module level" for name in names
            if name.split(".")[0] not in allowed
        ]  # fmt: skip
    return found


def bare(tree: ast.AST) -> bool:
    """Whether nothing but `face` and the version is taken from bitbyte itself."""
    taken = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "bitbyte"
        for alias in node.names
        if f"bitbyte.{alias.name}" not in MODULES
    }
    return taken <= {"face", "__version__"}


def at_import(tree: ast.Module):
    """Nodes that run when the module is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        guarded = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        if not guarded and not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            todo += ast.iter_child_nodes(node)


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert problems(module, MODULES[module].read_text("utf-8")) == []


def test_no_circles_and_a_lean_core():
    graph = {
        name: imports(ast.parse(path.read_text("utf-8"))) - FACES - {name}
        for name, path in MODULES.items()
        if name not in FACES
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert sum(n for path, n in lines.items() if path.parent == PACKAGE) <= CORE_LINES
    assert [str(path) for path in FILES if not path.read_text("utf-8").isascii()] == []
    assert {*FLOORS} == {name.split(".")[1] for name in FACES - {"bitbyte"}} - {"kernels"}


def test_renames_are_patient():
    """`files.patiently` calls them: on Windows a reader or a scanner may have the file open."""
    bare = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.rename", "os.replace"):
                bare.add(module)
    assert not bare


def test_the_document_shows_who_may_import_whom():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    shown = {}
    for floors, allowed in (row for row in table if len(row) == 2):
        for floor in re.findall(r"`(\w+)`", floors):
            shown.setdefault(floor, " ".join(re.findall(r"`(\w+)`", allowed)))
    assert shown | {"cli": FLOORS["cli"]} == FLOORS | {"kernels": ""}


@pytest.mark.parametrize(
    ("module", "source", "word"),
    [
        ("bitbyte.files", "from bitbyte.cli.data import pack", "may not import"),
        ("bitbyte.train", "def f():\n    from bitbyte.evaluate import leaks", "may not import"),
        ("bitbyte.plots.svg", "from bitbyte.widgets import lens", "may not import"),
        ("bitbyte.kernels.cpu_norm", "from bitbyte.plots import svg", "may not import"),
        ("bitbyte.train", "from bitbyte.evaluate import compare", "a face"),
        ("bitbyte.train", "import bitbyte", ""),
        ("bitbyte.train", "from bitbyte import recipes", "a face"),
        ("bitbyte.plots.svg", "import matplotlib", "module level"),
        (
            "bitbyte.plots.svg",
            "try:\n    import tyro\nexcept ImportError:\n    pass",
            "module level",
        ),
    ],
)
def test_the_rules_can_fail(module, source, word):
    assert any(word in problem for problem in problems(module, source)) or not word


def test_the_rules_let_good_code_pass():
    source = (
        "import os\nimport torch\nfrom bitbyte import __version__, files\n"
        "from bitbyte.kernels import numba_scan\ndef f():\n    import matplotlib\n"
    )
    assert problems("bitbyte.checkpoint", source) == []
    assert problems("bitbyte.cli.score", "import tyro\nfrom bitbyte.plots import svg\n") == []


def core_distributions() -> set[str]:
    """Names of the distributions that the core requirements bring, themselves included."""
    requirements = importlib.metadata.requires("bitbyte")
    todo, seen = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            more = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += map(Requirement, more)
    return seen


BLOCKER = """
import importlib, sys
blocked = set({blocked!r})
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{{name}} is no core dependency", name=name)
sys.meta_path.insert(0, Finder())
for name in {modules!r}:
    importlib.import_module(name)
print("imported", len({modules!r}))
"""


def import_with_core_only(modules: list[str]) -> subprocess.CompletedProcess:
    core = core_distributions()
    owners = importlib.metadata.packages_distributions()
    blocked = [
        name
        for name, dists in owners.items()
        if name != "bitbyte" and not core & {canonicalize_name(dist) for dist in dists}
    ]
    assert "matplotlib" in blocked and "torch" not in blocked
    code = BLOCKER.format(blocked=sorted(blocked), modules=modules)
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )


def test_every_module_imports_with_core_dependencies_only():
    modules = [
        name for name in MODULES
        if not (floor(name) == "widgets" and name not in FACES)
        and name != "bitbyte.__main__"
        and (name in FACES or not name.startswith(NATIVE))
    ]  # fmt: skip
    done = import_with_core_only(modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"imported {len(modules)}\n"


def test_the_blocker_blocks():
    assert "no core dependency" in import_with_core_only(["matplotlib"]).stderr
