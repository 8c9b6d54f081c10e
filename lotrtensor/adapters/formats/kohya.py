"""Single-file LoRAs of image models, as kohya's sd-scripts and diffusers write them.

kohya's file holds three tensors a module:

    <module>.lora_down.weight    A, r × n        or r × c × k × k for a convolution
    <module>.lora_up.weight      B, m × r        or m × r × 1 × 1
    <module>.alpha               a number; ΔW = alpha / r · B A, and B A where it is missing

A convolution's ΔW is the m × (c · k · k) matrix of its kernel's update, which is what sd-scripts
decomposes too: up holds one weight a channel, so the product is plain B A.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from lotrtensor.adapters.formats.directory import CONFIG_NAME, write_file
from lotrtensor.adapters.formats.factors import (
    Factor,
    as_matrices,
    check_pair,
    on_demand,
    scaled_module,
    widest,
    with_kernel,
)
from lotrtensor.adapters.formats.header import data_start
from lotrtensor.adapters.formats.image_names import (
    ALPHA,
    KOHYA,
    STYLES,
    base_class,
    check_methods,
    component,
    flat_names,
    is_difference,
    split_key,
)
from lotrtensor.adapters.formats.json_text import parse_json
from lotrtensor.adapters.formats.layout import (
    LAYOUT,
    Layout,
    check_lora_file,
    read_kernels,
    read_layout,
)
from lotrtensor.adapters.formats.lora_config import Scales, check_plain
from lotrtensor.adapters.formats.peft import LoraContent
from lotrtensor.adapters.formats.tensors import (
    WEIGHTS_NAME,
    StoredTensor,
    Tensors,
    file_bytes,
    is_large,
    open_weights,
)
from lotrtensor.adapters.formats.wrappers import unwrapped_names
from lotrtensor.adapters.grouping import layer_order
from lotrtensor.adapters.rounding import rounded
from lotrtensor.errors import FormatError, UnsupportedAdapterError

_PEFT_METADATA = "lora_adapter_metadata"  # diffusers' name for the LoRA config in the header


def read_single_file(path: Path) -> LoraContent:
    """Read a single-file LoRA of an image model.

    Parameters
    ----------
    path : Path
        The safetensors file.

    Returns
    -------
    modules, config, dtype, extras
        The fields of a `LoraAdapter`. The modules have the names of the file; the config holds its
        `Layout`.

    Raises
    ------
    FormatError
        If the file is damaged or incomplete, or is no adapter.
    UnsupportedAdapterError
        If it holds another method than LoRA, by its name.
    DataError
        If a factor is not finite floating point.
    """
    tensors, metadata = open_weights(path)
    large = is_large(sum(tensor.nbytes for tensor in tensors.values()))
    plain = unwrapped_names(tensors, path, component)
    tensors = {plain[key]: tensor for key, tensor in tensors.items()}
    check_methods(tensors, path)
    pairs, styles, alphas, extras = _split(tensors, path)
    configs = _peft_configs(metadata, pairs.keys() - alphas.keys(), path)
    modules, kernels, dtypes = [], {}, set()
    for name in sorted(pairs, key=layer_order):
        own = _pair(pairs[name], path)
        up, down, kernel = as_matrices(*own, path)
        check_pair(up, down, path)
        if name in alphas:
            scale = _alpha(alphas[name], path) / down.tensor.shape[0]
        else:
            scale = _peft_scale(name, styles[name], down, configs, path)
        module = scaled_module(name, up, down, scale, path)
        modules.append(on_demand(module, *own, (up, down), scale) if large else module)
        dtypes |= {up.tensor.dtype, down.tensor.dtype}
        if kernel:
            kernels[name] = list(kernel)
    common = max(set(styles.values()), key=list(styles.values()).count)
    layout = Layout(
        style=common,
        styles={name: style for name, style in styles.items() if style != common},
        kernels=kernels,
        metadata=metadata,
    )
    config = {"base_model_name_or_path": metadata.get("ss_sd_model_name"), LAYOUT: asdict(layout)}
    return tuple(modules), config, widest(dtypes), extras


def write_single_file(
    path: Path, content: LoraContent, *, kohya: bool, force: bool = False
) -> None:
    """Write a LoRA as one file, atomically, the scale baked into the factors.

    Parameters
    ----------
    path : Path
        The file to make.
    content : LoraContent
        Modules, config, storage type and carried tensors.
    kohya : bool
        Use kohya's names and keys; otherwise those of the file that the adapter came from. Only
        kohya's keys have an alpha, the largest rank, so only there does every module keep its own
        rank: in the other styles all get the largest, which every reader takes with scale 1.

    Raises
    ------
    FormatError
        If the output exists and ``force`` is not given, or cannot be written, or a module has no
        name in kohya's form.
    UnsupportedAdapterError
        If tensors beside the update would be lost.
    """
    modules, config, dtype, extras = content
    if any(module.embedding for module in modules):
        raise UnsupportedAdapterError(
            "embeddings have no place in a single file; write a directory"
        )
    layout = read_layout(config, path)
    largest = max(module.rank for module in modules)
    styles = {module.name: KOHYA if kohya else layout.style_of(module.name) for module in modules}
    names = {module.name: module.name for module in modules}
    if kohya:
        own = {name: layout.style_of(name) for name in names}
        names = flat_names(names, own, base_class(config))
    if extras and (LAYOUT not in config or any(name != flat for name, flat in names.items())):
        raise UnsupportedAdapterError(
            f"{next(iter(extras))} is no LoRA factor, and has no place in a single file of these "
            "names; write the adapter in the form that it came in, which carries it"
        )
    kernels = read_kernels(config, path)
    tensors: Tensors = dict(extras)
    for module in modules:
        style, name = styles[module.name], names[module.name]
        down_end, up_end = STYLES[style]
        if style == KOHYA:
            # One alpha for all modules, since diffusers loses those of single attention layers;
            # in float32 whatever the factors are in, as bfloat16 does not hold every rank.
            tensors[name + ALPHA] = np.array(largest, dtype=np.float32)
            share = math.sqrt(module.rank / largest)
            up, down = (factor * share for factor in module.factors())
        else:
            padding = (0, largest - module.rank)
            up, down = module.factors()
            down, up = np.pad(down, (padding, (0, 0))), np.pad(up, ((0, 0), padding))
        kernel = kernels.get(module.name)
        if kernel:
            up, down = with_kernel(module.name, up, down, kernel, path)
        tensors[name + down_end] = rounded(down, dtype, name + down_end)
        tensors[name + up_end] = rounded(up, dtype, name + up_end)
    metadata = _metadata(layout, {module.rank for module in modules}, tensors)
    check = partial(check_lora_file, force=True)
    encoded = file_bytes(tensors, metadata, checksums=True)
    write_file(path, encoded, force=force, check=check)


_Pairs = dict[str, dict[int, Factor]]


def _split(
    tensors: Mapping[str, StoredTensor], path: Path
) -> tuple[_Pairs, dict[str, str], dict[str, Factor], Tensors]:
    """Sort tensors into factors by module and side, the modules' styles, alphas, and the rest."""
    pairs: _Pairs = {}
    extras: Tensors = {}
    styles: dict[str, str] = {}
    alphas: dict[str, Factor] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = split_key(key)
        if is_difference(key):
            extras[key] = tensor.read()
        elif found is None and key.endswith(ALPHA):
            alphas[key.removesuffix(ALPHA)] = Factor(key, tensor)
        elif found is None:
            unknown.append(key)
        else:
            name, style, side = found
            if styles.setdefault(name, style) != style:
                raise FormatError(f"{path} holds the factors of {name} twice, in two styles")
            pairs.setdefault(name, {})[side] = Factor(key, tensor)
    if not pairs:
        raise FormatError(
            f"{path} holds no LoRA tensors, but {len(tensors)} others such as "
            f"{next(iter(tensors), 'none')}; expected lora_down and lora_up (a whole model is no "
            "adapter: lotr extract makes one of two)"
        )
    unknown += [factor.key for name, factor in alphas.items() if name not in pairs]
    if unknown:
        raise UnsupportedAdapterError(
            f"{path}: {unknown[0]} belongs to no LoRA of an image model that is known here; it "
            "would be lost"
        )
    return pairs, styles, alphas, extras


