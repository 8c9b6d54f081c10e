"""compress: an adapter becomes the smallest file of an error, or the best one of a size."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

from lotrtensor.adapters.calibration import Calibration
from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.compressed_group import SourceRecord
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.sizes import budget_bytes
from lotrtensor.core.bits.grid import check_width
from lotrtensor.core.options import shown
from lotrtensor.core.ranks.goal import Rank, make_goal
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import DataError, LotrWarning, OptionError, RankError
from lotrtensor.verbs._compression_job import PARTS, affordable_parts, compression_job
from lotrtensor.verbs._fit_groups import Progress
from lotrtensor.verbs._metrics import metrics_of

Form = Literal["auto", "lotr", "lora"]


@on_one_thread
def compress(
    adapter: Adapter,
    *,
    budget: int | str | None = None,
    tolerance: float | None = None,
    energy: float | None = None,
    rank: Rank | None = None,
    form: Form = "auto",
    bits: int | str = "auto",
    group_by: str = "type",
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> CompressedAdapter:
    """Compress an adapter: bits where the energy is, ΔW_k ≈ U G_k Vᵀ + P_k Q_kᵀ.

    Exactly one of ``budget``, ``tolerance``, ``energy`` and ``rank`` says how far.

    Parameters
    ----------
    adapter : LoraAdapter, LotrAdapter or CompressedAdapter
        The trained adapter.
    budget : int or str, optional
        Bytes of the whole file, config and index included, tensors carried along not: a number,
        ``"80KB"``, or a share of the adapter's bytes, ``"12%"``.
    tolerance : float, optional
        Relative Frobenius error, in (0, 1), that the file does not exceed.
    energy : float, optional
        Share of Σ ‖ΔW_k‖², in (0, 1), to keep: a tolerance of √(1 − energy).
    rank : int or (int, int), optional
        Left and right rank (p, q) of every group, at most what it needs: the LoTR of `convert` at
        this rank, in ``bits`` of one width. For ``form="lotr"`` alone.
    form : str
        ``"lora"``: terms of single modules; ``"lotr"``: factors shared by groups; ``"auto"``: of
        every group what is better, or both.
    bits : "auto" or int
        ``"auto"``: every column takes the bits that its energy is worth; 1 to 16: all take one
        width, and the size follows from the ranks.
    group_by : str
        Which modules share factors; see `group_modules`.
    calibration : Calibration, optional
        What `lotrtensor.torch.calibrate` measured: of all files of the budget, the one is looked
        for that changes the model's outputs least, rather than the updates. It has terms of
        single modules, and its plain relative error is larger, and may be above 1.
    progress : callable, optional
        Told of every group before it is decomposed.

    Returns
    -------
    CompressedAdapter
        Its ``relative_error`` is that of what is stored, its ``lower_bound`` what no parts of its
        ranks fall below, whatever their bits, its ``file_bytes`` what it takes; its
        ``alternatives`` say what other forms would reach there, where form and bits are auto.

    Raises
    ------
    RankError
        If the goal is out of reach, or not exactly one is given (the smallest file is named), or
        ``bits`` is out of range.
    OptionError
        If ``form`` is unknown, a rank is given without ``form="lotr"`` and a width, or a
        calibration with shared factors or a width.
    DataError
        If the calibration is of other modules.

    Warns
    -----
    LotrWarning
        If nothing of the updates is left at this size, or if the adapter is so large that ``auto``
        takes terms of single modules without a look at shared factors.

    Notes
    -----
    All columns are rounded to one grid and coded by their entropy; a term or column is kept where
    it takes more off the squared error than its bits do elsewhere. The step of the grid is found
    from a model of normal columns, and corrected by what is measured.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> lora = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> small = lt.compress(lora, budget="10%", form="lora")
    >>> small.file_bytes <= lora.bytes / 10, small.relative_error < 0.3
    (True, True)
    """
    if not isinstance(form, str) or form not in PARTS:
        raise OptionError(f"form is {shown(form)}; expected 'auto', 'lotr' or 'lora'")
    check_adapter(adapter)
    width = None if isinstance(bits, str) and bits == "auto" else check_width(_number(bits))
    lora = adapter if isinstance(adapter, LoraAdapter) else adapter.to_lora()
    given = None if budget is None else budget_bytes(budget, adapter.bytes)
    goal = make_goal(rank, tolerance, energy, given, size="budget")
    if goal.rank and (form != "lotr" or width is None):
        raise OptionError(
            f"rank is {rank}, which shared factors of one width have; expected form 'lotr' and "
            "bits from 1 to 16 with it, or a budget or tolerance instead"
        )
    source = _source_of(adapter)
    metrics = None
    if calibration is not None:
        _check_calibrated(calibration, form, width, budget)
        metrics = metrics_of(lora, calibration)
    parts = affordable_parts(form, lora, group_by)
    if form == "auto" and parts != "both" and metrics is None:
        warnings.warn(
            "shared factors of an adapter of this size would take many minutes and are not tried; "
            "ask for form 'lotr' to try them",
            LotrWarning,
            stacklevel=3,  # beyond on_one_thread
        )
    job = compression_job(
        lora, parts, width, group_by, progress, source, metrics=metrics, at_once=True
    )
    if goal.rank:
        found = job.of_rank(goal.rank, rank)
    elif budget is None or given is None:
        found = job.within_tolerance(goal.tolerance or 0.0)
    else:
        found = job.within_bytes(given, budget)
    if job.norm2 and not any(group.parameters for group in found.groups):
        warnings.warn(
            f"nothing of the updates is left in {found.file_bytes} bytes, and the error is 1: ask "
            "for a larger budget or a smaller error",
            LotrWarning,
            stacklevel=3,
        )
    # A form or width that was asked for is not one way among several.
    asked = parts != "both" or width is not None or metrics is not None
    if asked:
        return replace(found, weighted_error=job.weighted_error(found))
    return replace(found, alternatives=job.alternatives(found))


def _check_calibrated(
    calibration: object, form: Form, width: int | None, budget: int | str | None
) -> None:
    """Refuse what a calibration has no meaning for."""
    if not isinstance(calibration, Calibration):
        raise DataError(
            f"calibration is a {type(calibration).__name__}; expected a Calibration, which "
            "lotrtensor.torch.calibrate returns"
        )
    if form == "lotr" or width is not None:
        raise OptionError(
            "a calibration is for terms of single modules, whose columns take the bits that they "
            "are worth; expected form 'auto' or 'lora', and bits 'auto'"
        )
    if budget is None:
        raise RankError(
            "a calibration keeps the outputs, of which tolerance, energy and rank say nothing; "
            "expected a budget with it"
        )


def _source_of(adapter: Adapter) -> SourceRecord:
    """What an adapter is stored in; of a compressed one, what it was stored in before that."""
    if isinstance(adapter, CompressedAdapter):
        return adapter.source
    return SourceRecord(adapter.dtype, adapter.parameters, adapter.bytes)


def _number(bits: int | str) -> object:
    return int(bits) if isinstance(bits, str) and bits.isdecimal() and len(bits) < 4 else bits
