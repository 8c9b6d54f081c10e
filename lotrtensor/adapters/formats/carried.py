"""Tensors that an adapter file holds beside its update, and where PEFT loads them.

PEFT loads every tensor whose key is a parameter of the adapted model. So a file may carry, under
the path of a module,

    <module>.<anything>                 a module of modules_to_save, whole
    <module>[.base_layer].bias          biases that were trained
    <module>.weight, <module>.bias      embeddings, most often resized ones, and what else was saved
    <module>.base_layer.weight          the weight below an adapter, as the base model has it
    <module>.token_adapter.trainable_tokens_delta        rows of an embedding

A tensor of an update that is not read here must never be taken for one of these: the result would
silently lack it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lotrtensor.adapters.formats.image_names import is_difference
from lotrtensor.adapters.formats.layout import LAYOUT
from lotrtensor.adapters.formats.tensors import Tensors
from lotrtensor.adapters.grouping import module_kind
from lotrtensor.errors import FormatError, UnsupportedAdapterError

PREFIX = "base_model.model."

CarriedKind = Literal["saved", "weight", "bias", "base", "tokens", "difference"]


class Carried(NamedTuple):
    """What a carried tensor is.

    Attributes
    ----------
    module : str
        Path of its module in the base model.
    parameter : str
        Its name in that module: ``module.parameter`` is the base model's own parameter.
    kind : str
        ``"saved"``: of a module in ``modules_to_save``; ``"weight"``: the weight of a module that
        has no update, in place of the base model's; ``"bias"``: the same of a bias; ``"base"``:
        weight or bias below an adapter, a copy of the base model's unless that was resized or
        trained; ``"tokens"``: trained rows of an embedding; ``"difference"``: what a single file
        adds to a whole parameter.
    """

    module: str
    parameter: str
    kind: CarriedKind


def carried_tensors(extras: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Carried]:
    """Tell what the tensors are that an adapter carries: its ``extras`` and ``config``."""
    return {key: _describe(key, config) for key in extras}


# Names that PEFT gives its wrappers, below the path of the module that they wrap.
_WRAPPED = re.compile(r"\.(base_layer|token_adapter|original_module|modules_to_save)(?=\.|$)")
_TOKENS = "trainable_tokens_delta"


def _describe(key: str, config: Mapping[str, Any]) -> Carried:
    path, _, parameter = key.removeprefix(PREFIX).rpartition(".")
    module = _WRAPPED.sub("", path)
    if parameter == _TOKENS:
        return Carried(module, parameter, "tokens")
    if config.get(LAYOUT) and is_difference(key):
        return Carried(module, parameter, "difference")
    saved = _saved_module(key, config)
    if saved is not None and ".original_module" not in path:
        return Carried(saved, _WRAPPED.sub("", "." + key[len(PREFIX + saved) + 1 :])[1:], "saved")
    if module != path and not (parameter == "bias" and _trains_biases(config)):
        return Carried(module, parameter, "base")
    return Carried(module, parameter, "bias" if parameter == "bias" else "weight")


def split_extras(
    tensors: Tensors, config: Mapping[str, Any], adapted: Mapping[str, bool], directory: Path
) -> Tensors:
    """Return the tensors that an adapter carries beside its update, or refuse the rest by name.

    Parameters
    ----------
    tensors : dict of str to ndarray
        All that is no factor, under keys that begin with `PREFIX`.
    config : mapping
        The adapter's config.
    adapted : mapping of str to bool
        Paths of the adapted modules, and whether each is an embedding.
    directory : Path
        Named in messages.

    Raises
    ------
    UnsupportedAdapterError
        If PEFT would not load a tensor as a part of the base model.
    FormatError
        If ``modules_to_save`` is no list of names.
    """
    check_saved_names(config, directory)
    kinds = {module_kind(name) for name in adapted}
    for key, tensor in tensors.items():
        reason = _reason_against(key, tensor, config, adapted, kinds)
        if reason:
            raise UnsupportedAdapterError(f"{directory}: {key} {reason}; it would be lost")
    return dict(tensors)


def check_saved_names(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse ``modules_to_save`` that is no list of names.

    Raises
    ------
    FormatError
        Saying what was found.
    """
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise FormatError(
            f"{directory}: modules_to_save is {saved!r}; expected a list of module names"
        )


def _reason_against(
    key: str,
    tensor: np.ndarray,
    config: Mapping[str, Any],
    adapted: Mapping[str, bool],
    kinds: set[str],
) -> str:
    """Say why a tensor is not carried; empty where it is."""
    path, _, parameter = key.removeprefix(PREFIX).rpartition(".")
    saved = _saved_module(key, config)
    inside = key if saved is None else key[len(PREFIX + saved) :]
    if parameter == _TOKENS:
        return ""
    if is_method_key(inside):
        return "is a factor of a method that is not read here"
    if saved is not None:
        return ""
    if not key.startswith(PREFIX) or parameter not in ("weight", "bias"):
        return (
            "is neither a LoRA factor nor a weight or bias of the base model, nor named by "
            "modules_to_save"
        )
    module = _WRAPPED.sub("", path)
    if module == path and module in adapted:
        own = _trains_biases(config) if parameter == "bias" else adapted[module]
        return "" if own else f"is no parameter of the adapted {module}, whose own is in base_layer"
    parents = module.split(".")
    above = (".".join(parents[:end]) for end in range(1, len(parents)))
    if any(name in adapted or module_kind(name) in kinds for name in above):
        return "is below an adapted module and no LoRA factor"
    if parameter == "weight" and tensor.ndim > 1 and re.search(r"_[A-Z]$", module):
        return "looks like a factor of a method that is not read here"
    return ""


def _saved_module(key: str, config: Mapping[str, Any]) -> str | None:
    """Path of the module of ``modules_to_save`` that a key belongs to: PEFT compares ends alone."""
    names = tuple(config.get("modules_to_save") or ())
    parts = key.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    found = next((path for path in paths if path.endswith(names)), None) if names else None
    return None if found is None else found.removeprefix(PREFIX)


def _trains_biases(config: Mapping[str, Any]) -> bool:
    return config.get("bias", "none") not in ("none", None)


METHOD_PREFIXES = (
    *("lora_", "lotr_", "vera_", "pvera_", "hada_", "lokr_", "loha_", "oft_", "boft_", "ia3_"),
    *("adamss_", "adaption_", "beft_", "c3a_", "cartridge_", "cpt_", "deft_", "delora_"),
    *("fourierft_", "frod_", "glora_", "gralora_", "hira_", "hra_", "lily_", "ln_tuning_"),
    *("miss_", "shira_", "prompt_", "multitask_prompt_", "osf_", "p_tuning_", "peanut_", "poly_"),
    *("prefix_", "psoft_", "randlora_", "road_", "shadow_", "supertuning_", "tinylora_"),
    *("trainable_tokens_", "unilora_", "vblora_", "waveft_", "xlora_", "bone_"),
)
"""What the names of the parameters of PEFT's methods begin with."""


def is_method_key(key: str) -> bool:
    """Whether a key has a part that one of PEFT's methods names its parameters by."""
    return any(part.startswith(METHOD_PREFIXES) for part in key.split("."))
