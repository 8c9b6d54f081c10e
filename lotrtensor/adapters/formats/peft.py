"""PEFT LoRA directories: every field that changes ΔW is honoured, every other method refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.carried import PREFIX, split_extras
from lotrtensor.adapters.formats.directory import write_directory
from lotrtensor.adapters.formats.experts import (
    TARGETS,
    ExpertsLayout,
    fused_parameters,
    join_parts,
    parameter_path,
    split_experts,
    stack_experts,
)
from lotrtensor.adapters.formats.factors import (
    Factor,
    as_matrices,
    check_pair,
    on_demand,
    scaled_module,
    widest,
    with_kernel,
)
from lotrtensor.adapters.formats.layout import KERNELS
from lotrtensor.adapters.formats.lora_config import OWN_FIELDS, Scales, check_plain
from lotrtensor.adapters.formats.streamed import Planned
from lotrtensor.adapters.formats.tensors import (
    StoredTensor,
    Tensors,
    adapter_files,
    entries_of,
    is_large,
    open_tensors,
    read_config,
)
from lotrtensor.adapters.formats.wrappers import unwrapped, without_wrappers
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.modules import LazyModule, LoraModule
from lotrtensor.adapters.rounding import rounded
from lotrtensor.core.options import check_choice
from lotrtensor.errors import FormatError, RankError, UnsupportedAdapterError

GATES = (".gate_proj", ".w1")
"""Ends of the paths of experts' matrices that models with fused experts join to one."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank takes."""

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?"
)

LoraContent = tuple[tuple[LoraModule, ...], Mapping[str, Any], np.dtype, Mapping[str, np.ndarray]]
"""Modules, config, storage type and carried tensors: the fields of a `LoraAdapter`."""


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
    tensors = open_tensors(directory)
    plain = unwrapped(tensors, directory)
    large = is_large(sum(tensor.nbytes for tensor in tensors.values()))
    pairs, extras = _split(tensors, plain, config, directory)
    modules, kernels, dtypes = [], {}, set()
    scales = Scales(config, directory)
    pairs, targets = split_experts(pairs, config, scales, directory)
    for name in sorted(pairs, key=layer_order):
        pair = pairs.pop(name)
        module, kernel = _read_module(name, pair, scales, directory, large=large)
        modules.append(module)
        if kernel:
            kernels[name] = list(kernel)
        dtypes |= {factor.tensor.dtype for factor in pair.values()}
    config = _plain_names(config, [module.name for module in modules])
    if kernels:
        config[KERNELS] = kernels
    if targets:
        config[TARGETS] = targets
    return tuple(modules), config, widest(dtypes), extras


def write_lora(
    directory: Path,
    content: LoraContent,
    *,
    uniform: bool = True,
    pad: bool = False,
    force: bool = False,
    experts: ExpertsLayout | None = None,
) -> None:
    """Write a LoRA directory in the form that PEFT, vLLM, SGLang and llama.cpp read alike.

    All modules have one rank r, zero-padded where theirs is lower; alpha = r, so that the scale
    is 1 and baked into B; no rsLoRA, no rank or alpha patterns. With ``pad`` the rank is the next
    of the sizes that vLLM accepts. With ``uniform`` false every module keeps its own rank, told by
    rank and alpha patterns: smaller, and read by PEFT alone.

    ``experts`` is the layout of experts. Not given, those that ``target_parameters`` of the config
    names are stacked as PEFT has them, and others are a module each.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written.
    RankError
        If ``pad`` is given and the rank exceeds vLLM's largest.
    """
    modules, source_config, dtype, extras = content
    apart = experts == "parameters" and any(m.name.endswith(GATES) for m in modules)
    modules = join_parts(modules) if apart else modules
    rank = max(module.rank for module in modules)
    if pad:
        rank = _vllm_rank(rank)
    tensors: dict[str, np.ndarray | Planned] = dict(extras)
    kernels = source_config.get(KERNELS, {})
    patterns: dict[str, int] = {}
    fused = experts_of(modules, source_config, experts, directory)
    ranks = {path: 0 for path in fused.values()}
    for module in modules:
        if module.name in fused:
            path = fused[module.name]
            ranks[path] = rank if uniform else max(ranks[path], module.rank)
    patterns |= {"^" + re.escape(path): r for path, r in ranks.items() if r != rank}
    stacked = [module for module in modules if module.name in fused]
    layout = experts or "parameters"
    for key, tensor in stack_experts(stacked, ranks, layout, directory).items():
        tensors[PREFIX + key] = rounded(tensor, dtype, PREFIX + key)
    for module in modules:
        if module.name in fused:
            continue
        zeros = (0, rank - module.rank if uniform else 0)
        if not uniform and module.rank != rank:
            # PEFT matches a pattern to the end of a path: anchored, it means this module alone.
            patterns["^" + re.escape(module.name)] = module.rank
        kernel = kernels.get(module.name, ())
        tensors |= _tensors(module, zeros, dtype, kernel, directory)
    config = _portable(source_config, modules, fused, layout, apart=apart)
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


def _portable(
    source: Mapping[str, Any],
    modules: Sequence[LoraModule],
    fused: Mapping[str, str],
    layout: ExpertsLayout,
    *,
    apart: bool,
) -> dict[str, Any]:
    """Return what a config says beside ranks and scales: its targets are the modules written."""
    dropped = OWN_FIELDS | {KERNELS} | (set() if layout == "parameters" else {TARGETS})
    config = {key: value for key, value in source.items() if key not in dropped}
    plain = sorted({m.name for m in modules if m.name not in fused})
    config.setdefault("target_modules", plain)
    if apart:
        config["target_modules"] = plain
    if fused and layout == "parameters":
        config[TARGETS] = source.get(TARGETS) or sorted(set(fused.values()))
    elif fused and isinstance(config["target_modules"], list):
        leaves = {path.rpartition(".")[2] for path in fused.values()}
        config["target_modules"] = sorted({*config["target_modules"], *leaves})
    if str(config.get("bias")).endswith("_only"):  # each method has its own word for its layers'
        config["bias"] = "lora_only"
    return config


