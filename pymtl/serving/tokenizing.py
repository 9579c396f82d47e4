"""From a text to its tokens, and where each stands in it.

- ``words``: a word with its apostrophes and hyphens (``don't``, ``well-known``), but ``'s`` by itself; an abbreviation
  (``U.N.``); a number or date with its signs (``3.50``, ``10:30``, ``2/7/2021``); an address (``a@b.org``,
  ``https://…``); and each other character that is no space by itself. Of Chinese and Japanese every character is a
  token.
- ``whitespace``: what stands between spaces.
- ``characters``: each character that is no space.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Tokenizer = Literal["words", "whitespace", "characters"]
Place = tuple[int, int]  # the first character, and the one behind the last

# Kana and Chinese characters, of which each is a token; and what may stand within a word, beside letters and digits.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_JOINERS = "'\u2019\u200c\u200d-"
_WHITESPACE = re.compile(r"\S+")
_CHARACTERS = re.compile(r"\S")


def _words(marks: str) -> re.Pattern[str]:
    """The pattern of ``words``; ``marks``: the characters that stand on letters, as vowels of many scripts do."""
    letters = rf"(?:(?![{_IDEOGRAPH}])\w{f'|[{marks}]' if marks else ''})+"
    on_top, not_before = (f"[{marks}]*", f"(?![{marks}])") if marks else ("", "")
    return re.compile(
        r"https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]}]"  # an address ends before the sentence's own signs
        rf"|(?<![\w.+-])[\w.+-]{{1,64}}@\w[\w-]*(?:\.\w+)+{not_before}"
        rf"|\d+(?:[.,:/-]\d+)+(?![\w{marks}])"
        r"|(?:[^\W\d_]\.){2,}"
        rf"|{letters}(?:(?!['\u2019]s(?!\w))[{_JOINERS}]{letters})*"
        rf"|(?<=[\w{marks}])['\u2019]s(?!\w)"
        rf"|\S{on_top}"
    )


_ASCII_WORDS = _words("")


@functools.cache
def _all_words() -> re.Pattern[str]:
    planes = range(0x300, 0x20000)
    return _words("".join(re.escape(chr(c)) for c in planes if unicodedata.category(chr(c)) in ("Mn", "Mc", "Me")))


def places(text: str, tokenizer: Tokenizer) -> list[Place]:
    """Where the tokens of a text stand in it."""
    if tokenizer == "words":
        pattern = _ASCII_WORDS if text.isascii() else _all_words()
    else:
        pattern = _WHITESPACE if tokenizer == "whitespace" else _CHARACTERS
    return [match.span() for match in pattern.finditer(text)]


def tokens_of(text: str, tokenizer: Tokenizer) -> list[str]:
    """The tokens of a text."""
    return [text[first:last] for first, last in places(text, tokenizer)]


def went_on(text: str, tokens: Iterable[str], tokenizer: Tokenizer) -> str:
    """A text and the tokens behind it: no space between characters or ideographs, else one, since tokens do not tell
    where a text had none."""
    for token in tokens:
        close = tokenizer == "characters" or (tokenizer == "words" and _are_ideographs(text, token))
        text += token if close or text[-1:].strip() == "" else f" {token}"
    return text


JOINER = "\uffed"  # where a piece has no space beside it


def pieces_of(text: str) -> list[str]:
    """The tokens of ``words``, of which :func:`joined` makes the text again.

    Where no space stands between two, a joiner marks one of them: ``(￭ Ann ￭)``. It marks a sign rather than a word,
    since words of a text are to be found among its pieces. Ideographs need none beside one another; a space between
    two of them is a piece.
    """
    pieces: list[str] = []
    end = None
    for start, behind in places(text, "words"):
        token = text[start:behind]
        both = bool(pieces) and _are_ideographs(pieces[-1], token)
        if both and start != end:
            pieces.append(JOINER + " " + JOINER)
        if not both and start == end:
            if _joins(pieces[-1]) > _joins(token):
                pieces[-1] += JOINER
            else:
                token = JOINER + token
        pieces.append(token)
        end = behind
    return pieces


def joined(pieces: Iterable[str]) -> str:
    """The text of pieces: a space between two where neither has a joiner, nor both are ideographs."""
    text, free = "", False
    for piece in pieces:
        bare = piece.removeprefix(JOINER)
        if free and bare == piece and not _are_ideographs(text, bare):
            text += " "
        text += bare.removesuffix(JOINER)
        free = not bare.endswith(JOINER)
    return text


def _is_word(piece: str) -> bool:
    """Whether a piece is a word or number, not a sign."""
    return re.match(r"\w", piece) is not None


def _joins(piece: str) -> int:
    """How well a joiner suits a piece: signs best, words of letters least."""
    bare = piece.strip(JOINER)
    return 1 if _are_ideographs(bare, bare) else 0 if _is_word(bare) else 2


def _are_ideographs(before: str, after: str) -> bool:
    """Whether no space is written between the end of one piece and the beginning of the next."""
    return re.fullmatch(f"[{_IDEOGRAPH}]{{2}}", before[-1:] + after[:1]) is not None
