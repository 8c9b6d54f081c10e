"""analyze: what every representation of an adapter costs and keeps, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.analysis.in_bits import FORMS, forms_in_bits
from lotrtensor.analysis.recommend import recommend, recommended_size
from lotrtensor.analysis.representations import (
    Lotr,
    Representation,
    TruncatedLora,
    by_shape,
    by_type,
    clustered,
    reduce_group,
    thinned,
)
from lotrtensor.analysis.rows import Analysis, Choice, GroupAnalysis, Kind, Target
from lotrtensor.analysis.sharing import (
    compared,
    kind_overlaps,
    layer_label,
    module_rows,
    module_svds,
)
from lotrtensor.analysis.steps import steps
from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.options import check_number, shown
from lotrtensor.core.ranks.goal import Goal
from lotrtensor.core.rates import rate_points
from lotrtensor.core.slice_svd import SliceSvd
from lotrtensor.core.subspaces import Subspaces, chance, leading_subspaces, overlaps
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import OptionError
from lotrtensor.verbs._compression_job import CompressionJob, compression_job
from lotrtensor.verbs._fit_groups import Progress
from lotrtensor.verbs._sources import lora_groups

SHARES = (50, 35, 25, 17, 12, 10, 6, 3)
"""Sizes that are compared, in percent of the adapter's bytes."""

TOLERANCES = (0.1, 0.3, 0.5)
"""Errors whose sizes are compared: 99, 91 and 75 percent of the squared norm are kept."""

RATES = 64
"""Rows of a group's rate table, at most."""

Members = list[tuple[str, list[LoraModule]]]


@on_one_thread
def analyze(
    adapter: Adapter, shares: Sequence[float] = SHARES, progress: Progress | None = None
) -> Analysis:
    """Compare an adapter in bits, LoTR and truncated LoRA at every size, in bytes.

    Parameters
    ----------
    adapter : LoraAdapter, LotrAdapter or CompressedAdapter
        The adapter; what is no LoRA is taken as the one that it exports to.
    shares : sequence of float
        Sizes of the table, in percent of the adapter's bytes.
    progress : callable, optional
        Told of every group before it is decomposed, and of the steps after that.

    Returns
    -------
    Analysis
        A representation that does not get down to a size has no row there: a LoRA keeps rank 1
        for every module.

    Notes
    -----
    One decomposition a group prices all sizes. Errors in bits are predicted from a model of
    normal columns, those of LoTR by the truncated HOSVD, at most √2 times the smallest possible.
    The recommended size is made and measured.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 3, 12, 2))
    >>> modules = [lt.LoraModule(f"layers.{k}.query", b, a.T) for k, (b, a) in enumerate(zip(B, A))]
    >>> analysis = lt.analyze(lt.LoraAdapter(tuple(modules), {}, np.dtype("float32")), shares=(50,))
    >>> [group.name for group in analysis.groups], analysis.source_parameters
    (['query'], 144)
    """
    check_adapter(adapter)
    shares = _check_shares(shares)
    lora = adapter if isinstance(adapter, LoraAdapter) else adapter.to_lora()
    members = lora_groups(lora, "type")
    report = _Stages(progress, len(members) + 4)
    reduced = []
    for name, group in members:
        report(name)
        reduced.append(reduce_group(group))
    svds = [module_svds(group) for _, group in members]
    types = by_type([group for _, group in members], reduced, lora.dtype)
    job = compression_job(lora, at_once=True)
    others = _others(types, members, svds, report)
    every: list[Representation] = [*forms_in_bits(job), types, *others]
    report("sizes")
    choices = _choices(every, shares, lora)
    stops = steps(job, types, every)
    report("the recommended size")
    choices += _measured(every, choices, job)
    advice = recommend(choices, lora.bytes)
    subspaces = [[leading_subspaces(svd) for svd in group] for group in svds]
    kinds = compared(len(members))
    left, right = kind_overlaps(
        [[layer_label(module.name) for module in members[g][1]] for g in kinds],
        [subspaces[g] for g in kinds],
    )
    return Analysis(
        source_parameters=lora.parameters,
        source_bytes=lora.bytes,
        itemsize=lora.dtype.itemsize,
        choices=tuple(choices),
        recommendation=advice.text,
        recommended=advice.choice,
        targets=_targets(every),
        curves=tuple(representation.curve() for representation in every),
        steps=stops,
        groups=tuple(map(_group, members, reduced, svds, subspaces)),
        left_overlap=left,
        right_overlap=right,
        compared=kinds,
    )


