"""Files coded with a model: compress, decompress, certify."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "compress.codec": "Coded compress_file decompress_file find_checkpoint",
        "compress.container": "Header read_header",
    },
)
