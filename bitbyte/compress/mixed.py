"""Files and folders compressed by the mixer, alone or with a model: write, restore, test.

`frames` and `archive` describe the format.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from bitbyte.compress import archive, container, frames, segments
from bitbyte.compress.mixer import codec
from bitbyte.files import BitbyteError, check_target, open_input, replacing, shown

STDIO = "-"
Finder = Callable[[frames.Header], object] | None
SPOOL = 1 << 26  # bytes of standard input that are looked at to choose the size of the tables


@dataclasses.dataclass(frozen=True)
class Done:
    """Result of compressing, restoring or testing."""

    original: int  # bytes of the files
    size: int  # bytes of the compressed file
    files: int
    seconds: float
    with_model: bool = False

    def described(self) -> str:
        bpb = f", {8 * self.size / self.original:.4f} bits per byte" if self.original else ""
        rate = self.original / max(self.seconds, 1e-9) / 1000
        how = ", with the model" if self.with_model else ""
        return f"{self.original:,} bytes, {self.size:,} compressed{bpb}, {rate:.3g} kB/s{how}"


def compress(
    sources: Sequence[str | Path], target: str | Path, *, memory: int = codec.MEMORY, expert=None,
    allow_overwrite: bool = False, progress: bool = False, fast: bool | None = None,
) -> Done:  # fmt: skip
    """Compress one file, or several files and folders as an archive; ``-`` is standard input.

    ``memory`` is in MB; the decoder needs as much.  ``expert`` is a `streamed.Expert`, which is
    left out if it does not help with the beginning.  Raises BitbyteError, and OSError naming the
    target if the disk is full.
    """
    if not codec.MIN_MEMORY <= memory <= codec.MAX_MEMORY:
        raise BitbyteError(
            f"memory is {memory} MB; it must be between {codec.MIN_MEMORY} and {codec.MAX_MEMORY}"
        )
    several = len(sources) > 1 or (sources[0] != STDIO and Path(sources[0]).is_dir())
    if several and any(source == STDIO for source in sources):
        raise BitbyteError("standard input (-) can only be compressed alone")
    with contextlib.ExitStack() as stack:
        if several:
            entries = archive.collect([Path(source) for source in sources])
            pieces = archive.pieces(entries)
            length = sum(entry.size for entry, _ in entries)
        else:
            entries = []
            file, length = stack.enter_context(open_input(sources[0]))
            pieces = segments.pieces(file)
            pieces, length = (pieces, length) if length is not None else _spooled(pieces)
        n_buckets, ring_bits = codec.sizes_for(length, memory)
        if expert is not None:
            from bitbyte.compress.streamed import TRIAL_BYTES, helps

            begun, pieces = _begun(pieces, TRIAL_BYTES + (1 << 12))
            # The first piece of an archive is its table.
            sample = b"".join(piece.data for piece in begun[several:])
            expert = expert if helps(expert, sample) else None
        named = {} if expert is None else {
            "model": expert.name, "fingerprint": expert.fingerprint, "kept": expert.kept,
        }  # fmt: skip
        header = frames.Header(archive=several, n_buckets=n_buckets, ring_bits=ring_bits, **named)
        sink = stack.enter_context(_sink(target, allow_overwrite, None if several else sources[0]))
        tick = stack.enter_context(_ticks(length, "compress", progress))
        totals = frames.write(
            sink, header, segments.frames(pieces), tick, model=expert, fast=fast
        )  # fmt: skip
    files, n_bytes = 1, totals.original
    if several:
        files, n_bytes = archive.totals(entry for entry, _ in entries)
    return Done(n_bytes, totals.size, files, totals.seconds, expert is not None)


def _spooled(pieces: Iterator[segments.Piece]) -> tuple[Iterator[segments.Piece], int]:
    """(the same pieces, their bytes, at least if there are more than SPOOL)."""
    begun, pieces = _begun(pieces, SPOOL)
    return pieces, sum(len(piece.data) for piece in begun)


def _begun(
    pieces: Iterator[segments.Piece], most: int
) -> tuple[list[segments.Piece], Iterator[segments.Piece]]:
    """(the first pieces, of at least ``most`` bytes if there are as many; all pieces)."""
    begun, n = [], 0
    for piece in pieces:
        begun.append(piece)
        n += len(piece.data)
        if n >= most:
            break
    return begun, itertools.chain(begun, pieces)


@contextlib.contextmanager
def _sink(
    target: str | Path, allow_overwrite: bool, source: str | Path | None, need: int = 0
) -> Iterator[BinaryIO]:
    if target == STDIO:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    mode = 0o666 if source in (None, STDIO) else container.mode_of(source)
    with replacing(Path(target), overwrite=allow_overwrite, need=need, mode=mode) as sink:
        yield sink


@contextlib.contextmanager
def _ticks(length: int, word: str, progress: bool) -> Iterator[Callable]:
    """A progress bar's ``tick``, see `frames.write`: it shows kB/s, what is left, and the ratio."""
    with container.progress_bar(length, word, progress) as bar:

        def tick(n: int, totals: frames.Totals) -> None:
            if totals.original:
                share = totals.size / totals.original
                bar.set_postfix_str(f"{share:.3f} of size", refresh=False)
            bar.update(n)

        yield tick


