"""PEFT LoRA directories: every field that changes ΔW is honoured, every other method refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.directory import write_directory
from lotrtensor.adapters.formats.tensors import (
    BFLOAT16,
    Tensors,
    adapter_files,
    check_floating,
    read_config,
    read_tensors,
)
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.rounding import rounded
from lotrtensor.errors import FormatError, RankError, UnsupportedAdapterError

PREFIX = "base_model.model."

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank takes."""

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
)

# Config fields that, when set, make the update something else than a plain BA.
_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "target_parameters": "target_parameters",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that change the base weights: ΔW counts from another base than the user's.
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Fields of a LoRA config that describe its own factors and are written anew.
_OWN_FIELDS = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}


LoraContent = tuple[tuple[LoraModule, ...], Mapping[str, Any], np.dtype, Mapping[str, np.ndarray]]
"""Modules, config, storage type and carried tensors: the fields of a `LoraAdapter`."""


class Factor(NamedTuple):
    """A stored factor under the key that an error names."""

    key: str
    tensor: np.ndarray


def read_lora(directory: Path) -> LoraContent:
    """Read a PEFT LoRA directory.

    Parameters
    ----------
    directory : Path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors`` or its shards.

    Returns
    -------
    modules, config, dtype, extras
        The fields of a `LoraAdapter`. Factors in float32 (float64 where stored so), with the
        scale alpha / r or alpha / √r folded into B.

    Raises
    ------
    FormatError
        If the files are damaged, incomplete, or contradict each other.
    UnsupportedAdapterError
        If the adapter is no plain ΔW = s B A, by the name of the method found.
    DataError
        If a factor is not finite floating point.
    """
    config = read_config(directory)
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{directory} has peft_type {config.get('peft_type')!r}; expected LORA or LOTR"
        )
    check_plain(config, directory)
    pairs, extras = _split(read_tensors(directory), config, directory)
    modules, dtypes = [], set()
    for name in sorted(pairs, key=layer_order):
        modules.append(_read_module(name, pairs[name], config, directory))
        dtypes |= {factor.tensor.dtype for factor in pairs[name].values()}
    return tuple(modules), config, widest(dtypes), extras


def write_lora(
    directory: Path,
    content: LoraContent,
    *,
    uniform: bool = True,
    pad: bool = False,
    force: bool = False,
) -> None:
    """Write a LoRA directory in the form that PEFT, vLLM, SGLang and llama.cpp read alike.

    All modules have one rank r, zero-padded where theirs is lower; alpha = r, so that the scale
    is 1 and baked into B; no rsLoRA, no rank or alpha patterns. With ``pad`` the rank is the next
    of the sizes that vLLM accepts. With ``uniform`` false every module keeps its own rank, told by
    rank and alpha patterns: smaller, and read by PEFT alone.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    RankError
        If ``pad`` is given and the rank exceeds vLLM's largest.
    """
    modules, source_config, dtype, extras = content
    rank = max(module.rank for module in modules)
    if pad:
        rank = _vllm_rank(rank)
    tensors: Tensors = dict(extras)
    patterns = {}
    for module in modules:
        zeros = (0, rank - module.rank if uniform else 0)
        if not uniform and module.rank != rank:
            # PEFT matches a pattern to the end of a path: anchored, it means this module alone.
            patterns["^" + re.escape(module.name)] = module.rank
        b, a = np.pad(module.B, ((0, 0), zeros)), np.pad(module.A, (zeros, (0, 0)))
        stem, tail = ("lora_embedding_", "") if module.embedding else ("lora_", ".weight")
        for side, factor in (("A", a), ("B", b)):
            key = f"{PREFIX}{module.name}.{stem}{side}{tail}"
            tensors[key] = rounded(factor, dtype, key)
    config = {key: value for key, value in source_config.items() if key not in _OWN_FIELDS}
    config.setdefault("target_modules", sorted({m.name for m in modules}))
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_directory(directory, adapter_files(config, tensors), force=force)