def _pair(sides: dict[int, Factor], path: Path) -> tuple[Factor, Factor]:
    """Return up and down of a module."""
    if len(sides) != 2:
        raise FormatError(f"{path}: {sides.popitem()[1].key} has no partner; expected down and up")
    return sides[1], sides[0]


def _alpha(factor: Factor, path: Path) -> float:
    found = factor.entries
    value = float(found.reshape(-1)[0]) if found.size == 1 else math.nan
    if not abs(value) < 1e30:
        raise FormatError(f"{path}: {factor.key} is {found!s:.40}; expected one number")
    return value


def _peft_configs(
    metadata: Mapping[str, str], names: Iterable[str], path: Path
) -> dict[str | None, Scales]:
    """Return what the LoRA config says of every component that has one of the modules."""
    text = metadata.get(_PEFT_METADATA)
    config = parse_json(text, f"{path}: {_PEFT_METADATA}") if text else {}
    if not isinstance(config, dict):
        raise FormatError(f"{path}: {_PEFT_METADATA} is {text!r:.40}; expected an object")
    found = {}
    for part in {component(name) for name in names}:
        inside = {k.partition(".")[2]: v for k, v in config.items() if k.partition(".")[0] == part}
        own = inside or (config if "r" in config else {})
        if own:
            check_plain(own, path)
            found[part] = Scales(own, path)
    return found


