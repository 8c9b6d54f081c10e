"""How alike several adapters are, from their products alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lotrtensor.adapters.grouping import module_kind
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.analysis.rows import Similarity
from lotrtensor.core.similarity import inner
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import OptionError
from lotrtensor.verbs._compare import lora_factors

Factors = Mapping[str, LowRankStack]


def similarity(adapters: Sequence[Adapter]) -> Similarity:
    """Cosines between the updates of adapters, matched by the paths of their modules.

    A module that only one of them has counts as zero in the other. Only the products B A enter:
    the same adapter in another gauge has cosine 1.

    Parameters
    ----------
    adapters : sequence of LoraAdapter or LotrAdapter
        At least one.

    Returns
    -------
    Similarity
        Cosines of every two, over all modules and by kind.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> found = lt.similarity([adapter, lt.truncate(adapter, rank=4)])
    >>> found.cosine.shape, bool(0.9 < found.cosine[0, 1] < 1)
    ((2, 2), True)
    """
    if not isinstance(adapters, Sequence) or not adapters:
        raise OptionError(f"adapters is a {type(adapters).__name__}; expected at least one adapter")
    for adapter in adapters:
        check_adapter(adapter)
    factors = [lora_factors(adapter) for adapter in adapters]
    norms2 = [_by_kind({n: float(s.norms2()[0]) for n, s in f.items()}) for f in factors]
    kinds = sorted({kind for found in norms2 for kind in found})
    count = len(adapters)
    cosine, shared = np.full((count, count), np.nan), np.zeros((count, count), int)
    by_kind = {kind: np.full((count, count), np.nan) for kind in kinds}
    for i in range(count):
        for j in range(i, count):
            products = _products(factors[i], factors[j])
            shared[i, j] = shared[j, i] = len(products)
            if not products:
                continue
            sums = _by_kind(products)
            whole = _cosine(sum(sums.values()), sum(norms2[i].values()), sum(norms2[j].values()))
            cosine[i, j] = cosine[j, i] = whole
            for kind, product in sums.items():
                table = by_kind[kind]
                table[i, j] = table[j, i] = _cosine(product, norms2[i][kind], norms2[j][kind])
    return Similarity(cosine, by_kind, shared)


def _products(a: Factors, b: Factors) -> dict[str, float]:
    """⟨ΔW, ΔW'⟩ of every module that both have in one shape."""
    found = {}
    for name in (name for name in a if name in b):
        one, other = a[name], b[name]  # which of some adapters are made here and now
        if one.shape == other.shape:
            found[name] = inner(one, other)
    return found


def _by_kind(numbers: dict[str, float]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for name, number in numbers.items():
        sums.setdefault(module_kind(name), []).append(number)
    return {kind: math.fsum(found) for kind, found in sums.items()}


def _cosine(product: float, a2: float, b2: float) -> float:
    return max(-1.0, min(1.0, product / math.sqrt(a2 * b2))) if a2 and b2 else 0.0
