"""Weighted sums of adapters, exact or rounded to a rank."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lotrtensor.core.fit.truncate import truncate_tucker2
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError
from lotrtensor.peft.config import LotrConfig, write_group
from lotrtensor.peft.experts import cores_of
from lotrtensor.peft.layer import Embedding, LotrLayer
from lotrtensor.torch.groups import GroupPlan, check_rank
from lotrtensor.torch.numbers import GroupNumbers

COMBINATIONS = ("svd", "cat", "linear")


@dataclass(frozen=True)
class _Cell:
    """Layers for which every adapter has one pair of factors: a group that the sum can have."""

    name: str
    layers: dict[str, LotrLayer]
    adapters: dict[str, float]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the slices: the layers, or every expert of them."""
        adapter = next(iter(self.adapters))
        found = (cores_of(path, layer, adapter) for path, layer in self.layers.items())
        return tuple(name for cores in found for name, _ in cores)

    def terms(self) -> Iterator[Tucker2]:
        """Weighted slices of each adapter; those of adapters that share factors as one."""
        by_factors: dict[int, list[str]] = {}
        first = next(iter(self.layers.values()))
        for adapter in self.adapters:
            by_factors.setdefault(id(first.lotr_shared[adapter]), []).append(adapter)
        for together in by_factors.values():
            factors = first.lotr_shared[together[0]]
            cores = [
                torch.stack([self.adapters[a] * core for a, core in own.items()]).sum(0)
                for layer in self.layers.values()
                for own in _scaled_cores(layer, together)
            ]
            yield Tucker2(_wide(factors.left), torch.stack(cores), _wide(factors.right))


def weighted_sum(
    layers: Mapping[str, LotrLayer],
    weights: Mapping[str, float],
    combination_type: str,
    svd_rank: int | tuple[int, int] | None,
) -> tuple[list[GroupNumbers], float]:
    """Return the groups of Σ w_a ΔW_a, and the relative error of what they hold.

    Layers that share factors in every adapter share them in the sum. The factors stand side by
    side, the cores on the diagonal; that is exact, and HOSVD with HOOI rounds it.

    Parameters
    ----------
    layers : mapping of str to LotrLayer
        Layers that have a core of their own, by path.
    weights : mapping of str to float
        Weight of each adapter.
    combination_type : str
        ``"cat"``, ``"linear"`` or ``"svd"``; see `LotrModel.add_weighted_adapter`.
    svd_rank : int, (int, int) or None
        Rank (p, q) for ``"svd"``; the largest of the adapters if None.

    Raises
    ------
    UnsupportedAdapterError
        If ``"linear"`` meets adapters that do not share factors, or one has private factors.
    RankError
        If ``svd_rank`` is no rank.
    """
    _check_shared_alone(layers, weights)
    groups: list[GroupNumbers] = []
    lost2 = whole2 = 0.0
    for cell in _cells(layers, weights):
        terms = list(cell.terms())
        if combination_type == "linear" and len(terms) > 1:
            raise UnsupportedAdapterError(
                f"combination_type 'linear' adds up cores, and the adapters have factors of their "
                f"own in group {cell.name!r}; use 'cat', which is exact, or 'svd'"
            )
        exact = terms[0]
        for term in terms[1:]:
            exact = exact + term
        (_, m, n), (p, q) = exact.shape, exact.rank
        found = exact.orthogonalised() if p > m or q > n else exact
        if combination_type == "svd":
            found = _rounded(found, _rank(svd_rank, terms))
        stored = Tucker2(*(_wide(x.float()) for x in (found.left, found.core, found.right)))
        lost2 += (exact - stored).norm2()
        whole2 += exact.norm2()
        plan = GroupPlan(
            name=cell.name,
            modules=cell.modules,
            shape=(m, n),
            rank=stored.rank,
            scale=1.0,
            slice_ranks=(min(stored.rank),) * len(cell.modules),
            embedding=isinstance(next(iter(cell.layers.values())), Embedding),
        )
        groups.append(GroupNumbers(plan, stored.left, list(stored.core), stored.right))
    return groups, math.sqrt(lost2 / whole2) if whole2 else 0.0


def weighted_config(first: Any, groups: Sequence[GroupNumbers]) -> LotrConfig:
    """Return the config of a sum: that of the first adapter, with the groups of the sum."""
    config: LotrConfig = copy.copy(first)
    ranks = [group.plan.rank for group in groups]
    config.r = (max(p for p, _ in ranks), max(q for _, q in ranks))
    config.groups = [write_group(group.plan) for group in groups]
    config.target_modules = None  # the groups say it
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.train, config.init = "all", "orthogonal"
    return config


