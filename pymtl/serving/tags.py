"""Tags of spans: which schemes there are, which tags may follow one another, and the spans that tags mean.

==========  ==========================================================================================================
``bio``     ``B-x`` begins a span, ``I-x`` goes on with it (Ramshaw & Marcus 1995 as changed for CoNLL-2002: IOB2)
``iob1``    ``I-x`` is within a span, ``B-x`` begins one only where a span of the same type ends (Ramshaw & Marcus 1995)
``iobes``   as ``bio``, but ``E-x`` ends a span of several tokens and ``S-x`` is a span of one token (IOBES, BIOES)
``bilou``   the same with ``L-x`` (last) and ``U-x`` (unit) (Ratinov & Roth 2009)
==========  ==========================================================================================================

``O`` is a token outside of all spans. Spans of a single type may be tagged with the letters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

Scheme = Literal["bio", "iob1", "iobes", "bilou"]
ALIASES: dict[str, Scheme] = {"iob2": "bio", "bioes": "iobes"}  # other names of the same
SCHEMES: tuple[Scheme, ...] = ("bio", "iob1", "iobes", "bilou")
OUTSIDE = "O"
UNNAMED = "_"  # the type of spans that are tagged with the letters alone

_LETTERS = {"bio": "BI", "iob1": "BI", "iobes": "BIES", "bilou": "BILU"}
_AS_IOBES = {"L": "E", "U": "S"}

Span = tuple[str, int, int]  # its type, its first and its last token


def split(tag: str) -> tuple[str, str]:
    """The letter of a tag and the type of its span, ``("B", "x")`` of ``B-x``."""
    letter, _, kind = tag.partition("-")
    return letter, kind


def belongs_to(tag: str, scheme: Scheme) -> bool:
    """Whether it is a tag of the scheme."""
    letter, kind = split(tag)
    whole = len(kind) > 0 or "-" not in tag
    return tag == OUTSIDE or (len(letter) == 1 and letter in _LETTERS[scheme] and whole)


def may_follow(before: str | None, after: str | None, scheme: Scheme) -> bool:
    """Whether the scheme allows ``after`` behind ``before``; None is the beginning or the end of a sentence."""
    letter, kind = split(before or OUTSIDE)
    next_letter, next_kind = split(after or OUTSIDE)
    if scheme == "bio":
        return next_letter != "I" or (letter in ("B", "I") and kind == next_kind)
    if scheme == "iob1":
        return next_letter != "B" or (letter in ("B", "I") and kind == next_kind)
    letter, next_letter = _AS_IOBES.get(letter, letter), _AS_IOBES.get(next_letter, next_letter)
    is_open = letter in ("B", "I")
    goes_on = next_letter in ("I", "E")
    return goes_on == is_open and (not is_open or kind == next_kind)


def first_fault(tags: Sequence[str | None], scheme: Scheme) -> int | None:
    """The first token whose tag the scheme forbids behind the tag before it (the length: at the end); None: all are
    allowed. A tag that is None is not known, and nothing is said of it and of the tag behind it."""
    padded: list[str | None] = [OUTSIDE, *tags]
    for place, (before, after) in enumerate(zip(padded, tags)):
        if before is not None and after is not None and not may_follow(before, after, scheme):
            return place
    ends = not tags or tags[-1] is None or may_follow(tags[-1], None, scheme)
    return None if ends else len(tags)


def scheme_of(sentences: Iterable[Sequence[str | None]]) -> Scheme | None:
    """The scheme of some sentences' tags; None if they are not tags of spans.

    ``E`` or ``S`` tells ``iobes``, ``L`` or ``U`` tells ``bilou``. Of tags with ``B`` and ``I`` alone they are ``iob1``
    if some span begins with ``I`` and no sentence goes against that scheme, else ``bio``.
    """
    found = scheme_of_labels(tag for tags in sentences for tag in tags if tag is not None)
    if found != "bio":
        return found
    is_iob1 = any(first_fault(tags, "bio") is not None for tags in sentences)
    return "iob1" if is_iob1 and all(first_fault(tags, "iob1") is None for tags in sentences) else "bio"


def scheme_of_labels(labels: Iterable[str]) -> Scheme | None:
    """As :func:`scheme_of`, of the tags without their order: ``iob1`` then passes for ``bio``."""
    labels = {label for label in labels if label != OUTSIDE}
    letters = {split(label)[0] for label in labels}
    alone = any("-" not in label for label in labels)
    for scheme in ("bio", "iobes", "bilou"):
        # Letters alone may be any tags: those of spans have one that begins.
        if labels and all(belongs_to(label, scheme) for label in labels) and (not alone or "B" in letters):
            return scheme
    # Tags that are all "I" have no beginning, and pass for spans all the same.
    return "bio" if labels and labels <= {"B", "I"} else None


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The spans that tags of any scheme mean, as CoNLL's evaluation reads them (Tjong Kim Sang & Buchholz 2000).

    Tags that no scheme allows in this order are read too: ``I-x`` behind ``O`` or another type begins a span. What is
    no tag of a span is outside.
    """
    found: list[Span] = []
    first, kind, ended = 0, None, True  # of the span at work: its type, or None if there is none
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, own = split(tag)
        letter = _AS_IOBES.get(letter, letter)
        inside = letter in ("B", "I", "E", "S")
        goes_on = inside and kind is not None and not ended and letter in ("I", "E") and own == kind
        if kind is not None and not goes_on:
            found.append((kind or UNNAMED, first, place - 1))
            kind = None
        if inside and not goes_on:
            first, kind = place, own
        ended = letter in ("E", "S")
    return found


def tags_of(spans: Iterable[Span], length: int) -> list[str]:
    """Tags in the scheme ``bio`` of spans that do not overlap, among ``length`` tokens."""
    tags = [OUTSIDE] * length
    for kind, first, last in spans:
        name = "" if kind == UNNAMED else f"-{kind}"
        tags[first : last + 1] = [f"B{name}", *[f"I{name}"] * (last - first)]
    return tags
