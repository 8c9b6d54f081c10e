"""analyze: what every representation of an adapter costs and keeps, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.compare import compare
from lotrtensor.convert import Progress, convert
from lotrtensor.errors import RankError
from lotrtensor.truncate import truncate

SHARES = (50, 35, 25, 17, 12, 6, 3)
"""Sizes that are compared, in percent of the adapter's bytes."""


class Choice(NamedTuple):
    """One representation at one size.

    ``budget`` is the share of the adapter's bytes allowed, ``bytes`` what is stored,
    ``relative_error`` a relative Frobenius error; ``lower_bound`` is None for truncated LoRA, whose
    error is the smallest of its ranks.
    """

    representation: str
    budget: float
    parameters: int
    bytes: int
    relative_error: float
    lower_bound: float | None


class Analysis(NamedTuple):
    """All choices, and one sentence that names the best of the sizes that keep most."""

    source_parameters: int
    source_bytes: int
    choices: tuple[Choice, ...]
    recommendation: str


def analyze(
    adapter: Adapter, shares: Sequence[float] = SHARES, progress: Progress | None = None
) -> Analysis:
    """Compare LoTR by type, by shape and with layers clustered to truncated LoRA.

    Parameters
    ----------
    adapter : LoraAdapter or LotrAdapter
        The adapter; a LoTR is taken as the LoRA that it exports to.
    shares : sequence of float
        Sizes, in percent of the adapter's bytes.
    progress : callable, optional
        Told of every size before it is tried.

    Returns
    -------
    Analysis
        A representation that does not get down to a size has no row there: a LoRA keeps rank 1
        for every module.
    """
    lora = adapter.to_lora() if isinstance(adapter, LotrAdapter) else adapter
    choices: list[Choice] = []
    for done, share in enumerate(shares):
        if progress:
            progress(f"{share:g}%", done, len(shares))
        choices += _at_share(lora, share)
    return Analysis(lora.parameters, lora.bytes, tuple(choices), recommend(choices, lora.bytes))


def recommend(choices: Sequence[Choice], source_bytes: int) -> str:
    """Name, for the smallest size whose best error is below one half, the best and the runner-up.

    The best is the representation with the smallest error there, whichever it is.
    """
    sizes = sorted({choice.budget for choice in choices})
    for size in sizes:
        rows = sorted(
            (c for c in choices if c.budget == size), key=lambda choice: choice.relative_error
        )
        if rows and rows[0].relative_error < 0.5:
            return "; ".join(_phrase(choice, source_bytes) for choice in _best_two(rows))
    return (
        "no size tried keeps three quarters of the squared norm: this adapter is not redundant "
        "in the Frobenius norm; measure the task before shrinking it"
    )


def _best_two(rows: Sequence[Choice]) -> list[Choice]:
    """The best choice, and the best of the other family, LoTR or truncated LoRA."""
    family = rows[0].representation.startswith("LoTR")
    other = (c for c in rows if c.representation.startswith("LoTR") != family)
    return [rows[0], *list(other)[:1]]


def _phrase(choice: Choice, source_bytes: int) -> str:
    ratio = source_bytes / choice.bytes
    return f"{choice.representation}: {ratio:.1f} × smaller, error {choice.relative_error:.2g}"


def _at_share(lora: LoraAdapter, share: float) -> list[Choice]:
    budget = f"{share:g}%"
    attempts: dict[str, Callable[[], Adapter]] = {
        "LoTR by type": lambda: convert(lora, budget=budget),
        "LoTR by shape": lambda: convert(lora, budget=budget, group_by="shape"),
        "LoTR, layers in 2 clusters": lambda: convert(lora, budget=budget, cluster=2),
        "truncated LoRA, best ranks": lambda: truncate(lora, budget=budget),
        "truncated LoRA, one rank": lambda: _uniform(lora, share),
    }
    found = []
    for name, attempt in attempts.items():
        try:
            made = attempt()
        except RankError:
            continue
        found.append(_choice(name, share, lora, made))
    return found


def _uniform(lora: LoraAdapter, share: float) -> Adapter:
    """The largest one rank for all modules whose bytes stay within ``share`` percent."""
    for rank in range(max(module.rank for module in lora.modules), 0, -1):
        made = truncate(lora, rank=rank)
        if made.bytes <= lora.bytes * share / 100:
            return made
    raise RankError(f"rank 1 for every module is more than {share:g}%")


def _choice(name: str, share: float, lora: LoraAdapter, made: Adapter) -> Choice:
    if isinstance(made, LotrAdapter):
        error, bound = made.relative_error or 0.0, made.lower_bound
    else:
        error, bound = compare(lora, made).relative_error, None
    return Choice(name, share / 100, made.parameters, made.bytes, error, bound)
