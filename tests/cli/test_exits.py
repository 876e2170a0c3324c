"""The end of a run of several processes: `tools/exit_rounds.py` in short."""

import pytest
from tools.exit_rounds import one_round


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stop", "term"])
def test_all_processes_end_as_they_should_and_leave_no_thread_to_python(tmp_path, way):
    """A thread of gloo that is left may abort its process, whose work is done; rarely."""
    assert one_round(way, 2, tmp_path) == ""


def test_a_stop_while_it_starts(monkeypatch, capsys):
    import builtins

    from bitbyte.__main__ import run

    real = builtins.__import__

    def stopped(name, *rest):
        if name == "bitbyte.cli.dispatch":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", stopped)
    assert run() == 130
    monkeypatch.undo()
    assert capsys.readouterr().err == "stopped\n"
