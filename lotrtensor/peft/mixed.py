"""Batches whose rows belong to different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lotrtensor.errors import DataError
from lotrtensor.torch.factors import SharedFactors, Transposed
from lotrtensor.torch.functional import add_rows

if TYPE_CHECKING:
    from lotrtensor.peft.layer import LotrLayer

BASE = "__base__"
"""Adapter name of a row that gets no update."""


class Part(NamedTuple):
    """Rows of a batch whose adapters have the same factors.

    ``rows`` is None for all of them; ``which`` says which of ``names`` each row has.
    """

    factors: SharedFactors | Transposed
    rows: Tensor | None
    names: list[str]
    which: Tensor


class Rows(list[str]):
    """Adapter name of each row of a batch, split by factors once for all layers that ask.

    With many adapters the split takes longer than a layer's products; the layers of one model
    split one batch into the same few ways.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.distinct = list(dict.fromkeys(names))
        self._splits: dict[tuple[int, ...], list[Part]] = {}
        self._rows: dict[tuple[str, torch.device], Tensor | None] = {}

    def split(self, shared: Mapping[str, SharedFactors | Transposed]) -> list[Part]:
        """Return the rows of adapters that have the same factors, whatever their number.

        Parameters
        ----------
        shared : mapping of str to SharedFactors
            Factors of every adapter of a layer; rows of others, ``"__base__"`` among them, are
            left out.
        """
        key = tuple(id(shared.get(name)) for name in self.distinct)
        parts = self._splits.get(key)
        if parts is None:
            parts = self._splits[key] = list(self._split(shared))
        return parts

    def rows_of(self, name: str, device: torch.device) -> Tensor | None:
        """Return the rows of one adapter; None where they are all."""
        key = name, device
        if key not in self._rows:
            rows = [row for row, own in enumerate(self) if own == name]
            whole = len(rows) == len(self)
            self._rows[key] = None if whole else torch.tensor(rows, device=device)
        return self._rows[key]

    def _split(self, shared: Mapping[str, SharedFactors | Transposed]) -> Iterator[Part]:
        by_factors: dict[SharedFactors | Transposed, list[int]] = {}
        for row, name in enumerate(self):
            if name in shared:
                by_factors.setdefault(shared[name], []).append(row)
        for factors, rows in by_factors.items():
            names = list(dict.fromkeys(self[row] for row in rows))
            places = {name: place for place, name in enumerate(names)}
            device = factors.left.device
            yield Part(
                factors,
                None if len(rows) == len(self) else torch.tensor(rows, device=device),
                names,
                torch.tensor([places[self[row]] for row in rows], device=device),
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


def add_mixed(layer: LotrLayer, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
    """Add to every row of y the update of its adapter; rows of shared factors go together.

    Parameters
    ----------
    layer : LotrLayer
        The layer that has the adapters.
    y, x : tensor (b, ..., m), (b, ..., n)
        Output of its base layer, and input.
    adapter_names : list of str
        Adapter of each row.

    Raises
    ------
    DataError
        If there is not one name a row.
    """
    if len(adapter_names) != len(x):
        raise DataError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively: one a row, {BASE!r} for none."
        )
    batch = adapter_names if isinstance(adapter_names, Rows) else Rows(adapter_names)
    for factors, rows, names, which in batch.split(layer.lotr_shared):
        part = x if rows is None else x[rows]
        h = layer.project(part, factors.right, names[0])
        # One product with all cores: scaling them one by one would cost more than the update.
        cores = torch.stack([layer.core(name) for name in names])
        scale = layer.scale(names[0])
        if len(set(map(layer.lotr_scale.__getitem__, names))) > 1:
            cores = cores * cores.new_tensor(list(map(layer.scale, names)))[:, None, None]
            scale = 1.0
        mixed = multiply_rows(h, cores, which)
        wide = factors.left.T.contiguous()
        if rows is None:
            y = add_rows(y, mixed, wide, scale)
        else:
            y = y.index_copy(0, rows, add_rows(y[rows], mixed, wide, scale))
    return _add_private(layer, y, x, batch)


def _add_private(layer: LotrLayer, y: Tensor, x: Tensor, batch: Rows) -> Tensor:
    """Add private parts: two thin products an adapter, for all of its rows together."""
    for name in batch.distinct:
        private = layer.private(name)
        if private is None:
            continue
        rows = batch.rows_of(name, y.device)
        if rows is None:
            y = layer.add_private(y, x, private, name)
        else:
            y = y.index_copy(0, rows, layer.add_private(y[rows], x[rows], private, name))
    return y
