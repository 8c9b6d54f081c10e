"""Switch off the inference path of nn.TransformerEncoder, which uses weights and calls no layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def leave_fast_path(model: nn.Module, adapted: Iterable[str]) -> None:
    """Make every nn.TransformerEncoderLayer that holds an adapted layer call its layers.

    In evaluation without gradients its fused kernel would use the base weights and silently lose
    the update. PyTorch has no switch for one module: ``activation_relu_or_gelu`` says
    which activation the kernel has to apply, and 0 that it has none, which rules the kernel out
    and is read for nothing else.

    Parameters
    ----------
    model : nn.Module
        The model.
    adapted : iterable of str
        Paths of its adapted layers.
    """
    adapted = list(adapted)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not any(path.startswith(prefix) for path in adapted):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
