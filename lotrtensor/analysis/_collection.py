"""What the adapters of a collection have to do with one another: alike, apart, or the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.analysis.rows import Collection, CollectionRow, Duplicate
from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.options import check_number
from lotrtensor.core.similarity import average_linkage, cosines, pair_products
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import OptionError
from lotrtensor.verbs._compare import lora_factors


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
    cosine = cosines(products)
    clusters = average_linkage(cosine, threshold=threshold)
    rows = tuple(_row(i, names, norms, cosine, clusters) for i in range(len(names)))
    return Collection(names, cosine, rows, tuple(_duplicates(names, products, norms, same)))


def _row(
    i: int, names: tuple[str, ...], norms: np.ndarray, cosine: np.ndarray, clusters: np.ndarray
) -> CollectionRow:
    cluster = int(clusters[i]) + 1
    if len(names) == 1:
        return CollectionRow(names[i], float(norms[i]), None, None, cluster, False)
    j = int(np.argmax(np.where(np.arange(len(names)) == i, -np.inf, cosine[i])))
    alone = int(np.sum(clusters == clusters[i])) == 1
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
        lefts, rights = [to_numpy(b) for b, _ in pairs], [to_numpy(a) for _, a in pairs]
        sums[np.ix_(members, members)] += pair_products(lefts, rights)
    return 0.5 * (sums + sums.T)


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