def _vllm_rank(rank: int) -> int:
    larger = [size for size in VLLM_RANKS if size >= rank]
    if not larger:
        raise RankError(
            f"the LoRA rank is {rank}, vLLM serves {VLLM_RANKS[-1]} at most; export to a lower rank"
        )
    return larger[0]


def is_factor_of_another_method(key: str) -> bool:
    """Whether a tensor belongs to the update itself in a way that is not known here."""
    return bool(re.search(r"(^|\.)(lora_|vera_|loha|lokr|hada_|ia3_|oft_|boft_|lotr_)", key))


def split_extras(tensors: Tensors, config: Mapping[str, Any], directory: Path) -> Tensors:
    """Return the tensors that an adapter carries beside its update, or refuse the rest by name.

    Modules in ``modules_to_save``, trained biases, trained token rows and saved embedding layers
    are carried under their own keys.

    Raises
    ------
    UnsupportedAdapterError
        If a tensor is none of these.
    """
    for key in tensors:
        carried = (
            _names_saved_module(key, config, directory)
            or (config.get("bias", "none") != "none" and key.endswith(".bias"))
            or "trainable_tokens_delta" in key
            or re.search(
                r"(embed|lm_head|wte|wpe|shared|output_layer)[^.]*(\.base_layer)?\.weight$", key
            )
        )
        if not carried or is_factor_of_another_method(key):
            raise UnsupportedAdapterError(
                f"{directory}: {key} is neither a LoRA factor nor a tensor that its config carries "
                "(modules_to_save, bias, embeddings); it would be lost"
            )
    return dict(tensors)


def _names_saved_module(key: str, config: Mapping[str, Any], directory: Path) -> bool:
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise FormatError(
            f"{directory}: modules_to_save is {saved!r}; expected a list of module names"
        )
    return any(re.search(rf"(^|\.){re.escape(name)}\.", key) for name in saved)


