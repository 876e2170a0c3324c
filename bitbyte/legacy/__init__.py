"""Checkpoints of earlier scripts: read, tagged, converted.  Frozen: no new features."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "legacy.reader": "read scan table tag tag_all",
        "legacy.convert": "convert",
    },
)
