"""Compressors as subjects of a passport: by name, or any command that compresses and restores.

What a compressor needs for a file is its size, if the file comes back from it alone: the restoring
program runs in an empty folder that holds nothing but the compressed file.  Libraries run in this
process, in which anything could be kept: for these it is taken on trust.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bitbyte.compress import baselines
from bitbyte.files import BitbyteError, shown
from bitbyte.passport import audits
from bitbyte.passport.audits import FAIL, OPEN, PASS, RANDOM_BYTES, TITLES, Audit, attempt
from bitbyte.passport.scored import AROUND, FaultError, first_difference, quoted

NAMES = {  # what a user may call them: the names in `baselines`
    "gzip": "gzip -9", "bzip2": "bzip2 -9", "xz": "xz -9e", "zstd": "zstd --ultra -22",
    "brotli": "brotli -q 11", "ppmd": "ppmd (var. I, order 8)", "zpaq": "zpaq -m5",
    "none": baselines.MIXER,
}  # fmt: skip
SAMPLE = 1 << 16  # bytes that are compressed twice
NO_MODEL = "a compressor has no probabilities to look at"


class Coder:
    """A compressor: ``squeeze`` and ``restore`` bytes."""

    source = "compressor"

    def __init__(self, name: str, squeeze: Callable, restore: Callable, program: str | None):
        self.name, self.squeeze, self.restore = name, squeeze, restore
        self.apart = program is not None  # runs in a folder of its own
        place = shutil.which(program) if program else None
        self.sizes = {f"program {Path(program).name}:": os.path.getsize(place)} if place else {}


def by_name(name: str) -> Coder:
    """A compressor that is known by name.  Raises BitbyteError if it is not installed."""
    full = NAMES[name]
    compressor = baselines.compressors()[full]
    if compressor.squeeze is None:
        raise BitbyteError(f"{full} is not installed: {compressor.missing}")
    return Coder(full, compressor.squeeze, compressor.restore, name if name == "zpaq" else None)


def by_command(command: str, restore: str | None, timeout: float) -> Coder:
    """A compressor that is a command.

    ``{in}`` and ``{out}`` in a command are files; without them it reads standard input and writes
    standard output.  No shell is involved.  Raises BitbyteError.
    """
    if not restore:
        raise BitbyteError(
            "--command needs --restore, the command that gives the file back; a size alone is not "
            "a code"
        )
    if not timeout > 0:
        raise BitbyteError(f"timeout is {timeout}; it must be more than 0 seconds")
    words = [split(text) for text in (command, restore)]
    return Coder(
        command,
        lambda data: run(words[0], data, timeout),
        lambda data: run(words[1], data, timeout),
        words[0][0],
    )


def split(command: str, escape: str = "" if os.name == "nt" else "\\") -> list[str]:
    """The words of a command, its program by an absolute path, as it runs in another folder.

    On Windows a backslash is part of a path.  Raises BitbyteError.
    """
    lexer = shlex.shlex(command, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", escape
    try:
        words = list(lexer)
    except ValueError as error:
        raise BitbyteError(f"{shown(command)}: {error}") from None
    if not words:
        raise BitbyteError("an empty command cannot be run")
    program = shutil.which(words[0])
    if program is None:
        raise BitbyteError(f"there is no program {shown(words[0])}")
    return [os.path.abspath(program), *words[1:]]


def run(words: list[str], data: bytes, timeout: float) -> bytes:
    """What a command makes of ``data``, in an empty folder.  Raises BitbyteError if it fails."""
    with tempfile.TemporaryDirectory(prefix="bitbyte-") as folder:
        given, made = Path(folder, "given"), Path(folder, "made")
        given.write_bytes(data)
        files = {"{in}": str(given), "{out}": str(made)}
        call = [_filled(word, files) for word in words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with open(given, "rb") as source:
            if not any("{in}" in word for word in words):
                pipes["stdin"] = source
            process = subprocess.Popen(
                call, cwd=folder, stderr=subprocess.PIPE, start_new_session=os.name != "nt", **pipes
            )
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                _kill(process)
                raise BitbyteError(
                    f"{shown(words[0])} was stopped after {timeout:g} s; --timeout gives it longer"
                ) from None
            except BaseException:
                _kill(process)
                raise
        if process.returncode:
            lines = err.decode("utf-8", "replace").strip().splitlines()
            why = f": {shown(lines[-1])}" if lines else ""
            raise BitbyteError(f"{shown(words[0])} failed with status {process.returncode}{why}")
        if not any("{out}" in word for word in words):
            return out
        if not made.is_file():
            raise BitbyteError(f"{shown(words[0])} wrote no file {{out}}")
        return made.read_bytes()


def _filled(word: str, files: dict[str, str]) -> str:
    # In one pass, as a path may hold such marks itself.
    return re.sub("|".join(map(re.escape, files)), lambda match: files[match[0]], word)


def _kill(process: subprocess.Popen) -> None:
    """End a command and, where there are process groups, its children."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()


