"""Singular spectra of an adapter's groups, as rows and as lines of blocks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.modules import LotrGroup
from lotrtensor.core.rates import spectra, spectra_flops
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.report.documents import Document
from lotrtensor.report.names import shown_name
from lotrtensor.verbs._compare import lora_factors

BLOCKS = "▁▂▃▄▅▆▇█"
SHARES = (0.9, 0.99)
"""Shares of the squared norm whose ranks are shown."""


SECONDS_OF_WORK = 4e11
"""Flops that the spectra of an adapter may take unasked, some ten seconds of a processor."""


def add_spectra(document: Document, adapter: Adapter, *, asked: bool | None = None) -> None:
    """Give every group of an `inspect_document` the singular values of its two unfoldings.

    ``left`` falls as fast as one U serves all slices, ``right`` as one V does. They are None where
    they were not ``asked`` for, or, if that was left open, all take more than `SECONDS_OF_WORK`.
    """
    stacks = _stacks(document, adapter)
    if asked is None:
        asked = sum(map(spectra_flops, stacks)) <= SECONDS_OF_WORK
    for group in document["groups"]:  # which `_stacks` has gone through in this order
        stack = stacks.pop(0)  # what is joined of one group goes before that of the next is made
        group["singular_values"] = None
        if asked:
            found = spectra(stack)
            group["singular_values"] = {"left": found.left.tolist(), "right": found.right.tolist()}


def _stacks(document: Document, adapter: Adapter) -> list[LowRankStack]:
    if isinstance(adapter, LotrAdapter):
        return [_small(group) for group in adapter.groups]
    modules = lora_factors(adapter)
    pairs = [[modules[name].factors(0) for name in g["modules"]] for g in document["groups"]]
    return [
        LowRankStack.of_constants([b for b, _ in group], [a for _, a in group]) for group in pairs
    ]


def _small(group: LotrGroup) -> LowRankStack:
    if group.thin:
        return group.low_rank()
    # Orthonormal factors turn the spectra of U G Vᵀ into those of the small cores.
    core = group.tucker2().orthogonalised().core
    return LowRankStack(list(core), [np.eye(core.shape[2])] * len(core))


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """Return falling values as a line of at most ``width`` blocks, each the mean of its part.

    >>> sparkline([4, 3, 2, 1, 0])
    '█▆▅▃▁'
    """
    if not values or values[0] <= 0:
        return ""
    parts = np.array_split(np.asarray(values) / values[0], min(width, len(values)))
    heights = [round(float(part.mean()) * (len(BLOCKS) - 1)) for part in parts]
    return "".join(BLOCKS[height] for height in heights)


def rank_of_share(values: Sequence[float], share: float) -> int:
    """Return how many singular values hold a share of the squared norm.

    >>> rank_of_share([3, 1, 1], 0.9)
    2
    """
    kept = np.cumsum(np.square(values))
    return int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-12))) + 1 if kept[-1] else 0


def spectra_table(document: Document) -> Table:
    """Spectra of every group, and the ranks p, q that hold most of its squared norm."""
    table = Table(
        title="singular values: the faster they fall, the smaller p and q need to be",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    shares = [f"{share:.0%}" for share in SHARES]
    for column in ("group", "left", "right", *shares):
        text = column in ("group", "left", "right")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for group in document["groups"]:
        left, right = (group["singular_values"][side] for side in ("left", "right"))
        ranks = [(rank_of_share(left, share), rank_of_share(right, share)) for share in SHARES]
        table.add_row(
            shown_name(group["name"]),
            f"[cyan]{sparkline(left)}[/]",
            f"[cyan]{sparkline(right)}[/]",
            *("{}, {}".format(*pair) for pair in ranks),
        )
    return table
