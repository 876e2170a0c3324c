"""On PYTHONPATH: Python does as if what BITBYTE_WITHOUT names, packages and programs, were absent.

Stored outputs of notebooks may not depend on what is installed beside the extras they need.
"""

import os
import shutil
from importlib.machinery import PathFinder

ABSENT = set(os.environ.get("BITBYTE_WITHOUT", "").split())
find_spec, which = PathFinder.find_spec, shutil.which


def _find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find_spec(name, path, target)


def _which(command, *args, **options):
    return None if os.path.basename(command) in ABSENT else which(command, *args, **options)


PathFinder.find_spec, shutil.which = classmethod(_find_spec), _which