def version_of(source: str | Path) -> int:
    """Format version of a compressed file: 1 or 2.  Raises BitbyteError for any other file."""
    if source == STDIO:
        return frames.VERSION
    path = container.plain_file(Path(source))
    with open(path, "rb") as file:
        start = file.read(10)
    if start[:8] == container.MAGIC and int.from_bytes(start[8:], "little") == frames.VERSION:
        return frames.VERSION
    container.read_header(path)  # says what is wrong with a file of another kind
    return container.VERSION


@contextlib.contextmanager
def _opened(source: str | Path, progress: bool, word: str, fast: bool | None, expert: Finder):
    """(header, frames of the original, totals) of a compressed file, whose checksums are right."""
    name = "standard input" if source == STDIO else shown(source)
    with contextlib.ExitStack() as stack:
        if source == STDIO:
            file, length = sys.stdin.buffer, 0
        else:
            file = stack.enter_context(open(container.plain_file(Path(source)), "rb"))
            length = frames.check(file, name)
            file.seek(0)
        reader, totals = frames.Source(file, name), frames.Totals()
        header = frames.read_header(reader)
        model = expert(header) if header.model and expert else None
        if header.model and model is None:
            raise BitbyteError(f"{name} needs the model {header.model.hex()}; name it with --ckpt")
        tick = stack.enter_context(_ticks(length, word, progress))
        blocks = frames.read(reader, header, totals, tick, model=model, fast=fast)
        yield header, blocks, totals, length


def decompress(
    source: str | Path, target: str | Path, *, expert: Finder = None,
    allow_overwrite: bool = False, progress: bool = False, fast: bool | None = None,
) -> Done:  # fmt: skip
    """Restore what `compress` wrote: a file, or an archive's files in a new folder.

    ``target`` appears only when all of it is right (a pipe gets the bytes before that is known).
    ``expert`` finds the `streamed.Expert` of a header.  Raises BitbyteError on damage.
    """
    opened = _opened(source, progress, "decompress", fast, expert)
    with opened as (header, blocks, totals, length):
        if header.archive:
            if target == STDIO:
                raise BitbyteError("an archive needs a folder to be restored to, not -")
            files, n_bytes = archive.unpack(blocks, Path(target), shown(source))
        else:
            if target != STDIO:
                check_target(Path(target), overwrite=allow_overwrite)
            with _sink(target, allow_overwrite, source, length) as sink:
                for block in blocks:
                    sink.write(block)
            files, n_bytes = 1, totals.original
    return Done(n_bytes, totals.size, files, totals.seconds, bool(header.model))


def verify(
    source: str | Path, *, expert: Finder = None, progress: bool = False, fast: bool | None = None
) -> Done:
    """Decode a compressed file and write nothing.  Raises BitbyteError on damage."""
    with _opened(source, progress, "test", fast, expert) as (header, blocks, totals, _):
        if header.archive:
            files, n_bytes = archive.check(blocks, shown(source))
        else:
            for _ in blocks:
                pass
            files, n_bytes = 1, totals.original
    return Done(n_bytes, totals.size, files, totals.seconds, bool(header.model))
