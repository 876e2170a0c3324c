"""The run folder: steps and pointers found, cleaned and pruned; the log; the environment."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import assert_loads, save

from bitbyte import device, runs
from bitbyte.checkpoint import MODEL
from bitbyte.files import BitbyteError, folder_lock, to_json
from bitbyte.process import stop_asked
from bitbyte.runs import META


def test_latest_is_the_newest_complete_step(tmp_path, capsys):
    assert runs.latest_step(tmp_path / "absent") is None
    assert runs.latest_step(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert runs.latest_step(tmp_path) == 3
    (tmp_path / "step_0000003" / META).write_bytes(b'{"format": 1')
    shutil.copytree(tmp_path / "step_0000002", tmp_path / "step_00000004")  # one digit too many
    assert runs.complete_steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err == ""
    for text, said in (("step_0000009", "step 9"), ("junk", "nothing"), ("step_0000003", "step 3")):
        (tmp_path / "latest").write_text(text)
        assert runs.latest_step(tmp_path) == 2
        assert f"names {said}; using the newest complete step, 2" in capsys.readouterr().err
    runs.clean(tmp_path)
    assert (tmp_path / "latest").read_text() == "step_0000002\n"
    assert len(list(tmp_path.glob("damaged-step_0000003-*"))) == 1
    assert_loads(save(tmp_path, 3))


def test_pointers(tmp_path):
    save(tmp_path, 1)
    assert runs.read_pointer(tmp_path, "best") is None
    runs.set_pointer(tmp_path, "best", 1)
    assert runs.read_pointer(tmp_path, "best") == 1
    with pytest.raises(AssertionError):
        runs.set_pointer(tmp_path, "best", 2)
    (tmp_path / "best").write_bytes(b"../../etc")
    with pytest.raises(BitbyteError, match="does not name a step"):
        runs.read_pointer(tmp_path, "best")


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "checkpoints" / "my-run"
    run.mkdir(parents=True)
    first, second = save(run, 1), save(run, 2)
    runs.set_pointer(run, "best", 1)
    moved = shutil.copytree(first, tmp_path / "a model")
    for path, want in (
        (run, second), (run / "latest", second), (run / "best", first), (first, first),
        ("my-run", second), ("my-run/best", first), ("my-run/step_0000001", first),
        ("checkpoints/my-run", Path("checkpoints/my-run/step_0000002")), (moved, moved),
    ):  # fmt: skip
        assert runs.resolve(path) == want
    assert runs.resolve("my-run", best=True) == first
    (run / "latest").unlink()
    assert runs.resolve(run / "latest") == second
    (run / "step_0000003").mkdir()
    (tmp_path / "checkpoints" / "empty").mkdir()
    for path, message in (
        ("my-rum", "there is: my-run"),
        ("zzz", "there is: my-run$"),
        (run / "step_0000010", "there is: step_"),
        (run / "step_0000003", "incomplete"),
        (first / MODEL, "is a file"),
        ("empty", "no complete checkpoint"),
        ("empty/best", "no complete checkpoint; in .*checkpoints there is: my-run$"),
        (tmp_path / "x" / "y", "holds none|there is"),
    ):
        with pytest.raises(BitbyteError, match=message) as caught:
            runs.resolve(path)
        assert "\n" not in str(caught.value)
    # Here is a folder of texts of the same name, and one that is in no other place.
    put(tmp_path / "my-run", {"a.txt": "a text", "step_1/b.txt": "another"})
    put(tmp_path / "texts", {"a.txt": "a text"})
    assert runs.resolve("my-run") == second and runs.resolve("my-run/best") == first
    with pytest.raises(
        BitbyteError, match=r"^texts holds no complete .*checkpoints there is: my-r"
    ):
        runs.resolve("texts")
    put(tmp_path / "my-run", {"metrics.jsonl": ""})  # now it is a run, and not silently another
    with pytest.raises(BitbyteError, match=r"^my-run holds no complete checkpoint"):
        runs.resolve("my-run")
    runs.set_pointer(run, "best", 1)
    shutil.rmtree(first)
    with pytest.raises(BitbyteError, match="missing step 1; it holds step_0000002"):
        runs.resolve(run / "best")


def test_clean_and_remove_run(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step_0000002-99").mkdir()
    (tmp_path / ".trash-step_0000000-99" / "x").mkdir(parents=True)
    (tmp_path / ".tmp-latest-99").write_text("")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".lock").write_text("")
    runs.clean(tmp_path)
    there = [".lock", "latest", "mine.txt", "step_0000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == there
    runs.append_metrics(tmp_path, {"step": 1})
    runs.remove_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "mine.txt"]


OTHERS = {
    ".tmp-thesis/text": "mine", ".tmp-latest": "mine", ".trash-old/text": "mine",
    ".trash-step_0000001-9.txt": "mine", "mine.txt": "mine",
}  # fmt: skip


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def test_files_of_others_stay_in_a_run_and_elsewhere(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    save(run, 1)
    put(run, OTHERS)
    runs.clean(run)
    runs.remove_run(run)
    assert tree(run) == OTHERS
    put(elsewhere, OTHERS)
    runs.clean(elsewhere)
    runs.remove_run(elsewhere)
    assert tree(elsewhere) == OTHERS


def test_a_stop_is_an_order_only_in_a_run(tmp_path):
    run, elsewhere, other = (tmp_path / name for name in ("run", "elsewhere", "other"))
    run.mkdir()
    save(run, 1)
    for folder, text in ((run, "now"), (run, ""), (elsewhere, "")):
        put(folder, {"STOP": text})
        runs.clean(folder)
        assert not (folder / "STOP").exists()
    for folder, name in ((run, "STOP/text"), (elsewhere, "STOP"), (other, "STOP/text")):
        put(folder, {name: "mine"})
        before = sorted(folder.rglob("*"))
        with pytest.raises(BitbyteError, match="STOP is in the way: training stops"):
            runs.clean(folder)
            runs.remove_run(folder)
        assert (folder / name).read_text() == "mine" and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("best", "my best poems"),
        ("latest", ""),
        ("metrics.jsonl", "my numbers\n"),
        ("run.json", "[1]"),
        ("run.json", '{"speed": 3}'),
        ("step_0000001/poem", "mine"),
        ("step_0000001/meta.json", "[]"),
        ("step_0000001/meta.json", '{"format": 1}'),
        ("step_0000002/poem", "mine"),  # of a step that is saved
    ],
)
def test_what_no_run_wrote_is_in_the_way(name, text, tmp_path):
    """Where a run would write over it: then nothing is deleted, and elsewhere nothing moved."""
    files = OTHERS | {name: text}
    put(tmp_path, files)
    if not name.startswith("step_0000002"):
        runs.clean(tmp_path)
        assert tree(tmp_path) == files
    else:
        (tmp_path / "other").mkdir()
        shutil.copytree(save(tmp_path / "other", 2), tmp_path / "step_0000002", dirs_exist_ok=True)
    if name != "metrics.jsonl":
        runs.append_metrics(tmp_path, {"step": 1})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BitbyteError, match=re.escape(name.split("/")[0]) + " is in the way"):
        runs.remove_run(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_prune_leaves_a_step_that_holds_more(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_0000001" / "notes.txt").write_text("mine")
    (tmp_path / "best").write_text("not a step")
    assert runs.prune(tmp_path, 1) == [2]
    assert "step_0000001 is a link, or holds more than a saved step" in capsys.readouterr().err
    assert runs.complete_steps(tmp_path) == [1, 3]


def test_links_lead_no_deletion_out_of_the_run(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    save(run, 1)
    shutil.copytree(save(outside, 2), outside / "folder")
    put(outside, {"text": "mine"})
    (run / "step_0000002").symlink_to(outside / "step_0000002")
    (run / ".tmp-step_0000003-1").symlink_to(outside / "folder")
    (run / ".tmp-latest-1").symlink_to(outside / "text")
    (run / "latest").unlink()
    (run / "latest").symlink_to(outside / "text")
    before = sorted(outside.rglob("*"))
    runs.clean(run)
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step_0000001", "step_0000002"]
    runs.set_pointer(run, "latest", 1)
    assert runs.prune(run, 1) == [1]
    with pytest.raises(BitbyteError, match="step_0000002 is in the way"):
        runs.remove_run(run)
    assert sorted(outside.rglob("*")) == before and (outside / "text").read_text() == "mine"


def test_metrics(tmp_path):
    assert runs.read_metrics(tmp_path) == []
    runs.truncate_metrics(tmp_path, 3)
    rows = [{"step": step, "loss": step / 7, "memory": None} for step in range(1, 6)]
    for row in rows:
        runs.append_metrics(tmp_path, row)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    assert runs.read_metrics(tmp_path) == rows and whole.count(b"\n") == 5
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert runs.read_metrics(tmp_path) == rows[: whole[:cut].count(b"\n")]
    path.write_bytes(whole[:-3])
    runs.truncate_metrics(tmp_path, 9)
    assert path.read_bytes() == b"".join(whole.splitlines(True)[:4])
    runs.truncate_metrics(tmp_path, 2)
    runs.append_metrics(tmp_path, {"step": 3, "grad_norm": float("inf")})
    want = [*rows[:2], {"step": 3, "grad_norm": None}]
    assert runs.read_metrics(tmp_path) == want
    for bad in (b"[]\n", b"nonsense\n", b'{"step": "1"}\n', b"\n"):
        path.write_bytes(whole + bad + whole)
        with pytest.raises(BitbyteError, match="line 6"):
            runs.read_metrics(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_files_of_a_stranger(tmp_path, kind):
    """Nothing is written or read through a link, and no pipe is waited for."""
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text('{"step": 1}\n')
    run.mkdir()
    save(run, 2)
    (run / "latest").unlink()
    for name in ("metrics.jsonl", ".lock", "latest", "best", "run.json"):
        if kind == "link":
            (run / name).symlink_to(precious)
        else:
            os.mkfifo(run / name)
    for attempt in (
        lambda: runs.append_metrics(run, {"step": 2}),
        lambda: runs.read_metrics(run),
        lambda: runs.truncate_metrics(run, 0),
    ):
        with pytest.raises((BitbyteError, OSError), match=r"metrics\.jsonl"):
            attempt()
    for attempt in (
        lambda: runs.read_pointer(run, "best"),
        lambda: runs.resolve(run / "best"),
        lambda: runs.read_facts(run),
    ):
        with pytest.raises(BitbyteError, match=r"best is|run\.json is not a plain file"):
            attempt()
    assert runs.resolve(run) == run / "step_0000002"
    assert not runs.in_use(run) and precious.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(os.name == "nt", reason="locks are others")
def test_in_use_where_only_files_open_for_writing_can_be_locked(tmp_path, monkeypatch):
    """That is so on NFS: the kernel makes a POSIX lock of what flock asks for."""
    import fcntl

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    assert not runs.in_use(tmp_path)


def test_in_use(tmp_path):
    assert not runs.in_use(tmp_path)
    with folder_lock(tmp_path):
        assert runs.in_use(tmp_path)
    assert not runs.in_use(tmp_path)


def test_environment(tmp_path):
    about = device.environment()
    assert set(about) >= {"versions", "commit", "platform", "cpu", "threads"}
    assert about["versions"]["torch"] == torch.__version__ and about["cpu"]
    assert about["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", about["commit"])
    to_json(about)


def test_commit(tmp_path, monkeypatch):
    def commit():
        device._commit.cache_clear()
        return device._commit()

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)
        return done.stdout.decode().strip()

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "package"
    package.mkdir()
    (package / "device.py").write_text("x = 1\n")
    monkeypatch.setattr(device, "__file__", str(package / "device.py"))
    assert commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "empty")
    assert commit() is None  # a virtual environment inside of somebody's repository
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert commit() == git("rev-parse", "HEAD")
    (package / "device.py").write_text("x = 2\n")
    assert commit() == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
    device._commit.cache_clear()


def test_a_folder_named_stop_stops_too(tmp_path):
    (tmp_path / "STOP").mkdir()
    assert stop_asked(tmp_path) and (tmp_path / "STOP").is_dir()
    assert not stop_asked(tmp_path / "elsewhere")
