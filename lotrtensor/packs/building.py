"""A build: from adapters to the shards of a pack, cell by cell and adapter by adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.compressed_record import rounded_up
from lotrtensor.adapters.sizes import budget_bytes
from lotrtensor.core.bits.terms import slope
from lotrtensor.core.similarity import average_linkage, cosines
from lotrtensor.errors import FormatError, LotrError, LotrWarning, RankError
from lotrtensor.packs import tasks
from lotrtensor.packs.encoding import settled
from lotrtensor.packs.executors import results
from lotrtensor.packs.files import (
    ADAPTER_SHARD,
    BUILD,
    CELL_SHARD,
    Entry,
    Index,
    Shard,
    clear_build,
    write_shard,
)
from lotrtensor.packs.plan import PlannedCell, plan_cells, write_plan
from lotrtensor.packs.prices import Prices, crossing
from lotrtensor.packs.spool import (
    Source,
    Spooled,
    fingerprint,
    read_spooled,
    spool,
    write_norms,
)
from lotrtensor.packs.tasks import STEPS, Encoded
from lotrtensor.packs.writing import SHARD_MEMBERS, cells_bytes, cells_tensors, write_members
from lotrtensor.verbs._compress import Form
from lotrtensor.verbs._compression_job import MARGIN, NUDGE, SPARE
from lotrtensor.verbs._fit_groups import Progress

SHARES = ("auto", "adapters", "layers", "both", "none")
"""What adapters of a pack may share."""

FINER = 0.9
"""Step of the bases beside the one at which adapters on average have the error that is asked for:
so that few of them need private terms to make good the rounding of the bases."""

ROUNDING = 0.02
"""Squared error of the grid beside that of the ranks, where ranks are given: 1 % of the error."""

SIZES = 6
"""Packs made on the way to a budget; two or three do where prices are right."""


FINGERPRINT = 32
"""Digits of a request's digest that its build directory is named by."""


@dataclass(frozen=True)
class Request:
    """What is to be packed, and how; see `lotrtensor.pack`."""

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    tolerance: float | None
    budget: int | str | None
    rank: int | None
    clusters: int
    share: str
    executor: Executor
    skip_bad: bool = False
    progress: Progress | None = None

    @property
    def form(self) -> Form:
        """What an adapter is made of where it is stored alone."""
        return "auto" if self.share in ("auto", "layers") else "lora"


@dataclass
class Draft:
    """Cells and members of a pack, still in files of the build."""

    step: float
    cells: list[tuple[int, str]]
    members: dict[int, Encoded]


def build(path: Path, request: Request, before: Index) -> Index:
    """Make the shards of a pack beside those of ``before``, and return its index, unpublished.

    Parameters
    ----------
    path : Path
        The directory of the pack, locked.
    request : Request
        What is to be packed.
    before : Index
        What stands there; its numbers are not used again.
    """
    options = [
        request.tolerance,
        request.budget,
        request.rank,
        request.clusters,
        request.share,
        STEPS,
    ]
    # A folder of its own for what is asked: a worker that was given up may still write.
    folder = path / BUILD / fingerprint(request.names, request.sources, options)[:FINGERPRINT]
    if not folder.is_dir():
        clear_build(path)
        folder.mkdir(parents=True)
    try:
        return _Builder(path, str(folder), request, before).run()
    except LotrError as error:
        if not isinstance(error.__cause__, BrokenExecutor):
            clear_build(path)  # the same request would fail again
        raise


