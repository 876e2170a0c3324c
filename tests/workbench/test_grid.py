"""Grids: the file, claims that survive kills and races, cells that continue, several engines."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, names, until, words

from bitbyte import files, runs
from bitbyte.cli.dispatch import main
from bitbyte.evaluate.records import read_record
from bitbyte.files import BitbyteError, RunError, parse_json
from bitbyte.train import train
from bitbyte.workbench import cells, claims, engines
from bitbyte.workbench.claims import Watch, newest_claim, state_of, taken
from bitbyte.workbench.grid import read_grid, read_snapshot, records_of, save_grid, train_config

FIXED = {
    "data": "text.bin", "n_layer": 1, "d_model": 32, "seq_len": 32, "batch_size": 2, "steps": 4,
    "device": "cpu", "threads": 1, "log_every": 1,
}  # fmt: skip
GRID = {
    "command": "train", "fixed": FIXED, "grid": {"linear": ["ternary", "dense"], "seed": [0, 1]},
    "eval": {"data": "other.bin", "limit": 1000},
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with data and an artifacts folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITBYTE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("text.bin").write_bytes(words(3000))
    Path("other.bin").write_bytes(words(4000)[::-1])
    return tmp_path


def write(spec: dict, name: str = "g.json") -> str:
    Path(name).write_text(json.dumps(spec))
    return name


def one_cell(**fixed):
    """A saved grid of a single cell."""
    grid = read_grid(write(GRID | {"fixed": FIXED | fixed, "grid": {"seed": [0]}}))
    save_grid(grid)
    return grid, grid.cells[0]


# --- the file


def test_yaml_and_json_are_the_same_grid():
    pytest.importorskip("yaml")
    Path("g.yaml").write_text(
        "command: train\n"
        f"fixed: {json.dumps(FIXED)}\n"
        "grid: {linear: [ternary, dense], seed: [0, 1]}\n"
        "eval: {data: other.bin, limit: 1000}\n"
    )
    a, b = read_grid("g.yaml"), read_grid(write(GRID))
    assert [cell.key for cell in a.cells] == [cell.key for cell in b.cells]
    assert [cell.parameters for cell in a.cells] == [
        {"linear": linear, "seed": seed} for linear in ("ternary", "dense") for seed in (0, 1)
    ]
    assert [cell.label for cell in a.cells] == ["ternary", "ternary", "dense", "dense"]


def test_a_cell_is_known_by_what_changes_its_result(place):
    def keys(**changes):
        return [cell.key for cell in read_grid(write(GRID | changes)).cells]

    first = keys()
    assert len({*first}) == 4
    assert keys(fixed=FIXED | {"threads": 2, "log_every": 3, "save_minutes": 1.0}) == first
    assert keys(fixed=FIXED | {"preset": "nano"}) == first  # which is the default
    for changed in ({"steps": 5}, {"batch_size": 4}, {"lr": 0.01}, {"d_ff": 64}):
        assert not {*keys(fixed=FIXED | changed)} & {*first}
    assert not {*keys(eval={"data": "other.bin", "limit": 999})} & {*first}
    more = keys(grid=GRID["grid"] | {"seed": [0, 1, 2]})
    assert {*first} < {*more}  # a grid that grows keeps what is done
    (place / "text.bin").write_bytes(words(3001))
    assert not {*keys()} & {*first}


def test_the_snapshot_is_the_grid():
    grid = read_grid(write(GRID), "here")
    assert read_snapshot(save_grid(grid)) == grid == read_grid("here")
    assert train_config(grid.cells[2].fields).linear == "dense"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": "eval"}, "no command 'eval'; it can be train"),
        ({"notebook": "05"}, "it needs command: train, or notebook: NAME"),
        ({"grids": {}}, "unknown field 'grids'"),
        ({"grid": {"seed": 3}}, "seed in grid is not a list of values"),
        ({"grid": {"seed": []}}, "seed in grid is not a list of values"),
        ({"grid": {"steps": [1]}}, "steps is in fixed and in grid"),
        ({"grid": {"seed": [1, 1]}}, "two cells are the same; look for repeated values"),
        ({"grid": {"seed": [1], "eval_every": [1, 2]}}, "does not depend on eval_every"),
        ({"grid": {"seed": [*range(200)], "lr": [*range(1, 200)]}}, "39,800 cells are more"),
        ({"grid": {"family": ["ar", "rnn"]}}, "cell family rnn: no model family 'rnn'"),
        ({"grid": {"out": ["x"]}}, "out is for the grid to choose"),
        ({"grid": {"stepps": [1]}}, "train has no option stepps"),
        ({"grid": {"lr": ["fast"]}}, "lr is 'fast', which is not of its type"),
        ({"grid": {"lr": [-1.0]}}, "cell lr -1.0: lr is -1.0; it must be a number above 0"),
        ({"fixed": {}}, "no training data"),
        ({"fixed": FIXED | {"data": "gone"}}, "gone: no such file or folder"),
        ({"eval": {"limits": 1}}, "eval: unknown field 'limits'"),
        ({"eval": {"limit": 0}}, "eval: limit is 0; it must be at least 1"),
        ({"eval": {"draws": 0}}, "eval: draws is 0"),
        ({"eval": {"seed": -1}}, "eval: seed is -1"),
        ({"eval": {"dtype": "auto"}}, "eval: no dtype 'auto'; choose from fp32, bf16, fp16"),
        ({"eval": {"kind": "exct"}}, "no kind 'exct'"),
        ({"eval": {"kind": "upper_bound"}}, "this model's family has no upper_bound cost"),
        ({"eval": {"window": 9999}}, "window is 9999; this model scores windows of 1 to"),
        ({"eval": {"stride": 0}}, "stride is 0"),
    ],
)
def test_a_mistake_is_said_before_anything_starts(change, said, capsys):
    assert main(["grid", write(GRID | change)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("artifacts").exists()


def test_numbers_that_yaml_takes_for_text(tmp_path):
    assert train_config({"data": "x", "lr": "1e-3"}).lr == 1e-3
    with pytest.raises(BitbyteError, match="seed is '1'"):
        train_config({"seed": "1"})


def test_the_example_of_the_page_is_a_grid():
    pytest.importorskip("yaml")
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    Path("p.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    with pytest.raises(BitbyteError, match="enwik8: no such file"):
        read_grid("p.yaml")
    Path("enwik8").write_bytes(words(100))
    assert len(read_grid("p.yaml").cells) == 12


@pytest.mark.parametrize("on", ["cloud", "local:0", "local:x", "slurm:"])
def test_an_unknown_engine(on, capsys):
    assert main(["grid", write(GRID), "--on", on]) == 2
    assert "choose local, slurm or ray" in capsys.readouterr().err


def test_a_missing_engine_names_its_extra(monkeypatch, capsys):
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    for on, extra in (("slurm", "slurm"), ("ray", "ray")):
        assert main(["grid", write(GRID), "--on", on]) == 2
        assert f"bitbyte[{extra}]" in capsys.readouterr().err


# --- claims


def test_of_many_one_claims_a_cell():
    _, cell = one_cell()
    with taken(cell) as claim, taken(cell) as other:
        assert claim and other is None
        assert state_of(cell).state == "running"
    assert state_of(cell).state == "waiting"  # it was left
    with taken(cell) as claim:
        assert claim.number == 2 and claim.deaths == 0


def _race(folder: str, name: str, start, results) -> None:
    claims.machine = lambda: name
    cell = read_grid(folder).cells[0]
    start.wait()
    results.put(claims._claim(cell) is not None)


def test_without_locks_one_claims_a_cell_too():
    """As on a disk of machines that do not see each other's locks."""
    grid, cell = one_cell()
    cell.folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    for number in range(1, 6):
        start, results = context.Event(), context.Queue()
        racers = [
            context.Process(target=_race, args=(str(grid.folder), name, start, results))
            for name in "abcd"
        ]
        for racer in racers:
            racer.start()
        start.set()
        assert sorted(results.get() for _ in racers) == [False] * 3 + [True]
        for racer in racers:
            racer.join()
        assert newest_claim(cell)[0] == 2 * number - 1
        claims._put(claims._claim_path(cell, 2 * number), claims._note("waiting"), new=True)


