"""One adapter into a member of a pack: on the cells' bases, or alone, at a step or an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.compressed_group import CompressedGroup, SourceRecord
from lotrtensor.adapters.formats.compressed import DEFAULTS
from lotrtensor.adapters.formats.native import COMMON_FIELDS
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.core.bits.basis import CodedSlice, code_slice
from lotrtensor.core.bits.stack import FLOAT16, FLOAT32, QuantisedStack
from lotrtensor.core.bits.terms import lost2, quantise_slice
from lotrtensor.core.slice_svd import slice_svds
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import RankError
from lotrtensor.packs.members import Cell, Member
from lotrtensor.verbs._compress import Form
from lotrtensor.verbs._compression_job import (
    FINE,
    MARGIN,
    SPARE,
    TRIES,
    affordable_parts,
    compression_job,
)
from lotrtensor.verbs._sources import lora_groups

T = TypeVar("T", bound=Any)


def common_config(lora: LoraAdapter) -> dict[str, Any]:
    """The fields of a config that say where an adapter belongs, as a compressed one keeps them."""
    return {
        key: lora.config[key]
        for key in COMMON_FIELDS
        if lora.config.get(key) not in (None, False, [], {}, DEFAULTS.get(key))
        and key != "target_modules"
    }


def settled(value: float) -> float:
    """Return a number to six digits, which sums in another order do not change.

    Libraries add in an order that depends on where arrays lie; steps and weights that are chosen by
    sums would differ in their last digits from run to run, and files with them.
    """
    return float(f"{value:.6g}")


def norm_of(lora: LoraAdapter) -> float:
    """√Σ ‖ΔW‖² of an adapter."""
    stacks = (LowRankStack.of_constants([m.B], [m.A]) for m in lora.modules)
    return math.sqrt(sum(float(stack.norms2()[0]) for stack in stacks))


def alone(lora: LoraAdapter, form: Form, *, tolerance: float | None, step: float) -> Member:
    """The adapter by itself, as `compress` makes it: of an error, or on a grid of a step.

    Parameters
    ----------
    lora : LoraAdapter
        The adapter.
    form : str
        ``"lora"``, ``"lotr"`` or ``"auto"``.
    tolerance : float or None
        Relative error; None goes by ``step``.
    step : float
        Δ.
    """
    job = compression_job(lora, affordable_parts(form, lora))
    return Member(job.at(step) if tolerance is None else job.within_tolerance(tolerance))


def on_bases(
    lora: LoraAdapter,
    cells: Mapping[str, Cell],
    norm: float,
    *,
    tolerance: float | None,
    step: float,
    private: bool = True,
) -> Member:
    """The adapter on the bases of the cells that hold its modules.

    Parameters
    ----------
    lora : LoraAdapter
        The adapter.
    cells : mapping of str to Cell
        The cell of a module; a module that has none is stored by itself.
    norm : float
        Norm of the adapter: the weight of the mean cores.
    tolerance : float or None
        Relative error that is not exceeded; None goes by ``step``.
    step : float
        Δ in units of the norm; with a tolerance, where the search for one begins.
    private : bool
        False keeps cores alone of modules that have a basis.

    Raises
    ------
    RankError
        If the tolerance is out of reach.
    """

    def at(relative: float) -> Member:
        found = _at(lora, cells, norm, relative, FLOAT16, private)
        # The rounding of a value to half precision is a relative error of 3e-4.
        fine = not 0.1 < norm < 6e4 or found.relative_error < FINE
        return _at(lora, cells, norm, relative, FLOAT32, private) if fine else found

    if tolerance is None:
        return at(step)
    return within(tolerance, at, step)


def within(tolerance: float, at: Callable[[float], T], step: float) -> T:
    """What ``at`` makes at the coarsest step found whose error is within a tolerance.

    About a power of the step is the error; its exponent is taken from the last two steps.

    Parameters
    ----------
    tolerance : float
        Relative error that is not exceeded, in (0, 1).
    at : callable
        ``at(step).relative_error`` rises with the step.
    step : float
        Where to begin.

    Raises
    ------
    RankError
        If no step is fine enough.
    """
    best, before, low, high, fails = None, None, 0.0, math.inf, 0
    for _ in range(2 * TRIES):
        step = settled(step)
        try:
            found = at(step)
        except RankError:
            break
        error = found.relative_error
        if error <= tolerance:
            idle = low and error < (1.0 + IDLE) * (best.relative_error if best else 0.0)
            best, low = found, step
            if error >= SPARE * tolerance or not error or idle:
                break  # where nothing is private any more, a coarser step saves nothing
        else:
            high, fails = step, fails + 1
        power = 1.0
        if before is not None and before[0] != step and before[1] != error:
            power = math.log(error / before[1]) / math.log(step / before[0])
        before = step, error
        step *= (MARGIN * tolerance / error) ** (1.0 / min(max(power, 0.3), 3.0))
        if not low:  # where rounding of the basis is most of the error, the step says little
            step = min(step, high * FALLS[min(fails, len(FALLS)) - 1])
        elif not low < step < high:
            step = math.sqrt(low * high) if high < math.inf else 1.5 * low
        if low and high / low < CLOSE:
            break
    if best is None:
        raise RankError(
            f"tolerance is {tolerance}; no step of 16-bit codes reaches it: keep the adapter as "
            "it is, or ask for a larger error"
        )
    return best


FALLS = (0.99, 0.8, 0.6, 0.4)
"""Ratios of a step to the last one that was too coarse, at most: after one such, two, and so on."""

IDLE = 1e-3
"""Growth of the error with the step below which no coarser step is tried."""

CLOSE = 1.01
"""Ratio of two steps between which no other is looked for."""


def _at(
    lora: LoraAdapter,
    cells: Mapping[str, Cell],
    norm: float,
    step: float,
    dtype: np.dtype,
    private: bool,
) -> Member:
    absolute = step * norm or 1.0
    source = SourceRecord(lora.dtype, lora.parameters, lora.bytes)

    def coded(module: LoraModule) -> CodedSlice:
        return _slice(module, cells.get(module.name), norm, absolute, dtype, private)

    return member_of(lora, coded, cells, source, weight=norm, step=absolute, dtype=dtype)


def member_of(
    lora: LoraAdapter,
    coded: Callable[[LoraModule], CodedSlice],
    cells: Mapping[str, Cell],
    source: SourceRecord,
    *,
    weight: float,
    step: float,
    dtype: np.dtype = FLOAT16,
) -> Member:
    """Put the coded slices of an adapter together.

    Parameters
    ----------
    lora : LoraAdapter
        The adapter.
    coded : callable
        Codes of the core of a module, its private terms and what is lost.
    cells : mapping of str to Cell
        The cell of a module; one that has none is private as a whole.
    source : SourceRecord
        What it was stored in.
    weight, step : float
        Weight of the mean cores, and step of the codes.
    dtype : dtype
        Type of the private terms' values.
    """
    cores: dict[str, np.ndarray] = {}
    groups = []
    for name, modules in lora_groups(lora, "type"):
        found = [coded(module) for module in modules]
        for module, own in zip(modules, found, strict=True):
            if module.name in cells:
                cores[module.name] = own.codes
        groups.append(_group(name, modules, found, dtype))
    whole = CompressedAdapter(tuple(groups), common_config(lora), source, lora.extras)
    used = {module: cells[module] for module in cores}
    return Member(whole, cores, weight, step, used) if cores else Member(whole)


def _slice(
    module: LoraModule,
    cell: Cell | None,
    norm: float,
    step: float,
    dtype: np.dtype,
    private: bool,
) -> CodedSlice:
    if cell is not None:
        pair = module.factors()
        return code_slice(cell.basis, *pair, step, weight=norm, value_dtype=dtype, private=private)
    svd = slice_svds(LowRankStack.of_constants([module.B], [module.A]))[0]
    terms = quantise_slice(svd, step).rounded(dtype)
    return CodedSlice(np.zeros((0, 0), np.int16), terms, lost2(svd, terms))


def _group(
    name: str, modules: list[LoraModule], coded: list[CodedSlice], dtype: np.dtype
) -> CompressedGroup:
    norms2 = LowRankStack.of_constants([m.B for m in modules], [m.A for m in modules]).norms2()
    norm2, lost = float(norms2.sum()), sum(own.lost2 for own in coded)
    return CompressedGroup(
        name=name,
        modules=tuple(module.name for module in modules),
        shape=modules[0].shape,
        slice_ranks=tuple(min(m.rank, *m.shape) for m in modules),
        stack=QuantisedStack(None, tuple(own.private for own in coded), dtype),
        relative_error=math.sqrt(lost / norm2) if norm2 else 0.0,
        norm=math.sqrt(norm2),
        embedding=modules[0].embedding,
    )
