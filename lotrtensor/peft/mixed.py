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


def multiply_rows(h: Tensor, cores: Tensor, which: Tensor) -> Tensor:
    """Return h_i G_iᵀ for every row i of a batch, as t × p with the positions of all rows.

    Parameters
    ----------
    h : tensor (t, q)
        x V of all positions, those of row 0 first.
    cores : tensor (c, p, q)
        Cores of the adapters.
    which : tensor (b,)
        Adapter of each row.
    """
    own = cores.index_select(0, which).to(h.dtype)
    mixed = torch.bmm(h.reshape(len(which), -1, h.shape[-1]), own.mT)
    return mixed.reshape(-1, own.shape[1])
