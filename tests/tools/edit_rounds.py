"""Edits of compressed files: whatever was changed, no wrong bytes come out without an error.

    python tests/tools/edit_rounds.py [--edits 10000] [--seed 0]

Small files, with and without a model, sound and an archive among them, are changed at random: bytes
flipped, inserted, deleted, moved, the end cut off.  Every second edit gets a checksum that is right
again, so that it reaches the decoder.  Each must give a BitbyteError and no output, or, where the
edit does not matter, the original.  With BITBYTE_CHECK_INDICES=1 a wrong index is an error too.
`tests/compress/test_edits.py` does a part of it.  Exit code 0 if all is well.
"""

import argparse
import collections
import contextlib
import random
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

from bitbyte.compress import mixed, streamed
from bitbyte.files import BitbyteError

TAIL = 17  # bytes after the checksum of the last frame: its end, and the hash


class Case:
    """A compressed file and what it holds."""

    def __init__(self, name: str, data: bytes, folder: Path, model=None):
        self.name, self.data, self.model = name, data, model
        self.expert = streamed.Expert(model) if model else None
        source, packed = folder / "source", folder / "packed"
        source.write_bytes(data)
        sources = [source] if name != "archive" else [source, source.parent / "also"]
        (folder / "also").write_bytes(data[:50])
        # The toy model may join, though it saves less than its name costs.
        with mock.patch.object(streamed, "NAMED", 0):
            done = mixed.compress(sources, packed, expert=self.expert, allow_overwrite=True)
        assert done.with_model == bool(model), name
        self.packed = packed.read_bytes()
        self.folder = folder

    def find(self, header):
        """The expert of a header, as the command finds it, but without computing its hash again."""
        if self.expert is None or header.model not in self.expert.names:
            raise BitbyteError("another model")
        if header.fingerprint != self.expert.fingerprint:
            raise BitbyteError("other numbers")
        self.expert.begin()
        return self.expert

    def outcome(self, data: bytes) -> str:
        """What decoding ``data`` gives: "refused", or "the same".  Raises otherwise."""
        packed, back = self.folder / "packed", self.folder / "back"
        packed.write_bytes(data)
        try:
            mixed.decompress(packed, back, expert=self.find)
        except BitbyteError as error:
            assert "\n" not in str(error) and not back.exists(), error
            return "refused"
        if back.is_dir():
            found = sorted((path.name, path.read_bytes()) for path in back.iterdir())
            shutil.rmtree(back)
            assert found == [("also", self.data[:50]), ("source", self.data)], "other files"
        else:
            found = back.read_bytes()
            back.unlink()
            assert found == self.data, "wrong bytes and no error"
        return "the same"


def cases(folder: Path) -> list[Case]:
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "compress")]  # as pytest has it
    from support import words
    from test_compress import TERNARY, built, drawn
    from test_mixer import samples, wav

    text, model = words(70), built(TERNARY)
    made = []
    for name, data, own in (
        ("text", text, None), ("sound", wav(samples(150).tobytes()), None), ("one", b"x", None),
        ("archive", text, None), ("model", drawn(model, 160), model), ("zeros", bytes(300), None),
    ):  # fmt: skip
        (folder / name).mkdir()
        made.append(Case(name, data, folder / name, own))
    return made


def edited(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four changes; never the same."""
    out = bytearray(data)
    while bytes(out) == data:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            i, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 3, 9))
            kind = rng.randrange(7)
            if kind == 0:
                out[i:i] = rng.randbytes(n)
            elif kind == 1:
                del out[i : i + n]
            elif kind == 2:
                del out[i:]
            elif kind == 3:
                out[i : i + n] = rng.choice((b"\0", b"\xff", b"\x7f")) * n
            elif kind == 4:
                out[i : i + n] = out[i : i + n][::-1]
            elif i < len(out):
                out[i] ^= 1 << rng.randrange(8) if kind == 5 else rng.randrange(1, 256)
    return bytes(out)


def resealed(data: bytes) -> bytes:
    """With a right checksum of the first frame, if the file is long enough to hold one."""
    body = data[: -TAIL - 4]
    return body + zlib.crc32(body).to_bytes(4, "little") + data[-TAIL:] if body else data


def rounds(n: int, seed: int, folder: Path) -> collections.Counter:
    """How ``n`` edits ended.  Raises AssertionError, naming the edit that did not end well."""
    made, rng, ends = cases(folder), random.Random(seed), collections.Counter()
    for i in range(n):
        case = made[i % len(made)]
        data = edited(case.packed, rng)
        if i // len(made) % 2:
            # The hash at the end is left alone, or the checksum would never matter.
            data = resealed(edited(case.packed[:-TAIL], rng) + case.packed[-TAIL:])
        try:
            end = case.outcome(data)
        except Exception as error:
            raise AssertionError(f"edit {i} of {case.name}: {data.hex()}") from error
        ends[f"{case.name}, {end}"] += 1
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    choices = parser.parse_args()
    folder = tempfile.mkdtemp()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for end, n in sorted(rounds(choices.edits, choices.seed, Path(folder)).items()):
            print(f"{end}: {n:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
