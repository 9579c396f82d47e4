"""Records held out of the training records, to validate on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import torch


def stratified(strata: Sequence[frozenset[Hashable]], count: int, seed: int) -> list[int]:
    """Which records to hold out: as many of each label as of all, as far as whole records allow.

    The labels take turns from the rarest on, and each takes records until it has its share, one at least of a label
    with two records or more, but never the last record of a label (iterative stratification, after Sechidis et al.
    2011, "On the Stratification of Multi-label Data"). What is left of ``count`` is drawn from all records.

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
    kept = Counter({label: len(indices) for label, indices in holders.items()})
    share = count / max(len(strata), 1)
    chosen: set[int] = set()
    for label in sorted(holders, key=lambda label: (len(holders[label]), str(label))):
        total = len(holders[label])
        wanted = max(1, round(share * total)) if total > 1 else 0
        for i in holders[label]:
            if len(chosen) == count or total - kept[label] >= wanted:
                break
            if i not in chosen and all(kept[other] > 1 for other in strata[i]):
                chosen.add(i)
                kept.subtract(strata[i])
    # Others: first those that leave a record of each of their labels.
    for must_leave_one in (True, False):
        for i in order:
            if len(chosen) == count:
                break
            if i not in chosen and (not must_leave_one or all(kept[label] > 1 for label in strata[i])):
                chosen.add(i)
                kept.subtract(strata[i])
    return sorted(chosen)
