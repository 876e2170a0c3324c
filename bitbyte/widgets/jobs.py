"""Work in threads, one job at a time: a widget's callback only starts one and returns."""

import threading
from collections.abc import Callable
from typing import NamedTuple

from bitbyte.process import StopEvent


class Job(NamedTuple):
    """What a job asks while it runs."""

    stopped: Callable[[], bool]  # should it end?
    replaced: Callable[[], bool]  # did something newer take its place?


class Jobs:
    """Runs jobs one after the other; ``on_error`` hears what they raise."""

    def __init__(self, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._thread: threading.Thread | None = None
        self._halt = StopEvent()
        self._error: Exception | None = None

    def start(self, work: Callable[[Job], None], replace: bool = True) -> None:
        """Run ``work(job)`` once those before have ended; with ``replace`` they are told to end."""
        if replace:
            self._halt.set()
        before, halt = self._thread, StopEvent()
        self._halt = halt
        job = Job(halt.is_set, lambda: halt.is_set() and self._halt is not halt)

        def run() -> None:
            if before is not None:
                before.join()
            if job.replaced():
                return
            self._error = None
            try:
                work(job)
            except Exception as error:  # whatever it is, a person must see it
                self._error = error
                if not job.replaced():
                    self._on_error(error)

        self._thread = threading.Thread(target=run, name="bitbyte job")
        self._thread.start()

    def stop(self, replace: bool = False) -> None:
        """Tell the newest job to end; with ``replace`` nobody waits for what it has made."""
        self._halt.set()
        if replace:
            self._halt = StopEvent()

    def wait(self) -> Exception | None:
        """What went wrong in the last job, once all have ended."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join()
        return self._error
