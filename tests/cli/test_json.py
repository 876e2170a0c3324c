"""--json: one document on standard output, nothing else there, and none where a command fails."""

import json
import os
from pathlib import Path

import pytest
from support import FOX, brief_run

from bitbyte.bench import bench
from bitbyte.cli.dispatch import COMMANDS, main
from bitbyte.compress import certify
from bitbyte.files import BitbyteError, parse_json

WITH_JSON = [
    "plan", "grid", "runs", "runs rm", "models", "export", "import", "info", "eval", "compare",
    "passport", "results", "judge", "tasks",
    "sample", "infill", "certify", "bench",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Artifacts with two runs, each with one record, and a packed folder."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "text.txt").write_bytes(FOX)
    (folder / "other.txt").write_bytes(FOX[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITBYTE_ARTIFACTS", str(folder / "artifacts"))
        for name, family in (("one", "ar"), ("fog", "diffusion")):
            out = folder / "artifacts" / "checkpoints" / name
            brief_run(family, folder / "text.txt", out)
            words = ["eval", name, "--data", str(folder / "other.txt"), "--limit", "640"]
            assert main([*words, "--draws", "1"] if name == "fog" else words) == 0
        assert main(["pack", str(folder / "text.txt"), "--val_fraction", "0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _artifacts(world, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(world / "artifacts"))


def document(capfd, *words: object) -> object:
    """What a command with --json prints, as a strict reader takes it; in ASCII, for any locale."""
    capfd.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    out = capfd.readouterr().out
    assert out.isascii() and out.endswith("\n") and not out.endswith("\n\n")
    return parse_json(out.encode(), "standard output")


def test_these_commands_have_it_and_say_so(capsys):
    found = []
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        said = " ".join(capsys.readouterr().out.split())
        if "--json " in said.partition("Options:")[2]:
            assert "print one JSON document to standard output, and everything else" in said
            found.append(name)
    assert found == WITH_JSON


def test_eval(world, capfd, tmp_path):
    data = ("--data", world / "text.txt", "--limit", 640)
    (row,) = document(capfd, "eval", "one", *data, "--out", tmp_path)
    assert row["model"] == "one" and row["kind"] == "exact" and row["trained_on_it"]
    assert {"record": row["record"]} | json.loads(Path(row["record"]).read_text()) == row
    kinds = ("--kind", "upper_bound", "chain_rule:confidence", "--per_pass", 8, "--draws", 1)
    rows = document(capfd, "eval", "fog", *data, *kinds, "--no_record")
    assert [row["kind"] for row in rows] == ["upper_bound", "chain_rule:confidence"]
    assert [row["record"] for row in rows] == [None, None]


def test_passport(world, capfd, tmp_path):
    """A passport that is refused has a document, too, and exit code 1."""
    data = ("--data", world / "other.txt", "--out", tmp_path, "--card", tmp_path / "card.html")
    found = document(capfd, "passport", "uniform", *data)
    assert found["bpb"] == 8.0 and found["card"] == str(tmp_path / "card.html")
    words = ["passport", "uniform", *data, "--claim", 7, "--allow_overwrite", "--json"]
    assert main([*map(str, words)]) == 1
    found = parse_json(capfd.readouterr().out.encode(), "standard output")
    assert found["bpb"] is None and found["verdict"] == "fail"


def test_compare_and_results(world, capfd):
    found = document(capfd, "compare", "one", "fog")
    assert (found["a"], found["b"]) == ("one", "fog") and found["interval"] is None
    rows = document(capfd, "results")
    bpb = {row["model"]: row["bpb"] for row in rows}
    assert found["difference"] == bpb["one"] - bpb["fog"]
    assert {row["kind"] for row in rows} == {"exact", "upper_bound"}
    (world / "R.md").write_text("<!-- results -->\n<!-- end of results -->\n")
    assert document(capfd, "results", "--readme", world / "R.md") == rows
    assert "| one |" in (world / "R.md").read_text()


def test_info(world, capfd):
    assert "torch" in document(capfd, "info")["versions"]
    about = document(capfd, "info", "one", "--verify")
    assert about["step"] == 2 and about["model_family"] == "ar"
    about = document(capfd, "info", "text", "--verify")  # the packed folder, by its name
    assert about["bytes"] == len(FOX) and about["path"].endswith("text")
    assert [shard["name"] for shard in about["shards"]] == ["shard_00000.bin"]
    assert document(capfd, "info", world / "text.txt") == {
        "path": str(world / "text.txt"), "bytes": len(FOX)
    }  # fmt: skip


def test_sample_and_infill(world, capfd, tmp_path):
    options = ("--seed", 3, "--device", "cpu")
    words = ("one", "--prompt", "the ", "--max_new_tokens", 30, "--temperature", 3, *options)
    found = document(capfd, "sample", *words, "--metrics", "--out", tmp_path / "new")
    new = (tmp_path / "new").read_bytes()  # hardly any of it is UTF-8
    assert found["prompt"] == "the " and found["metrics"]["new_bytes"] == 30
    assert found["text"].encode("utf-8", "surrogateescape") == new
    for run in ("one", "fog"):
        found = document(capfd, "infill", run, "--text", "th_ quick", "--sign", "_", *options)
        assert found["masked"] == "th_ quick" and found["metrics"]["hidden_bytes"] == 1
        assert found["text"][:2] == "th" and found["text"].endswith(" quick")


def test_certify(world, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(certify, "model_rates", lambda *_: {"step": 1.0, "prefill": 1.0})
    words = ("certify", "one", world / "text.txt", "--out", tmp_path, "--device", "cpu")
    found = document(capfd, *words)
    (certificate,) = found["certificates"]
    assert certificate["identical"] and found["others"] is None
    assert [path.stem for path in tmp_path.glob("*.json")] == [certificate["record"]]


def test_bench(capfd, monkeypatch, tmp_path):
    def groups(sizes):
        print("what a library says")
        side = bench.Side(lambda: None)
        yield bench.Group("case", {"a": side, "b": side}, [bench.Pair("a", "b")], {})

    monkeypatch.setattr(bench, "ROWS", {"quick": bench.Row(groups, lambda _: None)})
    words = ("bench", "quick", "--repeats", 1, "--out", tmp_path / "record")
    found = document(capfd, *words)
    assert [row["row"] for row in found["rows"]] == ["quick"] and found["repeats"] == 1
    assert json.loads((tmp_path / "record").read_text()) == found


def test_runs(world, capfd):
    assert {row["name"] for row in document(capfd, "runs")} == {"one", "fog"}
    (row,) = document(capfd, "runs", "rm", "one", "--dry_run")
    assert row["name"] == "one" and row["removed"] is False and row["disk_bytes"] > 10_000


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "rm", "nothing"),
        ("runs", "rm"),
        ("info", "nothing"),
        ("eval", "nothing", "--data", "text"),
        ("eval", "one", "--data", "nothing"),
        # The second of two kinds is refused, and the first is not scored before.
        ("eval", "fog", "--data", "text", "--kind", "upper_bound", "exact"),
        ("compare", "one", "nothing"),
        ("results", "--readme", "nothing"),
        ("results", "--plot", "nothing"),
        ("sample", "one", "--temperature", "-1"),
        ("sample", "one", "--prompt", "a", "--slide", "nothing"),
        ("sample", "one", "--nothing"),
        ("infill", "one"),
        ("infill", "one", "--text", "\u25a1", "--steps", "3"),
        ("certify", "one", "nothing"),
        ("certify", "one"),
        ("bench", "nothing"),
        ("bench", "--repeats", "0"),
    ],
)
def test_a_mistake_leaves_standard_output_empty(words, world, capfd):
    words = [str(world / "text.txt") if word == "text" else word for word in words]
    assert main([*words, "--json"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/stdout")
def test_no_file_goes_where_the_document_goes(capfd):
    for words in (
        ("sample", "one", "--out", "/dev/stdout"),
        ("infill", "one", "--text", "abc", "--metrics_json", "/dev/stdout"),
        ("bench", "loader", "--out", "/dev/stdout"),
    ):
        assert main([*words, "--json"]) == 2
        said = capfd.readouterr()
        assert said.out == "" and "with --json standard output is taken" in said.err


def test_infinity_in_a_file_of_a_stranger_is_refused(world, capfd):
    """Python reads 1e999 as infinity, which no document could hold."""
    for text in ("1e999", "[-1e999]", "NaN", "Infinity"):
        with pytest.raises(BitbyteError, match="is not a number"):
            parse_json(text.encode(), "x")
    assert parse_json(b"[1e308, -1.5, 3]", "x") == [1e308, -1.5, 3]
    manifest = world / "artifacts" / "datasets" / "text" / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before.replace(b'"source": {', b'"source": {"x": 1e999, '))
    try:
        assert main(["info", "text", "--json"]) == 2
    finally:
        manifest.write_bytes(before)
    said = capfd.readouterr()
    assert said.out == "" and "1e999 is not a number" in said.err
