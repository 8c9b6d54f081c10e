"""Calibrating: second moments of what layers see, and of how outputs depend on what they give.

Of every adapted layer two moments are taken on some inputs, with the adapter in the model: of its
inputs x, S = E x xᵀ, and of gradients g of the outputs with respect to what the layer gives,
C = E g gᵀ. For outputs that are logits, the gradients are those of the logarithm of the probability
of a class drawn from the model's own distribution, so that C is the Fisher information of the
layer's output (Martens and Grosse, "K-FAC", arXiv 1503.05671); for other outputs those of a product
with a random normal vector. No labels are needed.

A moment is streamed: rows of inputs are gathered until they are some hundreds, and then cut to
their leading directions. What is cut counts evenly.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lotrtensor.adapters.calibration import (
    LARGEST,
    SMALLEST,
    Calibration,
    ModuleMoments,
    Moment,
)
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import module_stack
from lotrtensor.core.options import check_integer, is_count, shown
from lotrtensor.core.slice_svd import slice_spectra
from lotrtensor.errors import DataError, LotrWarning, OptionError
from lotrtensor.torch.distillation import (
    Output,
    Read,
    check_batches,
    check_carried,
    check_read,
    kept,
    linear_layers,
    outputs_of,
)
from lotrtensor.torch.groups import check_model
from lotrtensor.torch.sources import from_numpy

PLACES = 8192
"""Rows of inputs of a layer that go into a moment; all of them count in its trace."""

ENOUGH = 2
"""Places a column of a layer below which a moment is called poorly known."""


def calibrate(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Any],
    *,
    read: Read | None = None,
    rank: int = 64,
    seed: int = 0,
) -> Calibration:
    """Measure which errors of an adapter's updates a model's outputs see, to compress by it.

    Parameters
    ----------
    model : nn.Module
        The base model, without an adapter; it is left as it was.
    adapter : LoraAdapter, LotrAdapter or CompressedAdapter
        The trained adapter.
    batches : iterable
        Inputs of the kind that the adapter is for: mappings, sequences or tensors that the model is
        called with. Labels are not needed; some thousand tokens are enough.
    read : callable, optional
        Takes the model's output, returns the tensor that counts; see `lotrtensor.torch.heal`.
    rank : int
        Leading directions d of a moment that are kept, of the n of a layer; the file holds n · d
        numbers a moment.
    seed : int
        Of the classes and directions that are drawn.

    Returns
    -------
    Calibration
        Moments of every adapted layer.

    Raises
    ------
    OptionError
        If there are no batches, ``rank`` is no number of directions, ``seed`` no number, or
        ``read`` no function.
    DataError
        If an adapted layer is missing in the model, never runs, or has no part in the output;
        inputs or gradients are not finite; or the model lacks what the adapter carries.
    ShapeError
        If a layer has another shape than its update.
    UnsupportedAdapterError
        If embeddings or experts are adapted.

    Warns
    -----
    LotrWarning
        If fewer than `ENOUGH` places a column of a layer were seen; the number is named.

    Examples
    --------
    >>> import numpy as np, torch, lotrtensor as lt, lotrtensor.torch as lotr
    >>> B, A = np.random.default_rng(0).normal(size=(2, 32, 4))
    >>> lora = lt.LoraAdapter((lt.LoraModule("0", B, A.T),), {}, np.dtype("float32"))
    >>> generator = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> calibration = lotr.calibrate(model, lora, torch.randn(10, 8, 32))
    >>> calibration.places, calibration.modules["0"].inputs.factor.shape
    (80, (32, 32))
    >>> small = lt.compress(lora, budget=1500, calibration=calibration)
    """
    check_model(model)
    check_adapter(adapter)
    inputs = check_batches(batches, 1, "calibrating")
    if not is_count(rank):
        raise OptionError(f"rank is {shown(rank)}; expected a number of directions, at least 1")
    seed = check_integer(seed, "seed", 0, 2**63 - 1)
    check_read(read)
    lora = adapter if isinstance(adapter, LoraAdapter) else adapter.to_lora()
    layers = linear_layers(model, {m.name: m.shape for m in lora.modules})
    check_carried(model, lora.extras)
    updates = {
        m.name: (from_numpy(m.B).float(), from_numpy(m.A).float(), None) for m in lora.modules
    }
    watch = _Watch(rank, -(-PLACES // len(inputs)), seed)
    with outputs_of(model, layers, read, watch.see) as outputs:
        for batch in inputs:
            watch.start(batch)
            with torch.enable_grad():
                found = outputs(batch, updates)
                loss = _drawn(found, watch.generator)
            if not loss.requires_grad:
                raise DataError("the outputs do not depend on any adapted layer")
            # Of one leaf alone: what else has a gradient is the caller's.
            torch.autograd.backward(loss, inputs=[watch.zero])
            watch.take(len(found.values))
    norms = {
        m.name: math.sqrt(float((slice_spectra(module_stack([m]))[0] ** 2).sum()))
        for m in lora.modules
    }
    return watch.calibration(norms)


def _drawn(output: Output, generator: torch.Generator) -> Tensor:
    """A number whose gradients have the information about the outputs as second moment."""
    values = output.values.float()
    if output.are_logits:
        rows = values.reshape(-1, values.shape[-1])
        drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
        return torch.nn.functional.cross_entropy(rows, drawn[:, 0].to(rows.device), reduction="sum")
    noise = torch.randn(values.shape, generator=generator)
    return torch.sum(values * noise.to(values.device))


class _Watch:
    """What layers see and answer in one batch, and the moments of all so far."""

    def __init__(self, rank: int, rows: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rank, self.rows, self.outputs = rank, rows, 0
        self.zero = torch.zeros((), requires_grad=True)
        self.owners: dict[str, str] = {}
        self.moments: dict[tuple[str, str], _Streamed] = {}
        self.start(None)

    def start(self, batch: Any) -> None:
        """Forget what the batch before has shown."""
        self.batch = batch
        self.alive: list[Tensor] = []
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Take an input, and ask for the gradient at what the layer gives."""
        # A tensor that was changed in place since is another input; one that is gone would leave
        # its number to the next.
        key = id(x), 0 if x.is_inference() else x._version
        if key not in self.inputs:
            self.inputs[key] = self._rows(name, x, "its input")
            self.alive.append(x)
        self.seen[name].append(key)
        y = y + self.zero.to(y)  # has a gradient, and may be changed in place
        if y.requires_grad:
            y.register_hook(self.gradients[name].append)  # type: ignore[no-untyped-call]
        return y

    def take(self, outputs: int) -> None:
        """Add what the batch has shown to the moments."""
        self.outputs += outputs
        if not self.owners:
            sharing = defaultdict(list)
            for name, keys in self.seen.items():
                sharing[tuple(keys)].append(name)
            # Query, key and value, say, see one tensor: its moment is taken once.
            self.owners = {name: min(names) for names in sharing.values() for name in names}
        for name, keys in self.seen.items():
            owner = self.owners.setdefault(name, name)
            if self.seen[owner] != keys:
                raise DataError(
                    f"{name} and {owner} see one input in some batches and two in others; "
                    "calibrate on batches of one kind"
                )
            if owner == name:
                for key in keys:
                    self._add("inputs", name, self.inputs[key])
            for gradient in self.gradients[name]:
                self._add("outputs", name, self._rows(name, gradient, "the gradient at its output"))

    def _rows(self, name: str, x: Tensor, what: str) -> Tensor:
        rows = kept(x.detach(), self.batch).reshape(-1, x.shape[-1]).float().cpu()
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"{name}: {what} is not finite on a batch")
        return rows.clone() if rows.data_ptr() == x.data_ptr() else rows

    def _add(self, side: str, name: str, rows: Tensor) -> None:
        moment = self.moments.setdefault((side, name), _Streamed(rows.shape[-1], self.rank))
        moment.add(rows, self.rows, self.generator)

    def calibration(self, norms: dict[str, float]) -> Calibration:
        """The moments of all batches."""
        if not self.outputs or not all(m.places for m in self.moments.values()):
            raise DataError("the masks of all batches leave no place to look at")
        inputs = {
            name: m.moment(m.places) for (s, name), m in self.moments.items() if s == "inputs"
        }
        # Of gradients the sum over the places of an output counts.
        answers = {
            name: m.moment(self.outputs) for (s, name), m in self.moments.items() if s == "outputs"
        }
        for name in norms:
            if name not in answers or not answers[name].trace > SMALLEST:
                raise DataError(f"the outputs do not depend on {name}, which the adapter adapts")
            if not inputs[self.owners[name]].trace > SMALLEST:
                raise DataError(f"the input of {name} is zero on all batches")
            if max(answers[name].trace, inputs[self.owners[name]].trace) >= LARGEST:
                raise DataError(f"{name} sees or answers values that are too large to be squared")
        places = min(m.places for (side, _), m in self.moments.items() if side == "inputs")
        largest = max(moment.size for moment in inputs.values())
        if places < ENOUGH * largest:
            warnings.warn(
                f"{places} places of inputs were seen, and a layer has {largest} columns: expected "
                f"at least {ENOUGH * largest}; give more text",
                LotrWarning,
                stacklevel=3,
            )
        modules = {
            name: ModuleMoments(inputs[self.owners[name]], answers[name], norm)
            for name, norm in norms.items()
        }
        return Calibration(modules, places)


