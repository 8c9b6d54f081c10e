"""Adapters of a pack in a model: bases as shared factors, cores and private parts by layer."""

from __future__ import annotations

import os

import torch
from torch import nn

from lotrtensor.packs.pack import Pack
from lotrtensor.torch.state import load_lotr


def load_pack(
    model: nn.Module,
    pack: Pack | str | os.PathLike[str],
    name: str,
    *,
    train: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load one adapter of a pack into ``model``, in place.

    The bases and what is this adapter's own are read, and nothing of the others.

    Parameters
    ----------
    model : nn.Module
        The base model.
    pack : Pack or path-like
        The pack.
    name : str
        Name of the adapter.
    train : str, optional
        ``"all"`` or ``"cores"`` to train on; with the latter the bases stay those of the pack, and
        what is trained can be added to it. Not given, nothing trains.
    dtype : torch.dtype, optional
        Of factors and cores; that of the base weights if not given.

    Returns
    -------
    nn.Module
        ``model``, for chaining.

    Raises
    ------
    FormatError
        If the pack has no such adapter, or is damaged; and all that `load_lotr` raises.

    Examples
    --------
    >>> import tempfile, numpy as np, torch, lotrtensor as lt, lotrtensor.torch as lotr
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(64, 4)), rng.normal(size=(4, 64))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(64, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("0", own, A),), {}, np.dtype("float32"))
    >>> family = {f"user-{i}": tuned(0.1) for i in range(6)}
    >>> packed = lt.pack(family, tempfile.mkdtemp() + "/pack", tolerance=0.15)
    >>> model = lotr.load_pack(torch.nn.Sequential(torch.nn.Linear(64, 64)), packed, "user-3")
    >>> model[0].factors.rank == packed.cells[0].basis.rank
    True
    """
    found = pack if isinstance(pack, Pack) else Pack(pack)
    return load_lotr(model, found.member(name), train=train, dtype=dtype)
