"""The stacks that are measured: planted factors with noise, as trained adapters roughly are."""

from __future__ import annotations

import numpy as np

from lotrtensor import LowRankStack


def planted_stack(
    slices: int, m: int, n: int, r: int, *, shared: int = 32, noise: float = 0.05, seed: int = 0
) -> LowRankStack:
    """K slices of rank r in float32 that share ``shared`` directions a side, and noise beside."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((m, shared), dtype=np.float32)
    right = rng.standard_normal((n, shared), dtype=np.float32)
    left *= np.logspace(0, -2, shared, dtype=np.float32)
    scale = np.float32(noise * np.linalg.norm(left) / np.sqrt(m * shared))
    lefts, rights = [], []
    for _ in range(slices):
        mix = rng.standard_normal((shared, r), dtype=np.float32)
        lefts.append(left @ mix + scale * rng.standard_normal((m, r), dtype=np.float32))
        mix = rng.standard_normal((r, shared), dtype=np.float32)
        rights.append(
            mix @ right.T + np.float32(noise) * rng.standard_normal((r, n), dtype=np.float32)
        )
    return LowRankStack(lefts, rights)
