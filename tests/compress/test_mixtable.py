"""The mixer's tables: every file restored by another process, what its record and tables say."""

import json

import pytest

pytest.importorskip("llvmlite")

from support import save_run
from test_compress import TERNARY, built, drawn

from bitbyte.cli.dispatch import main
from bitbyte.compress import baselines, costs, mixtable
from bitbyte.compress.mixer import fast
from bitbyte.evaluate.records import check_record, read_records
from bitbyte.files import BitbyteError, RunError
from bitbyte.shards import ByteStreamDataset

NOISE = bytes((i * i * 7919 >> 3) & 255 for i in range(3000))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model "run" and two files, one of them of no use to the model."""
    folder = tmp_path_factory.mktemp("mixtable")
    save_run(folder / "run", built(TERNARY))
    (folder / "drawn").write_bytes(drawn(built(TERNARY), 5000))
    (folder / "noise").write_bytes(NOISE)
    return folder


@pytest.fixture(scope="module")
def record(place):
    said = []
    made = mixtable.measure(
        [place / "drawn", place / "noise"], place / "run", others=True, say=said.append
    )
    assert [text.split(":")[0] for text in said] == ["drawn", "noise"]
    return made


def test_the_record(record, place):
    assert check_record(record, "it") == "mixer" and json.loads(json.dumps(record)) == record
    drawn_one, noise = record["files"]["drawn"], record["files"]["noise"]
    none, model = drawn_one["sizes"]["none"], drawn_one["sizes"]["model"]
    data = (place / "drawn").read_bytes()
    assert model["with_model"] and not none["with_model"] and model["bytes"] < none["bytes"]
    assert none["promised_bits"] == pytest.approx(costs.Mixed().bits(data).sum())
    for row in (none, model):
        assert 30 < row["bytes"] - row["promised_bits"] / 8 < 90
        assert row["restored"] and row["out_kb_s"] > 0 and row["back_kb_s"] > 0
        assert row["memory_mb"] is None or 30 < row["memory_mb"] < 2000
    left_out = noise["sizes"]["model"]
    assert not left_out["with_model"] and left_out["bytes"] == noise["sizes"]["none"]["bytes"]
    assert {"gzip -9", "xz -9e"} <= drawn_one["sizes"].keys() - record["missing"].keys()
    assert baselines.MIXER not in drawn_one["sizes"]
    assert record["model_bytes"] > 0 and len(record["checkpoint"]) == 64


def test_what_the_model_began_with_was_seen_too(place, tmp_path):
    seen = {"train": ByteStreamDataset(place / "drawn", 1).fingerprint}
    began = {"init": {"run": "another", "data": seen}}
    save_run(tmp_path / "run", built(TERNARY), extra=began)
    files = mixtable.measure([place / "drawn", place / "noise"], tmp_path / "run")["files"]
    assert files["drawn"]["trained_on_it"] and not files["noise"]["trained_on_it"]


def test_the_tables(record):
    lines = mixtable.table(record).splitlines()
    head, row, noise = (lines[i].strip("| ").split(" | ") for i in (0, 2, 3))
    assert head[:7] == ["file", "bytes", "alone", "BPB", "with `run`", "BPB", "gain"]
    sizes = record["files"]["drawn"]["sizes"]
    gain = 100 * (1 - sizes["model"]["bytes"] / sizes["none"]["bytes"])
    assert row[4] == f"{sizes['model']['bytes']:,}" and row[6] == f"{gain:.1f} %"
    assert row[5].strip("*") == f"{8 * sizes['model']['bytes'] / 5000:.3f}"
    best = min(one["bytes"] for one in sizes.values())  # and only the best is bold
    assert [cell for cell in row if "**" in cell] == [f"**{8 * best / 5000:.3f}**"]
    assert noise[4] == "left out"
    assert len({line.count("|") for line in lines[:4]}) == 1
    (total,) = [line for line in lines if line.startswith("| with `run` |")]
    paid = sum(entry["sizes"]["model"]["bytes"] for entry in record["files"].values())
    assert f"| {paid:,} |" in total and f"| {paid + record['model_bytes']:,} |" in total
    record = json.loads(json.dumps(record))
    record["files"]["drawn"]["sizes"]["xz -9e"]["restored"] = False
    assert "(!) xz -9e did not give this file back." in mixtable.table(record)


def test_the_command_and_the_docs(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mixer -->\nold\n<!-- end of mixer -->\nb\n")
    assert main(["results", "--readme", str(page)]) == 0
    assert "old" in page.read_text()  # there is no record yet
    assert main(["certify", "none", str(place / "noise")]) == 0
    said = capsys.readouterr().out
    assert "alone" in said and "promised" in said and "gain" not in said
    (found,) = read_records("mixer")
    assert (found["model"], found["model_bytes"], found["missing"]) == ("none", 0, {})
    assert main(["results", "--readme", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert "old" not in lines and lines[0] == "a" and lines[-1] == "b"
    assert any(line.startswith("| noise | 3,000 |") for line in lines)
    for words in (["none", "--mode", "native"], ["none", "--device", "cuda"]):
        assert main(["certify", *words, str(place / "noise")]) == 2
        assert "no other mode or device" in capsys.readouterr().err


def test_what_is_refused(place, tmp_path, monkeypatch):
    (tmp_path / "noise").write_bytes(b"x")
    with pytest.raises(BitbyteError, match="same name"):
        mixtable.measure([place / "noise", tmp_path / "noise"])
    with pytest.raises(BitbyteError, match=r"no file|not exist|missing"):
        mixtable.measure([tmp_path / "nobody"])
    stub = "import sys; open(sys.argv[3], 'w').write('x'); print('[1, 1.0, false, null]')"
    monkeypatch.setattr(mixtable, "CHILD", stub)
    with pytest.raises(RunError, match="was not restored exactly"):
        mixtable.measure([place / "noise"])
    monkeypatch.setattr(mixtable, "CHILD", "import sys; sys.exit('no such luck')")
    with pytest.raises(RunError, match="no such luck"):
        mixtable.measure([place / "noise"])
    monkeypatch.setattr(fast, "problem", lambda: "it is not installed")
    with pytest.raises(BitbyteError, match="takes hours: it is not installed"):
        mixtable.measure([place / "noise"])
