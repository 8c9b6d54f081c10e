"""A small file of an image model in kohya's form, and how tests read such files."""

from __future__ import annotations

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from adapters_fixtures import (
    DTYPES,
)

BLOCK = "lora_unet_down_blocks_{}_attentions_{}_transformer_blocks_0_attn1_to_{}"
METADATA = {
    "ss_network_dim": "3",
    "ss_network_alpha": "1.5",
    "ss_sd_model_name": "v1-5.safetensors",
    "ss_tag_frequency": '{"ünï": {"cat": 3}}',
    "modelspec.title": "cats",
}


def kohya_tensors(dtype="float32", alpha=1.5, seed=0):
    """A small U-Net's file: linear layers, a 1 × 1 and a 3 × 3 convolution, a text encoder."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, down, up):
        tensors[name + ".lora_down.weight"] = rng.normal(size=down).astype(DTYPES[dtype])
        tensors[name + ".lora_up.weight"] = rng.normal(size=up).astype(DTYPES[dtype])
        if alpha is not None:
            tensors[name + ".alpha"] = np.array(alpha, dtype=DTYPES[dtype])

    for block in range(2):
        for layer in range(2):
            for kind in "qkv":
                add(BLOCK.format(block, layer, kind), (3, 8), (8, 3))
            add(
                f"lora_unet_down_blocks_{block}_attentions_{layer}_proj_in",
                (3, 8, 1, 1),
                (8, 3, 1, 1),
            )
            add(f"lora_unet_down_blocks_{block}_resnets_{layer}_conv1", (2, 4, 3, 3), (8, 2, 1, 1))
    for layer in range(3):
        add(f"lora_te_text_model_encoder_layers_{layer}_mlp_fc1", (3, 6), (10, 3))
    return tensors


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata=metadata or {"format": "pt"})
    return path


def deltas(tensors, ends=(".lora_down.weight", ".lora_up.weight")):
    """ΔW of every module from the file's own tensors, a convolution's as m × (c k k)."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(ends[0]):
            name = key.removesuffix(ends[0])
            up = tensors[name + ends[1]].astype(np.float64)
            down = down.astype(np.float64)
            r = down.shape[0]
            scale = (
                float(tensors[name + ".alpha"].reshape(())) / r if name + ".alpha" in tensors else 1
            )
            found[name] = scale * up.reshape(-1, r) @ down.reshape(r, -1)
    return found


def metadata_of(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()
