"""A codec that learns as it goes: context mixing by integers, with or without a model."""
