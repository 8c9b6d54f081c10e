"""Single files of image models, held against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

import lotrtensor as lt
from adapters_fixtures import (
    assert_same_modules,
    dense,
    document,
)

# diffusers asks for a processor that is not there, with older releases of torch.
pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type")


# --- against diffusers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """A function that makes the same small U-Net each time."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    def make():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ).eval()

    return make


TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]


def picture(model):
    import torch

    noise = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
    with torch.no_grad():
        text = torch.linspace(-1, 1, 48).reshape(1, 3, 16)
        return model(noise, 3, encoder_hidden_states=text).sample.numpy()


@pytest.fixture(scope="module")
def trained(unet, tmp_path_factory):
    """A U-Net with a PEFT LoRA on linear layers and convolutions, and the file diffusers writes."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("diffusers")
    StableDiffusionPipeline.save_lora_weights(
        path,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return model, path / "pytorch_lora_weights.safetensors"


def loaded(model, path):
    """The U-Net with the LoRA of a file, read by diffusers."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    state, alphas, metadata = Loader.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True
    )
    Loader.load_lora_into_unet(state, alphas, model, metadata=metadata)
    return model


def test_a_file_of_diffusers_holds_what_peft_computes(trained):
    from peft.tuners.lora import LoraLayer

    model, path = trained
    true = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").detach().double().numpy()
            true[f"unet.{name}"] = delta.reshape(len(delta), -1)
    assert {delta.shape for delta in true.values()} >= {(16, 16), (16, 144)}
    assert_same_modules(dense(lt.load(path)), true, 1e-6)


@pytest.mark.parametrize("form", ["its own", "kohya"])
def test_diffusers_draws_the_same_picture_from_what_is_written(trained, unet, tmp_path, form):
    model, path = trained
    expected, plain = picture(model), picture(unet())
    assert np.abs(expected - plain).max() > 0.01
    document("convert", path, "-o", tmp_path / "lotr", "--tolerance", 1e-5)
    out = tmp_path / "out.safetensors"
    document(
        "export", tmp_path / "lotr", "-o", out, *(["--format", form] if form == "kohya" else [])
    )
    keys = safetensors.numpy.load_file(out).keys()
    assert all(key.startswith("lora_unet_" if form == "kohya" else "unet.") for key in keys)
    np.testing.assert_allclose(
        picture(loaded(unet(), out)), expected, atol=1e-3 * np.abs(expected).max()
    )


@pytest.mark.parametrize("form", ["its own", "kohya"])
def test_diffusers_and_we_agree_on_different_ranks(trained, unet, tmp_path, form):
    """Modules of unlike rank: diffusers scales each by its alpha, or all by 1."""
    _, path = trained
    small = lt.truncate(lt.load(path), budget="50%")
    assert len({module.rank for module in small.modules}) > 1
    out = tmp_path / "out.safetensors"
    small.save(out, file_format="kohya" if form == "kohya" else None)
    from peft.tuners.lora import LoraLayer

    model = loaded(unet(), out)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default_0").detach().double().numpy()
            found[f"unet.{name}"] = delta.reshape(len(delta), -1)
    assert_same_modules(found, dense(small), 1e-6)
