"""Detect quantised weights by the tensors stored beside them in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lotrtensor.adapters.formats.checkpoint import FLOAT_TYPES, Checkpoint
from lotrtensor.errors import DataError

_COUNTERS = {"BOOL", "I64", "U64"}
"""Types of masks, positions and counters; no format packs weights in them."""


def tensors_by_module(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Names of the tensors of every module; ``q.weight.absmax`` belongs to ``q`` as well."""
    found: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        module = name.partition(".weight.")[0]
        found.setdefault(name.rpartition(".")[0] if module == name else module, []).append(name)
    return found


def is_scaled(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a parameter is eight-bit floats with a scale of their own, as fused experts have."""
    scales = (f"{name}_scale", f"{name}_scale_inv", f"{name}_weight_scale")
    dtype = checkpoint.tensors[name].dtype
    return dtype.startswith("F8") and any(scale in checkpoint.tensors for scale in scales)


def quantised_modules(checkpoint: Checkpoint) -> dict[str, str]:
    """Modules whose weight is quantised, each with the name of a tensor that says so.

    bitsandbytes keeps the key of the weight for packed bytes; GPTQ, AWQ and compressed-tensors
    have integers under other keys and no weight; scaled float8 has its scale beside the weight.
    """
    found = {}
    for module, names in tensors_by_module(checkpoint).items():
        weight = f"{module}.weight"
        if weight in names:
            dtype = checkpoint.tensors[weight].dtype
            scaled = dtype.startswith("F8") and any("scale" in n.rpartition(".")[2] for n in names)
            if dtype not in FLOAT_TYPES or scaled:
                found[module] = weight
            continue
        for name in names:
            stored = checkpoint.tensors[name]
            packed = stored.dtype not in FLOAT_TYPES and stored.dtype not in _COUNTERS
            if (packed and stored.shape) or is_scaled(checkpoint, name):
                found[module] = name
                break
    return found


def refuse_quantised(checkpoint: Checkpoint, name: str) -> DataError:
    """Return the refusal of a tensor that stands for quantised numbers."""
    config = checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    stored = checkpoint.tensors[name]
    return DataError(
        f"{checkpoint.place(name)}: {stored.key} has dtype {stored.dtype} and is quantised"
        + (f" ({method})" if method else "")
        + "; dequantise the checkpoint first, or take the one that it was made of"
    )


def check_not_quantised(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Callable[[str], object],
    differs: Callable[[str], bool],
) -> None:
    """Refuse modules that are quantised on one side or both, and are not the same on both.

    Parameters
    ----------
    base, tuned : Checkpoint
        Before and after fine-tuning.
    wanted : callable
        ``wanted(module)`` is false for modules that are left out.
    differs : callable
        ``differs(name)`` says whether a tensor that both have differs.

    Raises
    ------
    DataError
        Naming the tensor, before any shapes are compared.
    """
    own = (tensors_by_module(base), tensors_by_module(tuned))
    for checkpoint in (base, tuned):
        for module, name in quantised_modules(checkpoint).items():
            if wanted(module) and _changed(module, own, differs):
                raise refuse_quantised(checkpoint, name)


def _changed(
    module: str, own: Iterable[dict[str, list[str]]], differs: Callable[[str], bool]
) -> bool:
    first, second = (set(names.get(module, ())) for names in own)
    if not first or not second:
        return False  # one side lacks the module: that is told, and nothing is extracted of it
    return first != second or any(map(differs, first))
