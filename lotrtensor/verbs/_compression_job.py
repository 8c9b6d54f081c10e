"""A compression on its way: groups decomposed once, and the search for a size or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.compressed_group import Alternative, CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.native import COMMON_FIELDS
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import module_stack
from lotrtensor.core.bits.stack import FLOAT16, FLOAT32, Parts, QuantisedStack, StackInBits
from lotrtensor.core.bits.stream import LARGEST_CODE
from lotrtensor.core.bits.terms import HALF
from lotrtensor.core.bits.weighted import Metrics, WeightedStackInBits
from lotrtensor.core.fit.reduction import thin_flops
from lotrtensor.core.options import shown
from lotrtensor.core.ranks.goal import Rank
from lotrtensor.core.slice_svd import SvdsOnDemand
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.threads import one_by_one, side_by_side
from lotrtensor.errors import DataError, RankError
from lotrtensor.verbs._alternatives import (
    Each,
    PriceInBits,
    Prices,
    alternatives,
    grids,
    prices_in_bits,
)
from lotrtensor.verbs._edge import NEAREST, edge, over
from lotrtensor.verbs._fit_groups import Progress
from lotrtensor.verbs._goals import Asked, groups_goal
from lotrtensor.verbs._sources import SourceGroup, lora_groups, source_group

PARTS: dict[str, Parts] = {"auto": "both", "lotr": "shared", "lora": "private"}
"""What each form is made of: shared factors, terms of single modules, or whichever is better."""

SHARING_FLOPS = 1e13
"""Estimated cost of what shared factors ask for up to which they are tried, some minutes."""


def affordable_parts(form: str, lora: LoraAdapter, group_by: str = "type") -> Parts:
    """The parts of a form; of ``auto`` private ones alone where shared ones would take long."""
    if form != "auto":
        return PARTS[form]
    groups = [own for _, own in lora_groups(lora, group_by)]
    flops = sum(thin_flops(*own[0].shape, sum(m.rank for m in own)) for own in groups)
    return "both" if flops <= SHARING_FLOPS else "private"


def compression_job(
    lora: LoraAdapter,
    parts: Parts = "both",
    width: int | None = None,
    group_by: str = "type",
    progress: Progress | None = None,
    source: SourceRecord | None = None,
    *,
    metrics: Mapping[str, Metrics] | None = None,
    at_once: bool = False,
) -> CompressionJob:
    """Decompose the groups of an adapter once, for all sizes.

    With ``at_once`` the groups of a large adapter are worked on side by side, a thread each, to
    the same result; a caller that has a thread for each of several adapters leaves it False.
    """
    members = lora_groups(lora, group_by)

    def decomposed(number: int) -> tuple[SourceGroup, StackInBits]:
        name, modules = members[number]
        if progress:
            progress(name, number, len(members))
        group = source_group(name, modules, lora.dtype)
        if not group.held and parts == "private" and metrics is None:
            each_alone = [partial(module_stack, [module]) for module in modules]
            return group, StackInBits(SvdsOnDemand(each_alone), parts, width)
        slices = group.make()
        assert isinstance(slices, LowRankStack)
        if metrics is not None:
            return group, WeightedStackInBits(slices, [metrics[m.name] for m in modules])
        return group, StackInBits(slices, parts, width)

    each = side_by_side if at_once and lora.parameters > MANY else one_by_one
    groups = each(decomposed, range(len(members)))
    job = CompressionJob(
        groups, lora, source or SourceRecord(lora.dtype, lora.parameters, lora.bytes), each
    )
    if not SMALLEST < job.largest < LARGEST:
        raise DataError(
            f"an update has a singular value of {job.largest:.3g}, which the values of a "
            "compressed file do not hold; convert the adapter, or scale it"
        )
    return job


@dataclass(frozen=True, eq=False)
class CompressionJob:
    """Groups on their way, and the adapter that they come from."""

    groups: list[tuple[SourceGroup, StackInBits]]
    lora: LoraAdapter
    source: SourceRecord
    each: Each = one_by_one

    @property
    def norm2(self) -> float:
        return sum(stack.norm2 for _, stack in self.groups)

    def weighted_error(self, found: CompressedAdapter) -> float | None:
        """Relative error in the metrics of a calibration; None without one."""
        lost2 = norm2 = 0.0
        for (_, stack), group in zip(self.groups, found.groups, strict=True):
            if not isinstance(stack, WeightedStackInBits):
                return None
            lost2 += stack.weighted_lost2(group.stack)
            norm2 += stack.weighted_norm2
        return math.sqrt(lost2 / norm2) if norm2 else 0.0

    def _error(self, found: CompressedAdapter) -> float:
        """What is to be least at a size: the error in the metrics, where there are any."""
        weighted = self.weighted_error(found)
        return found.relative_error if weighted is None else weighted

    def predict(self, step: float) -> tuple[float, float]:
        """Bytes of all codes, and relative error."""
        found = self.each(lambda group: group[1].predict(step), self.groups)
        lost2 = sum(prediction.lost2 for prediction in found)
        bits = sum(prediction.bits for prediction in found)
        return bits / 8, math.sqrt(max(lost2, 0.0) / self.norm2) if self.norm2 else 0.0

    def at(self, step: float) -> CompressedAdapter:
        """The adapter on a grid of this step, measured."""
        predicted = self.predict(step)[1]
        # The rounding of a value to half precision is a relative error of 3e-4.
        dtype = FLOAT32 if predicted < FINE or not HALF[0] < self.largest < HALF[1] else FLOAT16

        def quantised(group: tuple[SourceGroup, StackInBits]) -> CompressedGroup:
            source, stack = group
            return _group(source, stack, stack.quantise(step, dtype))

        return self._adapter(tuple(self.each(quantised, self.groups)))

    def _adapter(self, groups: tuple[CompressedGroup, ...]) -> CompressedAdapter:
        lora = self.lora
        config = {key: lora.config[key] for key in COMMON_FIELDS if key in lora.config}
        return CompressedAdapter(groups, config, self.source, lora.extras)

    def of_rank(self, pair: tuple[int, int], asked: Rank | None) -> CompressedAdapter:
        """The adapter with shared factors of these ranks, or what a group needs, in one width."""
        sources = [source for source, _ in self.groups]
        groups_goal(Asked(rank=asked), sources, self.lora.dtype)  # refuses what none can need
        groups = []
        for source, stack in self.groups:
            ranks = min(pair[0], source.max_rank[0]), min(pair[1], source.max_rank[1])
            groups.append(_group(source, stack, stack.of_ranks(ranks)))
        return self._adapter(tuple(groups))

    def _simpler(self, made: CompressedAdapter) -> list[CompressionJob]:
        """Jobs of either part alone, where records weigh so much that predictions may mislead.

        What parts a group has is chosen by the bits of its codes; a shared part also asks for some
        bytes of the index, which count in small files.
        """
        both = all(stack.parts == "both" for _, stack in self.groups)
        if not both or made.file_bytes > SMALL * len(self.groups):
            return []
        parts: tuple[Parts, Parts] = ("shared", "private")
        return [
            replace(
                self, groups=[(source, stack.restricted(part)) for source, stack in self.groups]
            )
            for part in parts
        ]

    @property
    def largest(self) -> float:
        largest = max(float(own[0]) for _, stack in self.groups for own in stack.spectra)
        return largest or 1.0  # of an adapter of zeros any step is as good

    @property
    def reach(self) -> float:
        """Largest norm of a column that is rounded."""
        return max(stack.reach for _, stack in self.groups) or 1.0

    @property
    def coarsest(self) -> float:
        """A step at which about the largest term alone is left."""
        return 4.0 * self.reach / math.sqrt(min(self.groups[0][1].sides))

    @cached_property
    def smallest(self) -> CompressedAdapter:
        """The adapter of which next to nothing is left but config and index."""
        return self.at(self.coarsest)

    def prices(self, largest: float) -> Prices:
        """Sizes and errors of files of either part and of both, as predicted."""
        stacks = [stack for _, stack in self.groups]
        smallest = self.smallest.file_bytes
        return prices_in_bits(stacks, self.coarsest, smallest, largest, self.each)

    def alternatives(self, made: CompressedAdapter) -> tuple[Alternative, ...]:
        """What other forms would reach at the size of what was made."""
        stacks = [stack for _, stack in self.groups]
        ranks = [source.slice_ranks or () for source, _ in self.groups]
        price = PriceInBits(made.file_bytes, made.relative_error)
        prices = self.prices(price.bytes)
        return alternatives(stacks, ranks, self.lora.dtype.itemsize, price, prices)

    @cached_property
    def marks(self) -> list[float]:
        """Steps to search between, from coarse to fine: those of `prices`, and the finest."""
        # No entry of a column exceeds its norm, and codes are integers of 16 bits.
        finest = self.reach / LARGEST_CODE
        return [*(step for step in grids(self.coarsest) if step > finest), finest]

    def _coarsest_within(self, tolerance: float) -> float:
        """The coarsest step of at most this error, as predicted."""
        return edge(lambda step: over(self.predict(step)[1], tolerance), self.marks[::-1])

    def _finest_of(self, size: float) -> float:
        """The finest step of at most so many bytes of codes, as predicted."""
        return edge(lambda step: over(self.predict(step)[0], size), self.marks)

    def within_tolerance(self, tolerance: float) -> CompressedAdapter:
        """The smallest file found of at most this error."""
        found = self._found_within(tolerance)
        for other in self._simpler(found):
            with suppress(RankError):
                made = other.within_tolerance(tolerance)
                found = min(found, made, key=lambda adapter: adapter.file_bytes)
        return found

    def _found_within(self, tolerance: float) -> CompressedAdapter:
        """The smallest file of at most this error that the predictions lead to."""
        best, target, coarser, before, least = None, tolerance, math.inf, 0.0, math.inf
        for _ in range(TRIES):
            step = self._coarsest_within(target)
            # Where ranks jump, other targets lead to about one step: it is left behind by itself.
            step = step if step < coarser / SAME else coarser / NUDGE
            if before / SAME < step < before * SAME:
                break
            found, before = self.at(step), step
            error = found.relative_error
            least = min(least, error)
            if error > tolerance:
                coarser = min(coarser, step)
            if error <= tolerance and (best is None or found.file_bytes < best.file_bytes):
                best = found
            if SPARE * tolerance <= error <= tolerance:
                break
            target *= MARGIN * tolerance / error if error else 2.0
        if best is None:
            raise RankError(
                f"tolerance is {tolerance}; the smallest error reached is {least:.3g}: convert or "
                "truncate the adapter instead, which keep 16 bits a number or more"
            )
        return best

    def within_bytes(self, budget: int, asked: int | str) -> CompressedAdapter:
        """The file of the least error found of at most so many bytes."""
        found = self._found_of_bytes(budget, asked)
        for other in self._simpler(found):
            with suppress(RankError):
                made = other.within_bytes(budget, asked)
                found = min(found, made, key=self._error)
        return found

    def _found_of_bytes(self, budget: int, asked: int | str) -> CompressedAdapter:
        """The file of the least error of at most so many bytes that the predictions lead to."""
        smallest = self.smallest
        if budget < smallest.file_bytes:
            raise RankError(
                f"budget is {shown(asked)}; the smallest file of this adapter takes "
                f"{smallest.file_bytes} bytes, its config and index"
            )
        best, target, finer, coarser = smallest, float(budget), 0.0, self.coarsest
        for _ in range(TRIES):
            step = self._finest_of(target)
            # A model of normal columns knows no short ones, and has jumps.
            if not finer * SAME < step < coarser / SAME:
                step = math.sqrt(finer * coarser) if finer else coarser / NUDGE
            if coarser <= NUDGE * finer:
                break
            found = self.at(step)
            if found.file_bytes > budget:
                finer = step
            else:
                coarser = step
                if self._error(found) <= self._error(best):
                    best = found
                if found.file_bytes >= SPARE * budget:
                    break
            # Index, kinds and values take room that the model does not know of.
            target = self.predict(step)[0] + MARGIN * budget - found.file_bytes
        return best


SMALLEST, LARGEST = 1e-25, 1e30
"""Between these the largest singular value is: values in float32 then hold what is beside it."""

SMALL = 10_000
"""Bytes a group below which a hundred, about what the record of a shared part takes, are more than
a hundredth: predictions are no nearer than that."""

TRIES = 8
"""Files made on the way to a size or an error; two or three do where the model is right."""

NUDGE = 1.01
"""Ratio of a step to the one that did not do, where the model leads to the same one again."""

SAME = 1.0 + 2.0 * NEAREST
"""Ratio up to which two steps are one: a search ends somewhere that near to a jump."""

MANY = 2**22
"""Numbers of an adapter below which its groups are gone through one by one: a pool of threads and
its switches cost what they spare."""

SPARE = 0.99
"""Share of a budget or tolerance that has to be used."""

MARGIN = 0.998
"""How far below its goal a corrected try aims."""

FINE = 0.01
"""Relative error below which values are kept in float32."""


def _group(
    source: SourceGroup, stack: StackInBits, made: tuple[QuantisedStack, float]
) -> CompressedGroup:
    found, error2 = made
    norm2 = stack.norm2
    return CompressedGroup(
        name=source.name,
        modules=source.modules,
        shape=stack.sides,
        slice_ranks=source.slice_ranks or (),
        stack=found,
        relative_error=math.sqrt(error2 / norm2) if norm2 else 0.0,
        norm=math.sqrt(norm2),
        embedding=source.embedding,
        lower_bound=math.sqrt(stack.lower_bound2(found) / norm2) if norm2 else 0.0,
    )
