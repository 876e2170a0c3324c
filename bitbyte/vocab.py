"""The vocabulary: bytes are their own ids, plus one special id.

Ids 0..255 are the 256 byte values.  Id 256 means "nothing is known here": it precedes the first
byte of every window of a causal model (START) and replaces each hidden byte of a diffusion model
(MASK).  It is outside the byte range, so no file content can collide with it.  Models embed 257
ids and predict 256: the special id is never an output.
"""

import unicodedata

N_BYTES = 256  # what a model predicts
START = MASK = 256  # one row of the embedding serves both uses
VOCAB_SIZE = 257  # what a model reads

_OF_TEXT = "\n\t\u200c\u200d\u00ad"
_CONTROL = {0x0A: "\u23ce", 0x09: "\u21e5", 0x0D: "\u240d", 0x20: "\u2423", 0x7F: "\u2421"}


def byte_label(byte: int) -> str:
    """Short printable name of one id, for axis ticks and tables.

    Visible ASCII is shown as is, spaces and control bytes as their Unicode pictures, bytes >= 0x80
    as two hex digits (they are not characters on their own), and START/MASK as a box.
    """
    if byte == MASK:
        return "\u25a1"
    if byte in _CONTROL:
        return _CONTROL[byte]
    if byte < 0x20:
        return chr(0x2400 + byte)
    return chr(byte) if byte < 0x80 else f"{byte:02X}"


def on_terminal(text: str) -> str:
    """Text that is safe to print on a terminal: control characters are escaped.

    Newlines and tabs stay, as do invisible characters that are part of words: the joiners of
    Persian, Hindi and many emoji, and soft hyphens.
    """
    return "".join(ch if ch in _OF_TEXT else printable(ch.encode()) for ch in text)


def printable(data: bytes) -> str:
    """Decode for display on one line: valid UTF-8 is kept, everything else is escaped.

    Control characters become ``\\n`` or ``\\x07``; bytes that are not UTF-8 become ``\\xff``.
    """
    text = data.decode("utf-8", errors="backslashreplace")
    return "".join(
        ch if unicodedata.category(ch)[0] != "C" else ch.encode("unicode_escape").decode("ascii")
        for ch in text
    )
