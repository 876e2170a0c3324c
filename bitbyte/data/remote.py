"""Packed data at an address such as s3://bucket/folder: its shards are copied here once.

fsspec reads the address.  The copy is an ordinary packed folder in artifacts/cache, called by the
hash of its manifest: data that was packed anew gets another folder, the same data at two addresses
the same one.  A shard appears there whole and with the right hash, or not at all, so a copy that
was interrupted goes on where it stopped.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from bitbyte.files import (
    ADDRESS,
    JSON_LIMIT,
    BitbyteError,
    RunError,
    artifacts,
    folder_lock,
    output_folder,
    parse_json,
    replacing,
    safe_name,
    write_atomic,
)
from bitbyte.shards import MANIFEST, Manifest, Shard

BLOCK = 1 << 22  # bytes read at a time
WAIT = 0.5  # seconds between looks at another process that copies the same data


def is_address(name: object) -> bool:
    """Whether a name is an address for `fetch`, not a path."""
    return isinstance(name, str) and bool(ADDRESS.match(name))


def fetch(address: str, split: str | None = None) -> Path:
    """The local folder of the packed data at an address; copies the shards that are not there.

    ``split``: copy only those of train or val.  While another process copies the same data, this
    one waits.  Raises BitbyteError (fsspec or what it needs for such addresses is missing, no
    packed data there, a shard with another hash than its manifest says), RunError (the address
    cannot be read now) and OSError (disk full).
    """
    try:
        import fsspec
    except ImportError:
        raise BitbyteError(f'{address} needs fsspec: pip install "bitbyte[remote]"') from None
    try:
        system, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # no package for the protocol, or no such protocol
        reason = " ".join(str(error).split())  # names the package that is missing
        if isinstance(error, ImportError) and address.startswith(("s3:", "s3a:")):
            reason = 's3fs is missing: pip install "bitbyte[remote]"'
        raise BitbyteError(f"{address}: {reason}") from None
    address, root = address.rstrip("/"), root.rstrip("/")
    what = f"{address}/{MANIFEST}"
    raw = b"".join(_blocks(system, f"{root}/{MANIFEST}", what, JSON_LIMIT + 1))
    manifest = Manifest.from_dict(parse_json(raw, what), what)
    name = f"{safe_name(root.rpartition('/')[2] or 'data')}-{hashlib.sha256(raw).hexdigest()[:12]}"
    folder = output_folder(artifacts("cache", name))
    shards = manifest.shards if split is None else manifest.of(split)
    if (folder / MANIFEST).exists() and not _lacking(folder, shards):
        return folder  # without the lock: a reader may be on a disk it cannot write to
    with _turn(folder):
        lacking = _lacking(folder, shards)
        total = sum(shard.n_bytes for shard in lacking)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="fetch", delay=2, disable=None)
        with bar:
            for shard in lacking:
                _copy(system, f"{root}/{shard.name}", address, shard, folder, bar)
        write_atomic(folder / MANIFEST, raw)
    return folder


def _lacking(folder: Path, shards: tuple[Shard, ...]) -> list[Shard]:
    """The shards that are not in the folder, or not of their size: cut off by a full disk, say."""

    def size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    return [shard for shard in shards if size(folder / shard.name) != shard.n_bytes]


def _copy(system, path: str, address: str, shard: Shard, folder: Path, bar: tqdm) -> None:
    what, digest = f"{address}/{shard.name}", hashlib.sha256()
    with replacing(folder / shard.name, follow=False, need=shard.n_bytes) as file:
        for block in _blocks(system, path, what, shard.n_bytes + 1):
            digest.update(block)
            file.write(block)
            bar.update(len(block))
        if digest.hexdigest() != shard.sha256:
            raise BitbyteError(
                f"{what} is not what {MANIFEST} there says (its sha256 differs); upload it again"
            )


def _blocks(system, path: str, what: str, most: int) -> Iterator[bytes]:
    """At most ``most`` bytes of a remote file; errors name it as ``what``."""
    try:
        with system.open(path, "rb") as source:
            while most and (block := source.read(min(BLOCK, most))):
                yield block
                most -= len(block)
    except FileNotFoundError:
        raise BitbyteError(f"there is no {what}; give a folder that bitbyte pack made") from None
    except Exception as error:  # whatever a store, its client or the network may raise
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"cannot read {what} ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, once others are done with it."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder_lock(folder))
                break
            except BitbyteError as error:
                if "in use" not in str(error):
                    raise
            time.sleep(WAIT)
        yield
