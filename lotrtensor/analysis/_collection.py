"""What the adapters of a collection have to do with one another: alike, apart, or the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.analysis.rows import Collection, CollectionRow, Duplicate
from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.options import check_number
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import OptionError
from lotrtensor.verbs._compare import lora_factors

COLUMNS = 1024
"""Columns of thin factors that are multiplied with all others at a time: so many rows in memory."""


def analyze_collection(
    adapters: Mapping[str, Adapter], *, threshold: float = 0.5, same: float = 0.01
) -> Collection:
    """Tell which adapters of one base model are alike: clusters, outliers, duplicates.

    Only the products B A enter, so that the gauge, rank and scale of a file do not matter. Modules
    are matched by their paths; one that an adapter lacks is zero in it.

    Parameters
    ----------
    adapters : mapping of str to adapter
        Adapters by name; those of a pack are
        ``{name: packed.unpack(name) for name in packed.names}``.
    threshold : float
        Mean cosine, in (0, 1), from which on clusters are joined (average linkage).
    same : float
        Two adapters are duplicates if ‖ΔW − ΔW'‖ is at most so much of the larger norm.

    Returns
    -------
    Collection
        Cosines of every two, a row an adapter, and pairs of duplicates.

    Raises
    ------
    OptionError
        If there are no adapters, or a number is out of its range.
    UnsupportedAdapterError
        If one is no adapter.

    Notes
    -----
    ⟨ΔW, ΔW'⟩ is the sum of ⟨BᵀB', A A'ᵀ⟩ over modules: all thin factors of a module are multiplied
    at once, a million products a pair of adapters of rank 16 and width 4096.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> family = {"a": adapter, "b": lt.truncate(adapter, rank=6), "again": adapter}
    >>> found = lt.analyze_collection(family)
    >>> [row.cluster for row in found.rows], found.duplicates[0][:2]
    ([1, 1, 1], ('a', 'again'))
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise OptionError(
            f"adapters is a {type(adapters).__name__}; expected at least one adapter, by name"
        )
    for name, value in (("threshold", threshold), ("same", same)):
        if not 0 < check_number(value, name) < 1:
            raise OptionError(f"{name} is {value}; expected a number between 0 and 1")
    for adapter in adapters.values():
        check_adapter(adapter)
    names = tuple(map(str, adapters))
    products = _products([lora_factors(adapter) for adapter in adapters.values()])
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    safe = np.where(norms > 0, norms, 1.0)
    cosine = np.clip(products / np.outer(safe, safe), -1.0, 1.0)
    clusters = _clusters(cosine, threshold)
    rows = tuple(_row(i, names, norms, cosine, clusters) for i in range(len(names)))
    return Collection(names, cosine, rows, tuple(_duplicates(names, products, norms, same)))


def _row(
    i: int, names: tuple[str, ...], norms: np.ndarray, cosine: np.ndarray, clusters: np.ndarray
) -> CollectionRow:
    cluster = int(clusters[i])
    if len(names) == 1:
        return CollectionRow(names[i], float(norms[i]), None, None, cluster, False)
    j = int(np.argmax(np.where(np.arange(len(names)) == i, -np.inf, cosine[i])))
    alone = int(np.sum(clusters == cluster)) == 1
    return CollectionRow(names[i], float(norms[i]), names[j], float(cosine[i, j]), cluster, alone)


def _products(factors: list[Mapping[str, LowRankStack]]) -> np.ndarray:
    """Inner products of every two adapters, over all modules of one shape."""
    count = len(factors)
    sums = np.zeros((count, count))
    places: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, own in enumerate(factors):
        for name, stack in own.items():
            places.setdefault((name, stack.shape), []).append(i)
    for (name, _), members in places.items():
        pairs = [factors[i][name].factors(0) for i in members]
        lefts = [to_numpy(b).astype(np.float64) for b, _ in pairs]
        rights = [to_numpy(a).astype(np.float64) for _, a in pairs]
        sums[np.ix_(members, members)] += _module_products(lefts, rights)
    return 0.5 * (sums + sums.T)


def _module_products(lefts: list[np.ndarray], rights: list[np.ndarray]) -> np.ndarray:
    """⟨B A, B' A'⟩ of every two, blocks of columns at a time."""
    left, right = np.hstack(lefts), np.vstack(rights)
    starts = np.cumsum([0, *(b.shape[1] for b in lefts[:-1])])
    found = np.zeros((len(lefts), len(lefts)))
    for some in _blocks([b.shape[1] for b in lefts]):
        own, other = np.hstack(lefts[some]), np.vstack(rights[some])
        both = (own.T @ left) * (other @ right.T)
        inside = starts[some] - starts[some.start]
        sums = np.add.reduceat(both, inside, axis=0)
        found[some] = np.add.reduceat(sums, starts, axis=1)
    return found


def _blocks(counts: list[int]) -> Iterator[slice]:
    start, total = 0, 0
    for i, count in enumerate(counts):
        if total and total + count > COLUMNS:
            yield slice(start, i)
            start, total = i, 0
        total += count
    yield slice(start, len(counts))


def _clusters(cosine: np.ndarray, threshold: float) -> np.ndarray:
    """Cluster of every adapter, numbered from 1 by first appearance."""
    if len(cosine) == 1:
        return np.ones(1, int)
    distances = np.maximum(1.0 - cosine, 0.0)
    np.fill_diagonal(distances, 0.0)
    tree = hierarchy.linkage(squareform(distances, checks=False), method="average")
    labels = hierarchy.fcluster(tree, 1.0 - threshold, criterion="distance")
    order = list(dict.fromkeys(labels.tolist()))
    return np.array([order.index(label) + 1 for label in labels.tolist()])


def _duplicates(
    names: tuple[str, ...], products: np.ndarray, norms: np.ndarray, same: float
) -> Iterator[Duplicate]:
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            largest = max(norms[i], norms[j])
            distance2 = max(norms[i] ** 2 + norms[j] ** 2 - 2.0 * products[i, j], 0.0)
            distance = math.sqrt(distance2) / largest if largest else 0.0
            if distance <= same:
                yield Duplicate(names[i], names[j], distance)