def check_plain(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a LoRA config whose update is no plain BA.

    Raises
    ------
    UnsupportedAdapterError
        By the name of the variant.
    """
    for field, method in _VARIANTS.items():
        if config.get(field):
            raise UnsupportedAdapterError(
                f"{directory} uses {method} ({field} = {config[field]!r}); only plain LoRA, "
                "ΔW = s · B · A, has a LoTR form"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UnsupportedAdapterError(
            f"{directory} has init_lora_weights = {init!r}, which changes the base weights; save "
            "it as a plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _split(
    tensors: Tensors, config: Mapping[str, Any], directory: Path
) -> tuple[dict[str, dict[str, Factor]], Tensors]:
    """Sort tensors into factor pairs by module and side, and what is carried along."""
    pairs: dict[str, dict[str, Factor]] = {}
    extras: Tensors = {}
    adapters = set()
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            _check_variant_key(key, directory)
            extras[key] = tensor
            continue
        adapters.add(match["adapter"])
        side = (match["embedding"] or "") + match["side"]
        sides = pairs.setdefault(match["module"], {})
        if side in sides:
            raise FormatError(
                f"{directory}: {key} and {sides[side].key} are the same factor; expected one"
            )
        sides[side] = Factor(key, tensor)
    if len(adapters - {None}) > 1:
        raise FormatError(
            f"{directory} holds the adapters {sorted(adapters - {None})}; expected one a directory"
        )
    if not pairs:
        raise FormatError(f"{directory} has no lora_A and lora_B tensors; nothing to convert")
    return pairs, split_extras(extras, config, directory)


def _check_variant_key(key: str, directory: Path) -> None:
    variants = {
        "lora_magnitude_vector": "DoRA",
        "lora_A.bias": "lora_bias",
        "lora_B.bias": "lora_bias",
    }
    for part, method in variants.items():
        if part in key:
            raise UnsupportedAdapterError(
                f"{directory}: {key} belongs to {method}; only plain LoRA, ΔW = s · B · A, has a "
                "LoTR form"
            )


def _read_module(
    name: str, sides: dict[str, Factor], config: Mapping[str, Any], directory: Path
) -> LoraModule:
    embedding = any(side.startswith("embedding_") for side in sides)
    a, b = (sides.get(("embedding_" if embedding else "") + side) for side in "AB")
    if a is None or b is None:
        found = next(iter(sides.values())).key
        raise FormatError(
            f"{directory}: {found} has no partner; expected both lora_A and lora_B of {name}"
        )
    for factor in (a, b):
        if factor.tensor.ndim == 4:
            raise UnsupportedAdapterError(
                f"{directory}: {factor.key} has shape {factor.tensor.shape}; convolutions are not "
                "read, expected a matrix"
            )
    check_pair(b, a, directory)
    return scaled_module(name, b, a, lora_scale(name, a, config, directory), directory, embedding)


def check_pair(b: Factor, a: Factor, path: Path) -> None:
    """Refuse two stored factors that are no pair of matrices (m, r) and (r, n).

    Raises
    ------
    FormatError
        If a shape is wrong.
    DataError
        If a factor is not finite floating point.
    """
    for factor in (a, b):
        if factor.tensor.ndim != 2 or 0 in factor.tensor.shape:
            raise FormatError(
                f"{path}: {factor.key} has shape {factor.tensor.shape}; expected a matrix "
                "of rank at least 1 (an empty one comes from a sharded run saved without gathering)"
            )
        check_floating(factor.key, factor.tensor, path)
    if b.tensor.shape[1] != a.tensor.shape[0]:
        raise FormatError(
            f"{path}: {b.key} is {b.tensor.shape} and {a.key} is {a.tensor.shape}; expected "
            "(m, r) and (r, n) with one r"
        )


def scaled_module(
    name: str, b: Factor, a: Factor, scale: float, path: Path, embedding: bool = False
) -> LoraModule:
    """Return a module from its two stored matrices, ``scale`` folded into B.

    Raises
    ------
    FormatError
        If the scale makes them infinite.
    """
    wide = np.result_type(*(_as_wide(f.tensor.dtype) for f in (a, b)))
    with np.errstate(over="ignore"):
        scaled = b.tensor.astype(wide) * wide.type(scale)
    if not np.isfinite(scaled).all():
        raise FormatError(
            f"{path}: {b.key} times its scale {scale:.3g} (alpha over r) is infinite; "
            "expected a scale of ordinary size"
        )
    return LoraModule(
        name=name,
        B=scaled,
        A=a.tensor.astype(wide),
        embedding=embedding,
        stored=(b.tensor.dtype, a.tensor.dtype),
    )


def lora_scale(name: str, a: Factor, config: Mapping[str, Any], directory: Path) -> float:
    """Return the scale of a module by PEFT's rules, after checking its rank against the config."""
    rank = _by_pattern(name, "rank_pattern", config, config.get("r", 8), directory)
    alpha = _by_pattern(name, "alpha_pattern", config, config.get("lora_alpha", 8), directory)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        raise FormatError(
            f"{directory}: lora_alpha of {name} is {repr(alpha)[:40]}; expected a number such as 16"
        )
    found = a.tensor.shape[0]
    if rank != found:
        raise FormatError(
            f"{directory}: the config gives {name} the rank {rank!r}, but {a.key} has rank "
            f"{found}; they belong to different adapters"
        )
    return alpha / (math.sqrt(found) if config.get("use_rslora") else found)


def _by_pattern(
    name: str, field: str, config: Mapping[str, Any], default: Any, directory: Path
) -> Any:
    """Look a module up as PEFT does: the first pattern that its path ends with."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{directory}: {field} is {patterns!r}; expected patterns and numbers")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise FormatError(
                f"{directory}: {field} has {pattern!r}, which is no regular expression: {error}"
            ) from error
        if matches:
            return value
    return default


def _as_wide(dtype: np.dtype) -> np.dtype:
    """Type that a stored factor is worked with in: float64 stays, the rest is float32."""
    return np.dtype("float64") if dtype == np.float64 else np.dtype("float32")


def widest(dtypes: set[np.dtype]) -> np.dtype:
    """Return the one storage type, or float32 where half-precision types are mixed."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    half = {BFLOAT16, np.dtype("float16")}
    return np.dtype("float64") if np.dtype("float64") in dtypes - half else np.dtype("float32")