class _Builder:
    """One build: what the pieces of work find, and what is decided between them."""

    def __init__(self, path: Path, folder: str, request: Request, before: Index) -> None:
        self.path, self.folder, self.request, self.before = path, folder, request, before
        self.adapters: dict[int, Spooled] = {}
        self.clusters: dict[int, int] = {}
        self.cells: list[PlannedCell] = []

    def run(self) -> Index:
        """All of it."""
        self._spool()
        norms = {number: adapter.norm for number, adapter in self.adapters.items()}
        write_norms(self.folder, norms)
        self._cluster()
        self.cells = plan_cells(self.adapters, self.clusters)
        write_plan(self.folder, self.cells)
        request = self.request
        fine = 0.5 * request.tolerance if request.tolerance else 1e-4 if request.budget else 1.0
        source = sum(adapter.bytes for adapter in self.adapters.values())
        budget = None if request.budget is None else budget_bytes(request.budget, source)
        most = math.inf if budget is None else float(budget)
        work = [(self.folder, i, fine, most) for i in range(len(self.cells))]
        priced = self._all("pricing", tasks.price_cell, work)
        self.prices = Prices(self.cells, priced, norms, request.share)
        if request.rank is not None:
            return self._of_rank(request.rank)
        if budget is None:
            assert request.tolerance is not None
            step = FINER * self.prices.step_for(request.tolerance)
            draft = self._draft(step, request.tolerance)
            return self._write(draft, {"tolerance": request.tolerance})
        return self._within(budget)

    def _spool(self) -> None:
        request, bad = self.request, []
        pairs = list(zip(request.names, request.sources, strict=True))
        work = [(self.folder, i, name, source) for i, (name, source) in enumerate(pairs)]
        for i, error in enumerate(self._all("reading", _spool_or_error, work)):
            if error is None:
                self.adapters[i] = read_spooled(self.folder, i)
            elif request.skip_bad:
                bad.append(f"{request.names[i]} is left out: {error}")
            else:
                raise error
        for text in bad:
            warnings.warn(text, LotrWarning, stacklevel=2)
        if not self.adapters:
            raise FormatError("no adapter is left to pack; expected at least one that can be read")

    def _cluster(self) -> None:
        """Split the adapters into as many clusters as are asked for, by their cosines."""
        self.clusters, count = dict.fromkeys(self.adapters, 0), self.request.clusters
        if count == 1 or len(self.adapters) == 1:
            return
        places: dict[str, list[tuple[int, int]]] = {}
        for number, adapter in self.adapters.items():
            for i, module in enumerate(adapter.modules):
                places.setdefault(f"{module.name} {module.shape}", []).append((number, i))
        order = {number: i for i, number in enumerate(self.adapters)}
        sums = np.zeros((len(order), len(order)))
        work = [(self.folder, own) for own in places.values()]
        found = self._all("comparing", tasks.module_products, work)
        for own, products in zip(places.values(), found, strict=True):
            members = [order[number] for number, _ in own]
            sums[np.ix_(members, members)] += products
        labels = average_linkage(cosines(sums), count=count).tolist()
        self.clusters = dict(zip(self.adapters, labels, strict=True))

    def _all(self, what: str, work: Callable[..., Any], each: Sequence[tuple[Any, ...]]) -> Any:
        """Results of all pieces of one kind, in their order; progress is told of them."""
        tell = self.request.progress

        def progress(done: int) -> None:
            if tell:
                tell(what, done, len(each))

        return results(self.request.executor, work, each, progress)

    def _within(self, budget: int) -> Index:
        """The pack of the least error found within a size."""
        best: tuple[float, Draft] | None = None
        sizes = np.maximum(self.prices.bytes, 1e-3)
        target, smallest, coarser = float(budget), math.inf, 0.0
        for _ in range(SIZES):
            step = crossing(sizes[::-1], max(target, 1e-3), STEPS[::-1])
            step = max(step, coarser)
            draft = self._draft(step, None)
            size = self._size(draft)
            error2 = sum(own.error**2 for own in draft.members.values())
            smallest = min(smallest, size)
            if size <= budget and (best is None or error2 < best[0]):
                best = error2, draft
            finest = size <= budget and step <= STEPS[-1]
            if SPARE * budget <= size <= budget or finest or step >= STEPS[0]:
                break
            if size > budget:
                coarser = max(coarser, NUDGE * step)
            # Headers and records take room that prices do not know of.
            priced = float(np.exp(np.interp(math.log(step), np.log(STEPS[::-1]),
                                            np.log(sizes[::-1]))))  # fmt: skip
            target = priced + MARGIN * budget - size
        if best is None:
            raise RankError(
                f"budget is {budget} bytes; the smallest pack that was found takes {smallest:.0f}"
            )
        return self._write(best[1], {"step": best[1].step})

    def _of_rank(self, rank: int) -> Index:
        """The pack of cores alone on bases of given ranks, on a grid that adds little to the error.

        The grid loses step² / 12 an entry: of a core, or of a column that all slices share.
        """
        cells = self._fit(STEPS[-1], "", rank)
        bounds = tasks.CellFiles(self.folder, cells).bounds()
        lost2 = sum(own.lost2 for own in bounds) / len(self.adapters)
        used = [self.cells[i] for i, _ in cells]
        entries = sum(
            len(cell.modules) * rank * (rank + sum(cell.shape) / len(cell.members)) for cell in used
        )
        step = math.sqrt(12.0 * ROUNDING * lost2 / entries) if cells else 0.0
        step = settled(min(max(step, STEPS[-1]), STEPS[0]))
        cells = self._fit(step, "", rank)
        what = "encoding" if cells else "alone"
        members = self._encode(what, cells, step, None, private=False)
        draft = Draft(step, cells, members)
        return self._write(draft, {"rank": rank, "step": step})

    def _draft(self, step: float, tolerance: float | None) -> Draft:
        """Fit the cells at a step and encode every adapter, in the cheaper of two ways."""
        request, numbers, step = self.request, list(self.adapters), settled(step)
        cells = self._fit(step, "")
        if cells and tolerance is not None:
            cells = self._fit(step, self._weights(cells, step, tolerance))
        alone: dict[int, Encoded] = {}
        if not cells or request.share == "auto":
            alone = self._encode("alone", [], step, tolerance)
        if not cells:
            return Draft(step, [], alone)
        shared = self._encode("encoding", cells, step, tolerance)
        if request.share != "auto":
            return Draft(step, cells, shared)

        def cost(own: Encoded) -> float:
            # At one error bytes compare by themselves, at one step with what they take off it.
            return own.bytes + (0.0 if tolerance else own.error**2 / (8 * slope(step)))

        gains = {n: cost(alone[n]) - cost(shared[n]) for n in numbers}
        if sum(max(gain, 0.0) for gain in gains.values()) <= cells_bytes(self.folder, cells):
            return Draft(step, [], alone)
        better = {n for n in numbers if gains[n] > 0}
        members = {n: shared[n] if n in better else alone[n] for n in numbers}
        return Draft(step, cells, members)

    def _fit(self, step: float, weights: str, rank: int | None = None) -> list[tuple[int, str]]:
        """The bases that are worth their bits, or of a rank: numbers of their cells, and files."""
        chosen = self.prices.chosen(step)
        most = (rank, rank) if rank is not None else None
        work = [
            (self.folder, i, step, most or self.prices.widest(i, step), weights, rank)
            for i in chosen
        ]
        files = self._all("sharing", tasks.fit_cell, work)
        return [(i, file) for i, file in zip(chosen, files, strict=True) if file]

    def _encode(
        self,
        what: str,
        cells: list[tuple[int, str]],
        step: float,
        tolerance: float | None,
        *,
        private: bool = True,
    ) -> dict[int, Encoded]:
        form = self.request.form
        own = {
            cluster: [(i, file) for i, file in cells if self.cells[i].cluster == cluster]
            for cluster in set(self.clusters.values())
        }
        work = [
            (self.folder, n, own[self.clusters[n]], step, tolerance, form, private)
            for n in self.adapters
        ]
        return dict(zip(self.adapters, self._all(what, tasks.encode, work), strict=True))

    def _weights(self, cells: list[tuple[int, str]], step: float, tolerance: float) -> str:
        """Weights of adapters by what the bases lose of them: one error is asked of all.

        What a basis leaves of an adapter, its private part would have to hold, column by column.
        """
        found = self._encode("weighing", cells, step, None)
        errors = {n: settled(own.error / tolerance) for n, own in found.items()}
        return tasks.write_weights(
            self.folder, {n: min(max(error, 0.5), 2.0) for n, error in errors.items()}
        )

    def _size(self, draft: Draft) -> int:
        """Bytes of a pack's files, without tensors that are carried along."""
        cells = cells_tensors(self.folder, draft.cells)
        # Sizes of eight digits, and digests of the length that they have.
        shards = [
            Shard(f"{kind}-{i:05}.safetensors", 10**7, "0" * 64)
            for kind, count in (
                (CELL_SHARD, len(cells)),
                (ADAPTER_SHARD, -(-len(draft.members) // SHARD_MEMBERS)),
            )
            for i in range(count)
        ]
        index = self._index(draft, [shards[-1].file] * len(draft.members), {"step": draft.step})
        index = replace(
            index, cells=tuple(shards[: len(cells)]), shards=tuple(shards[len(cells) :])
        )
        own = sum(member.bytes for member in draft.members.values())
        own += sum(tasks.tensor_bytes(k, x) for tensors in cells for k, x in tensors.items())
        return len(index.to_json()) + 40 * len(shards) + own

    def _write(self, draft: Draft, goal: Mapping[str, float]) -> Index:
        """Write the shards, and return the index."""
        cells, following = [], self.before.next
        for tensors in cells_tensors(self.folder, draft.cells):
            cells.append(write_shard(self.path, CELL_SHARD, following, tensors))
            following += 1
        members = [draft.members[number].file for number in draft.members]
        shards, places = write_members(self.path, self.folder, members, self.before.next, following)
        index = self._index(draft, places, goal)
        return replace(
            index,
            cells=tuple(cells),
            shards=tuple(shards),
            next=max(following + len(shards), self.before.next + len(members)),
            bounds=self._bounds(draft.cells),
        )

    def _bounds(self, cells: list[tuple[int, str]]) -> tuple[float | None, ...]:
        files = tasks.CellFiles(self.folder, cells)
        return tuple(
            None if sampled else own.relative
            for own, sampled in zip(files.bounds(), files.sampled(), strict=True)
        )

    def _index(self, draft: Draft, files: Sequence[str], goal: Mapping[str, float]) -> Index:
        means = self.prices.mean_errors()
        entries = {
            self.adapters[number].name: Entry(
                shard=file,
                number=self.before.next + i,
                relative_error=rounded_up(draft.members[number].error),
                mean_error=float(f"{means[number]:.6g}"),
                bytes=draft.members[number].bytes,
                uses_bases=draft.members[number].uses_bases,
            )
            for i, (number, file) in enumerate(zip(draft.members, files, strict=True))
        }
        return Index(adapters=entries, goal=goal, share=self.request.share)


def _spool_or_error(build: str, number: int, name: str, source: Source) -> LotrError | None:
    try:
        spool(build, number, name, source)
    except LotrError as error:
        return error
    return None
