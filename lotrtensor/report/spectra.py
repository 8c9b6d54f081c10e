"""Singular spectra of an adapter's groups, as rows and as lines of blocks in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from rich import box
from rich.table import Table

from lotrtensor.adapters.compressed_group import CompressedGroup
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import module_stack
from lotrtensor.core.rates import joined_flops, spectra, spectra_flops
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.report.documents import Document
from lotrtensor.report.names import shown_name

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
    sources = _sources(document, adapter)
    if asked is None:
        asked = sum(flops for flops, _ in sources) <= SECONDS_OF_WORK
    for group in document["groups"]:  # which `_sources` has gone through in this order
        _, make = sources.pop(0)  # the slices of one group go before those of the next are there
        group["singular_values"] = None
        if asked:
            found = spectra(make())
            group["singular_values"] = {"left": found.left.tolist(), "right": found.right.tolist()}


def _sources(
    document: Document, adapter: Adapter
) -> list[tuple[float, Callable[[], LowRankStack]]]:
    """What the spectra of every group cost, and what makes its slices."""
    if isinstance(adapter, LoraAdapter):
        modules = {module.name: module for module in adapter.modules}
        groups = [[modules[name] for name in group["modules"]] for group in document["groups"]]
        return [
            (joined_flops(*own[0].shape, sum(m.rank for m in own)), partial(module_stack, own))
            for own in groups
        ]
    if isinstance(adapter, LotrAdapter):
        made = [_small(group) for group in adapter.groups]
    else:
        made = [_of_compressed(group) for group in adapter.groups]
    return [(spectra_flops(stack), partial(made.__getitem__, i)) for i, stack in enumerate(made)]


def _of_compressed(group: CompressedGroup) -> LowRankStack:
    pairs = [group.factors(k) for k in range(len(group.modules))]
    return LowRankStack.of_constants([b for b, _ in pairs], [a for _, a in pairs])


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
