"""Whole-adapter size against error, for every representation that a user could choose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lotrtensor.adapters.modules import LoraModule
from lotrtensor.analysis.rows import AdapterPoint, Curve, CurvePoint, GroupPoint
from lotrtensor.core.clusters import cluster
from lotrtensor.core.fit.profile import Profile, profile, profile_between, relative
from lotrtensor.core.fit.reduction import EXACT_FLOPS, exact_flops
from lotrtensor.core.ranks.allocation import allocate_budget, allocate_tolerance, allocation_walk
from lotrtensor.core.ranks.curve import pair_at
from lotrtensor.core.ranks.terms import ranks_for_budget, ranks_for_tolerance, truncation_error
from lotrtensor.core.rates import truncation_curve
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import RankError

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
    def name(self) -> str:
        """What people call it."""

    def within(self, parameters: int) -> CurvePoint | None:
        """The smallest error for at most so many parameters; None where it needs more."""

    def reaching(self, tolerance: float) -> CurvePoint | None:
        """The smallest size of at most that error; None where it does not get there."""

    def curve(self) -> Curve:
        """Size against error."""


@dataclass(frozen=True, eq=False)
class Lotr:
    """LoTR with ranks shared out over the groups by energy per parameter.

    ``members`` are the modules of every group, ``profiles`` their decompositions.
    """

    name: str
    members: tuple[tuple[LoraModule, ...], ...]
    profiles: tuple[Profile, ...]

    @property
    def exact(self) -> bool:
        """Whether no group was too large for the exact problem."""
        return all(profile.exact for profile in self.profiles)

    @property
    def norm2(self) -> float:
        """Σ ‖ΔW‖² over all groups."""
        return sum(profile.norm2 for profile in self.profiles)

    def pairs_within(self, parameters: int) -> list[Pair] | None:
        """Ranks of every group for at most so many parameters."""
        curves = [profile.curve for profile in self.profiles]
        if parameters < sum(int(curve.parameters[0]) for curve in curves):
            return None
        return self._pairs(allocate_budget(curves, parameters))

    def within(self, parameters: int) -> CurvePoint | None:
        """The smallest predicted error for at most so many parameters."""
        if parameters > self._seen:
            return None
        pairs = self.pairs_within(parameters)
        return None if pairs is None else self.point(pairs)

    @property
    def _seen(self) -> float:
        """Size up to which the curves are known."""
        if self.exact:
            return math.inf
        return sum(int(profile.curve.parameters[-1]) for profile in self.profiles)

    def reaching(self, tolerance: float) -> CurvePoint | None:
        """The smallest size found of at most that predicted error."""
        try:
            chosen = allocate_tolerance([profile.curve for profile in self.profiles], tolerance)
        except RankError:
            return None  # a matrix-free profile ends before that
        return self.point(self._pairs(chosen))

    def curve(self) -> Curve:
        """Breakpoints of the allocation, thinned out, and what lies in the gaps between them."""
        walk = allocation_walk([profile.curve for profile in self.profiles])
        sizes = [
            sum(int(p.curve.parameters[i]) for p, i in zip(self.profiles, chosen, strict=True))
            for chosen in walk
        ]
        points = [self.point(self._pairs(walk[i])) for i in thinned(sizes)]
        # A line across a gap would promise errors that no ranks have.
        found = [points[0]]
        for before, after in itertools.pairwise(points):
            steps = math.ceil(math.log(after.parameters / before.parameters) / math.log(GAP))
            sizes = np.geomspace(before.parameters, after.parameters, steps + 1)[1:-1].tolist()
            between = (self.within(int(size)) for size in sizes)
            found += [
                point for point in between if point and point.parameters > found[-1].parameters
            ]
            found.append(after)
        return Curve(self.name, tuple(found))

    def point(self, pairs: Sequence[Pair]) -> CurvePoint:
        """Size, error and bound at given ranks."""
        squares = [p.squares(pair) for p, pair in zip(self.profiles, pairs, strict=True)]
        size = sum(p.parameters(pair) for p, pair in zip(self.profiles, pairs, strict=True))
        error2, bound2 = (sum(column) for column in zip(*squares, strict=True))
        return CurvePoint(size, relative(error2, self.norm2), relative(bound2, self.norm2))

    def adapter_points(self, choices: Sequence[Sequence[Pair]]) -> list[AdapterPoint]:
        """Points with their groups and slices, one for every choice of ranks."""
        columns = [
            self._group_points(g, [pairs[g] for pairs in choices])
            for g in range(len(self.profiles))
        ]
        rows = zip(*columns, strict=True)
        return [
            _adapter_point(self.point(pairs), groups)
            for pairs, groups in zip(choices, rows, strict=True)
        ]

    def _group_points(self, group: int, pairs: Sequence[Pair]) -> list[GroupPoint]:
        profile = self.profiles[group]
        norms2 = np.where(profile.norms2 > 0, profile.norms2, 1.0)
        errors = np.sqrt(profile.slice_errors2(pairs) / norms2)
        return [
            GroupPoint(*pair, profile.parameters(pair), *profile.errors(pair), slice_errors)
            for pair, slice_errors in zip(pairs, errors, strict=True)
        ]

    def _pairs(self, chosen: Sequence[int]) -> list[Pair]:
        return [pair_at(p.curve, i) for p, i in zip(self.profiles, chosen, strict=True)]


def _adapter_point(point: CurvePoint, groups: tuple[GroupPoint, ...]) -> AdapterPoint:
    return AdapterPoint(point.parameters, point.relative_error, point.lower_bound or 0.0, groups)


@dataclass(frozen=True, eq=False)
class TruncatedLora:
    """Every ΔW at a lower rank of its own, exactly; ``one_rank`` for all, or the best ranks."""

    name: str
    spectra: Sequence[np.ndarray]
    costs: Sequence[int]
    one_rank: bool

    def within(self, parameters: int) -> CurvePoint | None:
        """The smallest error for at most so many parameters."""
        if parameters < sum(self.costs):
            return None
        found = ranks_for_budget(self.spectra, self.costs, parameters, uniform=self.one_rank)
        return self._point(found)

    def reaching(self, tolerance: float) -> CurvePoint:
        """The smallest size of at most that error."""
        found = ranks_for_tolerance(self.spectra, self.costs, tolerance, uniform=self.one_rank)
        return self._point(found)

    def curve(self) -> Curve:
        """One point a rank, or one for each of the best terms, thinned out."""
        points = truncation_curve(self.spectra, self.costs, optimal=not self.one_rank)
        kept = thinned([point.parameters for point in points])
        return Curve(self.name, tuple(CurvePoint(*points[i], None) for i in kept))

    def _point(self, ranks: Sequence[int]) -> CurvePoint:
        size = sum(c * r for c, r in zip(self.costs, ranks, strict=True))
        return CurvePoint(size, truncation_error(self.spectra, ranks), None)


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


def profile_group(modules: Sequence[LoraModule]) -> Profile:
    """Decompose the updates of modules that would share factors."""
    stack = LowRankStack([module.B for module in modules], [module.A for module in modules])
    return profile(stack, slice_ranks=stack.ranks, widest=WIDEST)


def by_type(members: Sequence[Sequence[LoraModule]], profiles: Sequence[Profile]) -> Lotr:
    """LoTR with one pair of factors for all modules of a kind."""
    return Lotr("LoTR by type", tuple(map(tuple, members)), tuple(profiles))


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
    members, profiles = [], []
    for same in shapes.values():
        modules = tuple(module for g in same for module in types.members[g])
        found = _joined(modules, [types.profiles[g] for g in same])
        if found is None:
            return None
        members.append(modules)
        profiles.append(found)
    return Lotr("LoTR by shape", tuple(members), tuple(profiles))


def _joined(modules: Sequence[LoraModule], parts: Sequence[Profile]) -> Profile | None:
    if len(parts) == 1:
        return parts[0]
    stack = LowRankStack([module.B for module in modules], [module.A for module in modules])
    if exact_flops(stack) <= EXACT_FLOPS:
        return profile(stack, slice_ranks=stack.ranks)
    if not all(part.exact for part in parts):
        return None
    count = JOINED // len(parts)
    lefts, rights = zip(*(part.directions(count) for part in parts), strict=True)
    return profile_between(
        stack,
        np.concatenate(lefts, axis=1),
        np.concatenate(rights, axis=1),
        slice_ranks=stack.ranks,
    )


JOINED = 1024
"""Directions a side that the groups of one shape bring together."""


def clustered(types: Lotr, clusters: int = 2) -> Lotr | None:
    """Split the slices of every group among pairs of factors of their own.

    They are split at a quarter of the ranks that the group can need, as `convert` does it; on the
    small problem and from HOSVDs, which is as good a guide to who belongs to whom. None where no
    group has slices enough.
    """
    members, profiles = [], []
    for modules, group in zip(types.members, types.profiles, strict=True):
        small = group.problem.reduction.small
        if group.shape[0] <= clusters or not isinstance(small, LowRankStack):
            members.append(modules)
            profiles.append(group)
            continue
        for part in _partition(small, clusters):
            members.append(tuple(modules[k] for k in part))
            profiles.append(_part(group, small, part))
    name = f"LoTR, layers in {clusters} clusters"
    changed = len(members) > len(types.members)
    return Lotr(name, tuple(members), tuple(profiles)) if changed else None


def _partition(small: LowRankStack, clusters: int) -> list[list[int]]:
    """Indices of the slices of every cluster."""
    p, q = small.max_rank
    restarts = 4 if max(p, q) <= CHEAP else 0
    pair = max(1, p // 4), max(1, q // 4)
    labels = cluster(small, clusters, pair, restarts=restarts, method="hosvd").labels
    return [np.nonzero(labels == c)[0].tolist() for c in range(int(labels.max()) + 1)]


CHEAP = 128
"""Largest side of a small problem that clusters are looked for from several starts."""


def _part(group: Profile, small: LowRankStack, members: list[int]) -> Profile:
    """The profile of some slices, priced at the size of the whole matrices."""
    ranks = None if group.slice_ranks is None else [group.slice_ranks[k] for k in members]
    return profile(small.take(members), slice_ranks=ranks, sides=group.shape[1:], widest=WIDEST)
