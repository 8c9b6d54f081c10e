"""Weights of layers that are stored quantised."""

from __future__ import annotations

from typing import Any

from torch import nn


def restore_order(layer: nn.Module) -> None:
    """Put the 4-bit numbers of a layer back into the order that they are dequantised from.

    On a CPU with AVX512-BF16, bitsandbytes reorders a weight in place at its first forward pass in
    evaluation, and dequantises it from that order to a wrong matrix, without a word. Its own way
    back, which saving takes too, leaves the scales (n / block × m) transposed where they are not
    quantised themselves.

    Parameters
    ----------
    layer : Module
        Any layer; one that is not reordered is left alone.
    """
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        weight.quant_state = state
    scales = getattr(state, "absmax", None)
    if scales is not None and scales.ndim == 2:
        state.absmax = scales.T.reshape(-1).float()
