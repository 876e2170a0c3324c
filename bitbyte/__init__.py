"""bitbyte: a research workbench for tiny byte-level language models."""

__version__ = "0.1.0"