def test_a_claim_of_another_machine_lasts_while_it_is_renewed(monkeypatch):
    _, cell = one_cell()
    cell.folder.mkdir(parents=True)
    path = claims._claim_path(cell, 1)
    with monkeypatch.context() as there:
        there.setattr(claims, "machine", lambda: "another")
        claims._put(path, claims._note("running"), new=True)
    now = 0.0
    watch = Watch(silence=100, clock=lambda: now)
    for beat in range(1, 6):
        with taken(cell) as claim:
            assert claim is None
        with monkeypatch.context() as there:
            there.setattr(claims, "machine", lambda: "another")
            claims._put(path, claims._note("running", beat=beat), new=False)
        now += 90
        watch.reclaim(cell)
    assert newest_claim(cell)[0] == 1
    now += 99
    watch.reclaim(cell)
    assert newest_claim(cell)[0] == 1
    now += 1
    watch.reclaim(cell)
    number, last = newest_claim(cell)
    assert (number, last["state"], last["deaths"]) == (2, "waiting", 1)
    with taken(cell) as claim:
        assert claim.number == 3


def test_copies_of_a_claim_are_not_claims():
    _, cell = one_cell()
    with taken(cell) as claim:
        path = claims._claim_path(cell, claim.number)
        for name in ("claim-0009.sync-conflict-2026.json", "claim-0009 (1).json", "claim-x.json"):
            shutil.copyfile(path, path.with_name(name))
        assert newest_claim(cell)[0] == 1 and state_of(cell).state == "running"