def _check_shares(shares: Sequence[float]) -> list[float]:
    if not isinstance(shares, Sequence) or isinstance(shares, str | bytes):
        raise OptionError(f"shares is {shown(shares)}; expected numbers, in percent of the bytes")
    return [check_number(share, "a share") for share in shares]


class _Stages:
    """Tells a progress hook of one stage after the other."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, name: str) -> None:
        if self._progress:
            self._progress(name, self._done, self._total)
        self._done += 1


def _others(
    types: Lotr,
    members: Members,
    svds: list[list[SliceSvd]],
    report: Callable[[str], None],
) -> list[Representation]:
    """Every representation beside LoTR by type; those that would be the same are left out."""
    found: list[Representation] = []
    report("groups by shape")
    shapes = by_shape(types)
    report("clusters of layers")
    clusters = clustered(types)
    found += [lotr for lotr in (shapes, clusters) if lotr]
    spectra = [svd.values for group in svds for svd in group]
    costs = [sum(module.shape) for _, group in members for module in group]
    itemsize = types.dtype.itemsize
    found += [TruncatedLora(kind, spectra, costs, itemsize) for kind in TruncatedLora.NAMES]
    return found


def _choices(
    representations: Sequence[Representation], shares: Sequence[float], lora: LoraAdapter
) -> list[Choice]:
    """Every representation at every size that it gets down to."""
    found = []
    for share in shares:
        for form in representations:
            point = form.within(int(share / 100 * lora.bytes))
            if point:
                row = (point.bytes, point.relative_error, point.lower_bound, point.parameters)
                found.append(Choice(form.kind, form.name, share / 100, *row))
    return found


def _targets(representations: Sequence[Representation]) -> tuple[Target, ...]:
    """The smallest size of every representation within each of `TOLERANCES`."""
    return tuple(
        Target(
            representation.kind, representation.name, tolerance, representation.reaching(tolerance)
        )
        for tolerance in TOLERANCES
        for representation in representations
    )


def _measured(
    representations: Sequence[Representation], choices: Sequence[Choice], job: CompressionJob
) -> list[Choice]:
    """The best form in bits and the best LoTR at the recommended size, as really made."""
    size = recommended_size(choices)
    if size is None:
        return []
    budget, at = int(size * job.lora.bytes), [c for c in choices if c.budget == size]
    found = []
    if any(c.kind is Kind.COMPRESSED for c in at):
        made = job.within_bytes(budget, budget)
        row = (made.file_bytes, made.relative_error, None, None)
        found.append(Choice(Kind.COMPRESSED, FORMS[Kind.COMPRESSED][1], size, *row, measured=True))
    shared = [c for c in at if c.kind.family == "LoTR"]
    wanted = {c.kind for c in sorted(shared, key=lambda c: c.relative_error)[:1]}
    return found + [
        _converted(lotr, size, job.lora)
        for lotr in representations
        if isinstance(lotr, Lotr) and lotr.exact and lotr.kind in wanted
    ]


def _converted(lotr: Lotr, share: float, lora: LoraAdapter) -> Choice:
    """The adapter at a share of its bytes, refined and rounded to its storage type."""
    made = lotr.converted(Goal(parameters=int(share * lora.bytes) // lora.dtype.itemsize))
    row = (made.bytes, made.relative_error or 0.0, made.lower_bound, made.parameters)
    return Choice(lotr.kind, lotr.name, share, *row, measured=True)


def _group(
    member: tuple[str, list[LoraModule]],
    reduced: ReducedStack,
    svds: Sequence[SliceSvd],
    subspaces: Sequence[Subspaces],
) -> GroupAnalysis:
    name, modules = member
    points = thinned(reduced.curve.parameters.tolist(), RATES)
    numbers = compared(len(modules))
    subspaces = [subspaces[k] for k in numbers]
    return GroupAnalysis(
        name=name,
        shape=modules[0].shape,
        modules=module_rows(modules, svds),
        parameters=sum(module.parameters for module in modules),
        norm=math.sqrt(reduced.norm2),
        rates=rate_points(reduced, points),
        left_values=to_numpy(reduced.hosvd.left_values),
        right_values=to_numpy(reduced.hosvd.right_values),
        left_overlap=overlaps([space.left for space in subspaces]),
        right_overlap=overlaps([space.right for space in subspaces]),
        chance=(chance([s.left for s in subspaces]), chance([s.right for s in subspaces])),
        compared=numbers,
    )
