"""Options of commands that say how generated answers are looked for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from .generation import Search

# Of each option the field of Search, its type, its metavar and its help.
OPTIONS: dict[str, tuple[str, type, str, str]] = {
    "--beam": (
        "beam_size",
        int,
        "N",
        "hypotheses that a search for generated answers or CTC labels keeps (default: as the configuration says)",
    ),
    "--nbest": (
        "nbest",
        int,
        "N",
        "answers to give, the best score first, samples as drawn (default: 1; --beam is N at least)",
    ),
    "--length-penalty": ("length_penalty", float, "A", "divide scores by ((5 + length) / 6)^A (default: 1)"),
    "--coverage-penalty": ("coverage_penalty", float, "B", "prefer answers that have read the whole text (default: 0)"),
    "--no-repeat": ("no_repeat_ngram", int, "N", "let no N tokens come twice in an answer"),
    "--max-length": ("max_length", int, "N", "tokens of an answer at most"),
    "--temperature": ("temperature", float, "T", "with --sample: divide logits by T (default: 1)"),
    "--top-k": ("top_k", int, "K", "with --sample: draw among the K likeliest tokens"),
    "--top-p": ("top_p", float, "P", "with --sample: draw among the likeliest tokens of probability P together"),
    "--seed": ("seed", int, "N", "with --sample: of the draws (default: 0)"),
}
FOR_SAMPLES = ("--temperature", "--top-k", "--top-p", "--seed")
FOR_SCORES = ("--length-penalty", "--coverage-penalty", "--no-repeat", "--max-length")  # of a search for one answer


def add_search_options(parser: argparse._ActionsContainer, options: Iterable[str] = OPTIONS) -> None:
    """Adds some options, all by default; with those of samples ``--sample`` too."""
    for option in options:
        field, kind, metavar, description = OPTIONS[option]
        parser.add_argument(option, dest=field, type=kind, metavar=metavar, help=description)
        if option == "--max-length" and options is OPTIONS:
            parser.add_argument(
                "--sample", action="store_true", help="draw each token instead of looking for the likeliest"
            )


def given_options(arguments: argparse.Namespace) -> list[str]:
    """The options that were given, ``--sample`` among them."""
    found = [option for option, (field, *_) in OPTIONS.items() if getattr(arguments, field, None) is not None]
    return [*found, *(["--sample"] if getattr(arguments, "sample", False) else [])]


def search_of(arguments: argparse.Namespace) -> Search | None:
    """What the options say; None if nothing.

    Raises:
        ValueError: they do not fit.
    """
    asked = given_options(arguments)
    sampled = "--sample" in asked
    settings: dict[str, Any] = {"sample": True} if sampled else {}
    for option in asked:
        if option in FOR_SAMPLES and not sampled:
            raise ValueError(f"{option}: expected --sample with it")
        if option != "--sample":
            settings[OPTIONS[option][0]] = getattr(arguments, OPTIONS[option][0])
    try:
        return Search(**settings) if settings else None
    except ValueError as error:
        said = str(error)
        for option, (field, *_) in OPTIONS.items():
            said = said.replace(f"{field}:", f"{option}:").replace(f"{field} = ", f"{option} ")
            said = said.replace(f"({field}", f"({option}")
        raise ValueError(said) from None
