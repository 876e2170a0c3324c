"""Python code in a process of its own, so that nothing of the encoder can help the decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bitbyte.files import RunError


def run(code: str, words: list[str], failed: str) -> list:
    """What the code prints as JSON on its last line.  ``words`` are its arguments.

    It imports the same bitbyte.  Raises RunError with ``failed`` and the last line of its errors.
    """
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        # -P: modules that lie in the current folder are not ours.
        [sys.executable, "-P", "-c", code, *words], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunError(f"{failed}: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
