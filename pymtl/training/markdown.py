"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    """The lines of a table; with ``numbers`` all columns but the first are aligned to the right."""
    line = ["---", *["---:" if numbers else "---"] * (len(heading) - 1)]
    return [f"| {' | '.join(map(_cell, row))} |" for row in (heading, line, *rows)]


def _cell(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
