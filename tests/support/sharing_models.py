"""Multi-task models of every sharing scheme, a batch with targets, and the ways to run them."""

import pytest
import torch
from torch import nn

from pymtl import (
    AttentionPooling,
    ClassificationHead,
    JointLoss,
    MultiTaskModel,
    RegressionHead,
    TokenClassificationHead,
)
from pymtl.sharing import SCHEMES

VOCABULARY, E, H = 20, 5, 6
LENGTHS = [4, 7, 1, 5, 2]
B, T = len(LENGTHS), 7
VALID = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
HEADS = {
    "intent": lambda: ClassificationHead(4),
    "slots": lambda: TokenClassificationHead(5),
    "score": lambda: RegressionHead(2, "max"),
    "tone": lambda: ClassificationHead(3, AttentionPooling(2)),
}
TASKS = list(HEADS)
VARIANTS = {
    "hard": ("hard", {"num_layers": 2}),
    "soft": ("soft", {"num_layers": 2}),
    "soft, trace norm": ("soft", {"penalty": "trace_norm"}),
    "soft, representations": ("soft", {"penalty": "representations"}),
    "shared_private": ("shared_private", {"adversarial": 0.1}),
    "hierarchical": ("hierarchical", {"levels": {"intent": 2, "slots": 1, "score": 2, "tone": 3}}),
    "cross_stitch": ("cross_stitch", {"num_layers": 2}),
    "mmoe": ("mmoe", {"num_layers": 2}),
    "cgc": ("cgc", {}),
    "cgc, 2 levels": ("cgc", {"num_layers": 2, "num_experts": 2}),
    "task_attention": ("task_attention", {"num_layers": 2}),
}
KINDS = {name: VARIANTS[name][0] for name in VARIANTS}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
both_modes = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])


def model_of(variant, heads=HEADS, dtype=torch.float64, dropout=0.0, seed=0, **more):
    name, options = VARIANTS[variant]
    torch.manual_seed(seed)
    encoder = SCHEMES[name](list(heads), E, H, **(options | more))
    made = {task: make() for task, make in heads.items()}
    return MultiTaskModel(nn.Embedding(VOCABULARY, E, padding_idx=0), encoder, made, dropout).to(dtype)


def levels_of(variant, count=2):
    """The option that a hierarchy of the first tasks needs."""
    levels = {"intent": 2, "slots": 1, "score": 2}
    return {"levels": {task: levels[task] for task in TASKS[:count]}} if variant == "hierarchical" else {}


def batch(seed=3):
    """Token ids and lengths; the padding holds ids too, to be sure that nobody reads it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (B, T), generator=generator), torch.tensor(LENGTHS)


def targets(tasks=TASKS):
    generator = torch.Generator().manual_seed(4)
    every = {
        "intent": torch.randint(4, (B,), generator=generator),
        "slots": torch.randint(5, (B, T), generator=generator).masked_fill(~VALID, -100),
        "score": torch.randn(B, 2, generator=generator),
        "tone": torch.randint(3, (B,), generator=generator),
    }
    return {task: every[task] for task in tasks}


def joint_loss(model, balancing=None):
    return JointLoss({task: 0.5 + k for k, task in enumerate(model.heads)}, model.losses, balancing)


def close(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected))


def in_all_ways(model, *arguments, **options):
    """The logits with gradients, without, and in evaluation."""
    found = [model.train()(*arguments, **options)]
    with torch.no_grad():
        found.append(model(*arguments, **options))
    with torch.inference_mode():
        found.append(model.eval()(*arguments, **options))
    model.train()
    return found
