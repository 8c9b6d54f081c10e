"""Whole-adapter size against error, for every representation that a user could choose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LoraModule, module_stack
from lotrtensor.analysis.rows import AdapterPoint, Curve, CurvePoint, GroupPoint, Kind
from lotrtensor.core.clusters import cluster
from lotrtensor.core.fit import tuning
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import exact_flops, reduce_between, reduce_stack
from lotrtensor.core.ranks.allocation import allocate_error, allocate_parameters, allocation_walk
from lotrtensor.core.ranks.curve import pair_at
from lotrtensor.core.ranks.goal import Goal
from lotrtensor.core.ranks.terms import ranks_for_parameters, ranks_for_tolerance, truncation_error
from lotrtensor.core.rates import truncation_curve
from lotrtensor.core.squared_error import SquaredError, relative_errors
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import RankError
from lotrtensor.verbs._fit_groups import GroupFit, fit_reduced
from lotrtensor.verbs._sources import source_group

WIDEST = 512
"""Directions a side that are looked at where a group is too large for the exact problem."""

POINTS = 96
"""Points of a curve, at most; a few more where it has gaps."""

GAP = 1.3
"""Ratio of two neighbouring sizes of a curve from which others are looked for between them."""

Pair = tuple[int, int]


class Representation(Protocol):
    """A way to store an adapter, at any size."""

    @property
    def kind(self) -> Kind:
        """Which one it is."""

    @property
    def name(self) -> str:
        """What people call it."""

    def within(self, size: int) -> CurvePoint | None:
        """The smallest error in at most so many bytes; None where it needs more."""

    def reaching(self, tolerance: float) -> CurvePoint | None:
        """The smallest size of at most that error; None where it does not get there."""

    def curve(self) -> Curve:
        """Size against error."""


@dataclass(frozen=True, eq=False)
class Lotr:
    """LoTR with ranks shared out over the groups by energy per parameter.

    ``members`` are the modules of every group, ``groups`` their decompositions,
    ``dtype`` the type that the adapter is stored in.
    """

    kind: Kind
    name: str
    members: tuple[tuple[LoraModule, ...], ...]
    groups: tuple[ReducedStack, ...]
    dtype: np.dtype

    @property
    def exact(self) -> bool:
        """Whether no group was too large for the exact problem."""
        return all(group.exact for group in self.groups)

    @property
    def norm2(self) -> float:
        """Σ ‖ΔW‖² over all groups."""
        return sum(group.norm2 for group in self.groups)

    def pairs_within(self, parameters: int) -> list[Pair] | None:
        """Ranks of every group for at most so many parameters."""
        curves = [group.curve for group in self.groups]
        if parameters < sum(int(curve.parameters[0]) for curve in curves):
            return None
        return self._pairs(allocate_parameters(curves, parameters))

    def within(self, size: int) -> CurvePoint | None:
        """The smallest predicted error in at most so many bytes."""
        parameters = size // self.dtype.itemsize
        if parameters > self._seen:
            return None
        pairs = self.pairs_within(parameters)
        return None if pairs is None else self.point(pairs)

    @property
    def _seen(self) -> float:
        """Size up to which the curves are known."""
        if self.exact:
            return math.inf
        return sum(int(group.curve.parameters[-1]) for group in self.groups)

    def reaching(self, tolerance: float) -> CurvePoint | None:
        """The smallest size of at most that error, by the curves; `convert` finds a smaller one."""
        curves = [group.curve for group in self.groups]
        try:
            chosen = allocate_error(curves, tolerance**2 * self.norm2)
        except RankError:
            return None
        return self.point(self._pairs(chosen))

    def converted(self, goal: Goal) -> LotrAdapter:
        """The adapter at a goal, refined and rounded to its storage type.

        Raises
        ------
        RankError
            If the goal is out of reach.
        """
        jobs = [
            GroupFit(source_group(str(g), modules, self.dtype), group)
            for g, (modules, group) in enumerate(zip(self.members, self.groups, strict=True))
        ]
        return LotrAdapter(fit_reduced(jobs, goal, self.dtype), {}, self.dtype)

    def curve(self) -> Curve:
        """Breakpoints of the allocation, thinned out, and what lies in the gaps between them."""
        walk = allocation_walk([group.curve for group in self.groups])
        sizes = [
            sum(int(p.curve.parameters[i]) for p, i in zip(self.groups, chosen, strict=True))
            for chosen in walk
        ]
        points = [self.point(self._pairs(walk[i])) for i in thinned(sizes)]
        # A line across a gap would promise errors that no ranks have.
        found = [points[0]]
        for before, after in itertools.pairwise(points):
            steps = math.ceil(math.log(after.bytes / before.bytes) / math.log(GAP))
            sizes = np.geomspace(before.bytes, after.bytes, steps + 1)[1:-1].tolist()
            between = (self.within(int(size)) for size in sizes)
            found += [point for point in between if point and point.bytes > found[-1].bytes]
            found.append(after)
        return Curve(self.kind, self.name, tuple(found))

    def point(self, pairs: Sequence[Pair]) -> CurvePoint:
        """Size, error and bound at given ranks."""
        rows = [group.truncated(pair) for group, pair in zip(self.groups, pairs, strict=True)]
        size = sum(group.parameters(pair) for group, pair in zip(self.groups, pairs, strict=True))
        error, bound = (sum(column, SquaredError()) for column in zip(*rows, strict=True))
        return CurvePoint(size * self.dtype.itemsize, error.relative, bound.relative, size)

    def adapter_points(self, choices: Sequence[Sequence[Pair]]) -> list[AdapterPoint]:
        """Points with their groups and slices, one for every choice of ranks."""
        columns = [
            self._group_points(g, [pairs[g] for pairs in choices]) for g in range(len(self.groups))
        ]
        rows = zip(*columns, strict=True)
        return [
            _adapter_point(self.point(pairs), groups)
            for pairs, groups in zip(choices, rows, strict=True)
        ]

    def _group_points(self, index: int, pairs: Sequence[Pair]) -> list[GroupPoint]:
        group = self.groups[index]
        slice_errors = relative_errors(group.slices_truncated2(pairs), group.norms2)
        points = []
        for pair, errors in zip(pairs, slice_errors, strict=True):
            error, bound = group.truncated(pair)
            size = group.parameters(pair) * self.dtype.itemsize
            points.append(GroupPoint(*pair, 0, size, error.relative, bound.relative, errors))
        return points

    def _pairs(self, chosen: Sequence[int]) -> list[Pair]:
        return [pair_at(p.curve, i) for p, i in zip(self.groups, chosen, strict=True)]


def _adapter_point(point: CurvePoint, groups: tuple[GroupPoint, ...]) -> AdapterPoint:
    return AdapterPoint(point.bytes, point.relative_error, point.lower_bound, groups)


@dataclass(frozen=True, eq=False)
class TruncatedLora:
    """Every ΔW at a lower rank of its own, exactly: one rank for all, or the best ranks."""

    NAMES: ClassVar[dict[Kind, str]] = {
        Kind.LORA_BEST_RANKS: "truncated LoRA, best ranks",
        Kind.LORA_ONE_RANK: "truncated LoRA, one rank",
    }

    kind: Kind
    spectra: Sequence[np.ndarray]
    costs: Sequence[int]
    itemsize: int

    @property
    def name(self) -> str:
        """What people call it."""
        return self.NAMES[self.kind]

    @property
    def one_rank(self) -> bool:
        """Whether all modules have the same rank."""
        return self.kind is Kind.LORA_ONE_RANK

    def within(self, size: int) -> CurvePoint | None:
        """The smallest error in at most so many bytes."""
        parameters = size // self.itemsize
        if parameters < sum(self.costs):
            return None
        found = ranks_for_parameters(self.spectra, self.costs, parameters, uniform=self.one_rank)
        return self._point(found)

    def reaching(self, tolerance: float) -> CurvePoint:
        """The smallest size of at most that error."""
        found = ranks_for_tolerance(self.spectra, self.costs, tolerance, uniform=self.one_rank)
        return self._point(found)

    def curve(self) -> Curve:
        """One point per rank, or one for each of the best terms, thinned out."""
        points = truncation_curve(self.spectra, self.costs, optimal=not self.one_rank)
        kept = thinned([point.parameters for point in points])
        rows = (points[i] for i in kept)
        points_ = (self._row(row.parameters, row.relative_error) for row in rows)
        return Curve(self.kind, self.name, tuple(points_))

    def _point(self, ranks: Sequence[int]) -> CurvePoint:
        size = sum(c * r for c, r in zip(self.costs, ranks, strict=True))
        return self._row(size, truncation_error(self.spectra, ranks))

    def _row(self, parameters: int, error: float) -> CurvePoint:
        return CurvePoint(parameters * self.itemsize, error, None, parameters)


def thinned(sizes: Sequence[int], points: int = POINTS) -> list[int]:
    """Indices of at most ``points`` of the rising ``sizes``, evenly on a logarithmic scale.

    The first and the last are among them.
    """
    if len(sizes) <= points:
        return list(range(len(sizes)))
    wanted = np.geomspace(sizes[0], sizes[-1], points)
    found = np.searchsorted(sizes, wanted)
    kept: list[int] = np.unique(np.clip(found, 0, len(sizes) - 1)).tolist()
    return kept


def reduce_group(modules: Sequence[LoraModule]) -> ReducedStack:
    """Decompose the updates of modules that would share factors."""
    stack = module_stack(modules)
    return ReducedStack(stack, reduce_stack(stack, (WIDEST, WIDEST)), slice_ranks=stack.ranks)


def by_type(
    members: Sequence[Sequence[LoraModule]], groups: Sequence[ReducedStack], dtype: np.dtype
) -> Lotr:
    """LoTR with one pair of factors for all modules of a kind."""
    return Lotr(Kind.LOTR_BY_TYPE, "LoTR by type", tuple(map(tuple, members)), tuple(groups), dtype)


def by_shape(types: Lotr) -> Lotr | None:
    """LoTR with one pair of factors for all matrices of a shape, from the groups by type.

    Where the exact problem is too large, the slices are looked at between the leading directions
    of the groups that they come from. None where that would be the same as by type, or where those
    groups are too large themselves.
    """
    shapes: dict[tuple[tuple[int, int], bool], list[int]] = {}
    for g, modules in enumerate(types.members):
        shapes.setdefault((modules[0].shape, modules[0].embedding), []).append(g)
    if len(shapes) == len(types.members):
        return None
    members, groups = [], []
    for same in shapes.values():
        modules = tuple(module for g in same for module in types.members[g])
        found = _joined(modules, [types.groups[g] for g in same])
        if found is None:
            return None
        members.append(modules)
        groups.append(found)
    return Lotr(Kind.LOTR_BY_SHAPE, "LoTR by shape", tuple(members), tuple(groups), types.dtype)


def _joined(modules: Sequence[LoraModule], parts: Sequence[ReducedStack]) -> ReducedStack | None:
    if len(parts) == 1:
        return parts[0]
    stack = module_stack(modules)
    if exact_flops(stack) <= JOINED_FLOPS:
        return ReducedStack(stack, reduce_stack(stack, kind="exact"), slice_ranks=stack.ranks)
    if not all(part.exact for part in parts):
        return None
    count = JOINED // len(parts)
    lefts, rights = zip(*(part.directions(count) for part in parts), strict=True)
    spaces = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=1)
    return ReducedStack(stack, reduce_between(stack, *spaces), slice_ranks=stack.ranks)


JOINED_FLOPS = tuning.EXACT_FLOPS
"""What the exact reduction of all matrices of a shape may cost."""

JOINED = 1024
"""Directions a side that the groups of one shape bring together."""


def clustered(types: Lotr, clusters: int = 2) -> Lotr | None:
    """Split the slices of every group among pairs of factors of their own.

    They are split at a quarter of the ranks that the group can need, as `convert` does it; on the
    small problem and from HOSVDs, which is as good a guide to who belongs to whom. None where no
    group has slices enough.
    """
    members, groups = [], []
    for modules, group in zip(types.members, types.groups, strict=True):
        small = group.reduction.small
        if group.shape[0] <= clusters or not isinstance(small, LowRankStack):
            members.append(modules)
            groups.append(group)
            continue
        for part in _partition(small, clusters):
            members.append(tuple(modules[k] for k in part))
            groups.append(group.part(part, (WIDEST, WIDEST)))
    name = f"LoTR, layers in {clusters} clusters"
    if len(members) == len(types.members):
        return None
    return Lotr(Kind.LOTR_CLUSTERED, name, tuple(members), tuple(groups), types.dtype)


def _partition(small: LowRankStack, clusters: int) -> list[list[int]]:
    """Indices of the slices of every cluster."""
    p, q = small.max_rank
    restarts = 4 if max(p, q) <= CHEAP else 0
    pair = max(1, p // 4), max(1, q // 4)
    labels = cluster(small, clusters, pair, restarts=restarts, method="hosvd").labels
    return [np.nonzero(labels == c)[0].tolist() for c in range(int(labels.max()) + 1)]


CHEAP = 128
"""Largest side of a small problem that clusters are looked for from several starts."""
