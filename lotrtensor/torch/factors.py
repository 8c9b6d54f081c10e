"""SharedFactors: the pair (U, V) that all layers of a group read, held once by the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class SharedFactors(nn.Module):
    """The factors U (m × p) and V (n × q) of ΔW_k = scale · U G_k Vᵀ, one pair per group.

    A layer keeps a reference to this *module*, not to its parameters, and does not register it:
    the parameters then occur once in ``state_dict``, optimisers and wrappers, and every layer sees
    when they are replaced (by ``to``, ``load_state_dict(assign=True)`` or a sharding wrapper).

    Parameters
    ----------
    shape : (int, int)
        Shape (m, n) of a ΔW_k.
    rank : (int, int)
        Left and right rank (p, q).
    dtype, device : optional
        Of both factors; torch's defaults if not given.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> model[0].factors is model[1].factors, model[0].factors
    (True, SharedFactors(left=(8, 2), right=(8, 2)))
    """

    left: nn.Parameter
    right: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, int],
        rank: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        (m, n), (p, q) = shape, rank
        self.left = nn.Parameter(torch.zeros(m, p, dtype=dtype, device=device))
        self.right = nn.Parameter(torch.zeros(n, q, dtype=dtype, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of a ΔW_k."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> tuple[int, int]:
        """Left and right rank (p, q)."""
        return self.left.shape[1], self.right.shape[1]

    def extra_repr(self) -> str:
        """Shapes for ``repr``."""
        return f"left={tuple(self.left.shape)}, right={tuple(self.right.shape)}"


@dataclass(frozen=True)
class Transposed:
    """Factors of the transposed update: V in the place of U, for a tied layer.

    Parameters
    ----------
    factors : SharedFactors
        U and V of ΔW_k; this is the pair of ΔW_kᵀ = scale · V G_kᵀ Uᵀ.
    """

    factors: SharedFactors

    @property
    def left(self) -> Tensor:
        """V (n × q)."""
        return self.factors.right

    @property
    def right(self) -> Tensor:
        """U (m × p)."""
        return self.factors.left


class FactorTable(nn.ModuleDict):
    """All shared factors of a model, by group name; the model's one owner of them.

    Group names hold dots (``attention.self.query``), which names of submodules cannot:
    ``encode`` and ``decode`` of this file translate. Called as a module it returns its input, so
    that an ``nn.Sequential``, which runs every child, may own a table too.

    Examples
    --------
    >>> import torch, lotrtensor.torch as lotr
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> model = lotr.apply_lotr(model, ["0", "1"], rank=2)
    >>> [(name, factors.rank) for name, factors in model.lotr_factors.groups()]
    [('*', (2, 2))]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` unchanged."""
        return x

    def add(self, group: str, factors: SharedFactors) -> None:
        """Take over the factors of ``group``."""
        self[encode(group)] = factors

    def of(self, group: str) -> SharedFactors:
        """Return the factors of ``group``."""
        factors = self[encode(group)]
        assert isinstance(factors, SharedFactors)
        return factors

    def groups(self) -> Iterator[tuple[str, SharedFactors]]:
        """Iterate over group names and their factors."""
        for key in self:
            yield decode(key), self.of(decode(key))


def encode(group: str) -> str:
    """Return the submodule name of a group; a colon keeps it apart from attributes of modules.

    >>> encode("self.query")
    ':self%2Equery'
    """
    return ":" + group.replace("%", "%25").replace(".", "%2E")


def decode(key: str) -> str:
    """Return the group of a submodule name: the inverse of `encode`."""
    return key.removeprefix(":").replace("%2E", ".").replace("%25", "%")
