"""The manifest of a packed folder: what its shards are, and whether they still are what they were.

A manifest may come from a stranger, so reading it checks every field, and the files it lists are
checked for size always and for content once.  Writing shards is the business of shards.py.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bitbyte import __version__
from bitbyte.files import BitbyteError, read_json, sha256_file, to_json, write_atomic

FORMAT = 1
MANIFEST, VERIFIED = "manifest.json", ".verified.json"
WORK = ".tmp-pack"  # folder that `pack` works in until its shards are complete
PREFIX = {"train": "shard", "val": "val"}  # split: how its files begin
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a packed folder; a document counts where its first byte is."""

    name: str
    split: str
    n_bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed folder holds.  Documents are records, whole files, or pieces of a large one."""

    shards: tuple[Shard, ...]
    sep_byte: int | None  # byte after each document; None: nothing between them
    source: dict  # where the bytes came from, as the packer was told
    bitbyte: str = __version__  # version that packed

    def of(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def bytes_of(self, split: str) -> int:
        """Bytes of a split, separators included."""
        return sum(shard.n_bytes for shard in self.of(split))

    def counts(self) -> dict:
        """{split: {bytes, documents, shards}}."""
        return {
            split: {
                "bytes": self.bytes_of(split),
                "documents": sum(shard.documents for shard in self.of(split)),
                "shards": len(self.of(split)),
            }
            for split in PREFIX
        }

    def summary(self) -> str:
        """One line for people."""
        unit = "piece" if self.source.get("kind") in ("files", "stdlib") else "document"
        return ", ".join(
            f"{split} {_count(n['bytes'], 'byte')} "
            f"({_count(n['documents'], unit)}, {_count(n['shards'], 'shard')})"
            for split, n in self.counts().items()
        )

    def to_dict(self) -> dict:
        """The content of manifest.json."""
        counts = self.counts()
        return {
            "format": FORMAT,
            "bitbyte": self.bitbyte,
            "bytes": sum(n["bytes"] for n in counts.values()),
            "documents": sum(n["documents"] for n in counts.values()),
            "sep_byte": self.sep_byte,
            "splits": counts,
            "source": self.source,
            "shards": [
                {
                    "name": shard.name, "split": shard.split, "bytes": shard.n_bytes,
                    "documents": shard.documents, "sha256": shard.sha256,
                }
                for shard in self.shards
            ],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: object, name: str) -> "Manifest":
        """Check what a stranger may have written.  Raises BitbyteError; ``name`` is the file's."""

        def need(good: bool, what: str) -> None:
            if not good:
                raise BitbyteError(f"{name}: {what}; pack the data again")

        def count(number: object, low: int = 0) -> bool:
            return type(number) is int and low <= number < 2**63

        need(isinstance(value, dict) and count(value.get("format"), 1), "not a shard manifest")
        if value["format"] > FORMAT:
            raise BitbyteError(
                f"{name}: made by a newer bitbyte (format {value['format']}, this one reads "
                f"{FORMAT}); upgrade bitbyte"
            )
        empty = cls(shards=(), sep_byte=None, source={}).to_dict()
        need(set(value) == set(empty), f"its keys are not {', '.join(empty)}")
        sep = value["sep_byte"]
        need(sep is None or (count(sep) and sep < 256), "sep_byte is no byte")
        need(isinstance(value["source"], dict), "source is no object")
        need(isinstance(value["bitbyte"], str), "bitbyte is no version")
        need(isinstance(value["shards"], list), "shards is no list")
        shards = []
        for i, item in enumerate(value["shards"]):
            keys = {"name", "split", "bytes", "documents", "sha256"}
            need(isinstance(item, dict) and set(item) == keys, f"shard {i} has not the keys {keys}")
            file, split, digest = item["name"], item["split"], item["sha256"]
            plain = isinstance(file, str) and _NAME.fullmatch(file)
            need(bool(plain), f"the name of shard {i} is no plain file name")
            need(isinstance(split, str) and split in PREFIX, f"{file}: no such split")
            need(count(item["bytes"], 1), f"{file}: bytes is no count")
            need(count(item["documents"]), f"{file}: documents is no count")
            hexed = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
            need(bool(hexed), f"{file}: sha256 is not 64 hex digits")
            n, documents = item["bytes"], item["documents"]
            shards.append(
                Shard(name=file, split=split, n_bytes=n, documents=documents, sha256=digest)
            )
        need(len({shard.name for shard in shards}) == len(shards), "a shard is listed twice")
        manifest = cls(
            shards=tuple(shards), sep_byte=sep, source=value["source"], bitbyte=value["bitbyte"]
        )
        for key, want in manifest.to_dict().items():
            # Equal text, not equal values: True == 1 == 1.0 in Python.
            same = json.dumps(value[key], sort_keys=True) == json.dumps(want, sort_keys=True)
            need(same, f"{key} is not what its shards add up to")
        return manifest


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def manifest_of(path: str | Path) -> Manifest | None:
    """The manifest of a packed folder; None if ``path`` has none.

    Raises BitbyteError if there is one and it is broken.
    """
    file = Path(path) / MANIFEST
    return Manifest.from_dict(read_json(file), str(file)) if file.is_file() else None


def check_sizes(folder: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise BitbyteError(f"{path}: {MANIFEST} lists it and it is not there; pack again")
        size = path.stat().st_size
        if size != shard.n_bytes:
            raise BitbyteError(
                f"{path} has {size} bytes, {MANIFEST} says {shard.n_bytes}; pack again"
            )


def _check_hashes(folder: Path, shards: tuple[Shard, ...], known: dict) -> dict:
    """Hash the shards whose file is not ``known``; returns {name: [inode, size, mtime, sha256]}."""
    bar = tqdm(
        total=sum(shard.n_bytes for shard in shards), unit="B", unit_scale=True, desc="verify",
        delay=2, disable=None,
    )  # fmt: skip
    with bar:
        for shard in shards:
            path = folder / shard.name
            info = path.stat()
            row = [info.st_ino, info.st_size, info.st_mtime_ns, shard.sha256]
            if known.get(shard.name) != row and sha256_file(path) != shard.sha256:
                raise BitbyteError(
                    f"{path} was changed: its sha256 is not {MANIFEST}'s; pack again"
                )
            known = {**known, shard.name: row}
            bar.update(shard.n_bytes)
    return known


def check_once(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Sizes always, hashes once for each state of a file; what was hashed is remembered."""
    check_sizes(folder, shards)
    before: object = {}
    with contextlib.suppress(OSError, BitbyteError):  # no memory, or a broken one: hash again
        before = read_json(folder / VERIFIED)
    before = before if isinstance(before, dict) else {}
    after = _check_hashes(folder, shards, before)
    if after != before:
        with contextlib.suppress(OSError):  # a read-only folder is hashed each time
            write_atomic(folder / VERIFIED, to_json(after))


def verify(path: str | Path) -> Manifest:
    """Hash every shard of a packed folder.  Raises BitbyteError that names the bad file."""
    folder, manifest = Path(path), manifest_of(path)
    if manifest is None:
        raise BitbyteError(f"{path} has no {MANIFEST}: there is nothing to verify it against")
    check_sizes(folder, manifest.shards)
    _check_hashes(folder, manifest.shards, {})
    return manifest
