"""Options of commands that say how generated answers are looked for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .answers import Answers
from .errors import DataError
from .generation import Search

# Of each option the field of Search, its type, its metavar and its help.
OPTIONS: dict[str, tuple[str, type, str | None, str]] = {
    "--beam": (
        "beam_size",
        int,
        "N",
        "hypotheses to keep at each step of the search for generated answers or CTC labels (default: as in training's "
        "configuration)",
    ),
    "--nbest": (
        "nbest",
        int,
        "N",
        "number of answers, the best first, or samples as drawn; at most --beam, if that is given (default: 1)",
    ),
    "--length-penalty": (
        "length_penalty",
        float,
        "A",
        "divide an answer's log probability by ((5 + length) / 6)^A to get its score; 0 prefers short (default: 1)",
    ),
    "--coverage-penalty": (
        "coverage_penalty",
        float,
        "B",
        "prefer answers that have read the whole text; try 0.2, as much more makes answers run on (default: 0)",
    ),
    "--no-repeat": (
        "no_repeat_ngram",
        int,
        "N",
        "let no N tokens come twice in an answer (default: 0, they may)",
    ),
    "--max-length": ("max_length", int, "N", "tokens of an answer at most (default: as in training's configuration)"),
    "--sample": ("sample", bool, None, "draw each token instead of looking for the likeliest"),
    "--temperature": ("temperature", float, "T", "with --sample: divide logits by T (default: 1)"),
    "--top-k": ("top_k", int, "K", "with --sample: draw among the K likeliest tokens (default: 0, among all)"),
    "--top-p": (
        "top_p",
        float,
        "P",
        "with --sample: draw among the likeliest tokens of probability P together (default: 1)",
    ),
    "--seed": ("seed", int, "N", "with --sample: start of the random numbers (default: 0)"),
}
FOR_SAMPLES = ("--temperature", "--top-k", "--top-p", "--seed")
FOR_ONE = ("--beam", "--length-penalty", "--coverage-penalty", "--no-repeat", "--max-length")  # of one answer


def add_search_options(parser: argparse.ArgumentParser, options: Iterable[str] = OPTIONS) -> argparse._ArgumentGroup:
    """Adds some options, by default all, in a group of their own."""
    group = parser.add_argument_group("answers that are generated")
    for option in options:
        field, kind, metavar, description = OPTIONS[option]
        if kind is bool:
            group.add_argument(option, dest=field, action="store_const", const=True, help=description)
        else:
            group.add_argument(option, dest=field, type=kind, metavar=metavar, help=description)
    return group


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, and their values."""
    values = {option: getattr(arguments, field, None) for option, (field, *_) in OPTIONS.items()}
    return {option: value for option, value in values.items() if value is not None}


def search_of(arguments: argparse.Namespace) -> Search | None:
    """What the options say; None if nothing.

    Raises:
        DataError: they do not fit.
    """
    given = given_options(arguments)
    for option in FOR_SAMPLES:
        if option in given and "--sample" not in given:
            raise DataError(f"{option}: expected --sample with it")
    try:
        return Search(**{OPTIONS[option][0]: value for option, value in given.items()}) if given else None
    except ValueError as error:
        said = str(error)
        for option, (field, *_) in OPTIONS.items():
            said = said.replace(f"{field}:", f"{option}:").replace(f"{field} = ", f"{option} ")
            said = said.replace(f"({field}", f"({option}")
        raise DataError(said) from None


def refuse_idle(options: Iterable[str], kinds: Iterable[Answers]) -> None:
    """Refuses options without an effect: they need a task of kind ``generation``; ``--beam`` works with ``ctc`` too.

    Raises:
        DataError: an option would have no effect.
    """
    known = list(kinds)
    generates = any(kind.generates for kind in known)
    for option in options:
        if option == "--beam" and not generates and not any(kind.name == "ctc" for kind in known):
            raise DataError(f"{option}: expected a model with a task of kind 'generation' or 'ctc', got none")
        if option != "--beam" and not generates:
            raise DataError(f"{option}: expected a model with a task of kind 'generation', got none")
