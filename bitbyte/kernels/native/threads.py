"""Threads that compute one program together.

A kernel that takes ``part`` and ``parts`` computes one share of its outputs, see `Kernel.share`.
All other kernels are run by the first thread.  Threads meet before they need each other's work.
Each output is computed as one thread would compute it, so the bits do not depend on the threads.

A busy system takes a thread off its processor for milliseconds, and the others wait that long at
the next meeting.  So calls are timed, and whichever way was faster lately is taken, alone or
together.
"""

import collections
import ctypes
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from bitbyte.kernels.native.vector import minimum

PATIENCE = 1000  # looks in vain, some 10 us, after which a thread lets others have its processor
RELEASED = 1 << 62  # arrivals after which nobody waits any more
WORTH = 3e-4  # seconds; what takes less is not divided
TRIED = 4  # calls for which the other way is tried
PERIOD, LONGEST = 32, 1024  # calls from one trial to the next, at first and at most
RECENT = 4  # calls over which times are averaged


def meet(k, arrived, rest, part, parts):
    """Wait until all parts have come here.  ``arrived`` (int64) counts them, over all meetings.

    ``rest`` is the address of a function that lets other threads run.
    """
    before = k.count_up(arrived)

    def meanwhile(n):
        k.pause()
        with k.when((n % PATIENCE).equals(PATIENCE - 1)):
            k.call_at(rest)

    all_here = (before // parts + 1) * parts
    k.wait_for(arrived, minimum(all_here, RELEASED), meanwhile)


KERNELS = [meet]


def _rest() -> int:
    windows = os.name == "nt"
    library = ctypes.WinDLL("kernel32") if windows else ctypes.CDLL(None)  # pyright: ignore
    function = library.SwitchToThread if windows else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Crew:
    """The threads that help the calling one."""

    def __init__(self, threads: int):
        self.threads, self.process = threads, os.getpid()
        self.pool = ThreadPoolExecutor(threads - 1, "bitbyte-engine")
        self.lock = threading.Lock()  # two programs at once could wait for each other's threads
        self.paces = collections.defaultdict(_Pace)  # of calls of one kind, see `Division`

    def stop(self) -> None:
        """Wait for the threads to end their work; new ones come when they are needed."""
        self.pool.shutdown()
        self.pool = ThreadPoolExecutor(self.threads - 1, "bitbyte-engine")


class Division:
    """The operations of a program, divided among a crew."""

    def __init__(self, crew: Crew, machine, rows: list[list[int]]):
        self.crew, self.run = crew, machine.run
        self.arrived = np.zeros(1, np.int64)
        meeting = [machine.addresses["meet"], self.arrived.ctypes.data, _rest()]
        meeting += [0] * (len(rows[0]) - len(meeting))
        self.lists = [self._list(machine.shares, rows, meeting, i) for i in range(crew.threads)]

    def _list(self, shares: dict, rows: list, meeting: list[int], part: int) -> np.ndarray:
        """What one thread does.  ``shares``: where a kernel's operations have part and parts."""

        def mine(row: list[int], place: int) -> list[int]:
            return [*row[:place], part, self.crew.threads, *row[place + 2 :]]

        made, shared = [], False  # whether the operation before is
        for row in rows:
            place = shares.get(row[0], 0)
            if place or shared:
                made.append(mine(meeting, 3))
            if place or part == 0:
                made.append(mine(row, place) if place else row)
            shared = place > 0
        return np.array([*made, mine(meeting, 3)], np.int64)

    def __call__(self, alone: tuple[int, int, int], rows: int, times: int) -> None:
        """Run the program, as ``alone`` says if one thread was faster lately."""
        # Another program of as many operations, for as many rows, is one for another state.
        crew, pace, start = self.crew, self.crew.paces[len(self.lists[0]), rows], perf_counter()
        together = pace.together and crew.process == os.getpid()  # a forked process has no crew
        together = together and crew.lock.acquire(blocking=False)
        if together:
            try:
                self._together(alone[2], times)
            finally:
                crew.lock.release()
        else:
            self.run(*alone, times)
        if together == pace.together:
            pace.note((perf_counter() - start) / times)

    def _together(self, context: int, times: int) -> None:
        calls = [(made.ctypes.data, len(made), context, times) for made in self.lists]
        try:
            for call in calls[1:]:
                self.crew.pool.submit(self.run, *call)
            self.run(*calls[0])  # when this is over, so is all the work
        except BaseException:  # Ctrl-C: some of them may wait for others that never come
            self.arrived[0] = RELEASED
            self.crew.stop()
            self.arrived[0] = 0
            raise


class _Pace:
    """Which way is faster: after some calls of one, the other is tried."""

    def __init__(self):
        self.together = self.trying = False
        self.seconds = [math.inf, math.inf]  # of a call alone and together, lately
        self.left, self.period = TRIED, PERIOD  # calls until the next decision

    def note(self, seconds: float) -> None:
        """Take the time of a call into account."""
        way, before = self.together, self.seconds[self.together]
        self.seconds[way] = seconds if before == math.inf else before + (seconds - before) / RECENT
        self.left -= 1
        here, there = self.seconds[way], self.seconds[not way]
        if (self.left > 0 and here < 2 * there) or (here < WORTH and not way):
            return
        if self.trying:
            won = here < there
            self.together = way if won else not way
            self.period = PERIOD if won else min(2 * self.period, LONGEST)
        else:
            self.together = not way
            self.seconds[self.together] = math.inf
        self.trying = not self.trying
        self.left = TRIED if self.trying else self.period
