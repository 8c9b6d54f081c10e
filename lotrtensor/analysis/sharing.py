"""What the modules of an adapter have in common: layer against layer, kind against kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lotrtensor.adapters.modules import LoraModule, module_stack
from lotrtensor.analysis.rows import ModuleRow
from lotrtensor.core.slice_svd import SliceSvd, slice_svds
from lotrtensor.core.subspaces import Subspaces, leading_subspaces, overlaps


def layer_label(name: str) -> str:
    """Numbers of a module path: which layer it belongs to.

    >>> layer_label("model.layers.12.mlp.experts.3.up_proj")
    '12.3'
    """
    return ".".join(part for part in name.split(".") if part.isdecimal())


def module_svds(modules: Sequence[LoraModule]) -> list[SliceSvd]:
    """The r × r problems of modules of one shape."""
    stack = module_stack(modules)
    return slice_svds(stack)


def module_rows(modules: Sequence[LoraModule], svds: Sequence[SliceSvd]) -> tuple[ModuleRow, ...]:
    """One row per module."""
    return tuple(
        ModuleRow(
            name=module.name,
            layer=layer_label(module.name),
            norm=float(np.sqrt(np.sum(svd.values**2))),
            lora_rank=module.rank,
            directions=int(leading_subspaces(svd).left.shape[1]),
        )
        for module, svd in zip(modules, svds, strict=True)
    )


MOST = 128
"""Modules, or groups, of which every two are compared: tables of more would be square in them."""


def compared(count: int) -> tuple[int, ...]:
    """Numbers of those that are compared with one another: all, or `MOST` evenly spaced.

    >>> compared(3), len(compared(10_000)), compared(10_000)[-1]
    ((0, 1, 2), 128, 9999)
    """
    if count <= MOST:
        return tuple(range(count))
    return tuple(int(k) for k in np.linspace(0, count - 1, MOST).round())


def kind_overlaps(
    labels: Sequence[Sequence[str]], subspaces: Sequence[Sequence[Subspaces]]
) -> tuple[np.ndarray, np.ndarray]:
    """Left and right overlap of every two groups (G × G), a mean over the layers both have.

    Parameters
    ----------
    labels : sequence of sequence of str
        Layer of every module, a group each.
    subspaces : sequence of sequence of Subspaces
        Leading directions of the same modules.
    """
    found = tuple(_mean_overlaps(labels, subspaces, side) for side in (0, 1))
    return found[0], found[1]


def _mean_overlaps(
    labels: Sequence[Sequence[str]], subspaces: Sequence[Sequence[Subspaces]], side: int
) -> np.ndarray:
    groups = len(labels)
    sums, counts = np.zeros((groups, groups)), np.zeros((groups, groups))
    at_layer: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
    for g, (names, spaces) in enumerate(zip(labels, subspaces, strict=True)):
        for label, space in zip(names, spaces, strict=True):
            basis = space[side]
            if basis.shape[1]:
                at_layer.setdefault((label, basis.shape[0]), []).append((g, basis))
    for members in at_layer.values():
        members = [members[k] for k in compared(len(members))]
        owners = np.array([g for g, _ in members])
        table = overlaps([basis for _, basis in members])
        np.add.at(sums, (owners[:, None], owners[None, :]), table)
        np.add.at(counts, (owners[:, None], owners[None, :]), 1)
    means = np.full((groups, groups), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
