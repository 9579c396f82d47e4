"""The linear-chain conditional random field, step by step in log space."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def crf(
    emissions: Tensor, batch_sizes: Tensor, tags: Tensor | None, start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """What :func:`pymtl.ops.crf` computes."""
    sizes, idle = _sizes_and_idle(emissions, batch_sizes)
    emissions = emissions[: sum(sizes)]
    if tags is not None:
        tags = tags[: sum(sizes)]
        if tags.is_cuda:  # where an index out of range would end the process's use of the GPU
            wrong = (tags < 0) | (tags >= emissions.shape[1])
            emissions = emissions.masked_fill(wrong.unsqueeze(1), torch.nan)
            tags = tags.masked_fill(wrong, 0)
    steps = emissions.split(sizes)
    alphas = start + steps[0]
    finished = []
    for before, step in pairwise(steps):
        finished.append(alphas[step.shape[0] : before.shape[0]])
        alphas = _log_sum(alphas[: step.shape[0]].unsqueeze(2) + transitions) + step
    finished.append(alphas)
    result = torch.logsumexp(torch.cat(finished[::-1]) + end, dim=1)
    if tags is not None:
        result = _score(steps, tags.split(sizes), start, end, transitions) - result
    return torch.cat([result, result.new_zeros(idle)])


def _sizes_and_idle(emissions: Tensor, batch_sizes: Tensor) -> tuple[list[int], int]:
    """The sizes, and how many sequences have no token: where there are more rows than tokens there are T*B."""
    sizes = batch_sizes.tolist()
    rows = emissions.shape[0]
    return sizes, rows // len(sizes) - sizes[0] if rows > sum(sizes) else 0


def _log_sum(scores: Tensor) -> Tensor:
    """logsumexp over the second dimension; where nothing is possible the derivative is 0, not NaN."""
    impossible = (scores == -torch.inf).all(dim=1, keepdim=True)
    sums = torch.logsumexp(scores.masked_fill(impossible, 0.0), dim=1)
    return sums.masked_fill(impossible.squeeze(1), -torch.inf)


def _score(
    steps: tuple[Tensor, ...], tags: tuple[Tensor, ...], start: Tensor, end: Tensor, transitions: Tensor
) -> Tensor:
    """Of the given paths, [B]."""
    scores = start[tags[0]] + steps[0].gather(1, tags[0].unsqueeze(1)).squeeze(1)
    finished = []
    for t in range(1, len(steps)):
        count = steps[t].shape[0]
        finished.append(scores[count:] + end[tags[t - 1][count:]])
        moved = transitions[tags[t - 1][:count], tags[t]]
        scores = scores[:count] + moved + steps[t].gather(1, tags[t].unsqueeze(1)).squeeze(1)
    finished.append(scores + end[tags[-1]])
    return torch.cat(finished[::-1])


def crf_decode(
    emissions: Tensor, batch_sizes: Tensor, start: Tensor, end: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`pymtl.ops.crf_decode` computes; among equal paths another may win."""
    sizes, idle = _sizes_and_idle(emissions, batch_sizes)
    beyond = emissions.shape[0] - sum(sizes)
    steps = emissions[: sum(sizes)].split(sizes)
    scores = start + steps[0]
    origins, finished = [], []
    for before, step in pairwise(steps):
        finished.append(scores[step.shape[0] : before.shape[0]])
        best, origin = (scores[: step.shape[0]].unsqueeze(2) + transitions).max(dim=1)
        origins.append(origin)
        scores = best + step
    finished.append(scores)
    best, last = (torch.cat(finished[::-1]) + end).max(dim=1)
    tags = [last[: steps[-1].shape[0]]]
    for t in range(len(steps) - 2, -1, -1):
        going_on = steps[t + 1].shape[0]
        came_from = origins[t].gather(1, tags[0].unsqueeze(1)).squeeze(1)
        tags.insert(0, torch.cat([came_from, last[going_on : steps[t].shape[0]]]))
    return torch.cat([*tags, last.new_zeros(beyond)]), torch.cat([best, best.new_zeros(idle)])
