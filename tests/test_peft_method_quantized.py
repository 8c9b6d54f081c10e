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


@pytest.fixture(params=list(BACKENDS))
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Loads the encoder quantised."""
    quantization = BACKENDS[request.param]()
    bert().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return BertModel.from_pretrained(
            tmp_path / "base",
            add_pooling_layer=False,
            quantization_config=quantization,
            dtype=torch.float32,
        ).eval()

    return load


def test_trains_merges_and_reloads(quantized: Any, tmp_path: Path) -> None:
    before = output(quantized())
    model = get_peft_model(quantized(), config())
    assert torch.equal(output(model), before)
    assert all(layer.quantization_backend for layer in lotr_layers(model).values())
    randomize(model)
    expected = output(model)
    moved = (expected - before).abs().max()

    weighted(model(ids())[0]).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 15
    assert all(grad.norm() > 1e-3 for grad in grads)

    model.save_pretrained(tmp_path / "lotr")
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "lotr")
    torch.testing.assert_close(output(loaded), expected)

    model.merge_adapter(safe_merge=True)  # quantises anew: equal up to the grid
    assert (output(model) - expected).abs().max() < 0.25 * moved
    model.unmerge_adapter()
    assert (output(model) - expected).abs().max() < 0.25 * moved


def test_svd_of_the_dequantised_weights(quantized: Any) -> None:
    model = get_peft_model(quantized(), config(init="svd"))
    plain = get_peft_model(bert(), config(init="svd"))
    for name, factors in model.base_model.lotr_factors["default"].groups():
        other = plain.base_model.lotr_factors["default"].of(name)
        overlap = torch.linalg.svdvals(factors.left.T @ other.left)
        assert overlap[0] > 0.9
