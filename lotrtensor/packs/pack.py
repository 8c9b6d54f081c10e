"""Pack: a collection of adapters on disk, of which one is read without the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.packs.adding import Job, add_files, check_options, scratch
from lotrtensor.packs.executors import running
from lotrtensor.packs.files import (
    Index,
    check_digest,
    locked,
    pack_bytes,
    plain_names,
    publish,
    read_index,
)
from lotrtensor.packs.members import Cell, Member
from lotrtensor.packs.reading import entry_of, read_cells, read_member
from lotrtensor.packs.serving import ServePlan, plan_serving
from lotrtensor.packs.spool import Source
from lotrtensor.packs.trained import mark_of
from lotrtensor.packs.verifying import VerifiedRow, verified
from lotrtensor.verbs._fit_groups import Progress


class PackRow(NamedTuple):
    """What a pack says of an adapter.

    ``relative_error`` is that of what is stored, ``mean_error`` that of the mean of the adapters
    that were packed together; ``bytes`` is its own share of the files. ``uses_bases`` is False for
    an adapter that the shared bases do not suit: it is stored by itself, as `compress` would.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.PackRow("a", 0.1, 0.4, 900, True).relative_error
    0.1
    """

    name: str
    relative_error: float
    mean_error: float | None
    bytes: int
    uses_bases: bool


class Pack:
    """A pack of adapters in a directory; see `lotrtensor.pack`, which makes one.

    Parameters
    ----------
    path : path-like
        The directory.
    bounds : tuple of (float or None)
        For every cell the relative error, over its slices, that no basis of its ranks falls below
        where nothing is private: what `pack` finds, and no file holds. None where the cell was
        made of a sample of them.

    Raises
    ------
    FormatError
        If it is no pack, not finished, damaged, or of a newer version.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(40, 4)), rng.normal(size=(4, 40))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(40, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("layers.0.q", own, A),), {}, np.dtype("float32"))
    >>> folder = tempfile.mkdtemp()
    >>> made = lt.pack({"a": tuned(0.1), "b": tuned(0.1)}, folder + "/pack", tolerance=0.2)
    >>> found = lt.Pack(folder + "/pack")
    >>> found.names, all(row.relative_error <= 0.2 for row in found.rows)
    (('a', 'b'), True)
    >>> found.add("c", tuned(0.2)).name, found.remove("a"), found.names
    ('c', None, ('b', 'c'))
    """

    def __init__(self, path: str | os.PathLike[str], bounds: tuple[float | None, ...] = ()) -> None:
        self.path, self.bounds = expand(path), bounds
        self._index = read_index(self.path)

    @property
    def share(self) -> str:
        """What was asked to be shared; see `lotrtensor.pack`."""
        return self._index.share

    @property
    def goal(self) -> Mapping[str, float]:
        """``tolerance``, or ``step`` of a pack that was made for a size."""
        return self._index.goal

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files beside the index."""
        return tuple(self._index.files)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self._index.adapters)

    @property
    def rows(self) -> tuple[PackRow, ...]:
        """What the index says of every adapter."""
        return tuple(map(self.row, self.names))

    @property
    def bytes(self) -> int:
        """Bytes of all files, tensors that adapters carry along included."""
        return pack_bytes(self._index)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the files that hold the bases."""
        return sum(shard.bytes for shard in self._index.cells)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The bases that adapters share."""
        return read_cells(self.path, self._index)

    @property
    def mark(self) -> str:
        """What tells these bases from all others, for adapters trained on them; empty without."""
        return mark_of(self._index)

    def row(self, name: str) -> PackRow:
        """Return what the index says of one adapter.

        Parameters
        ----------
        name : str
            Its name.

        Raises
        ------
        FormatError
            If there is none of that name.
        """
        e = entry_of(self.path, self._index, name)
        return PackRow(name, e.relative_error, e.mean_error, e.bytes, e.uses_bases)

    def member(self, name: str) -> Member:
        """Return one adapter as it is stored: bases, cores and private parts.

        The bases and its own tensors are read, and nothing of the others.

        Parameters
        ----------
        name : str
            Its name.

        Raises
        ------
        FormatError
            If there is none of that name, or its files are damaged.
        """
        cells = self.cells if self.row(name).uses_bases else ()
        return read_member(self.path, self._index, name, cells)

    def unpack(self, name: str, rank: int | None = None) -> LoraAdapter:
        """Return one adapter as a LoRA, in the type that it had before it was packed.

        Parameters
        ----------
        name : str
            Its name.
        rank : int, optional
            Largest LoRA rank of a module; the original one if not given.

        Raises
        ------
        FormatError
            As `member` does.
        RankError
            If ``rank`` is below 1.
        """
        return self.member(name).to_lora(rank)

    def add(
        self,
        name: str,
        adapter: Source,
        *,
        tolerance: float | None = None,
        max_error: float | None = None,
    ) -> PackRow:
        """Add an adapter: a new file beside the others, none of which is written again.

        It is coded on the bases that are there, with private parts for what they leave of it, or by
        itself where that takes fewer bytes.

        Parameters
        ----------
        name : str
            Its name in the pack.
        adapter : path or adapter
            The adapter. One that was trained on these bases (`lotrtensor.peft.save_cores`) is taken
            as it is, without loss.
        tolerance : float, optional
            Relative error that is not exceeded; what the pack was made with if not given.
        max_error : float, optional
            Relative error past which the adapter is refused. If not given, and neither the pack nor
            the call has a tolerance, 1 - error² has to be half at least of what it is for any
            adapter in the pack that the bases were made of.

        Raises
        ------
        FormatError
            If the name is taken, the adapter belongs to another base model, or another process
            writes.
        OptionError
            If ``max_error`` is no finite number of at least 0.
        RankError
            If the error is past ``max_error``, or the tolerance is out of reach.
        """
        return self.add_all({name: adapter}, tolerance=tolerance, max_error=max_error)[0]

    def add_all(
        self,
        adapters: Mapping[str, Source],
        *,
        tolerance: float | None = None,
        max_error: float | None = None,
        executor: Executor | None = None,
        progress: Progress | None = None,
    ) -> tuple[PackRow, ...]:
        """Add several adapters as `add` does, all or, where one is refused, none of them.

        Parameters
        ----------
        adapters : mapping of str to path or adapter
            Adapters by their names in the pack.
        tolerance, max_error : float, optional
            As for `add`.
        executor : concurrent.futures.Executor, optional
            What encodes them, an adapter a piece of work; threads if not given. The files are the
            same to the bit.
        progress : callable, optional
            As for `lotrtensor.pack`.

        Returns
        -------
        tuple of PackRow
            What the index says of each, in the order given.

        Raises
        ------
        FormatError, OptionError, RankError
            As for `add`; of several adapters, the one that is refused is named first.
        """
        check_options(adapters, tolerance, max_error)
        with running(executor) as used, locked(self.path):
            index = read_index(self.path)
            plain_names([*index.adapters, *adapters])
            self._set(index)
            several, shapes = len(adapters) > 1, self._shapes()
            with scratch(self.path, index, self.cells) as folder:
                job = Job(str(self.path), folder, shapes, tolerance, max_error, several)
                index = add_files(job, adapters, index, used, progress)
            publish(self.path, index)
            self._set(index)
        return tuple(map(self.row, adapters))

    def remove(self, name: str) -> None:
        """Remove an adapter from the index, and its file once no other adapter is in it.

        Parameters
        ----------
        name : str
            Its name.

        Raises
        ------
        FormatError
            If there is none of that name, or another process writes.
        """
        with locked(self.path):
            self._set(read_index(self.path))
            self.row(name)
            kept = {k: entry for k, entry in self._index.adapters.items() if k != name}
            index = replace(self._index, adapters=kept).without_unused()
            publish(self.path, index)
            self._set(index)

    def check(self) -> None:
        """Read all files and decode every adapter.

        Raises
        ------
        FormatError
            Naming the first file or adapter that is not what was written.
        """
        for shard in self._index.files.values():
            check_digest(self.path, shard)
        for name in self.names:
            self.member(name)

    def verify(self, originals: Mapping[str, Adapter]) -> tuple[VerifiedRow, ...]:
        """Measure what the pack holds against the originals, adapter by adapter.

        Parameters
        ----------
        originals : mapping of str to adapter
            Adapters by their names in the pack.

        Raises
        ------
        FormatError
            If the pack has none of a name, or an original is of another base model.
        """
        rows = []
        for name, original in originals.items():
            member, row = self.member(name), self.row(name)
            rows.append(verified(name, member, row.bytes, original))
        return tuple(rows)

    def serve_plan(self, max_lora_rank: int | None = None, max_loras: int = 8) -> ServePlan:
        """Count what the adapters take on a device: in slots of a server, and as they are here.

        Parameters
        ----------
        max_lora_rank : int, optional
            Rank of a slot, vLLM's ``--max-lora-rank``; the least that the unpacked adapters fit in
            if not given.
        max_loras : int
            Number of slots: ``--max-loras``, or SGLang's ``--max-loras-per-batch``.

        Raises
        ------
        OptionError
            If a number is no integer of at least 1.
        """
        members = [self.member(name) for name in self.names]
        return plan_serving(members, self.cells, max_lora_rank, max_loras)

    def _set(self, index: Index) -> None:
        if index.cells != self._index.cells:
            self.__dict__.pop("cells", None)
        self._index = index

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the modules that the pack knows: of its cells, and of one adapter."""
        known = {name: cell.shape for cell in self.cells for name in cell.modules}
        for name in self.names[:1]:
            for group in self.member(name).own.groups:
                known |= dict.fromkeys(group.modules, group.shape)
        return known
