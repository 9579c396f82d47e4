"""Probabilities from logits, along the last axis."""

from __future__ import annotations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    exponentials = np.exp(z - z.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def sigmoid(z: np.ndarray) -> np.ndarray:
    smaller = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + smaller), smaller / (1 + smaller))
