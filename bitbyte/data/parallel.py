"""Read, unpack and parse the files of a corpus in several processes, in the order of one.

Each process writes what it makes of some files to a temporary file, from which the documents come
in the order of the files: so memory does not grow, however far the processes are ahead, and a
corpus is packed into the same bytes.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

BATCH = 16 << 20  # bytes of files that a process takes at a time; a larger file is taken alone
FEW = 1000  # files that it takes at most
HEAD = struct.Struct("<BI")  # kind of a piece and its length
GOES_ON, PARTED, WHOLE = range(3)  # a piece continues a document, or begins one that ...


def batches(files: list[Path]) -> Iterator[list[Path]]:
    """Consecutive files, of at most `BATCH` bytes together or one alone."""
    held, size = [], 0
    for file in files:
        size += file.stat().st_size
        if held and (size > BATCH or len(held) >= FEW):
            yield held
            held, size = [], file.stat().st_size
        held.append(file)
    if held:
        yield held


def in_order(
    read: Callable[[list[Path]], Iterable], files: list[Path], workers: int, make: Callable
) -> Iterator:
    """The documents that ``read(files)`` gives, read by ``workers`` processes in batches.

    ``read`` must be picklable.  ``make(name, chunks, whole)`` is a document.  What ``read`` raises
    is raised here, at its place in the order.
    """
    # Not fork: this process has threads.
    context = multiprocessing.get_context("spawn")
    folder = Path(tempfile.mkdtemp(prefix="bitbyte-"))
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        jobs = ((read, batch, folder / f"{i}") for i, batch in enumerate(batches(files)))
        running = collections.deque(pool.submit(_spill, *job) for job in _take(jobs, workers + 1))
        while running:
            path, error = running.popleft().result()
            running.extend(pool.submit(_spill, *job) for job in _take(jobs, 1))
            with open(path, "rb") as file:
                yield from _documents(file, make)
            path.unlink()
            if error is not None:
                raise error
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _take(jobs: Iterator, n: int) -> Iterator:
    return itertools.islice(jobs, n)


def _spill(read: Callable, files: list[Path], path: Path) -> tuple[Path, Exception | None]:
    """Write the documents of some files; (path, what reading raised after those)."""
    try:
        with open(path, "xb") as file:
            for document in read(files):
                kind = WHOLE if document.whole else PARTED
                for chunk in document.chunks:
                    if chunk:
                        file.write(HEAD.pack(kind, len(chunk)))
                        file.write(chunk)
                        kind = GOES_ON
    except Exception as error:
        return path, error
    return path, None


def _documents(file: BinaryIO, make: Callable) -> Iterator:
    head = file.read(HEAD.size)
    while head:
        kind, length = HEAD.unpack(head)
        first, head = file.read(length), b""

        def chunks(first: bytes = first) -> Iterator[bytes]:
            nonlocal head
            yield first
            while head := file.read(HEAD.size):
                kind, length = HEAD.unpack(head)
                if kind != GOES_ON:
                    return
                yield file.read(length)

        pieces = chunks()
        yield make(name="", chunks=pieces, whole=kind == WHOLE)
        for _ in pieces:  # what the caller left
            pass
