"""shared_outer: experts as a LoRA that shares one side among them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lotrtensor.adapters.formats.experts import DOWN, parameter_path
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.loading import Adapter
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import LotrGroup
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.errors import FormatError, RankError, UnsupportedAdapterError


def shared_outer(adapter: Adapter, rank: int | None = None) -> LoraAdapter:
    """Return experts as a LoRA that shares the side of the hidden state among them.

    On the way up all experts of a parameter have one A: ΔW_e = B_e A. On the way down
    (``down_proj``, ``w2``) they have one B: ΔW_e = B A_e. Servers compute the shared side once a
    token.

    A LoTR is such a LoRA exactly: A = Vᵀ with B_e = U G_e, or B = U with A_e = G_e Vᵀ. Any other
    adapter is projected onto the leading singular vectors of all its updates side by side, which
    no other shared side of this rank betters.

    Parameters
    ----------
    adapter : LotrAdapter or LoraAdapter
        The adapter. Modules that are no experts (``experts.<number>.<name>``) stay as they are.
    rank : int, optional
        Rank of the shared side; needed where there is no LoTR. A LoTR has its own, q on the way up
        and p on the way down.

    Returns
    -------
    LoraAdapter
        To be written by ``save(..., experts="shared-outer")``.

    Raises
    ------
    RankError
        If ``rank`` is no positive integer, is missing, or is given beside a LoTR.
    FormatError
        If no module is an expert.
    UnsupportedAdapterError
        If the adapter is compressed.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> names = [f"layers.0.experts.{e}.up_proj" for e in range(3)]
    >>> modules = tuple(lt.LoraModule(n, np.ones((4, 1)), np.ones((1, 6))) for n in names)
    >>> adapter = lt.LoraAdapter(modules, {}, np.dtype("float64"))
    >>> shared = lt.shared_outer(adapter, rank=1)
    >>> bool((shared.modules[0].A == shared.modules[2].A).all())
    True
    >>> lt.compare(adapter, shared).relative_error < 1e-12
    True
    """
    if not isinstance(adapter, LotrAdapter | LoraAdapter):
        raise UnsupportedAdapterError(
            f"the adapter is a {type(adapter).__name__}; expected a LoTR or a LoRA: export it to a "
            "LoRA first"
        )
    if isinstance(adapter, LotrAdapter) and rank is not None:
        raise RankError(
            f"rank is {rank!r}, and the ranks of a LoTR are its own; truncate the adapter to "
            "another rank first (lotr truncate)"
        )
    lora = adapter.to_lora()
    stacks: dict[str, list[LoraModule]] = {}
    for module in lora.modules:
        path = parameter_path(module.name)
        if path and path.split(".")[-2] == "experts":
            stacks.setdefault(path, []).append(module)
    if not stacks:
        raise FormatError(
            "no module of the adapter is an expert (experts.0.down_proj, say); expected some"
        )
    experts = {module.name for members in stacks.values() for module in members}
    found = [module for module in lora.modules if module.name not in experts]
    if isinstance(adapter, LotrAdapter):
        for group in adapter.groups:
            found += [m for m in _of_group(group) if m.name in experts]
    else:
        for path, members in stacks.items():
            found += _projected(path, members, _check_rank(rank, path, members))
    return replace(lora, modules=tuple(sorted(found, key=lambda m: layer_order(m.name))))


def _of_group(group: LotrGroup) -> list[LoraModule]:
    tucker2 = group.tucker2()
    left, right = tucker2.left, tucker2.right
    return [
        LoraModule(name, left, core @ right.T)
        if _leads_down(name)
        else LoraModule(name, left @ core, right.T)
        for name, core in zip(group.modules, tucker2.core, strict=True)
    ]


def _projected(path: str, members: list[LoraModule], rank: int) -> list[LoraModule]:
    """Project the updates of one parameter onto their leading singular vectors on one side."""
    down = _leads_down(path)
    # ΔW_e = B_e A_e with B_e = Q_e R_e: the rows R_e A_e have the Gram matrix of ΔW_e.
    thin = [(m.A.T, m.B.T) if down else (m.B, m.A) for m in members]
    rows = [np.linalg.qr(b.astype(float), mode="r") @ a.astype(float) for b, a in thin]
    shared = np.linalg.svd(np.vstack(rows), full_matrices=False)[2][:rank]
    found = []
    for member, (b, a) in zip(members, thin, strict=True):
        own = b.astype(float) @ (a.astype(float) @ shared.T)
        sides = (shared.T, own.T) if down else (own, shared)
        found.append(LoraModule(member.name, *sides))
    return found


def _check_rank(rank: int | None, path: str, members: list[LoraModule]) -> int:
    if rank is None:
        raise RankError(
            f"the adapter is a LoRA, whose experts share nothing yet (those of {path}, say); give "
            "the rank of the side that they are to share"
        )
    if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
        raise RankError(f"rank is {rank!r}; expected an integer of at least 1")
    m, n = members[0].shape
    if any(member.shape != (m, n) for member in members):
        raise FormatError(f"the experts of {path} are of unlike shapes; they can share no side")
    return min(int(rank), m if _leads_down(path) else n)


def _leads_down(name: str) -> bool:
    return name.rpartition(".")[2] in DOWN
