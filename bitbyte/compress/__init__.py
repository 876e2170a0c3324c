"""Lossless compression of files with a model: compress, decompress, certify."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "compress.codec": "Coded checkpoint_for compress_file decompress_file",
        "compress.container": "Header read_header",
    },
    renamed="find_checkpoint:checkpoint_for",
)
