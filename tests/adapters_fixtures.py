"""Adapters to try the library on, made by hand tensor by tensor, and ways to run the command line.

Nothing here reads or writes through the library, so that a test has an independent other side.
"""

from __future__ import annotations

import binascii
import contextlib
import io
import json
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lotrtensor.cli import main

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Arrays = dict[str, np.ndarray]
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def bert_pairs(layers: int = 12, r: int = 3, seed: int = 0) -> Pairs:
    """Factors (B, A) of query and value (12 × 10) and intermediate (20 × 10) of every layer.

    The slices of a kind share most of their energy, as trained adapters' do, so that errors differ
    clearly between ranks.
    """
    rng = np.random.default_rng(seed)
    shapes = {"attention.self.query": (12, 10), "attention.self.value": (12, 10)}
    shapes["intermediate.dense"] = (20, 10)
    common = {
        kind: (rng.normal(size=(m, r)), rng.normal(size=(r, n))) for kind, (m, n) in shapes.items()
    }
    pairs = {}
    for layer in range(layers):
        for kind, (m, n) in shapes.items():
            b, a = common[kind]
            b = b @ rng.normal(size=(r, r)) + 0.3 * rng.normal(size=(m, r))
            a = rng.normal(size=(r, r)) @ a + 0.3 * rng.normal(size=(r, n))
            name = f"encoder.layer.{layer}.{kind}"
            pairs[name] = (b.astype(np.float32), a.astype(np.float32))
    return pairs


def lora_config(r: int, **fields: Any) -> dict[str, Any]:
    """A LoRA config as PEFT writes it, the fields that matter here; alpha = 2 r."""
    base = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/bert",
        "task_type": "FEATURE_EXTRACTION",
        "target_modules": ["dense", "query", "value"],
        "r": r,
        "lora_alpha": 2 * r,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return base | fields


def lora_tensors(
    pairs: Pairs,
    dtype: str = "float32",
    prefix: str = PREFIX,
    tail: str = ".weight",
) -> Arrays:
    """The tensors of a LoRA file by key."""
    tensors = {}
    for name, (b, a) in pairs.items():
        tensors[f"{prefix}{name}.lora_A{tail}"] = a.astype(DTYPES[dtype])
        tensors[f"{prefix}{name}.lora_B{tail}"] = b.astype(DTYPES[dtype])
    return tensors


def write_adapter(path: Path, config: Mapping[str, Any], tensors: Arrays) -> Path:
    """Write both files of an adapter directory."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(x) for key, x in tensors.items()}, path / WEIGHTS
    )
    return path


def write_lora(
    path: Path,
    pairs: Pairs | None = None,
    *,
    extras: Arrays | None = None,
    dtype: str = "float32",
    **fields: Any,
) -> Path:
    """Write a LoRA directory: `bert_pairs` if no others are given, alpha = 2 r."""
    pairs = bert_pairs() if pairs is None else pairs
    r = max(b.shape[1] for b, _ in pairs.values())
    config = lora_config(r) | fields
    return write_adapter(path, config, lora_tensors(pairs, dtype) | (extras or {}))


def shard(path: Path, parts: int = 3) -> Path:
    """Split the weights of an adapter directory into shards with an index."""
    import safetensors.numpy

    tensors = read_arrays(path)
    weight_map = {}
    for i, key in enumerate(sorted(tensors)):
        weight_map[key] = f"adapter_model-{i % parts + 1:05d}-of-{parts:05d}.safetensors"
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        safetensors.numpy.save_file(part, path / name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / WEIGHTS).unlink()
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The config of an adapter directory."""
    return json.loads((path / CONFIG).read_text())


def edit_config(path: Path, **fields: Any) -> None:
    """Change fields of a config in place."""
    (path / CONFIG).write_text(json.dumps(read_config(path) | fields))


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def read_arrays(path: Path) -> Arrays:
    """All tensors of an adapter directory."""
    return safetensors.numpy.load_file(path / WEIGHTS)