def check_weighted(
    configs: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    unused: Mapping[str, object],
) -> dict[str, float]:
    """Return the weight of every adapter.

    Raises
    ------
    FormatError
        If an adapter does not exist, or the new one does.
    DataError
        If the weights are not one finite number an adapter, or an adapter occurs twice.
    UnsupportedAdapterError
        If the combination has no meaning for LoTR, or an adapter trains more than its update.
    """
    missing = [name for name in adapters if name not in configs]
    if missing or adapter_name in configs:
        what = f"no adapter {missing[0]!r}" if missing else f"an adapter {adapter_name!r} already"
        raise FormatError(f"the model has {what}; it has {', '.join(map(repr, configs))}")
    finite = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if not adapters or len(weights) != len(adapters) or not finite:
        raise DataError(
            f"weights is {list(weights)!r} for {len(adapters)} adapters; expected one finite "
            "number for each, and an adapter at the least"
        )
    if len(set(adapters)) < len(adapters):
        raise DataError(f"an adapter occurs twice in {list(adapters)!r}; add up its weights")
    if combination_type not in COMBINATIONS:
        raise UnsupportedAdapterError(
            f"combination_type is {combination_type!r}, which picks single entries of factors or "
            "of ΔW; the factors of a LoTR are known only up to a change of basis, and ΔW is not "
            f"built: choose one of {', '.join(map(repr, COMBINATIONS))}"
        )
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise UnsupportedAdapterError(
            f"{given[0]} has no meaning for combination_type {combination_type!r} of a LoTR; "
            "leave it out"
        )
    chosen = {name: configs[name] for name in adapters}
    _check_configs(chosen)
    return dict(zip(adapters, map(float, weights), strict=True))


def _check_configs(configs: Mapping[str, Any]) -> None:
    for name, config in configs.items():
        for key in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, key, None):
                raise UnsupportedAdapterError(
                    f"adapter {name!r} has {key}, and what is trained in full has no weighted sum "
                    "here; add up adapters without it"
                )
        if not isinstance(config, LotrConfig) or config.bias != "none":
            raise UnsupportedAdapterError(
                f"adapter {name!r} trains biases or is no LoTR; only updates of weights add up"
            )
    if len({config.ensure_weight_tying for config in configs.values()}) > 1:
        raise UnsupportedAdapterError(
            "some of the adapters have ensure_weight_tying and some do not, so that the tied "
            "layers would need updates of their own; add up adapters that agree"
        )


def _check_shared_alone(layers: Mapping[str, LotrLayer], adapters: Iterable[str]) -> None:
    for adapter, (path, layer) in itertools.product(adapters, layers.items()):
        if layer.private(adapter) is not None:
            raise UnsupportedAdapterError(
                f"adapter {adapter!r} has private factors in {path}, as compressed adapters do, "
                "which have no weighted sum here; convert the adapters to LoTR (lotr export, lotr "
                "convert) and add those up"
            )


def _cells(layers: Mapping[str, LotrLayer], weights: Mapping[str, float]) -> Iterator[_Cell]:
    cells: dict[tuple[int, ...], dict[str, LotrLayer]] = {}
    for path, layer in layers.items():
        own = {a: id(layer.lotr_shared[a]) for a in weights if a in layer.lotr_core}
        if own:
            cells.setdefault(tuple(own.get(a, 0) for a in weights), {})[path] = layer
    taken: set[str] = set()
    for members in cells.values():
        first = next(iter(members.values()))
        kind = next(iter(members)).rpartition(".")[2]
        numbered = (f"{kind}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([kind], numbered) if name not in taken)
        taken.add(name)
        yield _Cell(name, members, {a: w for a, w in weights.items() if a in first.lotr_core})


def _rank(svd_rank: int | tuple[int, int] | None, terms: Sequence[Tucker2]) -> tuple[int, int]:
    if svd_rank is not None:
        return check_rank(svd_rank)
    return max(t.rank[0] for t in terms), max(t.rank[1] for t in terms)


def _rounded(exact: Tucker2, rank: tuple[int, int]) -> Tucker2:
    pair = min(rank[0], exact.rank[0]), min(rank[1], exact.rank[1])
    return exact if pair == exact.rank else truncate_tucker2(exact, pair)


def _scaled_cores(layer: LotrLayer, adapters: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Iterate over the slices of a layer, one or its experts: a core in each adapter."""
    own = {a: [layer.lotr_scale[a] * _wide(c) for _, c in cores_of("", layer, a)] for a in adapters}
    for cores in zip(*own.values(), strict=True):
        yield dict(zip(own, cores, strict=True))


def _wide(x: Tensor) -> Tensor:
    return x.detach().cpu().double()
