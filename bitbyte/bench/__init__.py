"""This package timed against its peers."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "bench.bench": "ROWS run_bench",
        "bench.sides": "Sizes",
    },
)
