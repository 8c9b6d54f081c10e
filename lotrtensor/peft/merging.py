"""What is looked at before the first weight of a PEFT model is written."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from lotrtensor.errors import UnsupportedAdapterError
from lotrtensor.peft.experts import ExpertsUpdate
from lotrtensor.peft.layer import Embedding, LotrLayer
from lotrtensor.torch.shared_weights import Users, weight_users
from lotrtensor.torch.weight_reads import weight_reads

WAY_OUT = (
    "untie them first (clone the weight and set tie_word_embeddings=False), give both the same "
    "update with ensure_weight_tying=True, or keep the update apart"
)


def check_merge(model: nn.Module, adapter_names: list[str] | None, *, safe: bool) -> None:
    """Refuse a merge that would change more than the adapted layers, or write what is not finite.

    Parameters
    ----------
    model : nn.Module
        The base model with its adapted layers.
    adapter_names : list of str or None
        Adapters to merge; the active ones if None.
    safe : bool
        Look for values that are not finite.

    Raises
    ------
    UnsupportedAdapterError
        If another layer uses the weight of an adapted layer and does not carry the same update.
    DataError
        If ``safe`` and a sum is not finite.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LotrLayer)}
    users = weight_users(model)
    reads = weight_reads(model, [n for n, layer in layers.items() if isinstance(layer, Embedding)])
    for name, layer in layers.items():
        names = layer.active_adapters if adapter_names is None else adapter_names
        fresh = [a for a in names if a not in layer.merged_adapters and layer.carries(a)]
        if not fresh:
            continue
        _check_shared(name, fresh, layers, users)
        if name in reads:
            raise UnsupportedAdapterError(
                f"{name}: {reads[name].where} uses the weight of this embedding as a matrix too, "
                "without the update, which merging would change; keep the update apart"
            )
    if safe:
        for name, layer in layers.items():
            with onload_layer(layer):
                layer.check_finite(name, adapter_names)


def _check_shared(
    name: str, fresh: list[str], layers: Mapping[str, LotrLayer], users: Users
) -> None:
    layer = layers[name]
    holder = name.rpartition(".")[0] if isinstance(layer, ExpertsUpdate) else None
    for user in users[id(layer.base_parameter)]:
        plain = user.removesuffix(".base_layer")
        if plain == holder != user:
            continue
        other = layers.get(plain) if plain != user else None
        # What stands behind a trained copy takes no part while that is active.
        if user.endswith(".original_module") or (
            other is not None
            and all(other.carries(a) and other.owner_of(a) is layer.owner_of(a) for a in fresh)
        ):
            continue
        raise UnsupportedAdapterError(
            f"{name} shares its weight with {plain}, which does not carry the same update and "
            f"which merging would change; {WAY_OUT}"
        )
