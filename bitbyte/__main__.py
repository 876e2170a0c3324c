"""``python -m bitbyte`` is the command line."""

import sys

from bitbyte.cli import main

if __name__ == "__main__":
    sys.exit(main())
