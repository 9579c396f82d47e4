"""The project's one tolerance.

An error is measured from the truth and judged by the error PyTorch's own path makes in the same precision:
``max|ours - truth| <= 2 max|torch - truth| + 4 eps max|truth|``, for each tensor. The truth of float32 is PyTorch in
float64, the truth of float64 is long double.
"""

from collections.abc import Mapping

import numpy as np
import torch

Results = Mapping[str, torch.Tensor | np.ndarray]


def wide(values):
    """As a long double array: exact for every floating-point dtype."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().numpy()
    return np.asarray(values, dtype=np.longdouble)


def violation(ours, theirs, truth):
    """What breaks the rule, in words, or None."""
    if tuple(ours.shape) != tuple(theirs.shape) or tuple(ours.shape) != tuple(truth.shape):
        return f"shapes differ: {tuple(ours.shape)}, torch {tuple(theirs.shape)}, truth {tuple(truth.shape)}"
    if ours.dtype != theirs.dtype:
        return f"dtypes differ: {ours.dtype}, torch {theirs.dtype}"
    eps = torch.finfo(ours.dtype).eps
    ours, theirs, truth = wide(ours), wide(theirs), wide(truth)
    if not all(np.isfinite(values).all() for values in (ours, theirs, truth)):
        return "not all numbers are finite"
    error, allowance, size = (np.abs(v).max(initial=0.0) for v in (ours - truth, theirs - truth, truth))
    bound = 2 * allowance + 4 * eps * size
    if error <= bound:
        return None
    return f"error {error:.3e} > {bound:.3e}; torch's error {allowance:.3e}, largest value {size:.3e}"


def assert_parity(ours: Results, theirs: Results, truth: Results) -> None:
    """Each tensor of ``ours`` obeys the rule; all three map the same names to tensors."""
    assert ours.keys() == theirs.keys() == truth.keys()
    broken = {name: violation(ours[name], theirs[name], truth[name]) for name in ours}
    broken = {name: text for name, text in broken.items() if text is not None}
    assert not broken, "\n".join(f"{name}: {text}" for name, text in broken.items())


def bits(values):
    """Floating-point numbers as integers, so that 0 and -0 differ."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}
    return values.view(integers[values.dtype]) if values.dtype in integers else values


def assert_same_bits(ours: Results, expected: Results) -> None:
    """The same names, shapes, dtypes and bits; only a NaN's payload is free."""
    assert ours.keys() == expected.keys()
    for name in ours:
        a, b = ours[name].detach(), expected[name].detach()
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        different = (bits(a) != bits(b)) & ~(a.isnan() & b.isnan())
        assert not different.any(), f"{name}: {int(different.sum())} of {a.numel()} numbers differ"
