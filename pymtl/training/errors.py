"""Errors that are the user's to mend; the command line prints them without a traceback."""


class ConfigError(ValueError):
    """The configuration has an unknown key, or a value that does not fit."""


class DataError(ValueError):
    """A data file has a line that does not fit; the message names file, line and reason."""


class RunError(ValueError):
    """A run folder lacks a file, holds a damaged one, or belongs to something else."""