def raw_safetensors(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def dense(adapter: Any) -> Arrays:
    """ΔW of every module of a LoRA in memory, float64."""
    return {m.name: m.B.astype(np.float64) @ m.A.astype(np.float64) for m in adapter.modules}


def dense_lora(path: Path, scale: float | Mapping[str, float]) -> Arrays:
    """ΔW of every module of a LoRA directory, from its file and a known scale."""
    tensors = read_arrays(path)
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            factor = scale if isinstance(scale, int | float) else scale[name]
            deltas[name] = factor * (b.astype(np.float64) @ a.astype(np.float64))
    return deltas


def dense_lotr(path: Path) -> Arrays:
    """ΔW of every module of a native directory, from its files alone."""
    tensors = {key: x.astype(np.float64) for key, x in read_arrays(path).items()}
    deltas = {}
    for group in read_config(path)["groups"]:
        left = tensors["base_model.lotr_left." + group["name"]]
        right = tensors["base_model.lotr_right." + group["name"]]
        for name in group["modules"]:
            key = f"{PREFIX}{name}.lotr_core"
            core = tensors.get(key)
            if core is None:
                core = tensors[key + "_left"] @ tensors[key + "_right"]
            deltas[name] = group["scale"] * left @ core @ right.T
    return deltas


def distance(found: Arrays, expected: Arrays) -> float:
    """Relative Frobenius distance over all modules, which must be the same ones."""
    assert found.keys() == expected.keys()
    lost = sum(np.linalg.norm(found[name] - expected[name]) ** 2 for name in expected)
    return float(np.sqrt(lost / sum(np.linalg.norm(x) ** 2 for x in expected.values())))


def largest_distance(found: Arrays, expected: Arrays) -> float:
    """Largest relative Frobenius distance of a module; the modules must be the same ones."""
    assert found.keys() == expected.keys()
    return max(distance({k: found[k]}, {k: expected[k]}) for k in expected)


def with_checksums(content: bytes) -> bytes:
    """A safetensors file with the checksums that the page on file formats describes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", {})
    found = ""
    for key in sorted(header):
        begin, end = header[key]["data_offsets"]
        sides = ",".join(map(str, header[key]["shape"]))
        text = f"{key}\n{header[key]['dtype']}\n{sides}\n".encode()
        found += f"{binascii.crc32(text + data[begin:end]):08x}"
    header["__metadata__"] = dict(sorted((metadata | {"lotr_crc32": found}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file and directory below ``path``, contents included."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"(directory)"
        for p in sorted(path.rglob("*"))
    }


class Outcome(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


def lotr(*args: object) -> Outcome:
    """Run ``lotr`` in this process, exactly as the installed command does."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["lotr", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Outcome(code or 0, out.getvalue(), err.getvalue())


def lotr_process(*args: object, prelude: str = "") -> Outcome:
    """Run ``lotr`` in a process of its own, after the code of ``prelude``."""
    program = f"{prelude}\nfrom lotrtensor.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], capture_output=True, check=False
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def document(*args: object) -> Any:
    """The JSON document that a command prints, and nothing beside it."""
    found = lotr(*args, "--json")
    assert found.code == 0, found.err
    assert found.err == ""
    return json.loads(found.out)


def assert_refused(found: Outcome, *parts: object) -> None:
    """Exit code 1, nothing on stdout, one sentence on stderr that names all ``parts``."""
    assert "Traceback" not in found.err
    assert (found.code, found.out) == (1, ""), found
    assert found.err.startswith("lotr: error: "), found.err
    assert found.err.endswith("\n")
    assert len(found.err.splitlines()) == 1, found.err
    for part in parts:
        assert str(part) in found.err, f"{part!r} is not named by: {found.err}"


def nth_call(
    function: Callable[..., Any], number: int, error: BaseException, *, after: bool = False
) -> Callable[..., Any]:
    """``function``, but its call ``number`` (from 1) raises, before or after it has done its work.

    Later calls work again, so that the code under test can clean up.
    """
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise error

    return wrapped


quiet = pytest.mark.filterwarnings(
    "ignore::FutureWarning:peft",
    "ignore::FutureWarning:transformers",
    "ignore::DeprecationWarning:torch",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:PiSSA changes the base weights:UserWarning",
    "ignore:Adapter 'default'. 2 LoRA tensor:UserWarning",
)
"""What peft and its libraries say of themselves and is nothing of ours."""


class Peft:
    """Tiny transformers models with trained-looking adapters of the real peft."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.peft = pytest.importorskip("peft")
        self.transformers = pytest.importorskip("transformers")

    def bert(self, layers=12):
        self.torch.manual_seed(0)
        config = self.transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=50,
            max_position_embeddings=16,
        )
        return self.transformers.BertModel(config).eval()

    def gpt2(self):
        self.torch.manual_seed(0)
        config = self.transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=16
        )
        return self.transformers.GPT2LMHeadModel(config).eval()

    def llama(self):
        self.torch.manual_seed(0)
        config = self.transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            max_position_embeddings=16,
        )
        return self.transformers.LlamaForCausalLM(config).eval()

    def adapt(self, model, path, dtype=None, **fields):
        """Give ``model`` an adapter with random factors, save it, return the PeftModel."""
        config = self.peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | fields))
        if dtype:
            model = model.to(getattr(self.torch, dtype))
        adapted = self.peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        self.torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                self.torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(path)
        return adapted.eval()

    def load(self, model, path):
        return self.peft.PeftModel.from_pretrained(model, path).eval()

    def deltas(self, adapted):
        """ΔW of every adapted module as PEFT computes it, out × in (embedding: dim × tokens)."""
        found = {}
        for name, module in adapted.base_model.model.named_modules():
            if not isinstance(module, self.peft.tuners.lora.LoraLayer):
                continue
            delta = module.get_delta_weight("default").detach().double().numpy()
            base = module.get_base_layer()
            embedding = isinstance(base, self.torch.nn.Embedding)
            if embedding or getattr(module, "fan_in_fan_out", False):
                delta = delta.T
            found[name] = delta
        return found

    def outputs(self, model):
        ids = self.torch.arange(24).reshape(2, 12) % 50
        with self.torch.no_grad():
            return model(input_ids=ids)[0].numpy()


def assert_same_modules(found: Arrays, expected: Arrays, tolerance: float = 1e-6) -> None:
    """Module by module, relative to its norm: a zero ΔW must be exactly zero."""
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert found[name].shape == delta.shape
        assert np.linalg.norm(found[name] - delta) <= tolerance * np.linalg.norm(delta), name