def measure(coder: Coder, data: bytes, on_disk: int, whole: bool, seed: int = 0):
    """(bytes compressed, seconds, audits) of a compressor on ``data``."""
    clock = time.perf_counter()
    packed = coder.squeeze(data)  # an error here is no finding: there is nothing to judge
    seconds = time.perf_counter() - clock
    made = {
        "denominator": lambda: _size(data, on_disk, whole),
        "coverage": lambda: _restored(coder, packed, data),
        "random": lambda: _random(coder, seed),
        "repeat": lambda: _repeat(coder, data[:SAMPLE]),
    }
    found: dict[str, Audit] = {}
    for name, audit in made.items():
        found[name] = attempt(name, audit, found)
    if found["coverage"].verdict == PASS:
        text = "the file came back from the compressed bytes, in the same process"
        if coder.apart:
            text = "the file came back in an empty folder that held nothing but the compressed file"
        found["coder"] = Audit("coder", PASS, text)
    else:
        found["coder"] = Audit("coder", FAIL, found["coverage"].text)
    sizes = "; ".join(f"{what} {n:,} bytes" for what, n in coder.sizes.items())
    found["size"] = Audit("size", PASS if sizes else OPEN, sizes or "its program's size is unknown")
    reasons = {
        "interval": "a compressor gives one size for the whole file",
        "training": "what its authors tuned it on is not known",
        "claim": "no number was claimed",
    }
    listed = [
        found.get(name) or Audit(name, OPEN, reasons.get(name, NO_MODEL)) for name in TITLES
    ]  # fmt: skip
    return len(packed), seconds, listed


def _size(data: bytes, on_disk: int, whole: bool) -> str:
    if whole and len(data) != on_disk:
        raise FaultError("denominator", f"read {len(data):,} bytes; the file has {on_disk:,}")
    of = "" if whole else f" of {on_disk:,}: only the first part was asked for"
    return f"{len(data):,} bytes{of}"


def _restored(coder: Coder, packed: bytes, data: bytes) -> str:
    back = coder.restore(packed)
    if back != data:
        at = first_difference(data, back)
        raise FaultError(
            "coverage",
            f"byte {at:,} of the file: {quoted(back[at : at + AROUND])} came back, the file has "
            f"{quoted(data[at : at + AROUND])}; {len(data):,} bytes became {len(back):,}",
        )
    return f"{len(packed):,} bytes gave back all {len(data):,}"


def _random(coder: Coder, seed: int) -> str:
    data = audits.draw(RANDOM_BYTES, None, seed)
    why = "it does not keep all bytes, or keeps them elsewhere"
    return audits.judged(8 * len(coder.squeeze(data)), len(data), 8, why)


def _repeat(coder: Coder, data: bytes) -> str:
    sizes = [len(coder.squeeze(data)) for _ in range(2)]
    if sizes[0] != sizes[1]:
        raise FaultError(
            "repeat", f"{len(data):,} bytes took {sizes[0]:,} bytes and then {sizes[1]:,}"
        )
    return f"{len(data):,} bytes took {sizes[0]:,} bytes twice"
