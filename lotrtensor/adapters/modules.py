"""The update of one module as a pair of thin factors, in memory or made on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lotrtensor.adapters.rounding import check_size
from lotrtensor.core.linalg import largest_term
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.errors import ShapeError


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The update ΔW = B A of one module.

    Attributes
    ----------
    name : str
        Path of the adapted module in the base model, without any prefix of PEFT's.
    B : ndarray (m, r)
        Left factor, LoRA scale included.
    A : ndarray (r, n)
        Right factor.
    embedding : bool
        Whether the module is an embedding, whose weight is n × m: the transpose of ΔW.
    stored : (dtype, dtype) or None
        Types that B and A were read in; None where they are no longer what a file holds.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> module = lt.LoraModule("layers.0.query", B=np.ones((4, 2)), A=np.ones((2, 6)))
    >>> module.shape, module.rank, module.parameters
    ((4, 6), 2, 20)
    """

    name: str
    B: np.ndarray
    A: np.ndarray
    embedding: bool = False
    stored: tuple[np.dtype, np.dtype] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """LoRA rank r of this module."""
        return int(self.B.shape[1])

    @property
    def parameters(self) -> int:
        """Number of stored numbers: r (m + n)."""
        return self.rank * sum(self.shape)

    def bytes_in(self, dtype: np.dtype) -> int:
        """Bytes of the two factors as they were read, or in ``dtype`` where they were not."""
        b, a = self.stored or (dtype, dtype)
        return self.rank * (self.shape[0] * b.itemsize + self.shape[1] * a.itemsize)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × r) and A (r × n), at the cost of one where both are made on demand."""
        return self.B, self.A

    def held(self) -> LoraModule:
        """Return the module with its factors in memory."""
        return self


class LazyModule(LoraModule):
    """The update ΔW = B A of one module, its factors made anew whenever they are asked for.

    So is a large adapter gone through without ever being in memory as a whole.

    Parameters
    ----------
    name : str
        Path of the adapted module.
    shape : (int, int)
        Shape (m, n) of ΔW.
    rank : int
        LoRA rank r.
    make : callable
        Returns B (m × r) and A (r × n), at every call the same numbers.
    embedding, stored
        See `LoraModule`.

    Examples
    --------
    >>> import numpy as np
    >>> from lotrtensor.adapters.modules import LazyModule
    >>> made = LazyModule("q", (4, 6), 2, lambda: (np.ones((4, 2)), np.ones((2, 6))))
    >>> made.parameters, made.B.shape
    (20, (4, 2))
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        rank: int,
        make: Callable[[], tuple[np.ndarray, np.ndarray]],
        embedding: bool = False,
        stored: tuple[np.dtype, np.dtype] | None = None,
    ) -> None:
        own = {"name": name, "embedding": embedding, "stored": stored}
        self.__dict__.update(own, _shape=shape, _rank=rank, _make=make)

    _shape: tuple[int, int]
    _rank: int
    _make: Callable[[], tuple[np.ndarray, np.ndarray]]

    @property
    def B(self) -> np.ndarray:
        """Left factor (m × r)."""
        return self.factors()[0]

    @property
    def A(self) -> np.ndarray:
        """Right factor (r × n)."""
        return self.factors()[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of ΔW."""
        return self._shape

    @property
    def rank(self) -> int:
        """LoRA rank r of this module."""
        return self._rank

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return B (m × r) and A (r × n)."""
        return self._make()

    def held(self) -> LoraModule:
        """Return the module with its factors in memory."""
        return LoraModule(self.name, *self.factors(), self.embedding, self.stored)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """A copy has its factors in memory: an open file has no copy."""
        return LoraModule, (self.name, *self.factors(), self.embedding, self.stored)

    def __repr__(self) -> str:
        return f"LoraModule(name={self.name!r}, shape={self.shape}, rank={self.rank}, on demand)"

    # `dataclasses.replace` calls the class with the fields, two of which are made on demand here.
    __class__ = property(lambda self: LoraModule)


def module_stack(modules: Sequence[LoraModule]) -> LowRankStack:
    """Return the updates of modules of one shape as a stack, one slice a module.

    Raises
    ------
    DataError
        If one is beyond 1e±140: squares are taken of all of them.
    ShapeError
        If one has factors that do not fit, or no rank.
    """
    pairs = [module.factors() for module in modules]
    for module, (b, a) in zip(modules, pairs, strict=True):
        if not module.rank or b.shape[1] != a.shape[0]:
            raise ShapeError(
                f"{module.name}: B is {b.shape} and A is {a.shape}; expected (m, r) and (r, n) "
                "with r at least 1"
            )
        check_size(largest_term(b, a), module.name)
    # What is made on demand goes once it is in the stack; what is held anyhow is not copied.
    made = any(isinstance(module, LazyModule) for module in modules)
    stack = LowRankStack if made else LowRankStack.of_constants
    return stack([b for b, _ in pairs], [a for _, a in pairs])
