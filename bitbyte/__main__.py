"""``python -m bitbyte`` is the command line."""

import sys

from bitbyte.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
