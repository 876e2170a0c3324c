"""Result records: what counts as one, what is refused, and the README's tables of them."""

import dataclasses
import json
import os
import re

import pytest
from support import ROOT, record

from bitbyte import checkpoint, runs
from bitbyte.cli.dispatch import main
from bitbyte.config import TrainConfig
from bitbyte.evaluate import listing, records, tables
from bitbyte.evaluate.records import check_record, read_record, read_records, write_record
from bitbyte.evaluate.training import config_of, training_of
from bitbyte.files import BitbyteError

OWN = ROOT / "artifacts" / "results"


def bound(draws: int, **changes) -> dict:
    return record(kind="upper_bound", draws={"per_window": draws, "seed": 0}, **changes)


STRANGERS = {
    "manifest.json": {"format": 1, "shards": [], "source": {"name": "text"}},
    "meta.json": {"format": 1, "model_family": "ar", "data": {}, "blocks": [1.0]},
    "sums.json": {"blocks": [1.0, 2.0]},
    "list.json": [1, 2],
    "bench.json": {"kind": "bench", "rows": []},
    "true.json": {"format": True, "kind": "exact", "bpb": 1.0},
    "other.json": {"format": ["certificate 1"]},
    "certificate-later.json": {"format": "certificate 99"},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "art"))
    folder = tmp_path / "art" / "results"
    folder.mkdir(parents=True)
    for name, value in STRANGERS.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def test_what_is_no_record_is_passed_over(results, tmp_path, capsys):
    write_record(record())
    assert [r["model"] for r in read_records("evaluation")] == ["tiny"]
    assert read_records("certificate") == read_records("compressors") == []
    assert {read_record(results / name)[0] for name in STRANGERS} == {None}
    (tmp_path / "README.md").write_text(
        "<!-- results -->\n<!-- end of results -->\n"
        "<!-- certificates -->\n<!-- end of certificates -->\n"
    )
    assert main(["results", "--readme", str(tmp_path / "README.md")]) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["manifest", "meta", "sums", "list", "certificate-later"])
def test_what_is_no_record_is_not_compared(name, results, capsys):
    good = write_record(record(blocks=[25_000.0] * 100))
    assert main(["compare", str(results / f"{name}.json"), str(good)]) == 2
    said = capsys.readouterr().err
    assert f"{name}.json is not a record of bits per byte" in said and said.count("\n") == 1
    (results / "folder.json").mkdir()
    if os.name != "nt":
        (results / "link.json").symlink_to("nowhere")
        os.mkfifo(results / "pipe.json")  # which nobody writes to
    assert main(["compare", str(good), "tiny"]) == 0  # a model's name, strangers beside it


def test_committed_records_are_whole():
    kinds = {path: read_record(path)[0] for path in OWN.glob("*.json")}
    counts = {kind: list(kinds.values()).count(kind) for kind in (*records.FORMATS, None)}
    assert counts["evaluation"] >= 49 and counts["certificate"] >= 66 and counts["compressors"] >= 1
    others = [path.name for path, kind in kinds.items() if kind is None]
    assert all(name.startswith(("bench", "plan")) for name in others)


def test_tables_of_the_committed_records_fit_a_wide_terminal():
    for table, kind in ((tables.bpb_table, "evaluation"), (tables.passport_table, "passport")):
        assert max(map(len, table(read_records(kind, OWN)).splitlines())) <= 120


ROW = {"bytes": 9, "out_kb_s": 1.0, "back_kb_s": None, "restored": True, "with_model": False}
MIXER = {
    "format": "mixer 1", "model": "none", "mode": "mixed", "model_bytes": 0,
    "files": {"a": {"bytes": 20, "sizes": {"none": ROW}}},
}  # fmt: skip


def wholes() -> dict[str, dict]:
    return {kind: (read_records(kind, OWN) or [MIXER])[0] for kind in records.FORMATS}


@pytest.mark.parametrize("kind", records.FORMATS)
def test_each_field_that_readers_count_on_is_looked_at(kind):
    whole = wholes()[kind]
    assert check_record(whole, "it") == kind
    for path in records.FIELDS[kind]:
        if kind == "evaluation" and path in ("kind", "bpb"):
            continue  # without these it is something else
        for spoil in (lambda last, at: last.pop(at), lambda last, at: last.update({at: {}})):
            broken = json.loads(json.dumps(whole))
            *before, at = path.split(".")
            last = broken
            for key in before:
                last = last[key]
            spoil(last, at)
            with pytest.raises(BitbyteError, match=f"^it is not a valid .*(no|its) {path}"):
                check_record(broken, "it")


