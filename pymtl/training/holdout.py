"""Records held out of the training records, to validate on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import torch


def stratified(strata: Sequence[frozenset[Hashable]], count: int, seed: int) -> list[int]:
    """Which records to hold out: as many of each label as of all, as far as whole records allow.

    The labels take turns from the rarest on, and each takes records until it has its share, one at least of a label
    with two records or more, but never the last record of a label (iterative stratification, after Sechidis et al.
    2011, "On the Stratification of Multi-label Data"). Records whose other labels all lack some of their share come
    first. What is left of ``count`` is drawn from all records in the same order.

    Args:
        strata: the labels of each record, N sets.
        count: how many records to hold out, from 1 to N.
        seed: of the drawing.

    Returns:
        The records' indices, rising.
    """
    order = torch.randperm(len(strata), generator=torch.Generator().manual_seed(seed)).tolist()
    holders: dict[Hashable, list[int]] = defaultdict(list)
    for i in order:
        for label in strata[i]:
            holders[label].append(i)
    totals = {label: len(indices) for label, indices in holders.items()}
    share = count / max(len(strata), 1)
    wanted = {label: max(1, round(share * total)) if total > 1 else 0 for label, total in totals.items()}
    taken = Counter(dict.fromkeys(totals, 0))
    chosen: set[int] = set()

    def lacks(label: Hashable) -> bool:
        return taken[label] < wanted[label]

    def leaves_one(i: int) -> bool:
        return all(totals[label] - taken[label] > 1 for label in strata[i])

    def take(
        candidates: Sequence[int], in_share: bool, leaving_one: bool = True, until: Hashable | None = None
    ) -> None:
        """Takes of the candidates until ``count`` are chosen, or the label ``until`` has its share."""
        for i in candidates:
            if len(chosen) == count or (until is not None and not lacks(until)):
                return
            if i in chosen or (in_share and not all(map(lacks, strata[i]))) or (leaving_one and not leaves_one(i)):
                continue
            chosen.add(i)
            taken.update(strata[i])

    for label in sorted(holders, key=lambda label: (totals[label], str(label))):
        take(holders[label], in_share=True, until=label)
        take(holders[label], in_share=False, until=label)
    take(order, in_share=True)
    take(order, in_share=False)
    take(order, in_share=False, leaving_one=False)
    return sorted(chosen)
