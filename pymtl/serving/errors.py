"""Errors that are the user's to mend."""


class DataError(ValueError):
    """Data do not fit: a line of a file, whose message names file, line and reason, or what a model is asked."""
