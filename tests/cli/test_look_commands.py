"""Commands for looking at a model: the page of the lens, the chat, the app."""

import io
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from support import FOX, ROOT, brief_run

from bitbyte.cli import workbench
from bitbyte.cli.dispatch import main

TEXT = b"plain <script>alert(1)</script> \"&' \xff\x00 Gr\xc3\xbc\xc3\x9fe" * 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    (folder / "text.bin").write_bytes(FOX)
    (folder / "odd.bin").write_bytes(TEXT)
    kinds = ("ar", "mamba")
    found = {kind: brief_run(kind, folder / "text.bin", folder / kind) for kind in kinds}
    return found | {"file": str(folder / "odd.bin")}


def test_entropy_writes_a_page_that_asks_nobody(runs, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    words = ["entropy", runs["ar"], runs["file"], "--against", runs["mamba"], "--out", str(out)]
    assert main([*words, "--threshold", "4"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"\d\.\d{4} bits per byte .exact. over 138 of 138 bytes", said)) == 2
    assert "patches" in said and str(out) in said
    page = out.read_text("utf-8")
    assert "<script>alert" not in page and "A - B" in page
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "default-src 'none'" in page and "bits per byte" in page


def test_entropy_agrees_with_eval(runs, tmp_path, capsys):
    assert main(["entropy", runs["ar"], runs["file"]]) == 0
    lens = re.search(r"(\d\.\d{4}) bits", capsys.readouterr().out)[1]
    assert main(["eval", runs["ar"], "--data", runs["file"], "--out", str(tmp_path)]) == 0
    assert f"ar: {lens} bits per byte" in capsys.readouterr().out


def test_entropy_of_a_pipe(runs, tmp_path, capsys, monkeypatch):
    """It has no known length, and its bytes before the first wanted one must be read."""
    data = bytes(range(97, 123)) * 3
    (tmp_path / "file").write_bytes(data)
    options = ("--start", "30", "--limit", "20")
    assert main(["entropy", runs["ar"], str(tmp_path / "file"), *options]) == 0
    wanted = capsys.readouterr().out.replace(" of 78 bytes", " bytes")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "latin-1"))
    page = tmp_path / "page.html"
    assert main(["entropy", runs["ar"], "-", *options, "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{wanted}{page}\n"
    assert "<title>standard input under " in page.read_text("utf-8")
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data))
        writer.start()
        assert main(["entropy", runs["ar"], str(tmp_path / "pipe"), *options]) == 0
        writer.join(30)
        assert capsys.readouterr().out == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "latin-1"))
    assert main(["entropy", runs["ar"], "-", "--start", "78"]) == 2
    assert "- has no byte at 78: it has 78" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_entropy_of_a_name_that_is_not_text(runs, tmp_path, capsys):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9<b>")
    shutil.copy(runs["file"], odd)
    assert main(["entropy", runs["ar"], odd, "--out", f"{odd}.html"]) == 0
    assert capsys.readouterr().out.endswith("caf\\xe9<b>.html\n")
    page = Path(f"{odd}.html").read_text("utf-8")
    assert "<title>caf\\xe9&lt;b&gt; under" in page and "<td>caf\\xe9&lt;b&gt;</td>" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("entropy", "ar", "nothing.txt"), "there is no file nothing.txt"),
        (("entropy", "ar", "."), ". is a folder; name a file"),
        (("entropy", "ar", "file", "--start", "138"), "has no byte at 138: it has 138"),
        (("entropy", "ar", "file", "--limit", "0"), "limit 0"),
        (("entropy", "ar", "file", "--window", "33"), "windows of 1 to 32"),
        (("entropy", "ar", "file", "--threshold", "1", "--rule", "odd"), "no rule 'odd'"),
        (("entropy", "ar", "file", "--rule", "jump"), "--rule: no effect without --threshold"),
        (("entropy", "ar", "file", "--threshold", "nan"), "threshold is nan"),
        (("entropy", "ar", "file", "--start", str(2**63)), "start must be at least 0"),
        (("tasks", "file", "tasks", "--limit", "-5"), "limit is -5"),
        (("chat", "nothing"), "no checkpoint 'nothing'"),
    ],
)
def test_mistakes_are_one_line(runs, words, said, capsys):
    assert main([runs.get(word, word) for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_app_listens_here_only_and_asks_for_a_token(monkeypatch, tmp_path):
    pytest.importorskip("voila")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "07_sample.ipynb", tmp_path / "notebooks")
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    seen = []
    monkeypatch.setattr(workbench, "exec_command", seen.append)
    main(["app", "--port", "9999", "--no_browser"])
    (command,) = seen
    assert {"--Voila.ip=127.0.0.1", "--token", "--port=9999", "--no-browser"} <= {*command}
    assert any("connect-src 'self'" in word for word in command)
    (page,) = [Path(word) for word in command if word.endswith(".ipynb")]
    assert "9999" in page.name  # another app has another file
    assert "ckpt = " in page.read_text() and "wiki-small.bbm" in page.read_text()
    assert main(["app", "nothing"]) == 2
