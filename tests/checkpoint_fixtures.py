"""Checkpoints of a small encoder to extract from and to merge into, made tensor by tensor."""

import json
import re

import numpy as np
import safetensors.numpy

from lotrtensor import extract
from tests.adapters_fixtures import DTYPES

INDEX = "model.safetensors.index.json"

D, F, V = 12, 16, 20
"""Hidden size, inner size and vocabulary of the model."""


def model(seed=0, layers=3):
    """The tensors of a small encoder, float32, entries between 1/2 and 1."""
    rng = np.random.default_rng(seed)
    shapes = {"embeddings.word_embeddings.weight": (V, D), "embeddings.LayerNorm.weight": (D,)}
    for i in range(layers):
        prefix = f"encoder.layer.{i}."
        shapes |= {
            f"{prefix}attention.self.query.weight": (D, D),
            f"{prefix}attention.self.query.bias": (D,),
            f"{prefix}attention.self.value.weight": (D, D),
            f"{prefix}intermediate.dense.weight": (F, D),
            f"{prefix}intermediate.dense.bias": (F,),
        }
    return {key: rng.uniform(0.5, 1, shape).astype(np.float32) for key, shape in shapes.items()}


def tune(tensors, seed=1, rank=None, pattern="query|intermediate|word_embeddings", size=0.05):
    """Change the weights that match: by updates of some rank, or by full ones."""
    rng, tuned = np.random.default_rng(seed), dict(tensors)
    for key, x in tensors.items():
        if re.search(pattern, key) and key.endswith("weight"):
            m, n = x.shape
            r = rank or min(m, n)
            delta = size * rng.standard_normal((m, r)) @ rng.standard_normal((r, n)) / np.sqrt(r)
            tuned[key] = (x + delta).astype(x.dtype)
    return tuned


def cast(tensors, dtype):
    """Every tensor in one type."""
    return {key: x.astype(DTYPES[dtype]) for key, x in tensors.items()}


def write(path, tensors, shards=1, **files):
    """A checkpoint directory: one file, or shards and their index."""
    path.mkdir(parents=True)
    keys = list(tensors)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {key: names[i * shards // len(keys)] for i, key in enumerate(keys)}
    for name in names:
        part = {k: x.copy(order="C") for k, x in tensors.items() if weight_map[k] == name}
        safetensors.numpy.save_file(part, path / name, metadata={"format": "pt"})
    if shards > 1:
        size = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "bert"}')
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def read(path):
    """All tensors of a checkpoint, and the file that each is in."""
    tensors, files = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        for key, x in safetensors.numpy.load_file(file).items():
            tensors[key], files[key] = x, file.name
    return tensors, files


def pair(tmp_path, dtype="float32", shards=1, **how):
    """Base and tuned checkpoint in one type, with their tensors."""
    base = cast(model(), dtype)
    tuned = cast(tune(model(), **how), dtype)
    return (
        write(tmp_path / "base", base, shards),
        write(tmp_path / "tuned", tuned, shards),
        base,
        tuned,
    )


def deltas(base, tuned):
    """ΔW of the changed matrices by module, out × in; an embedding's is transposed."""
    found = {}
    for key, x in base.items():
        delta = tuned[key].astype(np.float64) - x.astype(np.float64)
        if x.ndim == 2 and delta.any():
            found[key.removesuffix(".weight")] = delta.T if "embeddings" in key else delta
    return found


def full(tmp_path, group_by="type"):
    """An adapter of full rank, in float32."""
    rank = (D, D) if group_by == "none" else (F, D)
    both = tmp_path / "base", tmp_path / "tuned"
    return extract(*both, rank=rank, dtype="float32", group_by=group_by)


def dense_deltas(adapter):
    """ΔW of every module of a LoTR in memory."""
    return {
        name: group.tucker2().slice(k)
        for group in adapter.groups
        for k, name in enumerate(group.modules)
    }
