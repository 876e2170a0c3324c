"""Certificates of a tiny model, and other compressors to compare with."""

import functools
import json
import os

import numpy as np
import pytest
import torch
from support import brief_run, save_run

from bitbyte import checkpoint, device, models, scoring
from bitbyte.cli.dispatch import main
from bitbyte.compress import baselines, certify, child
from bitbyte.config import DiffusionConfig, TransformerConfig
from bitbyte.evaluate.records import check_record, read_records
from bitbyte.files import BitbyteError, RunError, sha256_file
from bitbyte.plots import compress, style
from bitbyte.shards import ByteStreamDataset

CONFIG = TransformerConfig(n_layer=1, d_model=64, d_ff=64, seq_len=32)
# Four letters of 1.685 bits each: what the model makes of them is coded, and not stored.
LETTERS = np.frombuffer(b"aaaaabbbcd", np.uint8)
TEXT = np.random.default_rng(0).choice(LETTERS, 2000).tobytes()
NOISE = np.random.default_rng(0).bytes(540)  # this is stored


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = models.build(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids_BT = torch.frombuffer(bytearray(TEXT[:1920]), dtype=torch.uint8).view(-1, CONFIG.seq_len)
    for step in range(40):
        model(ids_BT[step % 7 :: 7]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_run(folder, model)
    return folder


@pytest.fixture(autouse=True)
def brief_timing(monkeypatch):
    rates = functools.partial(certify.model_rates, seconds=0.02)
    monkeypatch.setattr(certify, "model_rates", rates)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(TEXT)
    return path


@pytest.mark.parametrize("mode", ["portable", "float"])
def test_certificate(mode, run, source, tmp_path):
    record = certify.certify(run, source, mode=mode, folder=tmp_path / "records")
    written = json.loads((tmp_path / "records" / f"{record['record']}.json").read_text())
    assert written == {key: value for key, value in record.items() if key != "record"}
    model, meta = checkpoint.load_model(run)
    score = scoring.score(model, ByteStreamDataset(source, 1))
    assert record["identical"] and record["sha256"] == sha256_file(source)
    assert (record["mode"], record["bytes"], record["lanes"]) == (mode, len(TEXT), 63)
    assert record["promised_bits"] == pytest.approx(score.bits)
    assert 1.6 < record["promised_bpb"] < 2 and record["stored_bytes"] == 0
    assert abs(record["mode_cost_bpb"]) < 0.01
    paid, table, promised = (record[f"{name}_bits"] for name in ("payload", "table", "promised"))
    assert 0 < record["coder_gap_percent"] == 100 * (paid / table - 1) < 4
    assert record["gap_percent"] == 100 * (paid / promised - 1)
    assert 8 * record["container_bytes"] == paid + 8 * 120  # the header, and that of one block
    assert record["checkpoint"] == meta["files"]["model.safetensors"]["sha256"]
    rest = sum(p.numel() for n, p in model.named_parameters() if "norm" in n or n == "embed")
    assert record["model_bytes"] - record["packed_bytes"] == 2 * rest
    parts = record["container_bytes"] + record["model_bytes"] + record["code_bytes"]
    assert record["charged_bytes"] == parts
    assert record["encode_over_prefill"] > 0 and record["decode_over_step"] > 0
    said = certify.summary(record)
    assert "came back identical" in said and "of the model's steps" in said
    assert f"{record['gap_percent']:+.3f} %" in said and "stored" not in said


def test_a_file_that_was_trained_on_is_said(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(certify, "LEAST_SHOWN", 0)
    model, other = brief_run("ar", source, tmp_path / "run"), tmp_path / "other"
    other.write_bytes(TEXT[::-1])
    words = ["certify", model, str(source), str(other), "--others", "--out", str(tmp_path / "o")]
    assert main([*words, "--mode", "portable"]) == 0
    assert capsys.readouterr().out.count("note: the model was trained on these bytes") == 1
    records = {r["file"]: r for r in read_records("certificate", tmp_path / "o")}
    assert records["source"]["trained_on_it"] and records["source"]["overlap"] == 1
    assert not records["other"]["trained_on_it"] and records["other"]["overlap"] == 0
    text = certify.all_tables(tmp_path / "o")
    assert text.count("| run, portable, trained on it | source |") == 1
    assert text.count("| run, portable | other |") == 1
    assert "\n| source, trained on it | 2,000 |" in text and "\n| other | 2,000 |" in text
    for record in records.values():
        del record["trained_on_it"]
    assert "trained on it" not in certify.markdown([*records.values()])  # of earlier versions


def test_the_thread_count_of_the_caller_comes_back(run, source, tmp_path):
    before = torch.get_num_threads()
    record = certify.certify(run, source, threads=before + 1, folder=tmp_path / "records")
    assert record["environment"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_what_is_stored_keeps_no_promise(run, tmp_path):
    (tmp_path / "noise").write_bytes(NOISE)
    record = certify.certify(run, tmp_path / "noise", folder=tmp_path / "records")
    assert record["stored_bytes"] == len(NOISE) < record["promised_bits"] / 8
    assert record["gap_percent"] is record["coder_gap_percent"] is None
    assert record["decode_over_step"] is None and record["encode_over_prefill"] > 0
    assert "stored, not decoded" in certify.summary(record)
    assert check_record(record, "it") == "certificate"


def test_a_file_that_is_cut_while_it_is_scored(run, source, tmp_path, monkeypatch):
    """Reading a map beyond the end of its file would kill the process without a word."""

    def score(model, data, **_):
        source.write_bytes(b"")
        data.read(0, data.n_bytes)

    monkeypatch.setattr(scoring, "score", score)
    with pytest.raises(RunError, match=r"source was cut from 2000 to 0 bytes"):
        certify.certify(run, source, folder=tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_nothing_to_certify_and_what_does_not_come_back(run, source, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.touch()
    record = certify.certify(run, empty, folder=tmp_path / "records")
    assert record["payload_bits"] == 0 and record["gap_percent"] is None
    assert "nothing to code" in certify.summary(record)
    monkeypatch.setattr(certify, "RECEIVER", "import sys; sys.exit('no such luck')")
    with pytest.raises(RunError, match="no such luck"):
        certify.certify(run, source, folder=tmp_path / "more")
    stub = "import sys, json; open(sys.argv[2], 'w').write('x'); print(json.dumps([1, 0, []]))"
    monkeypatch.setattr(certify, "RECEIVER", stub)
    with pytest.raises(RunError, match="was not restored exactly"):
        certify.certify(run, source, folder=tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_command_with_others(run, source, tmp_path, capsys):
    assert main(["certify", str(run), str(source), "--others", "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert "promised" in said and "gzip -9" in said and "bellard.org" in said
    (path,) = (tmp_path / "o").glob("compressors-*.json")
    record = json.loads(path.read_text())
    sizes = record["files"]["source"]["sizes"]
    assert {"gzip -9", "bzip2 -9", "xz -9e", "model"} <= set(sizes)
    assert record["environment"] == device.environment()
    listed = set(baselines.compressors())
    assert set(sizes) - {"model", "mixed"} | set(record["missing"]) == listed
    assert read_records("evaluation", tmp_path / "o") == []
    assert len(read_records("compressors", tmp_path / "o")) == 1
    assert main(["certify", str(run)]) == 2  # no file
    before = sorted((tmp_path / "o").iterdir())
    words = [str(source), str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    assert main(["certify", str(run), *words]) == 2
    assert sorted((tmp_path / "o").iterdir()) == before  # files are looked for first
    assert main(["certify", str(run), str(tmp_path / "none")]) == 2


def test_tables_in_a_readme(run, source, tmp_path, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    (tmp_path / "empty").touch()
    files = [str(source), str(tmp_path / "empty")]
    assert main(["certify", str(run), *files, "--others", "--mode", "portable"]) == 0
    readme, marks = tmp_path / "README.md", ("results", "certificates")
    text = "\n".join(f"a\n<!-- {name} -->\nold\n<!-- end of {name} -->" for name in marks) + "\nb\n"
    readme.write_text(text)
    assert main(["results", "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert "old" not in lines and lines[0] == "a" and lines[-1] == "b"
    records = {r["file"]: r for r in read_records("certificate")}
    record, n = records["source"], len(TEXT)
    assert not [line for line in lines if line.startswith("| tiny, portable |")]  # a small file
    monkeypatch.setattr(certify, "LEAST_SHOWN", 0)
    *_, row = certify.markdown([records["empty"], record]).splitlines()
    assert row.startswith("| tiny, portable | source | 2,000 |")
    gap = f"{record['payload_bits'] / n:.4f} | {record['gap_percent']:+.3f} % |"
    assert f"| {record['promised_bpb']:.4f} | {gap}" in row
    assert f", {record['decode_over_step']:.2f} of its steps |" in row
    assert len(certify.markdown([record | {"stored_bytes": n}]).splitlines()) == 2
    (total,) = [line for line in lines if line.startswith("| tiny | ")]
    assert total.split("|")[-2] == f" {record['decode_kb_s']:,.1f} "
    readme.write_text("<!-- results -->\n<!-- end of results -->\n<!-- certificates -->")
    assert main(["results", "--readme", str(readme)]) == 2


def test_compressors_that_are_there_give_files_back(source, monkeypatch):
    rows = baselines.measure(source)
    assert all(400 < row["bytes"] < 800 or name == "zpaq -m5" for name, row in rows.items())
    broken = baselines.Compressor(lambda data: b"x", lambda data: data)

    def refuse(data):
        raise ValueError("corrupted")

    found = {"bad": broken, "worse": broken._replace(restore=refuse)}
    monkeypatch.setattr(baselines, "compressors", lambda expert: found)
    rows = baselines.measure(source)
    assert [row["restored"] for row in rows.values()] == [False, False]
    ours = {"bytes": 200, "out_kb_s": 1.0, "back_kb_s": 1.0, "restored": True}
    record = {
        "files": {"source": {"bytes": len(TEXT), "sizes": rows | {"model": ours}}}, "model": "tiny",
        "model_bytes": 1, "code_bytes": 1, "published": [],
    }  # fmt: skip
    table = baselines.table(record)
    assert table.count("(!)") == 3 and "bad, worse did not give this file back" in table
    assert "**0.800**" in table  # 200 bytes: the best of those that did


def test_a_compressor_that_fails_does_not_take_the_others_along(source, monkeypatch):
    def refuse(data):
        raise RunError("out of memory")

    there = baselines.compressors()["gzip -9"]
    found = {"bad": there._replace(squeeze=refuse), "good": there}
    monkeypatch.setattr(baselines, "compressors", lambda expert: found)
    rows = baselines.measure(source)
    assert [row["restored"] for row in rows.values()] == [False, True]
    assert rows["bad"]["bytes"] == len(TEXT) and rows["bad"]["out_kb_s"] is None
    record = {
        "files": {"source": {"bytes": len(TEXT), "sizes": rows}}, "model": "tiny",
        "model_bytes": 1, "code_bytes": 1, "published": [],
    }  # fmt: skip
    assert "8.000 (!)" in baselines.table(record)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_failing_zpaq_is_one_line(tmp_path, monkeypatch):
    program = tmp_path / "zpaq"
    program.write_text("#!/bin/sh\necho reading >&2\necho zpaq error: no memory >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    zpaq = baselines.compressors()["zpaq -m5"]
    for way in (zpaq.squeeze, zpaq.restore):
        with pytest.raises(RunError, match=r"^zpaq failed: zpaq error: no memory$"):
            way(b"x")


def test_names_of_files_and_models_do_not_break_tables(run, source, tmp_path):
    record = certify.certify(run, source, folder=tmp_path) | {"bytes": certify.LEAST_SHOWN}
    ours = {"bytes": 200, "out_kb_s": 1.0, "back_kb_s": 1.0, "restored": True}
    compared = {
        "files": {"a|<b>": {"bytes": 9, "sizes": {"model": ours}}}, "model": "m|<n>",
        "model_bytes": 1, "code_bytes": 1, "published": [],
    }  # fmt: skip
    shown = certify.markdown([record | {"file": "a|<b>", "model": "m|<n>"}])
    for table in (shown, baselines.table(compared)):
        assert "a&#124;&lt;b&gt;" in table and "m&#124;&lt;n&gt;" in table
        assert "a|" not in table and "m|" not in table


def test_nothing_in_the_tables_of_nothing(run, tmp_path):
    (tmp_path / "empty").touch()
    words = ["certify", str(run), str(tmp_path / "empty"), "--others", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert "| empty | 0 |" in certify.all_tables(tmp_path / "o")


def test_files_of_one_name_are_refused_before_any_work(run, source, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "source").write_bytes(b"other")
    files = [str(source), str(tmp_path / "b" / "source")]
    assert main(["certify", str(run), *files, "--others", "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr()
    assert "two of the files have the same name" in said.err and not said.out
    assert read_records("certificate", tmp_path / "o") == []


def test_missing_ones_are_named(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(baselines.shutil, "which", lambda name: None)
    found = baselines.compressors()
    left_out = [name for name, entry in found.items() if entry.squeeze is None]
    assert len(left_out) == 4 and "bitbyte[compress]" in found["brotli -q 11"].missing


def test_figures():
    figure = compress.saved_bits(b"ab\x00c", [1.0, 9.5, 3.0, 8.0])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [7.0, -1.5, 5.0, 0.0]
    figure = compress.saved_bits(
        b"abc", [1.0, 9.0, 2.0], start=1, by=[[0, 0], [1, -2], [4, 2]], names=("model", "words")
    )
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [1, 4, 0, 2, 0, 0, -2, 0]  # above the line by name, then below it
    assert axes.patches[3].get_y() == 4 and "from byte 1" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "saved in all", "model", "words",
    ]  # fmt: skip
    (axes,) = compress.paid_so_far({"both": [8.0, 2.0], "model": [4.0, 4.0]}).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[8, 5], [4, 4]]
    (axes,) = compress.weights_over_text([[1, 0], [3, 0], [5, 1]], ("model", "words"), 2).axes
    assert axes.lines[0].get_ydata().tolist() == [1, 2, 4]
    figure = compress.size_bars({"xz": 2.0, "model": 1.5, "gzip": 3.0}, own="model")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "model", "xz", "gzip",
    ]  # fmt: skip
    more = compress.size_bars({"zpaq": None, "xz": 2.0, "gzip": 3.0}, own="model")
    assert [label.get_text() for label in more.axes[0].get_yticklabels()] == ["xz", "gzip", "zpaq"]
    assert [text.get_text() for text in more.axes[0].texts] == ["2.000", "3.000", "not installed"]
    assert more.get_size_inches().tolist() == figure.get_size_inches().tolist()
    assert style.png_bytes(figure).startswith(b"\x89PNG")
    with pytest.raises(BitbyteError, match="no compressors"):
        compress.size_bars({"zpaq": None})
    with pytest.raises(BitbyteError, match="bits has shape"):
        compress.saved_bits(b"abc", [1.0])


@pytest.mark.parametrize("linear", ["ternary", "dense"])
def test_a_certificate_of_the_code_within_blocks(linear, source, tmp_path):
    """It promises the cost of the code that it uses, which is not that of the next bytes."""
    shape = {"n_layer": 1, "d_model": 64, "d_ff": 64, "seq_len": 32, "block": 4}
    model = models.build(DiffusionConfig(**shape, linear=linear))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids_BT = torch.frombuffer(bytearray(TEXT[:1920]), dtype=torch.uint8).view(-1, 32)
    for step in range(30):
        part_BT = ids_BT[step % 7 :: 7]
        model(part_BT, torch.arange(len(part_BT)) + 100 * step).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_run(tmp_path / "run", model.eval())
    record = certify.certify(tmp_path / "run", source, mode="blocks", folder=tmp_path / "records")
    data, kind = ByteStreamDataset(source, 1), "chain_rule:left_to_right"
    assert record["promised_bits"] == pytest.approx(scoring.score(model, data, kind=kind).bits)
    assert record["promised_bits"] != pytest.approx(scoring.score(model, data).bits, rel=1e-6)
    assert record["mode"] == "blocks" and record["identical"]
    assert abs(record["mode_cost_bpb"]) < 0.02
    assert record["kernels"]["arithmetic"] == {"ternary": "integer", "dense": "float"}[linear]


def test_modules_in_the_current_folder_are_not_ours(tmp_path, monkeypatch):
    (tmp_path / "tqdm.py").write_text("raise SystemExit('not that of tqdm')\n")
    monkeypatch.chdir(tmp_path)
    code = "from bitbyte.compress import container\nprint(len(container.MAGIC))"
    assert child.run(code, [], "failed") == 8
