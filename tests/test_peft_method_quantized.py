"""Quantised base layers, on the backends of PEFT that run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BertModel, BitsAndBytesConfig  # noqa: E402

from compressed_fixtures import adapter, dense_updates, group  # noqa: E402
from tests.peft_models import (  # noqa: E402
    THIRD_PARTY,
    bert,
    config,
    ids,
    lotr_layers,
    output,
    randomize,
    weighted,
)

pytestmark = [
    pytest.mark.filterwarnings(THIRD_PARTY),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


def _torchao() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


BACKENDS = {
    "torchao int8": _torchao,
    "bitsandbytes int8": lambda: _bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


# 4-bit kernels of some CPUs want outputs in 32s and inputs in whole blocks of 64; of more than one
# block, saving leaves the scales transposed, in layers that are not adapted too.
WIDE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(params=list(BACKENDS))
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Loads the encoder quantised."""
    quantization = BACKENDS[request.param]()
    bert(**WIDE).save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return BertModel.from_pretrained(
            tmp_path / "base",
            add_pooling_layer=False,
            quantization_config=quantization,
            dtype=torch.float32,
        ).eval()

    try:
        load()
    except RuntimeError as error:
        if "None of the available devices" not in str(error):
            raise
        pytest.skip("this transformers quantises on no CPU")
    return load


def test_trains_merges_and_reloads(quantized: Any, tmp_path: Path) -> None:
    before = output(quantized())
    model = get_peft_model(quantized(), config())
    assert torch.equal(output(model), before)
    assert all(layer.quantization_backend for layer in lotr_layers(model).values())
    randomize(model)
    expected = output(model)
    moved = (expected - before).abs().max()

    # A model of its own: evaluation may have left the base weights in an order without gradients.
    trained = get_peft_model(quantized(), config()).train()
    randomize(trained)
    weighted(trained(ids())[0]).backward()
    grads = [p.grad for p in trained.parameters() if p.requires_grad]
    assert len(grads) == 15
    assert all(grad.norm() > 1e-3 for grad in grads)

    model.save_pretrained(tmp_path / "lotr")
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "lotr")
    torch.testing.assert_close(output(loaded), expected)

    model.merge_adapter(safe_merge=True)  # quantises anew: equal up to the grid
    assert (output(model) - expected).abs().max() < 0.25 * moved
    model.unmerge_adapter()
    assert (output(model) - expected).abs().max() < 0.25 * moved


def test_a_compressed_adapter(quantized: Any, tmp_path: Path) -> None:
    """Beside quantised layers private factors are float32, and compute what a dense ΔW would."""
    names = [f"encoder.layer.{k}.attention.self.query" for k in range(2)]
    compressed = adapter(group("query", names, (64, 64), (2, 3), (2, 0)))
    compressed.save(tmp_path / "small")
    model = PeftModel.from_pretrained(quantized(), tmp_path / "small", is_trainable=True)
    assert {p.dtype for n, p in model.named_parameters() if "lotr_" in n} == {torch.float32}
    layers = dict(model.base_model.model.named_modules())
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    for name, delta in dense_updates(compressed).items():
        expected = layers[name].base_layer(x) + x @ torch.from_numpy(delta.T).float()
        torch.testing.assert_close(layers[name](x), expected, rtol=1e-4, atol=1e-4)
    # A model of its own: evaluation may have left the base weights in an order without gradients.
    trained = PeftModel.from_pretrained(quantized(), tmp_path / "small", is_trainable=True).train()
    weighted(trained(ids())[0]).backward()
    left, _ = trained.base_model.model.get_submodule(names[0]).private("default")
    assert left.grad.abs().max() > 0


def test_svd_of_the_dequantised_weights(quantized: Any) -> None:
    model = get_peft_model(quantized(), config(init="svd"))
    plain = get_peft_model(bert(**WIDE), config(init="svd"))
    for name, factors in model.base_model.lotr_factors["default"].groups():
        other = plain.base_model.lotr_factors["default"].of(name)
        overlap = torch.linalg.svdvals(factors.left.T @ other.left)
        assert overlap[0] > 0.9


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_a_cpu_kernel_has_reordered(nested: bool, saved: bool, tmp_path: Path) -> None:
    """What evaluation does to 4-bit weights on some CPUs, done by hand: it runs on every CPU."""
    functional = pytest.importorskip("bitsandbytes").functional
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes reorders nothing")
    bert(layers=1, hidden_size=128, intermediate_size=64).save_pretrained(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_use_double_quant": nested}
    base = BertModel.from_pretrained(
        tmp_path, add_pooling_layer=False, quantization_config=BitsAndBytesConfig(**options)
    )
    for layer in lotr_layers(get_peft_model(base, config())).values():
        weight = layer.get_base_layer().weight
        before = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        packed = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        weight.data, weight.quant_state = packed
        if saved:
            layer.get_base_layer().state_dict()
        found = layer.get_base_weight().float()
        # The scales are rounded to bfloat16, and nested ones to eight bits anew: half a per cent.
        assert (found - before).norm() < 0.01 * before.norm()
        assert torch.equal(layer.get_base_weight().float(), found)