def _peft_scale(
    name: str, style: str, down: Factor, configs: Mapping[str | None, Scales], path: Path
) -> float:
    """Return the scale of a module without an alpha: its component's LoRA config, else 1."""
    part = component(name)
    if part in configs:
        names = (name.removeprefix(f"{part}."), name)
        return configs[part].of(names, down.key, down.tensor.shape[0])
    if style.startswith("peft") and part is None:
        raise FormatError(
            f"{path}: {down.key} has no alpha, and its name no component such as unet., "
            "transformer. or text_encoder., so that the scale alpha / r is unknown; make a "
            f"directory of the file as {WEIGHTS_NAME} with its {CONFIG_NAME}, such as "
            f'{{"peft_type": "LORA", "r": {down.tensor.shape[0]}, "lora_alpha": '
            f"{down.tensor.shape[0]}}}, where lora_alpha = r is the scale 1"
        )
    return 1.0


def _metadata(layout: Layout, ranks: set[int], tensors: Tensors) -> dict[str, str]:
    """Return the source's metadata, corrected where it spoke of the source's own tensors."""
    stale = {_PEFT_METADATA, "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"}
    metadata = {key: value for key, value in layout.metadata.items() if key not in stale}
    metadata.setdefault("format", "pt")
    own = {"ss_network_alpha": f"{max(ranks):.1f}", "ss_network_dim": str(max(ranks))}
    if len(ranks) > 1:
        own["ss_network_dim"] = "Dynamic"  # sd-scripts' word for several
    metadata |= {key: value for key, value in own.items() if key in metadata}
    if "sshs_model_hash" in layout.metadata:
        metadata |= _hashes(tensors, metadata)
    return metadata


def _hashes(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the two hashes by which web user interfaces index LoRA files.

    The first is of the tensors' bytes; the older one of 64 KiB from 1 MiB on, of the file with
    ``ss_`` metadata alone.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = file_bytes(tensors, training)
    return {
        "sshs_model_hash": hashlib.sha256(content[data_start(content) :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
