"""``python -m bitbyte`` is the command line."""

import sys


def run() -> int:
    """Run the command line; Ctrl-C counts from the first import on."""
    try:
        from bitbyte.cli.dispatch import main
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
