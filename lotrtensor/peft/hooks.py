"""Hand the adapter names of a mixed batch to the layers, for the time of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lotrtensor.peft.layer import LotrLayer
from lotrtensor.peft.mixed import Rows


@contextmanager
def mixed_batch_hooks(
    tuner: nn.Module, adapter_names: list[str], num_beams: int | None
) -> Iterator[None]:
    """Give every adapted layer the argument ``adapter_names``.

    Beam search repeats every row ``num_beams`` times in a row, except in the encoder of an
    encoder–decoder model, which still sees the original rows.
    """
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    rows = Rows(adapter_names)
    repeated = Rows([name for name in adapter_names for _ in range(beams)]) if beams > 1 else rows
    model: Any = tuner.model
    # Decoder-only models may answer get_encoder() with themselves.
    encoder = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None
    encoder = None if encoder is model else encoder
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    handles = []
    try:
        for module in tuner.modules():
            if isinstance(module, LotrLayer | AuxiliaryTrainingWrapper):
                names = rows if id(module) in inside else repeated
                hook = partial(_add_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
