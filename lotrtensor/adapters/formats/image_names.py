"""Names in the single-file LoRAs of image models: which tensor is what, and kohya's own names.

A module has two factors, "down" (A, r × n) and "up" (B, m × r). Their keys end in one of a few
ways, and what stands before is the module's name, kept as it is. kohya's flattened names, dots
turned into underscores, cannot be turned back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lotrtensor.adapters.grouping import FLAT_PREFIXES
from lotrtensor.errors import FormatError, UnsupportedAdapterError

KOHYA = "kohya"

STYLES = {
    KOHYA: (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "diffusers text": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "diffusers attention": ("_lora.down.weight", "_lora.up.weight"),
}
"""Ends of the keys of the down and up factor, by style."""

ALPHA = ".alpha"

# What the keys of other methods hold, and the method's name. The first that occurs is told.
_METHODS = (
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA"),
    (r"\.lora_mid\.", "a convolution in Tucker form (LoCon's lora_mid)"),
    (r"\.(oft_blocks|oft_diag|oft_R)", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.on_input$", "IA³"),
    (r"\.lora_(up|B)\.bias$|\.lora_B\.default\.bias$", "a trained bias"),
    (r"\.lora_(down|up)\.\d", "DyLoRA's or split weights"),
    (r"^(emb_params|bundle_emb|clip_[gl]$)", "a textual inversion"),
)


# Whole differences of a weight, bias, modulation or norm, that a file may hold beside factors.
_DIFFERENCE = re.compile(r".+\.(diff(_[a-z]+)?|w_norm|b_norm)")


def is_difference(key: str) -> bool:
    """Whether a tensor is a whole difference of a parameter, which is carried as it is."""
    return bool(_DIFFERENCE.fullmatch(key))


def split_key(key: str) -> tuple[str, str, int] | None:
    """Return module name, style, and side (0 down, 1 up) of a factor's key; None for others."""
    for style, ends in STYLES.items():
        for side, end in enumerate(ends):
            if key.endswith(end) and len(key) > len(end):
                return key.removesuffix(end), style, side
    return None


def check_methods(keys: Iterable[str], path: object) -> None:
    """Refuse a file of another method than LoRA, by the method's name.

    Raises
    ------
    UnsupportedAdapterError
        If a key belongs to one.
    """
    for key in keys:
        for pattern, method in _METHODS:
            if re.search(pattern, key):
                raise UnsupportedAdapterError(
                    f"{path}: {key} belongs to {method}; only plain LoRA, ΔW = s · up · down, has "
                    "a LoTR form"
                )


_COMPONENTS = re.compile(
    r"(?P<component>unet|diffusion_model|transformer(_\d)?|text_encoder(_\d)?)\.(?P<path>.+)"
)
# Paths inside a component, as a LoRA trained with PEFT on that component alone has them.
_INSIDE = (
    (r"(down_blocks|mid_block|up_blocks)\.|conv_in$|conv_out$|time_embedding\.", "lora_unet_"),
    (r"text_model\.", "lora_te_"),
    (r"(single_)?transformer_blocks\.", "lora_transformer_"),
)
# What transformers called the CLIP text model inside a CLIPTextModel, up to its version 5.5;
# kohya's names have it still.
_CLIP_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLIP_INSIDE = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)(\.|$)")
# Attention processors of old diffusers releases, and the layers that they stood for.
_PROCESSOR = {"to_out": "to_out.0"}
_TEXT_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def component(name: str) -> str | None:
    """Return the part of a pipeline that a dotted module name begins with, if it is a known one."""
    match = _COMPONENTS.fullmatch(name)
    return match["component"] if match else None


def base_class(config: Mapping[str, Any]) -> str | None:
    """Return the class of the model that was adapted, where PEFT wrote it into the config."""
    mapping = config.get("auto_mapping") or {}
    return mapping.get("base_model_class")


def flat_names(
    names: Iterable[str], styles: dict[str, str], model_class: str | None = None
) -> dict[str, str]:
    """Return kohya's name of every module.

    Parameters
    ----------
    names : iterable of str
        Module names: kohya's already, diffusers' with their component, or paths in a U-Net,
        transformer or text encoder.
    styles : dict of str to str
        Styles of modules whose file had another than PEFT's.
    model_class : str, optional
        Class of the model whose paths the names are: of a CLIP text encoder in recent releases of
        transformers they do not say so themselves.

    Raises
    ------
    FormatError
        If a module is none of these, or two get one name.
    """
    names = list(names)
    two_encoders = any(component(name) == "text_encoder_2" for name in names)
    found: dict[str, str] = {}
    for name in names:
        modern = _modern(name, styles.get(name))
        if model_class in _CLIP_CLASSES and component(modern) is None:
            modern = f"text_encoder.{modern}"
        flat = _flat_name(modern, two_encoders)
        if flat in found:
            raise FormatError(f"{found[flat]} and {name} are both {flat} in kohya's form")
        found[flat] = name
    return {name: flat for flat, name in found.items()}


def _modern(name: str, style: str | None) -> str:
    if style != "diffusers attention":
        return name
    stem, _, last = name.replace(".processor.", ".").rpartition(".")
    layers = _TEXT_PROCESSOR if name.startswith("text_encoder") else _PROCESSOR
    return f"{stem}.{layers.get(last, last)}"


def _flat_name(name: str, two_encoders: bool) -> str:
    if name.startswith(FLAT_PREFIXES) and "." not in name:
        return name
    match = _COMPONENTS.fullmatch(name)
    if match:
        prefix, path = _prefix(match["component"], two_encoders), match["path"]
        if match["component"].startswith("text_encoder") and _CLIP_INSIDE.match(path):
            path = f"text_model.{path}"
    else:
        prefix = next((known for inside, known in _INSIDE if re.match(inside, name)), "")
        path = name
    if not prefix:
        raise FormatError(
            f"{name} is no module of an image model; kohya's form has names for U-Nets, "
            "transformers and text encoders only: export to a PEFT directory"
        )
    return prefix + path.replace(".", "_")


def _prefix(part: str, two_encoders: bool) -> str:
    if part in ("unet", "diffusion_model"):
        return "lora_unet_"
    if part.startswith("text_encoder"):
        number = part.removeprefix("text_encoder").removeprefix("_")
        return f"lora_te{number or ('1' if two_encoders else '')}_"
    return f"lora_{part}_"