class _Streamed:
    """A second moment of rows that come bit by bit, of some leading directions."""

    def __init__(self, size: int, rank: int) -> None:
        self.rank, self.places, self.trace = min(rank, size), 0, 0.0
        self.rows = torch.zeros(0, size, dtype=torch.float64)
        self.fresh: list[Tensor] = []

    def add(self, rows: Tensor, most: int, generator: torch.Generator) -> None:
        """Take rows in, at most so many, which then stand for all.

        Rows are drawn by their squares and brought to one norm, so that the trace is kept, and the
        expectation too: of gradients a few rows may hold the most (Drineas, Kannan and Mahoney,
        SIAM J. Comput. 36 (2006)).
        """
        squares = rows.double().square().sum(1)
        total = float(squares.sum())
        self.places += len(rows)
        self.trace += total
        if len(rows) > most and total:
            some = torch.multinomial(squares, most, replacement=True, generator=generator)
            rows = rows[some] * (total / most / squares[some]).sqrt()[:, None].to(rows)
        self.fresh.append(rows)
        if sum(map(len, self.fresh)) >= 3 * self.rank:
            self._cut()

    def _cut(self) -> None:
        """Keep the leading directions: with Z = U Σ Vᵀ the first rows of Σ Vᵀ."""
        rows = torch.cat([self.rows, *(x.double() for x in self.fresh)])
        self.fresh = []
        if rows.shape[0] < rows.shape[1]:
            turn = torch.linalg.eigh(rows @ rows.T)[1].flip(1)
            self.rows = turn[:, : self.rank].T @ rows
            return
        squares, vectors = torch.linalg.eigh(rows.T @ rows)
        leading = slice(rows.shape[1] - self.rank, None)
        self.rows = squares[leading].clamp_min(0).sqrt()[:, None] * vectors[:, leading].T

    def moment(self, count: int) -> Moment:
        """The moment, as a mean over ``count``."""
        self._cut()
        factor = (self.rows / math.sqrt(count)).float().numpy()
        return Moment(factor, self.trace / count)