def _tensors(
    module: LoraModule,
    zeros: tuple[int, int],
    dtype: np.dtype,
    kernel: Sequence[int],
    directory: Path,
) -> dict[str, np.ndarray | Planned]:
    """Factors of a module under the keys of a file, or what makes them."""
    stem, tail = ("lora_embedding_", "") if module.embedding else ("lora_", ".weight")
    keys = [f"{PREFIX}{module.name}.{stem}{side}{tail}" for side in "BA"]
    if isinstance(module, LazyModule) and not kernel:
        return dict(_planned(module, zeros, keys, dtype))
    b, a = _filled(module, zeros)
    if kernel:
        b, a = with_kernel(module.name, b, a, kernel, directory)
    return {key: rounded(x, dtype, key) for key, x in zip(keys, (b, a), strict=True)}


def _filled(module: LoraModule, zeros: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Factors with columns and rows of zeros behind their own."""
    b, a = module.factors()
    return np.pad(b, ((0, 0), zeros)), np.pad(a, (zeros, (0, 0)))


def _planned(
    module: LazyModule, zeros: tuple[int, int], keys: Sequence[str], dtype: np.dtype
) -> dict[str, Planned]:
    """Factors that are made once, when the first of the two is written, and rounded."""
    made: dict[int, np.ndarray] = {}

    def make(side: int) -> np.ndarray:
        if side not in made:
            made.update(enumerate(_filled(module, zeros)))
        return rounded(made.pop(side), dtype, keys[side])

    (m, n), r = module.shape, module.rank + sum(zeros)
    shapes = (m, r), (r, n)
    return {keys[i]: Planned(dtype, shapes[i], partial(make, i)) for i in range(2)}


def experts_of(
    modules: Sequence[LoraModule],
    config: Mapping[str, Any],
    layout: ExpertsLayout | None,
    where: object,
) -> dict[str, str]:
    """Return the modules that a layout stacks, and the parameter that each belongs to.

    Raises
    ------
    OptionError
        If the layout is not known.
    FormatError
        If it stacks experts, and the adapter has none.
    """
    if layout is None:
        return fused_parameters((m.name for m in modules), config.get(TARGETS))
    check_choice(layout, "experts", ("parameters", "modules", "shared-outer"))
    if layout == "modules":
        return {}
    paths = {m.name: parameter_path(m.name) for m in modules if "experts" in m.name.split(".")}
    found = {name: path for name, path in paths.items() if path}
    if not found:
        raise FormatError(
            f"{where}: no module of this adapter is an expert (experts.0.down_proj, say), so that "
            f"there is nothing to lay out as {layout}; leave the option away"
        )
    return found


def _vllm_rank(rank: int) -> int:
    larger = [size for size in VLLM_RANKS if size >= rank]
    if not larger:
        raise RankError(
            f"the LoRA rank is {rank}, vLLM serves {VLLM_RANKS[-1]} at most; export to a lower rank"
        )
    return larger[0]


def _plain_names(config: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """Return the config with the modules' names as the plain model has them."""
    found = {key: value for key, value in config.items() if key != KERNELS}
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if field in found:
            found[field] = without_wrappers(found[field])
    targets = found.get("target_modules")
    if isinstance(targets, str) and "_orig_mod" in targets:
        found["target_modules"] = sorted(modules)
    return found


def _split(
    tensors: Mapping[str, np.ndarray | StoredTensor],
    plain: Mapping[str, str],
    config: Mapping[str, Any],
    directory: Path,
) -> tuple[dict[str, dict[str, Factor]], Tensors]:
    """Sort tensors into factor pairs by module and side, and what is carried along."""
    pairs: dict[str, dict[str, Factor]] = {}
    extras: Tensors = {}
    adapters = set()
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(plain[key].removeprefix(PREFIX))
        if match is None:
            _check_variant_key(key, directory)
            extras[plain[key]] = entries_of(tensor)
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
    adapted = {name: "embedding_A" in sides for name, sides in pairs.items()}
    return pairs, split_extras(extras, config, adapted, directory)


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
    name: str, sides: dict[str, Factor], scales: Scales, directory: Path, *, large: bool
) -> tuple[LoraModule, tuple[int, ...]]:
    """Return a module, and its kernel if it is a convolution."""
    embedding = any(side.startswith("embedding_") for side in sides)
    a, b = (sides.get(("embedding_" if embedding else "") + side) for side in "AB")
    if a is None or b is None:
        found = next(iter(sides.values())).key
        raise FormatError(
            f"{directory}: {found} has no partner; expected both lora_A and lora_B of {name}"
        )
    up, down, kernel = as_matrices(b, a, directory)
    check_pair(up, down, directory)
    # In a model that was wrapped, the config's patterns speak of the wrapped path.
    trained = a.key.removeprefix(PREFIX).rpartition(".lora_")[0]
    parameter = parameter_path(name)
    names = (name, trained, *([parameter] if parameter else []))
    scale = scales.of(names, a.key, a.tensor.shape[0])
    module = scaled_module(name, up, down, scale, directory, embedding)
    return on_demand(module, b, a, (up, down), scale) if large else module, kernel
