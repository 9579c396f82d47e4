"""From a text to its tokens, and where each stands in it.

- ``words``: a word with its apostrophes and hyphens (``don't``, ``well-known``), a number or date with its signs
  (``3.50``, ``10:30``, ``2/7/2021``), an address (``a@b.org``, ``https://…``), and each other character that is no
  space by itself. Of Chinese and Japanese every character is a token.
- ``whitespace``: what stands between spaces.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Tokenizer = Literal["words", "whitespace"]
Place = tuple[int, int]  # the first character, and the one behind the last

_IDEOGRAPH = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"  # kana too
_LETTERS = rf"(?:(?!{_IDEOGRAPH})\w)+"
_PATTERNS = {
    "words": re.compile(
        r"https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]}]"  # an address ends before the sentence's own signs
        r"|[\w.+-]+@\w[\w-]*(?:\.\w+)+"
        r"|\d+(?:[.,:/-]\d+)+"
        rf"|{_LETTERS}(?:['\u2019-]{_LETTERS})*"
        r"|\S"
    ),
    "whitespace": re.compile(r"\S+"),
}


def places(text: str, tokenizer: Tokenizer) -> list[Place]:
    """Where the tokens of a text stand in it."""
    found = [match.span() for match in _PATTERNS[tokenizer].finditer(text)]
    if tokenizer == "words" and not text.isascii():
        return _with_marks(text, found)
    return found


def tokens_of(text: str, tokenizer: Tokenizer) -> list[str]:
    """The tokens of a text."""
    return [text[first:last] for first, last in places(text, tokenizer)]


def _with_marks(text: str, found: list[Place]) -> list[Place]:
    """Joins marks to the letters they stand on: many scripts' vowels, which the pattern takes for signs."""
    joined: list[Place] = []
    after_mark = False
    for first, last in found:
        is_mark = last - first == 1 and unicodedata.category(text[first]) in ("Mn", "Mc", "Me", "Cf")
        touches = bool(joined) and joined[-1][1] == first
        if touches and (is_mark or (after_mark and text[first].isalnum())):
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
        after_mark = is_mark
    return joined