@pytest.mark.parametrize(
    "changes",
    [
        {"interval": [1]}, {"interval": [1, None]}, {"bpb": "x"}, {"bpb": True}, {"bytes": 2.5},
        {"bytes": -1}, {"data": None}, {"data": {"path": "x"}}, {"blocks": [1, "x"]},
        {"blocks": {}}, {"draws": 3}, {"draws": {}}, {"checkpoint": 7}, {"train_seed": "0"},
        {"context": {"window": 256, "stride": 0}}, {"per_pass": "2"},
        {"trained_on_it": 0}, {"bpb": float("inf")},
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_refused(changes):
    with pytest.raises(BitbyteError, match=r"^x\.json is not a valid result record: "):
        check_record(record(**changes), "x.json")


META = {  # of a checkpoint, as far as `training_of` reads it
    "train": dataclasses.asdict(TrainConfig(
        data="/home/me/texts", init="/home/me/runs/old/step_0000009", out="/home/me/runs/new",
        minutes=3.0, batch_size=4, act_quant=False, tracker="wandb", prior="counts",
    )),
    "step": 77,
    "extra": {"dtype": "bf16", "world": 2, "finished": True,
              "init": {"run": "/home/me/runs/old", "checkpoint": "ab", "bytes_seen": 5}},
}  # fmt: skip


def test_a_record_says_how_its_model_was_trained():
    block = training_of(META)
    assert check_record(record(training=block), "it") == "evaluation"
    expected = {
        "optimizer": "muon", "lr": 6e-3, "embed_lr": 4e-3, "weight_decay": 0.1, "clip": 1.0,
        "decay_until": 2 / 3, "schedule": "linear", "warmup": 0.04, "batch_size": 4, "seed": 0,
        "grad_accum": 1, "processes": 2, "seq_len": 256, "steps": 77, "dtype": "bf16",
        "prior": {
            "tables": "counts", "lr": 0.0, "orders": 6, "rows": 1 << 14, "rank": 32, "bits": 4,
        },
        "init": {"run": "old", "checkpoint": "ab", "bytes_seen": 5},
    }  # fmt: skip
    assert {name: block[name] for name in block if name not in ("command", "config")} == expected
    # Minutes mean another training on another machine; the tracker changes no weight.
    assert block["command"] == (
        "torchrun --nproc_per_node=2 -m bitbyte train ar --no_act_quant --init old/step_0000009 "
        "--prior counts --data texts --steps 77 --batch_size 4 --dtype bf16"
    )
    stopped = training_of(META | {"extra": {"finished": False}})
    assert "--minutes 3.0" in stopped["command"] and "--steps" not in stopped["command"]
    assert "/home" not in json.dumps(block)  # no path of the machine it was made on
    for name in block:
        for wrong in (block | {name: [1]}, {key: block[key] for key in block if key != name}):
            with pytest.raises(BitbyteError, match="its training is"):
                check_record(record(training=wrong), "it")


def test_what_does_not_say_how_it_was_trained_has_no_such_block():
    for meta in ({}, META | {"train": {}}, META | {"train": META["train"] | {"warp": 9}}):
        assert training_of(meta) is None
    earlier = {k: v for k, v in META["train"].items() if k not in ("newton_schulz", "prior")}
    block = training_of(META | {"train": earlier})  # what was before these options existed
    assert block["prior"] is None and config_of(block["config"], "it").newton_schulz == 5
    for path in runs.zoo()[-1].glob("*.bbm"):  # a packed model knows as much as its checkpoint
        block = training_of(checkpoint.read_meta(path))
        assert check_record(record(training=block), path.name) and block["lr"] > 0


def test_a_damaged_record_is_named_by_every_reader(results, capsys):
    path = results / "bad.json"
    path.write_text(json.dumps(record(data={"path": "text"})))
    for words in (["results"], ["compare", str(path), str(path)], ["compare", "tiny", "tiny"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "bad.json" in said and "no data.split" in said and said.count("\n") == 1


def test_narrow_intervals_of_earlier_versions_are_left_out(tmp_path):
    for n_bytes, interval in ((records.LEAST_BYTES, [2.4, 2.6]), (records.LEAST_BYTES - 1, None)):
        path = write_record(record(bytes=n_bytes), tmp_path)
        assert read_record(path)[1]["interval"] == interval


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_what_is_not_a_file_is_not_a_record(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    assert read_records("evaluation", tmp_path) == []


def test_names_of_any_length_are_written(tmp_path):
    long = record(model="m" * 300, data=record()["data"] | {"path": "d" * 250})
    path = write_record(long, tmp_path)
    assert len(path.name) < 180 and read_records("evaluation", tmp_path) == [long]
    assert write_record(long | {"bpb": 2.4}, tmp_path) != path


# --- the README's tables


def cells(*rows: dict) -> list[list[str]]:
    lines = tables.results_markdown(list(rows)).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]


def test_what_was_trained_on_is_not_in_the_table():
    seen = record(model="cheat", bpb=0.1, trained_on_it=True)
    assert [row[0] for row in cells(record(), seen)] == ["tiny"]
    assert tables.results_markdown([seen]) == ""


def test_the_table_of_most_bytes_comes_first():
    rows = [record(bytes=n, data=record()["data"] | {"path": path}, interval=None)
            for n, path in ((8192, "a"), (5_000_000, "b"))]  # fmt: skip
    heads = re.findall(r"^\*\*(\w)", tables.results_markdown(rows), re.M)
    assert heads == ["b", "a"]


def test_a_row_of_the_table():
    (row,) = cells(record())
    assert row == ["tiny", "123", "0.00 MB", "0.0 MB", "2.0", "**2.5000** (2.4000 to 2.6000)"]
    head, few = (tables.results_markdown([record(bytes=n, interval=i)]).splitlines()[0]
                 for n, i in ((1_000_000, [2.4, 2.6]), (8192, None)))  # fmt: skip
    assert head.endswith("windows 256/256; 95 % intervals of these bytes")
    assert few.endswith("windows 256/256; too few bytes for intervals")
    assert cells(record(interval=None))[0][-1] == "**2.5000**"
    code = record(kind="chain_rule:confidence", per_pass=4)
    assert cells(code)[0][-1] == "**2.5000** (2.4000 to 2.6000, 4 bytes a pass)"
    assert cells(code | {"interval": None})[0][-1] == "**2.5000** (4 bytes a pass)"
    kinds = [row[6] for row in tables.bpb_rows([code, code | {"per_pass": 1}, record()])]
    assert sorted(kinds) == ["confidence", "confidence, 4 a pass", "exact"]


def test_only_trainings_are_counted_as_seeds():
    two = bound(2, bpb=4.8277), bound(8, bpb=4.8332)  # of one checkpoint
    assert cells(*two)[0][-1] == cells(*two[::-1])[0][-1] == "<= **4.8332** (2.4000 to 2.6000)"
    other = bound(8, bpb=4.9, checkpoint="b", train_seed=1)
    assert cells(*two, other)[0][-1] == "<= **4.8666** (2 seeds, 4.8332 to 4.9000)"
    again = bound(8, bpb=4.9, checkpoint="b")  # the same seed, as on another machine
    assert cells(*two, again)[0][-1] == "<= **4.8666** (2 runs, 4.8332 to 4.9000)"
    exact = record(bpb=2.0, dtype="bf16"), record(bpb=2.1)
    assert cells(*exact)[0][-1] == "**2.1000** (2.4000 to 2.6000)"
    code = {"kind": "chain_rule:confidence"}
    fast = record(per_pass=8, bpb=3.0, **code), record(per_pass=1, bpb=2.9, **code)
    assert cells(*fast)[0][-1].startswith("**2.9000** (")
    slow, quick = record(train_seconds=1.0), record(checkpoint="b", train_seconds=3.0, train_seed=1)
    assert cells(slow, slow, quick)[0][4] == "4.0"  # the mean of 6 and 2 kB/s, each run once


def test_names_of_strangers_are_text():
    evil = record(model="<b>|", data={"path": "<i>|", "split": "<u>", "sha256": "<s>" * 9})
    table = tables.results_markdown([evil])
    assert "<b>" not in table and "<i>" not in table and "<u>" not in table and "<s>" not in table


def test_names_in_the_table_of_models_are_escaped(tmp_path, monkeypatch):
    evil = "a|b<img src=x>"
    path = tmp_path / "m.bbm"
    path.touch()
    monkeypatch.setattr(listing.RunFacts, "name", evil)
    facts = listing.RunFacts(path=path, family="ar", variant=evil, data=evil, begun_with=evil)
    monkeypatch.setattr(listing, "list_models", lambda: [facts])
    scored = record(model=evil, kind=evil)
    scored["data"] |= {"path": evil, "split": evil}
    proof = {"model": evil, "file": evil, "bytes": 1, "payload_bits": 8, "gap_percent": 0.0}
    table = listing.models_markdown([scored], [proof | {"stored_bytes": 0}])
    assert "<img" not in table and table.count("&lt;img src=x&gt;") == 8
    (line,) = table.splitlines()[2:]
    assert line.count("|") == 8
