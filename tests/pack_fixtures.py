"""Families of adapters: mean, shared and private parts of known sizes."""

from __future__ import annotations

import numpy as np

import lotrtensor as lt

KINDS = {"query": (160, 120), "dense": (240, 160)}
"""Shapes of the two modules of every layer."""


def family(
    count, *, mean=1.0, common=0.3, own=0.1, layers=2, seed=0, rank=3, own_rank=1, kinds=None
):
    """``count`` adapters in float32: the same update, and parts that they share or do not."""
    rng = np.random.default_rng(seed)
    names = [(f"layers.{k}.{kind}", shape) for k in range(layers) for kind, shape in
             (kinds or KINDS).items()]  # fmt: skip
    spaces = {
        name: (rng.normal(size=(m, rank)), rng.normal(size=(rank, n))) for name, (m, n) in names
    }
    found = {}
    for i in range(count):
        modules = []
        for name, (m, n) in names:
            left, right = spaces[name]
            middle = mean * np.eye(rank) + common * rng.normal(size=(rank, rank))
            b = np.hstack([left @ middle, own * rng.normal(size=(m, own_rank))])
            a = np.vstack([right, rng.normal(size=(own_rank, n))])
            modules.append(lt.LoraModule(name, b.astype("float32"), a.astype("float32")))
        found[f"user-{i}"] = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    return found


def strangers(count, *, seed=0, own_rank=4):
    """Adapters that have nothing in common."""
    return family(count, mean=0.0, common=0.0, own=1.0, seed=seed, own_rank=own_rank)


def dense(modules):
    """ΔW of every module, m × n in float64."""
    return {m.name: m.B.astype(float) @ m.A.astype(float) for m in modules}


def dense_error(stored, reference):
    """Relative error of stored modules against those of an adapter."""
    first, second = dense(reference.modules), dense(stored)
    lost2 = sum(np.linalg.norm(first[name] - second[name]) ** 2 for name in first)
    return np.sqrt(lost2 / sum(np.linalg.norm(x) ** 2 for x in first.values()))


def contents(directory):
    """Every file of a directory, but for the lock, by name."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())
            if p.is_file() and not p.name.startswith(".")}  # fmt: skip
