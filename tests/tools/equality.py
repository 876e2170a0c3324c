"""What a mere move of code must leave as it was: take a picture of two trees, and compare.

    python tests/tools/equality.py take before.json     # in a checkout of the old tree
    python tests/tools/equality.py take after.json      # in the new one, on the same machine
    python tests/tools/equality.py compare before.json after.json

A picture holds the syntax trees of all definitions by name, without imports and the modules they
are taken from; SHA-256 of the weights, optimizer states and logs of eight models after 20 steps;
the bits of their scores; the bytes of compressed files; the help of all commands; the results
tables, and the PDF bytes of the papers.  Wall times, versions and commits are left out.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = {
    f"{kind} {linear}": [family, *extra, "--linear", linear]
    for kind, family, extra in (
        ("ar", "ar", []), ("mamba1", "mamba", ["--ssm", "mamba1"]),
        ("mamba2", "mamba", ["--ssm", "mamba2"]), ("diffusion", "diffusion", []),
    )
    for linear in ("ternary", "dense")
}  # fmt: skip
SHAPE = "--n_layer 2 --d_model 64 --seq_len 64 --batch_size 4 --steps 20 --dtype fp32 --threads 1"
TIMES = ("seconds", "bytes_per_second", "memory")


def call(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """``bitbyte`` of this checkout on one thread."""
    about = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bitbyte", *map(str, words)], check=False, capture_output=True,
        text=True, cwd=ROOT, env=os.environ | about | environment,
    )  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Bare(ast.NodeTransformer):
    """Names without the module they are taken from, and no imports."""

    def __init__(self, modules: set[str]):
        self.modules = modules

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.Name(node.attr, node.ctx)
        return node

    def visit_Import(self, node):
        return ast.Pass()

    visit_ImportFrom = visit_Import  # noqa: N815 - a name of ast


def definitions() -> dict[str, list[str]]:
    """Hashes of the syntax trees of all top-level definitions of the package, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "bitbyte").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitbyte"):
                modules |= {alias.asname or alias.name for alias in node.names}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.dump(Bare(modules).visit(node))
                found.setdefault(node.name, []).append(sha256(text.encode())[:16])
    return {name: sorted(hashes) for name, hashes in found.items()}


def trained(folder: Path) -> dict:
    """Hashes of eight models after 20 steps, of their logs, scores and compressed files."""
    data, found = folder / "data.bin", {}
    data.write_bytes(bytes((i * i // 7 + i * 31) % 97 for i in range(20_000)))
    for name, words in MODELS.items():
        out = folder / name.replace(" ", "-")
        options = ["--data", data, "--out", out, "--device", "cpu", "--no_progress"]
        done = call("train", *words, *SHAPE.split(), *options, "--log_every", "1")
        assert done.returncode == 0, done.stderr
        step = out / "step_0000020"
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        facts = {
            "model": sha256((step / "model.safetensors").read_bytes()),
            "optim": sha256((step / "optim.safetensors").read_bytes()),
            "log": sha256(json.dumps(rows).encode()),
        }
        done = call(
            "eval",
            out,
            "--data",
            data,
            "--limit",
            "4096",
            "--draws",
            "2",
            "--out",
            folder / f"{out.name}-records",
            "--threads",
            "1",
            "--device",
            "cpu",
        )
        if done.returncode:  # an exact model has no draws
            done = call("eval", out, "--data", data, "--limit", "4096", "--threads", "1",
                        "--out", folder / f"{out.name}-records", "--device", "cpu")  # fmt: skip
        (path,) = (folder / f"{out.name}-records").glob("*.json")
        record = json.loads(path.read_bytes())
        facts["bits"], facts["fields"] = record["bits"], sorted(record)
        if "diffusion" not in name:
            for mode in ("float", "portable")[: 1 + ("ternary" in name)]:
                packed = folder / f"{out.name}.{mode}"
                done = call("compress", out, data, packed, "--mode", mode, "--threads", "1")
                assert done.returncode == 0, done.stderr
                facts[mode] = sha256(packed.read_bytes())
        found[name] = facts
    return found


def surface() -> dict:
    """Help of every command, and the list of them."""
    usage = call("--help").stdout
    names = re.findall(r"^  (\w+)  +\S", usage, re.MULTILINE)
    return {"commands": sorted(names)} | {name: call(name, "--help").stdout for name in names}


def documents(folder: Path) -> dict:
    """The results tables of the committed records, and the PDF bytes of the papers."""
    readme = folder / "R.md"
    readme.write_text(
        "<!-- results -->\n<!-- end of results -->\n<!-- certificates -->\n"
        "<!-- end of certificates -->\n"
    )
    assert call("results", "--readme", readme).returncode == 0
    done = call("papers", "--format", "pdf", "--out", folder / "papers")
    assert done.returncode == 0, done.stderr
    pdfs = {path.name: sha256(path.read_bytes()) for path in (folder / "papers").rglob("*.pdf")}
    return {"results": sha256(readme.read_bytes())} | pdfs


def take(out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = {
            "definitions": definitions(), "surface": surface(),
            "trained": trained(Path(folder)), "documents": documents(Path(folder)),
        }  # fmt: skip
    Path(out).write_text(json.dumps(picture, indent=1, sort_keys=True))


def differences(one: object, other: object, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted({*one, *other})
            for line in differences(one.get(key), other.get(key), f"{path}/{key}")
        ]
    return [] if one == other else [path]


def main(words: list[str]) -> int:
    if words[:1] == ["take"]:
        take(words[1])
        return 0
    pictures = [json.loads(Path(name).read_text()) for name in words[1:]]
    found = differences(*pictures)
    print("\n".join(found) or "equal")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
