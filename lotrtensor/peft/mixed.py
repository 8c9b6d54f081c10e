"""Batches whose rows belong to different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lotrtensor.torch.factors import SharedFactors

BASE = "__base__"
"""Adapter name of a row that gets no update."""


class Part(NamedTuple):
    """Rows of a batch whose adapters have the same factors.

    ``rows`` is None for all of them; ``which`` says which of ``names`` each row has.
    """

    factors: SharedFactors
    rows: Tensor | None
    names: list[str]
    which: Tensor


def split_batch(
    shared: Mapping[str, SharedFactors], adapter_names: Sequence[str]
) -> Iterator[Part]:
    """Split the rows of a batch by factors, whatever the number of adapters.

    Parameters
    ----------
    shared : mapping of str to SharedFactors
        Factors of every adapter of a layer.
    adapter_names : sequence of str
        Adapter of each row; rows of others, ``"__base__"`` among them, are left out.
    """
    by_factors: dict[int, tuple[list[int], dict[str, int], list[int]]] = {}
    for row, name in enumerate(adapter_names):
        factors = shared.get(name)
        if factors is not None:
            rows, places, index = by_factors.setdefault(id(factors), ([], {}, []))
            rows.append(row)
            index.append(places.setdefault(name, len(places)))
    for rows, places, index in by_factors.values():
        names = list(places)
        factors = shared[names[0]]
        device = factors.left.device
        whole = len(rows) == len(adapter_names)
        yield Part(
            factors,
            None if whole else torch.tensor(rows, device=device),
            names,
            torch.tensor(index, device=device),
        )


def update_rows(h: Tensor, cores: Tensor, index: Tensor, left: Tensor) -> Tensor:
    """Return h_i G_iᵀ Uᵀ for every row i of a batch.

    Parameters
    ----------
    h : tensor (b, ..., q)
        x V of every row.
    cores : tensor (c, p, q)
        Cores of the adapters, scaled.
    index : tensor (b,)
        Adapter of each row.
    left : tensor (m, p)
        U.
    """
    flat = h.reshape(h.shape[0], -1, h.shape[-1])
    own = cores.index_select(0, index).to(h.dtype)
    mixed = torch.bmm(flat, own.mT).reshape(*h.shape[:-1], left.shape[1])
    return mixed @ left.T
