"""This process: the signals that stop it, and its notes to the user."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STOPPING = b"\nstopping after this step, and saving; Ctrl-C again stops without either\n"


class Terminated(KeyboardInterrupt):
    """The process was asked to stop (SIGTERM), or its terminal was closed (SIGHUP)."""


@contextlib.contextmanager
def _handled(names: tuple[str, ...], handler: Callable) -> Iterator[None]:
    """Handle these signals in the main thread.  An ignored SIGHUP stays ignored: that is nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        old = signal.getsignal(number)
        if (number, old) != (getattr(signal, "SIGHUP", None), signal.SIG_IGN):
            before[number] = old or signal.SIG_DFL  # None: not installed from Python
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def interrupts():
    """Collect SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 in a list of arrival times.

    A Ctrl-C more than two seconds after the first signal of any kind raises KeyboardInterrupt;
    earlier ones do not, as launchers repeat a signal at once.  Other threads collect nothing.
    """
    seen: list[float] = []

    def note(number, frame):
        if number == signal.SIGINT and seen and time.monotonic() > seen[0] + 2:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not seen and os.isatty(2):
            os.write(2, STOPPING)  # print cannot be interrupted by itself
        seen.append(time.monotonic())

    with _handled(("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"), note):
        yield seen


@contextlib.contextmanager
def stoppable():
    """Make SIGTERM and SIGHUP raise, as Ctrl-C does, so that cleanup code runs.

    A closing terminal sends several at once; those within two seconds do not interrupt the cleanup.
    """
    seen: list[float] = []

    def stop(number, frame):
        if seen and time.monotonic() < seen[0] + 2:
            return
        seen.insert(0, time.monotonic())
        raise Terminated

    with _handled(("SIGTERM", "SIGHUP"), stop):
        yield


def stop_asked(run: Path) -> bool:
    """Whether somebody put a file named STOP into the run folder; the file is then deleted."""
    try:
        (run / "STOP").unlink()
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError):  # a folder: it asks too, and stays
        return True
    return True


def ending() -> bool:
    """Whether the program is about to exit, so that other threads should finish.

    PyTorch aborts the process when a daemon thread is killed while it computes, so threads that
    compute are not daemons and poll this instead.
    """
    return not threading.main_thread().is_alive()


class StopEvent(threading.Event):
    """An event that also counts as set once the program is about to exit."""

    def is_set(self) -> bool:
        return super().is_set() or ending()


def say(text: str) -> None:
    """Print a note for the user to stderr, as results go to stdout.  A closed stderr is ignored."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
