"""One small valid adapter of every form that is read, as files in memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import lotrtensor as lt

Files = dict[str, bytes]


def seeds() -> dict[str, Files]:
    """The files of every seed, by its name."""
    rng = np.random.default_rng(0)
    names = [f"layers.{k}.{kind}" for k in range(2) for kind in ("q", "v")]
    modules = tuple(
        lt.LoraModule(n, rng.normal(size=(4, 2)).astype("f4"), rng.normal(size=(2, 3)).astype("f4"))
        for n in names
    )
    config = {
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "modules_to_save": ["head"],
        "fan_in_fan_out": False,
    }
    extras = {"base_model.model.head.weight": np.ones((2, 3), np.float32)}
    lora = lt.LoraAdapter(modules, config, np.dtype("float32"), extras)
    image = tuple(lt.LoraModule(f"lora_unet_{m.name.replace('.', '_')}", m.B, m.A) for m in modules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        lora.save(path / "peft")
        lt.truncate(lora, budget="80%").save(path / "peft-ranks", uniform=False)
        lt.convert(lora, rank=(3, 2)).save(path / "native")
        lt.convert(lora, rank=1, dtype="bfloat16").save(path / "native-bfloat16")
        lt.compress(lora, tolerance=0.3).save(path / "compressed")
        single = lt.LoraAdapter(image, {}, np.dtype("float16"))
        single.save(path / "image.safetensors", file_format="kohya")
        found = {
            entry.name: (
                {entry.name: entry.read_bytes()}
                if entry.is_file()
                else {file.name: file.read_bytes() for file in entry.iterdir()}
            )
            for entry in path.iterdir()
        }
    return found | {"sharded": _sharded(found["peft"]), "checkpoint": _checkpoint(found["peft"])}


def _sharded(files: Files) -> Files:
    content = files["adapter_model.safetensors"]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    keys = [key for key in header if key != "__metadata__"]
    index = {"weight_map": dict.fromkeys(keys, "a.safetensors")}
    return {
        "adapter_config.json": files["adapter_config.json"],
        "a.safetensors": content,
        "adapter_model.safetensors.index.json": json.dumps(index).encode(),
    }


def _checkpoint(files: Files) -> Files:
    return {
        "config.json": b'{"architectures": ["X"], "tie_word_embeddings": false}',
        "model.safetensors": files["adapter_model.safetensors"],
    }
