"""What adapters of a pack take on a device: as LoRAs in a server's slots, and as the pack has them.

vLLM and SGLang hold a number of slots for adapters, each as wide as the largest rank that they are
told of, whatever the adapters in them need: slots · r · Σ (m + n) numbers over all modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lotrtensor.adapters.formats.peft import VLLM_RANKS
from lotrtensor.core.options import check_integer
from lotrtensor.packs.members import Cell, Member


class ServePlan(NamedTuple):
    """Ranks and bytes of adapters on a device.

    Attributes
    ----------
    modules : int
        Modules that any of the adapters changes.
    original_rank, unpacked_rank : int
        Largest LoRA rank of a module, before packing and as `Pack.unpack` gives it.
    max_lora_rank : int
        Rank of a slot: what was asked for, or the least of vLLM's sizes that the unpacked adapters
        fit in.
    max_loras : int
        Number of slots.
    fits : bool
        Whether the unpacked adapters fit in slots of this rank.
    slot_bytes, original_slot_bytes : int
        Of all slots, at ``max_lora_rank`` and at the least of vLLM's sizes for the originals.
    base_bytes, own_bytes : int
        Of the bases, once, and of as many adapters' own cores and terms on them, as plain numbers.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.ServePlan(1, 8, 4, 8, 2, True, 640, 640, 0, 320).fits
    True
    """

    modules: int
    original_rank: int
    unpacked_rank: int
    max_lora_rank: int
    max_loras: int
    fits: bool
    slot_bytes: int
    original_slot_bytes: int
    base_bytes: int
    own_bytes: int


def plan_serving(
    members: Sequence[Member],
    cells: Sequence[Cell],
    max_lora_rank: int | None,
    max_loras: int,
    itemsize: int = 2,
) -> ServePlan:
    """Count what adapters take on a device; see `ServePlan`.

    Parameters
    ----------
    members : sequence of Member
        The adapters.
    cells : sequence of Cell
        The bases of their pack.
    max_lora_rank : int or None
        Rank of a slot.
    max_loras : int
        Number of slots.
    itemsize : int
        Bytes of a number on the device.

    Raises
    ------
    OptionError
        If a number is no integer of at least 1.
    """
    slots = check_integer(max_loras, "max_loras", 1, 2**31)
    shapes: dict[str, tuple[int, int]] = {}
    original = unpacked = largest = 0
    for member in members:
        own = 0
        for group in member.own.groups:
            m, n = group.shape
            for name, before, c in zip(
                group.modules, group.slice_ranks, group.private_ranks, strict=True
            ):
                p, q = member.cores[name].shape if name in member.cores else (0, 0)
                p, q = (p, q) if p else group.stack.shared_ranks
                shapes[name] = group.shape
                original = max(original, before)
                unpacked = max(unpacked, min(before, min(p, q) + c), 1)
                own += p * q + c * (m + n)
        largest = max(largest, own)
    sides = sum(m + n for m, n in shapes.values())
    needed, before = (_server_rank(rank) for rank in (unpacked, original))
    rank = needed if max_lora_rank is None else check_integer(
        max_lora_rank, "max_lora_rank", 1, 2**31
    )  # fmt: skip
    bases = sum(c.basis.left.size + c.basis.right.size + c.basis.mean.size for c in cells)
    return ServePlan(
        modules=len(shapes),
        original_rank=original,
        unpacked_rank=unpacked,
        max_lora_rank=rank,
        max_loras=slots,
        fits=unpacked <= rank,
        slot_bytes=itemsize * slots * rank * sides,
        original_slot_bytes=itemsize * slots * before * sides,
        base_bytes=itemsize * bases,
        own_bytes=itemsize * slots * largest,
    )


def _server_rank(rank: int) -> int:
    return next((size for size in VLLM_RANKS if size >= rank), rank)
