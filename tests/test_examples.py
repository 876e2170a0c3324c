"""The code in the documents and in examples/ runs."""

import mailbox
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from bitbyte.config import TrainConfig
from bitbyte.data.pack import pack
from bitbyte.train import train

README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def script(page: Path, word: str) -> str:
    """The Python code on a page that has this word."""
    codes = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)
    (code,) = [code for code in codes if word in code]
    return code


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the code in the documents names: packed data, a run, a mailbox."""
    folder = tmp_path_factory.mktemp("work")
    artifacts = folder / "artifacts"
    text = [b"the cat sat on the mat. %d\n" % i * 20 for i in range(200)]
    pack(text, artifacts / "datasets" / "mine", val_fraction=0.2, progress=False)
    train(
        TrainConfig(
            data=str(artifacts / "datasets" / "mine"), out=str(artifacts / "checkpoints" / "mine"),
            steps=2, seq_len=32, device="cpu", progress=False,
        )
    )  # fmt: skip
    box = mailbox.mbox(folder / "archive.mbox")
    for i in range(3):
        message = mailbox.mboxMessage()
        message.set_payload(f"hello {i}\n" * 200)
        box.add(message)
    box.close()
    return folder


def python(workplace: Path, *arguments: str) -> str:
    """What a program prints that is run beside the packed data."""
    modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "BITBYTE_ARTIFACTS": str(workplace / "artifacts"), "PYTHONPATH": modules,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments], check=False, cwd=workplace, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_layer(workplace):
    python(workplace, "-c", script(README, "SquaredReLU"))


def test_a_family(workplace):
    """It also passes the leak check, fed byte by byte and read back from its checkpoint."""
    more = """
from bitbyte.checkpoint import load_model
from bitbyte.evaluate import evaluate
from bitbyte.runs import resolve

run = max((p for p in resolve("mine").parents[1].iterdir()), key=lambda p: "gru" in p.name)
model, meta = load_model(run)
assert sum(p.numel() for p in model.parameters()) == model.config.n_parameters
record, _ = evaluate(model, "artifacts/datasets/mine", name="gru", limit=2000, meta=meta)
print(record["family"], sorted(record["leaks"]))
"""
    out = python(workplace, "-c", script(ARCHITECTURE, "GRULM") + more)
    assert "gru" in out and "cached" in out


def test_a_corpus(workplace):
    python(workplace, "-c", script(ARCHITECTURE, "mailbox"))
    assert (workplace / "artifacts" / "datasets" / "mail" / "manifest.json").is_file()


def test_a_metric(workplace):
    out = python(workplace, "-c", script(ARCHITECTURE, "surprisal"))
    assert re.fullmatch(r"\d\.\d{4} bits per byte; .* cost less than one bit\n", out)


def test_the_example(workplace):
    example = ROOT / "examples" / "train_and_sample.py"
    data = workplace / "text.txt"
    data.write_bytes(b"the cat sat on the mat. " * 3000)
    out = python(workplace, str(example), str(data), "out", "--minutes", "0.01", "--preset", "nano")
    assert re.search(r"^\d\.\d{3} bits per byte on [\d,]+ bytes that were held out$", out, re.M)
    lines = example.read_text("utf-8").splitlines()
    where = [lines.index(line) for line in script(README, "evaluate(").splitlines()]
    assert where == sorted(where)  # the README shows lines of it
    assert "mixer: (" in python(workplace, str(ROOT / "examples" / "look_inside.py"), "out/run")


def test_looking_inside(workplace):
    out = python(workplace, str(ROOT / "examples" / "look_inside.py"), "wiki-small", "The city")
    assert re.search(r"^\d\.\d{3} bits per byte; one by one: \[", out, re.M)
    assert re.search(r"^norm: \(8, 192\), mean square \d", out, re.M)
