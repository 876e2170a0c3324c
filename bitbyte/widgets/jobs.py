"""Work in threads, one job at a time: a widget's callback only starts a job and returns."""

import threading
from collections.abc import Callable

from bitbyte.process import StopEvent


class Job:
    """A handle by which running work learns that it should stop."""

    def __init__(self):
        self._halt, self._replaced = StopEvent(), False

    def stop(self, replace: bool = False) -> None:
        self._replaced = self._replaced or replace
        self._halt.set()

    def stopped(self) -> bool:
        """Whether it should stop."""
        return self._halt.is_set()

    def replaced(self) -> bool:
        """Whether a newer job took its place, so that its result should be discarded."""
        return self._replaced


class Jobs:
    """Runs jobs one after the other; ``on_error`` gets what they raise."""

    def __init__(self, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._thread: threading.Thread | None = None
        self._jobs: list[Job] = []  # those not done yet
        self._error: Exception | None = None
        self._starting = threading.Lock()  # each job waits for the one before it

    def start(self, work: Callable[[Job], None], replace: bool = True) -> None:
        """Run ``work(job)`` after all earlier jobs; ``replace`` asks those to stop first."""
        job = Job()

        def run(before: threading.Thread | None) -> None:
            if before is not None:
                before.join()
            try:
                if not job.replaced():
                    self._error = None
                    work(job)
            except Exception as error:  # whatever it is, the user must see it
                if not job.replaced():
                    self._error = error
                    self._on_error(error)
            finally:
                self._jobs.remove(job)

        with self._starting:
            if replace:
                self.stop(replace=True)
            self._jobs.append(job)
            thread = threading.Thread(target=run, args=(self._thread,), name="bitbyte job")
            thread.start()
            self._thread = thread

    def stop(self, replace: bool = False) -> None:
        """Ask all jobs to stop; with ``replace``, discard their results."""
        for job in list(self._jobs):
            job.stop(replace)

    def wait(self) -> None:
        """Block until all jobs are done; raises the error of the last one."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()
        if self._error:
            raise self._error
