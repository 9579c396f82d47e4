"""How fast a trained model runs, beside the same model in plain PyTorch, and how equal they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from pymtl.benchmark.timing import interleaved
from pymtl.recurrent import freeze
from pymtl.serving.answers import NO_LABEL
from pymtl.serving.records import Record
from pymtl.training.batches import Batch, Batcher, buckets
from pymtl.training.config import Config
from pymtl.training.metrics import generated
from pymtl.training.model_with_loss import BACKENDS, ModelWithLoss, has_reference
from pymtl.training.step import Step
from pymtl.training.vocabulary import Vocabulary

BLOCK = 20  # batches a contender runs in a row: its parameters and Adam's moments fill most of the cache


Work = tuple[str, Batch]  # the data set, and a batch of it


def compare(
    model_with_loss: ModelWithLoss,
    config: Config,
    vocabulary: Vocabulary,
    train: Mapping[str, list[Record]],
    test: Mapping[str, list[Record]],
    batches: int = 200,
    device: str = "cpu",
    weights: torch.dtype | None = None,
) -> dict[str, Any]:
    """Times a training step and an inference batch of every backend on the same batches, interleaved; of ours alone
    where plain PyTorch has no counterpart of the model. With ``weights`` inference is timed of one more, ours frozen in
    that dtype.

    Returns:
        For ``bucketed`` batches (of similar lengths, as in training) and ``shuffled`` ones (as they come): how many
        ``batches``, and for ``training`` and ``inference`` each backend's median milliseconds and its ratio to ours
        (median of ratios). And, beside plain PyTorch, ``parity``, the largest difference of a logit and of a
        parameter's gradient between ours and the reference from the same weights, and of either's gradient from
        float64, each over the largest magnitude in any batch.
    """
    names = BACKENDS if has_reference(config) else BACKENDS[:1]
    models = {name: _same(model_with_loss, name, config, vocabulary).to(device) for name in names}
    batcher = Batcher(vocabulary, config)
    size = config.training.batch_size
    generator = torch.Generator().manual_seed(config.seed)

    def chosen(sets: Mapping[str, list[Record]], order: Callable[[list[Record]], Iterable[list[int]]]) -> list[Work]:
        every = [
            [(name, indices) for indices, _ in zip(order(records), range(batches))] for name, records in sets.items()
        ]
        turns = [item for items in zip_longest(*every) for item in items if item is not None][:batches]
        return [(name, batcher.batch(sets[name], indices).to(torch.device(device))) for name, indices in turns]

    orders = {
        "bucketed": lambda records: buckets(records, size, generator),
        "shuffled": lambda records: shuffled(records, size, generator),
    }
    work = {kind: (chosen(train, order), chosen(test, order)) for kind, order in orders.items()}
    result: dict[str, Any] = {}
    if has_reference(config):
        exact = _same(model_with_loss, "reference", config, vocabulary).to(device)
        exact.model.double()
        first = [batch for _, batch in work["bucketed"][0][:8]]
        result["parity"] = _parity(models["pymtl"], models["reference"], exact, first)
    # Small steps: the weights stay about what they are.
    settings = replace(config.training, learning_rate=1e-5, ema_decay=0.0)
    steps = {name: _ended(_each(Step(model, settings)), device) for name, model in models.items()}
    frozen = {}
    if weights is not None:
        name = f"pymtl, frozen in {str(weights).removeprefix('torch.')}"
        frozen[name] = _same(model_with_loss, "pymtl", config, vocabulary)
        freeze(frozen[name].model.eval(), weights)
    asked = {name: _ended(_ask(model, config), device) for name, model in (models | frozen).items()}
    for kind, (training, inference) in work.items():
        for model in models.values():
            model.train()
        result[kind] = {"batches": {"training": len(training), "inference": len(inference)}}
        result[kind]["training"] = interleaved(steps, training, "pymtl", BLOCK)
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            result[kind]["inference"] = interleaved(asked, inference, "pymtl", BLOCK)
    return result


def shuffled(records: list[Record], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    order = torch.randperm(len(records), generator=generator).tolist()
    yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _each(step: Step) -> Callable[[Work], object]:
    return lambda work: step([work[1]])


def _ask(model: ModelWithLoss, config: Config) -> Callable[[Work], object]:
    """Logits of a batch, and answers where they are generated."""

    def ask(work: Work) -> None:
        for name, z in model.logits(work[1], work[0]).items():
            if config.tasks[name].rules.generates:
                generated(z, config.tasks[name])

    return ask


def _ended(run: Callable[[Work], object], device: str) -> Callable[[Work], object]:
    """The same, over when the GPU is done."""
    if device != "cuda":
        return run

    def run_to_the_end(work: Work) -> None:
        run(work)
        torch.cuda.synchronize()

    return run_to_the_end


def _same(model_with_loss: ModelWithLoss, name: str, config: Config, vocabulary: Vocabulary) -> ModelWithLoss:
    other = ModelWithLoss(name, config, vocabulary)
    other.model.load_state_dict(copy.deepcopy(model_with_loss.model.state_dict()))
    return other


def _parity(ours: ModelWithLoss, theirs: ModelWithLoss, exact: ModelWithLoss, batches: list[Batch]) -> dict[str, float]:
    """The largest differences without dropout, whose masks differ with the layout.

    They are of each task's logits and each parameter's gradient, over the largest magnitude in any batch. A model that
    has almost converged has gradients near the rounding errors: ``exact``, in float64, shows which backend's they are.
    """
    kinds = ("logits", "gradients", "gradients from float64", "plain gradients from float64")
    found: dict[str, dict[str, list[tuple[float, float]]]] = {kind: {} for kind in kinds}

    def compare(kind: str, name: str, a: Tensor, b: Tensor) -> None:
        a, b = a.detach(), b.detach()
        found[kind].setdefault(name, []).append((float((a - b).abs().max()), float(b.abs().max())))

    for each in (ours, theirs, exact):
        each.eval()
    for batch in batches:
        steps = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        valid = steps < batch.lengths.to(steps.device).unsqueeze(1)
        # With the targets, which decoders read.
        a, b = (each.model(batch.inputs(), batch.lengths, each.tasks[""], batch.targets) for each in (ours, theirs))
        for task, z in a.items():
            if task in batch.generated:
                compare("logits", task, *(own[task][batch.targets[task] != NO_LABEL] for own in (a, b)))
            elif isinstance(z, Tensor):  # and no decoder without a label in the batch
                # At padding ours is zero and the reference its bias; only tokens count.
                compare("logits", task, *((z[valid], b[task][valid]) if z.dim() == 3 else (z, b[task])))
        for each in (ours, theirs, exact):
            each.model.zero_grad()
            each.loss(batch).total.backward()
        parameters = (each.model.parameters() for each in (theirs, exact))
        for (name, p), q, truth in zip(ours.model.named_parameters(), *parameters):
            if p.grad is not None and q.grad is not None:
                compare("gradients", name, p.grad, q.grad)
                compare("gradients from float64", name, p.grad, truth.grad)
                compare("plain gradients from float64", name, q.grad, truth.grad)
    return {
        kind: max(max(d for d, _ in pairs) / max(max(size for _, size in pairs), 1e-30) for pairs in by_name.values())
        for kind, by_name in found.items()
    }
