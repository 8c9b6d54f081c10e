"""compare: the difference of two adapters, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from lotrtensor.adapters.compressed_group import CompressedGroup
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.loading import Adapter, check_adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import module_stack
from lotrtensor.core.squared_error import SquaredError
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.threads import on_one_thread
from lotrtensor.errors import FormatError


class ModuleDifference(NamedTuple):
    """Relative Frobenius difference ‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖ of one module.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> row = lt.compare(adapter, adapter).modules[0]
    >>> row.name, row.relative_error
    ('encoder.layer.0.attention.output.dense', 0.0)
    """

    name: str
    relative_error: float


class Difference(NamedTuple):
    """How far two adapters are apart, A being the reference.

    ``relative_error`` is √(Σ ‖ΔW_A − ΔW_B‖² / Σ ‖ΔW_A‖²) over all modules; ``max_slice_error`` the
    largest of the modules' own.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> lt.compare(adapter, adapter)[:2]  # relative_error, max_slice_error
    (0.0, 0.0)
    """

    relative_error: float
    max_slice_error: float
    modules: tuple[ModuleDifference, ...]


@on_one_thread
def compare(a: Adapter, b: Adapter) -> Difference:
    """Compare the updates of two adapters module by module, each a LoRA or a LoTR.

    A module that only one of them has counts as zero in the other. The dense ΔW is never built.

    Parameters
    ----------
    a, b : LoraAdapter or LotrAdapter
        The reference and the other one.

    Returns
    -------
    Difference
        ``relative_error`` is √(Σ ‖ΔW_A − ΔW_B‖² / Σ ‖ΔW_A‖²) over all modules; ``modules`` has a
        row for each.

    Raises
    ------
    FormatError
        If a module has unlike shapes in the two: they belong to different base models.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> difference = lt.compare(adapter, lt.truncate(adapter, rank=4))
    >>> len(difference.modules), difference.relative_error < difference.max_slice_error < 1
    (36, True)
    """
    check_adapter(a)
    check_adapter(b)
    first, second = lora_factors(a), lora_factors(b)
    rows, whole = [], SquaredError()
    for name in sorted(first.keys() | second.keys(), key=layer_order):
        found = _difference(name, first.get(name), second.get(name))
        whole += found
        rows.append(ModuleDifference(name, found.relative))
    worst = max(row.relative_error for row in rows)
    return Difference(whole.relative, worst, tuple(rows))


class Factors(Mapping[str, LowRankStack]):
    """Every module's ΔW as a stack of one slice of thin factors, made when it is asked for.

    Parameters
    ----------
    makers : mapping of str to callable
        What makes it, by the module's name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], LowRankStack]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> LowRankStack:
        """The ΔW of a module."""
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        """Names of the modules."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Number of modules."""
        return len(self._makers)


def lora_factors(adapter: Adapter) -> Factors:
    """Every module's ΔW as a stack of one slice of thin factors, by module name."""
    if isinstance(adapter, LoraAdapter):
        return Factors({m.name: partial(module_stack, [m]) for m in adapter.modules})
    return Factors(
        {
            name: partial(_slice, group, k)
            for group in adapter.groups
            for k, name in enumerate(group.modules)
        }
    )


def _slice(group: LotrGroup | CompressedGroup, k: int) -> LowRankStack:
    b, a = group.factors(k)
    return LowRankStack.of_constants([b], [a])


def _difference(name: str, a: LowRankStack | None, b: LowRankStack | None) -> SquaredError:
    """ΔW_A − ΔW_B beside ΔW_A."""
    if a is None or b is None:
        present = a or b
        norm2 = float(present.norms2()[0]) if present else 0.0
        return SquaredError(norm2, norm2 if b is None else 0.0)
    if a.shape != b.shape:
        raise FormatError(
            f"{name} is {a.shape[1]} × {a.shape[2]} in the first adapter and {b.shape[1]} × "
            f"{b.shape[2]} in the second; they belong to different base models"
        )
    if all(np.array_equal(x, y) for x, y in zip(a.factors(0), b.factors(0), strict=True)):
        return SquaredError(0.0, float(a.norms2()[0]))
    # In float64: the difference of float32 products is no smaller than their rounding.
    first, second = (_wide(*stack.factors(0)) for stack in (a, b))
    return SquaredError(float((first - second).norms2()[0]), float(first.norms2()[0]))


def _wide(b: np.ndarray, a: np.ndarray) -> LowRankStack:
    return LowRankStack.of_constants([b.astype(np.float64)], [a.astype(np.float64)])
