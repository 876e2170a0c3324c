"""Pack documents into shards: raw bytes in files of a fixed size, and a manifest of them.

A packed folder holds shard_00000.bin ... for training, val_00000.bin ... for validation, without
headers, so any .bin is a shard, and manifest.json, written last.  No text is decoded here: the
bytes come from `corpora`; `bitbyte.shards` defines the manifest and reads the folder.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from bitbyte.data.readers import find_files
from bitbyte.files import (
    BitbyteError,
    folder_lock,
    output_folder,
    patiently,
    read_json,
    sync_folder,
    to_json,
    user_path,
    write_new,
)
from bitbyte.process import say
from bitbyte.shards import (
    MANIFEST,
    PREFIX,
    WORK,
    Manifest,
    Shard,
    manifest_of,
)

BLOCK = 1 << 20  # bytes written and hashed at a time
BUFFERS = 8  # blocks of memory for each split
SYNC = 1 << 26  # bytes written between two calls of fsync
SHARD_NAME = re.compile(rf"(?:{'|'.join(PREFIX.values())})_[0-9]{{5,9}}\.bin")
WORK_NAMES = {MANIFEST, f"new-{MANIFEST}", f"old-{MANIFEST}"}  # what WORK holds besides shards


class _Splitter:
    """Chooses train or val by the content of a piece, so that equal pieces share a split.

    A piece is identified by its length and its first and last 4 KiB.  The first piece goes to train
    and the first one that differs from it to val, so two different pieces are enough for two
    splits; all others go by their hash.
    """

    def __init__(self, val_fraction: float):
        self._limit = int(val_fraction * 2**64)
        self._fixed: list[int] = []

    def __call__(self, piece: bytes) -> str:
        if not self._limit:
            return "train"
        ends = piece if len(piece) <= 8192 else piece[:4096] + piece[-4096:]
        key = hashlib.blake2b(ends, digest_size=8, key=len(piece).to_bytes(8, "little")).digest()
        number = int.from_bytes(key, "little")
        if len(self._fixed) < 2 and number not in self._fixed:
            self._fixed.append(number)
        if number in self._fixed:
            return ("train", "val")[self._fixed.index(number)]
        return "val" if number < self._limit else "train"


class _Writer:
    """Writes the shards of one split.

    Hashing and waiting for the disk run on threads of their own, so that packing takes as long as
    the slowest of the three and not their sum.
    """

    def __init__(self, folder: Path, split: str, shard_size: int, hasher, syncer):
        self.folder, self.split, self.size = folder, split, shard_size
        self.hasher, self.syncer = hasher, syncer
        self.total, self.shards = 0, []
        self._counts = collections.Counter()  # documents by shard number
        # Reused: the page faults of fresh memory would cost more than all the rest.
        self._buffers = itertools.cycle([memoryview(bytearray(BLOCK)) for _ in range(BUFFERS)])
        self._buffer, self._held = next(self._buffers), 0
        self._file, self._room = None, 0
        self._hashing = collections.deque()
        self._syncing, self._unsynced = None, 0

    def write(self, data: bytes, starts: bool) -> None:
        """Append; ``starts``: a document begins here."""
        self._counts[self.total // self.size] += starts
        self.total += len(data)
        rest = memoryview(data)
        while rest:
            n = min(len(rest), BLOCK - self._held)
            self._buffer[self._held : self._held + n] = rest[:n]
            self._held, rest = self._held + n, rest[n:]
            if self._held == BLOCK:
                self._flush()

    def _flush(self) -> None:
        """Write the held block, across shards if need be, and start hashing it."""
        data, self._held = self._buffer[: self._held], 0
        while data:
            if self._file is None:
                name = f"{PREFIX[self.split]}_{len(self.shards):05d}.bin"
                self._file = open(self.folder / name, "xb", buffering=0)  # noqa: SIM115
                self._digest, self._room = hashlib.sha256(), self.size
            block, data = data[: self._room], data[self._room :]
            self._hashing.append(self.hasher.submit(self._digest.update, block))
            self._unsynced += len(block)
            while block:
                written = self._file.write(block)
                self._room -= written
                block = block[written:]
            # Never wait for the disk here: skip if the last fsync is still running.
            if self._unsynced >= SYNC and (self._syncing is None or self._syncing.done()):
                self._sync()
            if not self._room:
                self._end_shard()
        # The next buffer is the one used longest ago; it must have been hashed before reuse.
        while len(self._hashing) >= BUFFERS:
            self._hashing.popleft().result()
        self._buffer = next(self._buffers)

    def _sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        self._syncing, self._unsynced = self.syncer.submit(os.fsync, self._file.fileno()), 0

    def _end_shard(self) -> None:
        self._sync()
        self._syncing.result()
        self._file.close()
        while self._hashing:
            self._hashing.popleft().result()
        n_bytes, documents = self.size - self._room, self._counts[len(self.shards)]
        shard = Shard(
            name=Path(self._file.name).name, split=self.split, n_bytes=n_bytes,
            documents=documents, sha256=self._digest.hexdigest(),
        )  # fmt: skip
        self.shards.append(shard)
        self._file = self._syncing = None

    def finish(self) -> None:
        """Write what is held and close the last shard."""
        if self._held:
            self._flush()
        if self._file is not None:
            self._end_shard()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error) -> None:
        if self._file is not None:  # left open by an error
            if self._syncing is not None:
                concurrent.futures.wait([self._syncing])
            self._file.close()


def _pieces(documents: Iterable, sep: bytes, limit: int) -> Iterator[tuple[bool, bytes]]:
    """(whether a new unit to split starts, bytes) of all documents, up to ``limit`` bytes.

    A document in one piece is not cut: the first that would exceed the limit ends the stream.
    """
    for document in documents:
        alone = isinstance(document, bytes)
        whole, began = alone or document.whole, False
        for chunk in (document,) if alone else document.chunks:
            if not chunk:
                continue
            if limit == 0 or (whole and len(chunk) + len(sep) > limit):
                return
            piece = chunk[:limit]
            yield not began or not whole, piece
            began, limit = True, limit - len(piece)
        if began and sep and limit:
            yield False, sep
            limit -= 1


def _refuse_places(out: Path, source: dict, val_source: dict) -> None:
    """Raise BitbyteError if the shards would lie among the inputs, or the splits share inputs."""
    inputs, val_inputs = (
        [Path(item).resolve() for item in facts.get("inputs", ())] for facts in (source, val_source)
    )
    if out.resolve() in inputs:
        raise BitbyteError(f"{out} is also an input; --out must be another folder")
    for one, other in itertools.product(inputs, val_inputs):
        nested = one == other or one in other.parents or other in one.parents
        if nested and _files(one, source) & _files(other, val_source):
            raise BitbyteError(f"{other} is training data too; choose other --val_inputs")
    if val_source and val_source == source:
        raise BitbyteError("training and validation data are the same; choose other --val_inputs")


def _files(path: Path, facts: dict) -> set[Path]:
    """The files of one input that its patterns choose."""
    files = find_files([path], facts.get("include", ()), facts.get("exclude", ()))
    return {file.resolve() for file in files}


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder, which is made if missing, and removed after an error if it stayed empty."""
    new = not out.exists()
    output_folder(out)
    with folder_lock(out):
        try:
            yield
        except BaseException:
            if new and [path.name for path in out.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # Windows does not remove what is open
                    (out / ".lock").unlink()
                    out.rmdir()
            raise


def pack(
    documents: Iterable, out: str | Path, *, shard_size_gb: float = 1.0,
    sep_byte: int | None = None, val_fraction: float = 0.05,
    val_documents: Iterable | None = None, source: dict | None = None,
    val_source: dict | None = None, max_bytes: int | None = None, progress: bool = True,
    overwrite: bool = False,
) -> Manifest:  # fmt: skip
    """Write documents as shards and a manifest to the folder ``out``.

    ``documents`` are bytes, or have ``chunks`` (an iterable of bytes) and ``whole`` (all chunks
    belong to one split); empty ones are skipped.  ``sep_byte`` follows each document.  The
    validation split is a share ``val_fraction`` of them, chosen by content, or exactly
    ``val_documents`` if given.  At most ``max_bytes`` of ``documents`` are packed.  ``source`` and
    ``val_source`` are facts from `open_corpus`: the first goes into the manifest, and the inputs
    they list are checked.

    Memory does not depend on the size.  A kill leaves no manifest, and the next call starts from
    scratch; files that it did not make are never touched.  Raises BitbyteError (nothing to pack;
    the folder is in use, an input, or already packed and not ``overwrite``; validation data that
    is training data), OSError (disk full).
    """
    if not 1e-9 <= shard_size_gb <= 1e9:
        raise BitbyteError(f"shard_size_gb is {shard_size_gb}; it must be 1e-9 (one byte) to 1e9")
    shard_size, limit = round(shard_size_gb * 1e9), 2**63 if max_bytes is None else max_bytes
    if limit < 1:
        raise BitbyteError(f"max_bytes is {max_bytes}; it must be 1 or more")
    if not 0 <= val_fraction < 1:
        raise BitbyteError(f"val_fraction is {val_fraction}; it must be 0 or more and below 1")
    if sep_byte is not None and not 0 <= sep_byte < 256:
        raise BitbyteError(f"sep_byte is {sep_byte}; a byte is 0 to 255")
    out, source = user_path(out), dict(source or {})
    expected = source.get("size")
    expected = expected if expected is None else min(expected, limit)
    _refuse_places(out, source, val_source or {})
    with _locked(out):
        remove_unfinished(out)
        old = _refuse(out, overwrite)
        free = shutil.disk_usage(out).free
        if expected and expected > free:
            raise BitbyteError(f"{out}: {expected} bytes to pack, {free} bytes free on that disk")
        work = out / WORK
        work.mkdir()
        bar = tqdm(
            total=expected, unit="B", unit_scale=True, desc="pack", dynamic_ncols=True,
            disable=None if progress else True,
        )  # fmt: skip
        try:
            with contextlib.ExitStack() as stack:
                bar = stack.enter_context(bar)
                threads = [
                    stack.enter_context(concurrent.futures.ThreadPoolExecutor(1)) for _ in range(2)
                ]
                writers = {
                    split: stack.enter_context(_Writer(work, split, shard_size, *threads))
                    for split in PREFIX
                }
                sep = b"" if sep_byte is None else bytes([sep_byte])
                choose = _Splitter(val_fraction if val_documents is None else 0)
                streams = [(documents, choose, limit)]
                if val_documents is not None:
                    streams.append((val_documents, lambda piece: "val", 2**63))
                for stream, split_of, most in streams:
                    for starts, piece in _pieces(stream, sep, most):
                        if starts:
                            split = split_of(piece)
                        writers[split].write(piece, starts)
                        bar.update(len(piece))
                for writer in writers.values():
                    writer.finish()
            shards = tuple(itertools.chain(*(writer.shards for writer in writers.values())))
            manifest = Manifest(shards=shards, sep_byte=sep_byte, source=source)
            if not manifest.bytes_of("train"):
                what = "no document fits into max_bytes" if max_bytes else "there are no bytes"
                raise BitbyteError(f"nothing to pack into {out}: {what}")
            if val_documents is not None and not manifest.bytes_of("val"):
                raise BitbyteError(f"nothing to pack into {out}: no bytes to validate on")
            _publish(out, manifest, old)
        except BaseException:
            remove_unfinished(out)
            raise
    if val_fraction and not manifest.bytes_of("val"):
        say(f"{out}: too little data to split, so there is no validation data")
    return manifest


def _is_ours(path: Path, shard: Shard) -> bool:
    """Whether a file is, by name and size, a shard that a pack wrote.

    A manifest may come from a stranger and name any file in its folder.
    """
    try:
        info = path.lstat()
    except OSError:
        return False
    written = SHARD_NAME.fullmatch(path.name) and stat.S_ISREG(info.st_mode)
    return bool(written) and info.st_size == shard.n_bytes


def _remove(out: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        if _is_ours(out / shard.name, shard):
            (out / shard.name).unlink()


def _refuse(out: Path, overwrite: bool) -> Manifest | None:
    """The old manifest, to be replaced.  Raises BitbyteError if something is in the way."""
    if (out / MANIFEST).is_symlink():
        raise BitbyteError(f"{out / MANIFEST} is a link; choose another --out")
    old = manifest_of(out)
    if old is not None and not overwrite:
        raise BitbyteError(f"{out} is already packed; choose another --out, or --allow_overwrite")
    listed = {shard.name: shard for shard in old.shards} if old else {}
    for path in sorted(out.iterdir()):
        if not SHARD_NAME.fullmatch(path.name):
            continue
        if path.name not in listed:
            raise BitbyteError(f"{path} is in the way and not in a manifest; choose another --out")
        if not _is_ours(path, listed[path.name]):
            raise BitbyteError(
                f"{path} is in the way: it is not a file of {listed[path.name].n_bytes} bytes, as "
                f"{MANIFEST} says; delete it, or choose another --out"
            )
    return old


def _publish(out: Path, manifest: Manifest, old: Manifest | None) -> None:
    """Move finished shards into place; the manifests in WORK record which files are ours.

    Unlike one file by `files.replacing`, many files and a manifest cannot appear at once.  The
    folder has a manifest only while every shard it lists is there, and WORK says which of the
    others are new or old: after a kill at any line `remove_unfinished` knows what to delete.
    """
    work = out / WORK
    write_new(work / f"new-{MANIFEST}", to_json(manifest.to_dict()))
    patiently(os.rename, work / f"new-{MANIFEST}", work / MANIFEST)  # whole, or not there
    sync_folder(work)
    if old:
        patiently(os.replace, out / MANIFEST, work / f"old-{MANIFEST}")
        sync_folder(out)
        _remove(out, old)
    for shard in manifest.shards:
        patiently(os.rename, work / shard.name, out / shard.name)
    sync_folder(out)
    patiently(os.replace, work / MANIFEST, out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(work)


def remove_unfinished(out: Path) -> None:
    """Remove leftovers of an interrupted `pack`, and nothing else.  The lock must be held.

    Raises BitbyteError if WORK is not a folder that a pack made.
    """
    work = out / WORK
    if not os.path.lexists(work):
        return
    real = work.is_dir() and not work.is_symlink()
    for path in sorted(work.iterdir()) if real else [work]:
        known = path.name in WORK_NAMES or SHARD_NAME.fullmatch(path.name)
        if not known or not stat.S_ISREG(path.lstat().st_mode):
            raise BitbyteError(f"{path} is in the way and not left by a pack; choose another --out")
    if not (out / MANIFEST).exists():
        for path in (work / MANIFEST, work / f"old-{MANIFEST}"):
            with contextlib.suppress(BitbyteError):  # torn: then nothing was moved yet
                if path.exists():
                    _remove(out, Manifest.from_dict(read_json(path), str(path)))
    shutil.rmtree(work)
