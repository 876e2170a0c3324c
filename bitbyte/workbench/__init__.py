"""Notebooks: what they ask the package for, how they are run and shown."""
