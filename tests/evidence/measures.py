"""Accuracy, divergence from the original adapter, and paired bootstrap intervals."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

DRAWS = 2000


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the largest output is the label's, else 0."""
    return (logits.argmax(1) == labels).astype(float)


def divergence(original: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row, Σ p (log p − log q), in nats."""
    p, q = (log_softmax(x.astype(float), axis=1) for x in (original, changed))
    return np.sum(np.exp(p) * (p - q), axis=1)


def interval(values: np.ndarray, seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a mean over rows; differences of pairs give a paired one.

    Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), the percentile interval.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(values), size=(DRAWS, len(values)))
    means = values[rows].mean(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def packed(flags: np.ndarray) -> str:
    """A flag a row as hexadecimal, so that intervals can be drawn anew from a result."""
    return np.packbits(flags.astype(bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The flags of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(float)
