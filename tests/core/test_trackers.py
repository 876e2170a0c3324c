"""Trackers, with the real packages; each test is skipped where its package is not installed."""

import pytest
from support import brief_run

from bitbyte import runs
from bitbyte.config import TrainConfig
from bitbyte.files import BitbyteError


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.bin").write_bytes(bytes(range(97, 123)) * 40)
    return tmp_path / "text.bin"


@pytest.fixture
def row_of(data, tmp_path, monkeypatch):
    """Train with a tracker: the run's folder and its rows."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def trained(name: str):
        run = tmp_path / "run"
        brief_run("ar", data, run, tracker=name, log_every=1)
        assert runs.strangers(run) == []
        return run, runs.read_metrics(run)

    return trained


def test_tensorboard_has_the_rows(row_of):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, rows = row_of("tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2]
    assert [event.value for event in scalars] == pytest.approx([row["loss"] for row in rows])
    assert {*events.Tags()["scalars"]} >= rows[0].keys() - {"step"}


def wandb_records(path) -> list[bytes]:
    """The records of a .wandb file, which is a log of LevelDB: blocks of 32 KiB."""
    data, at, found, held = path.read_bytes(), 7, [], b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(held)
            held = b""
    return found


def test_wandb_has_the_rows_without_a_network(row_of):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run, rows = row_of("wandb")
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    kept = []
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            kept.append({(i.key or i.nested_key[0]): i.value_json for i in items})
    assert [float(item["loss"]) for item in kept] == pytest.approx([row["loss"] for row in rows])


def test_mlflow_has_the_rows(row_of):
    mlflow = pytest.importorskip("mlflow")
    run, rows = row_of("mlflow")
    client = mlflow.MlflowClient((run / "mlflow").absolute().as_uri())
    experiment = client.get_experiment_by_name("bitbyte")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(row["step"], row["loss"]) for row in rows]
    assert found.data.params["d_model"] == "64"


def test_an_unknown_tracker():
    with pytest.raises(BitbyteError, match="choose tensorboard, wandb or mlflow"):
        TrainConfig(tracker="comet")
