"""The command line; `main` runs one command."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "cli.dispatch": "COMMANDS main",
    },
)
