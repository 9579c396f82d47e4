"""Errors that are the user's to mend; the command line prints them without a traceback."""

from pymtl.serving.errors import DataError

__all__ = ["ConfigError", "DataError", "RunError"]


class ConfigError(ValueError):
    """The configuration has an unknown key, or a value that does not fit."""


class RunError(ValueError):
    """A run folder lacks a file, holds a damaged one, or belongs to something else."""
