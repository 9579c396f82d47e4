"""Models as files, and what the runtime without torch says of a batch: ``make test-kernels`` builds its library, which
PYMTL_RUNTIME_LIBRARY names."""

import itertools
import os

import numpy as np
import pytest
import torch
from torch import nn

import pymtl
from pymtl.sharing import SCHEMES

if "PYMTL_RUNTIME_LIBRARY" not in os.environ:
    pytest.skip("no PYMTL_RUNTIME_LIBRARY", allow_module_level=True)
import pymtl_runtime

HEADS = {
    "intent": lambda: pymtl.ClassificationHead(5, "last"),
    "topic": lambda: pymtl.ClassificationHead(4, "mean"),
    "slots": lambda: pymtl.TokenClassificationHead(7),
    "tags": lambda: pymtl.CRFHead(5, ["O", "B-x", "I-x", "B-y", "I-y"]),
    "scores": lambda: pymtl.RegressionHead(2, "max", mean=[1.0, -2.0], std=[3.0, 0.5]),
    "price": lambda: pymtl.RegressionHead(1, "mean", mean=[2.0], std=[1.5], log=True),
    "topics": lambda: pymtl.MultiLabelHead(5, "attention"),
    "stars": lambda: pymtl.OrdinalHead(4, "max"),
    "phones": lambda: pymtl.CTCHead(6),
    "skips": lambda: pymtl.TokenClassificationHead(3, reads=pymtl.Reads(skip=True)),
    "after tokens": lambda: pymtl.TokenClassificationHead(3, reads=pymtl.Reads(skip=True, after="slots")),
    "of tokens": lambda: pymtl.ClassificationHead(3, "max", reads=pymtl.Reads(skip=True, after="slots")),
    "after sequences": lambda: pymtl.TokenClassificationHead(3, reads=pymtl.Reads(after="intent")),
    "of sequences": lambda: pymtl.ClassificationHead(3, pymtl.AttentionPooling(2), reads=pymtl.Reads(after="intent")),
}
PLAIN = ("intent", "topic", "slots", "tags", "scores", "price", "stars", "phones")  # whose logits are kernels' alone
SIZES = {"words": 50, "characters": 20, "pos": 9}
NUMBERS = 2
FIELDS = {
    "words": lambda: nn.Embedding(SIZES["words"], 12, padding_idx=0),
    "characters": lambda: pymtl.CharacterLSTM(SIZES["characters"], 5, 6),
    "filters": lambda: pymtl.CharacterCNN(SIZES["characters"], 5, 6, kernel_sizes=(1, 3, 5)),
    "pos": lambda: nn.Embedding(SIZES["pos"], 3),
    "signal": nn.Identity,
}
WIDTHS = {"words": 12, "characters": 12, "filters": 18, "pos": 3, "signal": NUMBERS}
EVERY_SCHEME = ["none", *SCHEMES]
LENGTHS = [3, 9, 1, 4, 9]


def model_of(scheme="none", heads=HEADS, fields=("words",), layers=1, bidirectional=True, hidden=10, seed=0, kind=None):
    """A model of float32 in evaluation; ``kind``: makes the layers where no scheme does."""
    torch.manual_seed(seed)
    size = sum(WIDTHS[field] for field in fields)
    if scheme == "none":
        options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": True}
        encoder = (kind or pymtl.LSTM)(size, hidden, **options)
    else:
        encoder = SCHEMES[scheme](list(heads), size, hidden, layers, bidirectional)
    embedding = FIELDS["words"]() if fields == ("words",) else pymtl.TokenFeatures({f: FIELDS[f]() for f in fields})
    model = pymtl.MultiTaskModel(embedding, encoder, {task: make() for task, make in heads.items()}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as large as trained ones, so that gates are not all in the middle
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return model


def batch_of(fields=("words",), lengths=LENGTHS, seed=1):
    """Padded inputs as a model takes them, and the lengths; of padding, too, there are ids."""
    generator = torch.Generator().manual_seed(seed)
    batch, steps = len(lengths), max(lengths)
    found = {}
    for field in fields:
        if field in ("characters", "filters"):
            counts = torch.randint(0, 7, (batch, steps, 1), generator=generator)
            ids = torch.randint(1, SIZES["characters"], (batch, steps, 6), generator=generator)
            found[field] = ids * (torch.arange(6) < counts)
        elif field == "signal":
            found[field] = torch.randn(batch, steps, NUMBERS, generator=generator)
        else:
            found[field] = torch.randint(0, SIZES[field], (batch, steps), generator=generator)
    return found, torch.tensor(lengths)


def mask_of(lengths):
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(1)


def flat(values, lengths):
    """The rows of all tokens, one sequence after the other."""
    return values[mask_of(lengths)]


def answers_of(model, inputs, lengths, tasks=None):
    """The model's logits, of tokens as :func:`flat` has them."""
    given = inputs if isinstance(model.embedding, pymtl.TokenFeatures) else next(iter(inputs.values()))
    with torch.no_grad():
        found = dict(model(given, lengths, tasks))
    return {
        task: (flat(z, lengths) if model.heads[task].pooling is None else z).flatten(1) for task, z in found.items()
    }


def wide(model, inputs):
    """The model and its inputs in float64, and the same in float32 again when the block ends."""
    return model.double(), {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def run(session, inputs, lengths, **options):
    session.run(lengths.tolist(), {name: flat(x, lengths).numpy() for name, x in inputs.items()}, **options)


def logits_of(session, tasks=None):
    names = [task.name for task in session.model.tasks] if tasks is None else tasks
    return {task: torch.from_numpy(session.logits(task)) for task in names}


def loaded(path, **options):
    return pymtl_runtime.Model(path, **options)


def combinations(**choices):
    """Every combination, as keyword arguments."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def as_numpy(values):
    return np.asarray(values)
