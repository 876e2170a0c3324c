"""The package's shape, read from its source: layers, imports, sizes, forbidden calls."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bitbyte"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600

# A module imports only from rows above its own.
# fmt: off
LAYERS = (
    ("__init__", "story_words", "vocab"),
    ("files",),
    ("records",),
    ("bitlinear", "byteview_page", "compressors", "dist", "hooks", "inputs", "kernels",
     "manifest", "notebooks", "peers", "plots", "rans", "report", "runs", "story_plots", "svg"),
    ("analysis_plots", "byteview", "jobs", "optim", "scans", "transformer", "stories", "datasets"),
    ("compress_plots", "container", "corpora", "fixed", "shards", "mamba"),
    ("integer_mamba", "shapes"),
    ("models",),
    ("checkpoint", "config", "integer"),
    ("generate", "leaks", "bounds", "legacy", "predict"),
    ("evaluate", "infill", "legacy_convert", "compress", "export"),
    ("certify", "entropy", "listing", "paper_records"),
    ("analysis", "lens_parts", "paper_blocks", "sampler_parts", "train"),
    ("paper_source", "sampler_controls"),
    ("batch", "bench", "chat", "infiller", "lens", "monitor", "papers", "recipes", "sampler"),
    ("checkpoint_commands", "commands", "compress_commands", "look_commands", "widgets"),
    ("cli",),
    ("__main__",),
)
# fmt: on
LAYER = {name: number for number, row in enumerate(LAYERS) for name in row}
CORE = {"torch", "numpy", "safetensors", "tqdm"}
# For notebooks: these import the widget libraries of the extra "workbench", and nothing does them.
WIDGETS = {
    "byteview", "infiller", "lens", "monitor", "sampler", "sampler_controls", "widgets",
}  # fmt: skip


def module_name(path: Path) -> str:
    """bitbyte/files.py is files, bitbyte/kernels/cpu.py is kernels."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def at_import(tree: ast.Module):
    """The nodes that run when the module is imported: no function bodies, no TYPE_CHECKING."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def imports(nodes) -> list[tuple[str, int]]:
    """(dotted module, line); ``from bitbyte import x`` counts as bitbyte.x."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            names = [alias.name for alias in node.names]
            if source == "bitbyte":
                found += [(f"bitbyte.{name}", node.lineno) for name in names]
            else:
                found.append((source, node.lineno))
    return found


def problems(source: str, name: str, names: set[str]) -> list[str]:
    """What is wrong with one module's source.  ``names``: the modules of the package."""
    tree = ast.parse(source)
    found = []
    if not source.isascii():
        found.append("not ASCII")
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"{len(source.splitlines())} lines, more than {MAX_LINES}")
    if name not in LAYER:
        return [*found, "stands in no layer: add it to LAYERS"]
    for target, line in imports(ast.walk(tree)):
        if target.startswith("."):
            found.append(f"line {line}: relative import")
        if target.split(".")[0] != "bitbyte" or target == "bitbyte.__version__":
            continue
        other = target.split(".")[1] if "." in target else ""
        if other not in names:
            found.append(f"line {line}: {target} is no module (nothing goes through __init__)")
        elif other != name and LAYER.get(other, 99) >= LAYER[name]:
            found.append(f"line {line}: imports {other}, which is not in a lower layer")
        elif other in WIDGETS and name not in WIDGETS:
            found.append(f"line {line}: imports the widget {other}")
    allowed = {*CORE, "bitbyte", *sys.stdlib_module_names}
    if name == "cli" or name.endswith("commands"):
        allowed.add("tyro")
    if name in WIDGETS:
        allowed |= {"anywidget", "ipywidgets", "traitlets"}
    for target, line in imports(at_import(tree)):
        if target.split(".")[0] not in allowed:
            found.append(f"line {line}: imports {target} at module level; import it where used")
    for node in at_import(tree):
        if ast.unparse(node) == "sys.argv":
            found.append(f"line {node.lineno}: reads sys.argv on import")
    return found + forbidden(tree)


def forbidden(tree: ast.Module) -> list[str]:
    """Calls that run a stranger's code or pickle."""
    legacy = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "legacy" in node.name:
            legacy.update(map(id, ast.walk(node)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if call in ("torch.load", "load") and call.startswith("torch"):
                if id(node) not in legacy:
                    found.append(f"line {node.lineno}: torch.load outside of the legacy reader")
                if keywords.get("weights_only") != "True":
                    found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if "trust_remote_code" in keywords:
                found.append(f"line {node.lineno}: trust_remote_code")
            if call in ("yaml.load", "yaml.full_load", "yaml.unsafe_load"):
                found.append(f"line {node.lineno}: {call}; only yaml.safe_load")
            if call in ("eval", "exec", "pickle.load", "pickle.loads", "dcp.load", "os.system"):
                found.append(f"line {node.lineno}: {call}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module(path):
    names = {module_name(other) for other in FILES}
    assert problems(path.read_text("utf-8"), module_name(path), names) == []


@pytest.mark.parametrize(
    ("name", "source", "word"),
    [
        ("files", "from bitbyte.train import train", "lower layer"),
        ("files", "def f():\n    from bitbyte import train", "lower layer"),
        ("train", "from bitbyte import artifacts", "no module"),
        ("train", "import bitbyte", "no module"),
        ("train", "from . import files", "relative"),
        ("plots", "import matplotlib", "module level"),
        ("plots", "try:\n    import tyro\nexcept ImportError:\n    pass", "module level"),
        ("files", "import sys\nif sys.argv:\n    pass", "sys.argv"),
        ("files", "x = '\u00e9'", "ASCII"),
        ("files", "\n" * (MAX_LINES + 1), "lines"),
        ("surprise", "", "no layer"),
        ("recipes", "import ipywidgets", "module level"),
        ("commands", "from bitbyte import lens", "the widget lens"),
        ("checkpoint", "import torch\nx = torch.load('f', weights_only=True)", "legacy reader"),
        ("checkpoint", "import torch\ndef read_legacy():\n    torch.load('f')", "weights_only"),
        ("corpora", "load_dataset('x', trust_remote_code=False)", "trust_remote_code"),
        ("corpora", "yaml.load('x')", "safe_load"),
    ],
)
def test_the_rules_can_fail(name, source, word):
    names = {"files", "train", "plots", "checkpoint", "lens"}
    assert any(word in problem for problem in problems(source, name, names))


def test_the_rules_let_good_code_pass():
    source = (
        "import os\nfrom typing import TYPE_CHECKING\nimport torch\nfrom bitbyte import files\n"
        "from bitbyte.vocab import START\nif TYPE_CHECKING:\n    import matplotlib\n"
        "def read_legacy():\n    import tyro, sys\n    print(sys.argv)\n"
        "    return torch.load('f', weights_only=True)\n"
    )
    assert problems(source, "checkpoint", {"files", "vocab", "checkpoint"}) == []


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
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in FILES)
    modules = [".".join(part).removesuffix(".__init__") for part in parts]
    left_out = {"__main__", *WIDGETS}
    modules = [name for name in modules if name.split(".")[-1] not in left_out]
    done = import_with_core_only(modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"imported {len(modules)}\n"


def test_the_blocker_blocks():
    assert "no core dependency" in import_with_core_only(["matplotlib"]).stderr
