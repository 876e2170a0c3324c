"""Notebooks: the artifacts they use, how they are run, and the pages of a run."""
