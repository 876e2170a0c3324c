"""This process among others: the signals that stop it, and how it speaks to who watches."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), or its terminal was closed (SIGHUP)."""


@contextlib.contextmanager
def _handled(names: tuple[str, ...], handler: Callable) -> Iterator[None]:
    """Let ``handler`` have these signals.  A hang-up that is ignored stays so: that is nohup."""
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
    """Collect Ctrl-C, hang-ups and termination signals: the list is true once one came.

    A second Ctrl-C, two seconds later, is the ordinary KeyboardInterrupt (launchers repeat the
    first at once).  Only the main thread can do this; elsewhere signals keep their meaning.
    """
    seen: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number, frame):
        if seen and number == signal.SIGINT and time.monotonic() > seen[0] + 2:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    with _handled(("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"), note):
        yield seen


@contextlib.contextmanager
def stoppable():
    """Within it SIGTERM and SIGHUP end as Ctrl-C does: what is half done is put in order first.

    A terminal that closes sends several at once; those after the first do not disturb the tidying.
    """
    seen: list[float] = []

    def stop(number, frame):
        if seen and time.monotonic() < seen[0] + 2:
            return
        seen.insert(0, time.monotonic())
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(("SIGTERM", "SIGHUP"), stop):
        yield


def stop_asked(run: Path) -> bool:
    """Whether somebody put a file STOP into the run folder; asking takes it away."""
    try:
        (run / "STOP").unlink()
    except FileNotFoundError:
        return False
    return True


def ending() -> bool:
    """Whether the program is about to end: what runs in other threads should too.

    PyTorch aborts the process when a daemon thread is cut off in its midst, so threads that
    compute are no daemons, and ask this.
    """
    return not threading.main_thread().is_alive()


class StopEvent(threading.Event):
    """An event that is also set once the program ends."""

    def is_set(self) -> bool:
        return super().is_set() or ending()


def say(text: str) -> None:
    """A note for the person who watches; results go to stdout.  Nobody there is no failure."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
