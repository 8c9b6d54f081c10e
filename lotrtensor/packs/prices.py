"""What the cells of a build would cost at every step, and what is chosen by that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from lotrtensor.packs.plan import PlannedCell
from lotrtensor.packs.tasks import STEPS, Priced

SPARE_COLUMNS = 8
"""Columns of a basis beyond twice those that were priced: weights of adapters move ranks little."""


class Prices:
    """Prices of all cells.

    Parameters
    ----------
    cells : sequence of PlannedCell
        The cells.
    prices : sequence of Priced
        The price of each.
    norms : mapping of int to float
        Norms of the adapters by their numbers.
    share : str
        What adapters may share; see `lotrtensor.pack`.
    """

    def __init__(
        self,
        cells: Sequence[PlannedCell],
        prices: Sequence[Priced],
        norms: Mapping[int, float],
        share: str,
    ) -> None:
        self.cells, self.prices, self.norms, self.share = cells, prices, norms, share

    def _table(self, scope: str) -> list[int]:
        return [i for i, cell in enumerate(self.cells) if cell.scope == scope]

    @cached_property
    def _totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all codes and squared relative error of an adapter, at `STEPS`."""
        count = sum(1 for norm in self.norms.values() if norm) or 1
        bits, lost2 = np.zeros(len(STEPS)), np.zeros(len(STEPS))
        for i in self._table("adapters"):
            rows = np.array(self.prices[i].rows or [[0.0] * 7])
            rows = np.vstack([rows, np.repeat(rows[-1:], len(STEPS) - len(rows), axis=0)])
            first = 0 if self.share in ("none", "layers") else 2
            bits, lost2 = bits + rows[:, first], lost2 + rows[:, first + 1]
        return bits / 8, lost2 / count

    @property
    def bytes(self) -> np.ndarray:
        """Bytes of all codes at `STEPS`."""
        found: np.ndarray = self._totals[0]
        return found

    def step_for(self, tolerance: float) -> float:
        """The step at which the relative error of adapters is a tolerance, as priced.

        On a grid of given columns the squared error falls as the square of the step at most. Where
        it falls faster from one price to the next, bases become worth their bits in between, and
        it is not known where: the finer of the two has them.
        """
        lost2 = np.maximum(self._totals[1], 1e-30)
        step = crossing(lost2, tolerance**2)
        finer = sum(1 for priced in STEPS if priced > step)
        if 0 < finer < len(STEPS) and step > STEPS[finer]:
            ratio = STEPS[finer - 1] / STEPS[finer]
            if lost2[finer - 1] > ratio**2 * lost2[finer]:
                return float(STEPS[finer])
        return step

    def chosen(self, step: float) -> list[int]:
        """The cells that are made: of single modules or of whole kinds, kind by kind."""
        share = self.share
        if share in ("none", "layers"):
            return []
        if share in ("adapters", "both"):
            both = set() if share == "adapters" else set(self._table("both"))
            kinds = {self.cells[i].kind for i in both}
            rest = [i for i in self._table("adapters") if self.cells[i].kind not in kinds]
            return sorted([*both, *(i for i in rest if self.prices[i].rows)])
        place = int(np.argmin(np.abs(np.log(np.array(STEPS) / step))))
        found = []
        for kind in dict.fromkeys(cell.kind for cell in self.cells):
            totals: dict[str, tuple[float, list[int]]] = {}
            for scope in ("adapters", "both"):
                own = [i for i in self._table(scope) if self.cells[i].kind == kind]
                rows = [self.prices[i].rows for i in own if self.prices[i].rows]
                if rows and all(len(row) > place for row in rows):
                    price = sum(row[place][4] for row in rows)
                    totals[scope] = price, [i for i in own if self.prices[i].rows]
            if totals:
                found += min(totals.values())[1]
        return sorted(found)

    def widest(self, cell: int, step: float) -> tuple[int, int]:
        """Ranks that the basis of a cell will not exceed: twice those at the next finer price."""
        rows = self.prices[cell].rows
        finer = sum(1 for priced in STEPS if priced > step)
        p, q = (int(rank) for rank in rows[min(finer, len(rows) - 1)][5:])
        return 2 * p + SPARE_COLUMNS, 2 * q + SPARE_COLUMNS

    def mean_errors(self) -> dict[int, float]:
        """Relative error of the mean of all adapters, each brought to norm 1, taken for each."""
        lost2 = dict.fromkeys(self.norms, 0.0)
        for i in self._table("adapters"):
            for (number, _), own in zip(
                self.cells[i].members, self.prices[i].distances2, strict=True
            ):
                lost2[number] += own
        return {number: math.sqrt(value) for number, value in lost2.items()}


def crossing(values: np.ndarray, target: float, steps: Sequence[float] = STEPS) -> float:
    """The step at which values that fall along ``steps`` come down to a target."""
    below = np.nonzero(values <= target)[0]
    if not len(below) or below[0] == 0:
        return float(steps[int(below[0])] if len(below) else steps[-1])
    i = int(below[0])
    ends = np.log(values[[i - 1, i]])
    share = (math.log(target) - ends[0]) / (ends[1] - ends[0]) if ends[0] != ends[1] else 1.0
    return float(steps[i - 1] * (steps[i] / steps[i - 1]) ** share)