def test_a_claim_that_windows_has_open_is_replaced_a_little_later(monkeypatch):
    _, cell = one_cell()
    real, calls = os.replace, []

    def busy(source, target):
        calls.append(source)
        if len(calls) < 4:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    with taken(cell) as claim:
        path, note = claims._claim_path(cell, claim.number), claims._note("failed")
        monkeypatch.setattr(os, "replace", busy)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
        with monkeypatch.context() as windows:
            windows.setattr(files.os, "name", "nt")
            assert claims._put(path, note, new=False)
        assert len(calls) == 4 and newest_claim(cell)[1]["state"] == "failed"


def test_who_was_given_up_notices(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    _, cell = one_cell()
    with taken(cell) as claim:
        until(lambda: newest_claim(cell)[1]["beat"] > 1)
        claims._put(claims._claim_path(cell, 2), claims._note("waiting", 1), new=True)
        assert claim.lost.wait(60)
    assert newest_claim(cell)[0] == 2 and newest_claim(cell)[1]["deaths"] == 1


def test_a_cell_that_kills_its_workers_fails():
    _, cell = one_cell()
    for _ in range(claims.DEATHS):
        pid = os.fork()
        if pid == 0:
            with taken(cell) as claim:
                os._exit(9 if claim else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    Watch().reclaim(cell)
    state = state_of(cell)
    assert state.state == "failed" and "died 3 times" in state.error
    with taken(cell) as claim:
        assert claim is None
    claims.retry(cell)
    with taken(cell) as claim:
        assert claim.deaths == 0


def test_a_strange_claim_is_refused():
    _, cell = one_cell()
    cell.folder.mkdir(parents=True)
    (cell.folder / "claim-0001.json").write_text("{}")
    with pytest.raises(BitbyteError, match="is not a claim of bitbyte grid"):
        state_of(cell)


# --- cells


def test_a_cell_makes_one_record(place):
    grid, cell = one_cell()
    assert cells.work(grid.snapshot) == 1 and cells.work(grid.snapshot) == 0
    kind, record = read_record(cell.folder / "record.json")
    assert kind == "evaluation" and record["grid"]["parameters"] == {"seed": 0}
    assert record["bytes"] == 1000 and record["model"] == "ar-nano-ternary"
    assert not record["trained_on_it"]
    state = state_of(cell)
    assert (state.state, state.bpb, state.bytes_seen) == ("done", record["bpb"], 4 * 2 * 32)
    assert "4 steps" not in (cell.folder / "log.txt").read_text()
    assert records_of(grid.folder) == [record]


def test_a_stopped_cell_continues_and_equals_one_that_was_not(monkeypatch):
    grid, cell = one_cell(steps=6)
    assert cells.work(grid.snapshot) == 1
    whole = read_record(cell.folder / "record.json")[1]
    other = read_grid(write(GRID | {"fixed": FIXED | {"steps": 6}, "grid": {"seed": [0]}}), "two")
    save_grid(other)
    (again,) = other.cells
    with monkeypatch.context() as patch, taken(again) as claim:
        patch.setattr(cells, "train", lambda config, _: train(config.replace(stop_after=3)))
        assert not cells.do_cell(other, again, claim)
    assert state_of(again).state == "waiting" and runs.latest_step(again.folder / "run") == 3
    assert cells.work(other.snapshot) == 1
    record = read_record(again.folder / "record.json")[1]
    assert record["bits"] == whole["bits"] and record["checkpoint"] == whole["checkpoint"]


def test_a_failure_is_noted_with_its_log_and_tried_again(capsys):
    spec = GRID | {"fixed": FIXED, "grid": {"lr": [0.001, 1e30]}}
    assert main(["grid", write(spec)]) == 1
    said = capsys.readouterr()
    assert "1 of 2 cells failed; lr 1e+30: loss" in said.err and "log.txt" in said.err
    grid = read_grid("g.json")
    assert [state_of(cell).state for cell in grid.cells] == ["done", "failed"]
    assert "try a lower --lr" in (grid.cells[1].folder / "log.txt").read_text()
    before = (grid.cells[0].folder / "record.json").stat().st_mtime_ns
    assert main(["grid", write(spec)]) == 1
    assert (grid.cells[0].folder / "record.json").stat().st_mtime_ns == before
    assert (grid.cells[1].folder / "log.txt").read_text().count("try a lower --lr") == 2


def test_unexpected_errors_have_their_traceback_in_the_log(monkeypatch):
    grid, cell = one_cell()
    monkeypatch.setattr(cells, "train", lambda *_: 1 / 0)
    assert cells.work(grid.snapshot) == 0
    assert state_of(cell).error == "division by zero"
    assert "Traceback" in (cell.folder / "log.txt").read_text()


# --- whole grids


def children(pid: int) -> list[int]:
    lines = subprocess.check_output(["ps", "-eo", "pid,ppid"], text=True).splitlines()[1:]
    pairs = [tuple(map(int, line.split())) for line in lines]
    return [child for child, parent in pairs if parent == pid]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
@pytest.mark.parametrize("victim", ["worker", "command"])
def test_a_kill(victim, capfd):
    """Each cell has one record in the end, and it is as without a kill."""
    spec = GRID | {"fixed": FIXED | {"steps": 40, "save_every": 5}}
    command = [sys.executable, "-m", "bitbyte", "grid", write(spec), "--on", "local:2"]
    grid = read_grid("g.json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: any(state_of(cell).progress for cell in grid.cells), process)
    workers = children(process.pid)
    assert workers
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == (0 if victim == "worker" else -9)
    assert main(["grid", "g.json", "--json"]) == 0
    document = parse_json(capfd.readouterr().out.encode(), "")
    assert [cell["state"] for cell in document["cells"]] == ["done"] * 4
    found = {r["grid"]["key"]: (r["checkpoint"], r["bits"]) for r in records_of(grid.folder)}
    quiet = read_grid("g.json", "quiet")
    save_grid(quiet)
    cells.work(quiet.snapshot)
    whole = {r["grid"]["key"]: (r["checkpoint"], r["bits"]) for r in records_of(quiet.folder)}
    assert found == whole and len(found) == 4


@pytest.mark.slow
def test_two_commands_share_a_grid():
    command = [sys.executable, "-m", "bitbyte", "grid", write(GRID)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    grid = read_grid("g.json")
    for cell in grid.cells:
        assert len([*cell.folder.glob("claim-*.json")]) == 1
        assert names(cell.folder / "run").count("run.json") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no process groups")
def test_workers_end_with_their_command():
    process = subprocess.Popen(
        [sys.executable, "-m", "bitbyte", "grid", write(GRID | {"fixed": FIXED | {"steps": 10**6}})]
    )
    grid = read_grid("g.json")
    until(lambda: any(state_of(cell).progress is not None for cell in grid.cells), process)
    process.kill()
    process.wait()
    (cell,) = [cell for cell in grid.cells if state_of(cell).state == "running"]
    until(lambda: state_of(cell).state == "waiting")
    assert runs.latest_step(cell.folder / "run") > 0  # it has saved


def test_workers_that_do_nothing(monkeypatch):
    grid, _ = one_cell()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match="the workers on local do nothing: no message"):
        engines.run_grid(grid, poll=0.05)


def test_status_table_and_results(capsys):
    write(GRID)
    assert main(["grid", "g.json", "--status"]) == 0
    assert "0 of 4 done, 4 waiting" in capsys.readouterr().out
    grid = read_grid("g.json")
    save_grid(grid)
    cells.work(grid.snapshot)
    assert main(["grid", str(grid.folder), "--status"]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 done" in said and said.count("done") == 5
    assert main(["results", str(grid.folder), "--json", "--copy"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 4 and {row["model"] for row in found} == {"ternary", "dense"}
    assert len([*Path("artifacts/results").glob("*.json")]) == 4
    assert main(["results", "--copy"]) == 2


def test_a_high_table_is_cut_and_the_time_left_is_estimated(capsys):
    grid = read_grid(write(GRID))

    def state(cell, state, **more):
        fields = {"bpb": None, "kind": None, "seconds": None, "bytes_seen": None, "progress": None,
                  "where": "", "error": None}  # fmt: skip
        return claims.State(cell=cell, state=state, **fields | more)

    a, b, c, d = grid.cells
    states = [
        state(a, "done", seconds=10.0, bpb=2.0, progress=1.0), state(b, "running", progress=0.5),
        state(c, "failed", error="no \x1b[31m luck"), state(d, "waiting"),
    ]  # fmt: skip
    text = engines.table(grid, states, rows=2)
    assert "and 2 more" in text and "running 50%" in text and "\x1b" not in text
    assert engines.seconds_left(states) == 15.0
    assert "1 of 4 done, 1 running, 1 failed, 1 waiting; best" not in engines.summary(grid, states)
    assert "best 2.0000 (linear ternary, seed 0), about 0:15 left" in engines.summary(grid, states)
    bound = state(d, "done", bpb=1.5, kind="upper_bound")
    assert "<= 1.5000" in engines.table(grid, [bound])
    engines.Screen(grid)([bound])
    assert "done, <= 1.5000 BPB" in capsys.readouterr().err
    both = engines.summary(grid, [states[0], bound])
    assert "best 2.0000 (linear ternary, seed 0), best <= 1.5000 (linear dense, seed 1)" in both
    assert [c["kind"] for c in engines.as_document(grid, [bound])["cells"]] == ["upper_bound"]


def test_the_view_of_a_notebook():
    gridview = pytest.importorskip("bitbyte.widgets.gridview")
    grid, cell = one_cell()
    view = gridview.GridView()
    assert "no cells" in view.to_html()
    with taken(cell) as claim:
        claim.fail("<b>no</b> luck")
    assert cells.work(grid.snapshot) == 0
    view(engines.states_of(grid))
    assert "1 failed" in view.box.value and "<b>" not in view.box.value
    assert repr(view) == "GridView(0 of 1 cells done)"
    claims.retry(cell)
    engines.run_grid(grid, poll=0.05, show=view)
    assert repr(view) == "GridView(1 of 1 cells done)"


# --- notebooks


def test_a_grid_of_a_notebook(place, capsys):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    new = nbformat.v4
    parameters = new.new_code_cell("seed: int = 0  # of it\nrate: float = 0.5  # of it")
    parameters.metadata.tags = ["parameters"]
    code = "assert rate < 2, 'too fast'\nimport os, pathlib\n"
    code += "pathlib.Path(os.environ['BITBYTE_RUN'], 'results', 'seen').write_text(str(rate))"
    book = new.new_notebook(cells=[parameters, new.new_code_cell(code)])
    nbformat.write(book, place / "05_try_it.ipynb")
    spec = {"notebook": "05_try_it.ipynb", "fixed": {"seed": 3}, "grid": {"rate": [1, 2.5]}}
    grid = read_grid(write(spec))
    assert [cell.fields for cell in grid.cells] == [{"seed": 3, "rate": 1.0},
                                                    {"seed": 3, "rate": 2.5}]  # fmt: skip
    save_grid(grid)
    assert cells.work(grid.snapshot) == 1
    done, failed = grid.cells
    record = json.loads((done.folder / "record.json").read_text())
    assert record["format"] == "cell 1" and record["parameters"]["rate"] == 1.0
    assert (done.folder / "results" / "seen").read_text() == "1.0"
    assert "05_try_it.ipynb" in names(done.folder)
    assert state_of(failed).error == "AssertionError: too fast"
    assert records_of(grid.folder) == []
    assert main(["grid", write(spec | {"fixed": {"sed": 1}})]) == 2
    assert "did you mean seed?" in capsys.readouterr().err
    (place / "05_try_it.ipynb").write_text((place / "05_try_it.ipynb").read_text() + " ")
    claims.retry(failed)
    cells.work(grid.snapshot)
    assert "has changed since" in state_of(failed).error
