"""Adapters of a pack in one PEFT model: their bases are held once, whatever their number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, set_peft_model_state_dict
from torch import nn

from lotrtensor.adapters.formats.carried import carried_tensors
from lotrtensor.adapters.parts import GroupParts
from lotrtensor.core.options import shown
from lotrtensor.errors import FormatError, OptionError, UnsupportedAdapterError
from lotrtensor.packs.members import Member
from lotrtensor.packs.pack import Pack
from lotrtensor.peft.config import LotrConfig, version_of, write_group
from lotrtensor.peft.layer import LotrLayer
from lotrtensor.peft.model import LotrModel
from lotrtensor.peft.planning import base_layers, check_carried, check_sharing
from lotrtensor.peft.state import plain_numbers
from lotrtensor.peft.undo import Snapshot
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.groups import check_model, check_plans
from lotrtensor.torch.numbers import group_numbers
from lotrtensor.torch.sources import from_numpy
from lotrtensor.torch.state import parts_plans


def load_pack(
    model: nn.Module,
    pack: Pack | str | os.PathLike[str],
    names: Sequence[str] | Mapping[str, str] | None = None,
    *,
    train: str | None = None,
) -> PeftModel:
    """Load adapters of a pack into a model, each under its name.

    U and V are in the model once, for all adapters that use them; the cores and private parts are
    each adapter's own. ``model(x, adapter_names=[...])`` mixes them in one batch: the products with
    U and V are done for all rows together. More can be loaded at any time, from the same pack or
    others, and ``delete_adapter`` takes one out.

    Parameters
    ----------
    model : nn.Module
        The base model; or a PEFT model of LoTR, to which adapters are added.
    pack : Pack or path-like
        The pack.
    names : sequence of str, or mapping of str to str, optional
        Adapters to load; all of them if not given. A mapping gives the name in the model of each:
        one in a pack may hold dots, which those of PEFT may not.
    train : str, optional
        ``"cores"`` to train on: the cores alone, so that the bases stay those of the pack. Not
        given, nothing trains.

    Returns
    -------
    PeftModel
        The model, in which the first adapter is active if it had none before.

    Raises
    ------
    FormatError, ShapeError
        If the pack has no such adapter, is damaged, or was made for another model; or if a name is
        taken. The model is as it was.
    OptionError
        If ``train`` is another word, or an adapter has no cores.
    UnsupportedAdapterError
        If the model has adapters of another method; or if one of several carries biases, or another
        tensor that the base model has once for all of them.

    Examples
    --------
    >>> import tempfile, numpy as np, torch, lotrtensor as lt, lotrtensor.peft as lotr
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(64, 4)), rng.normal(size=(4, 64))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(64, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("0", own, A),), {}, np.dtype("float32"))
    >>> family = {f"user-{i}": tuned(0.1) for i in range(6)}
    >>> packed = lt.pack(family, tempfile.mkdtemp() + "/pack", tolerance=0.15)
    >>> model = lotr.load_pack(torch.nn.Sequential(torch.nn.Linear(64, 64)), packed)
    >>> y = model(torch.ones(3, 64), adapter_names=["user-2", "__base__", "user-5"])
    >>> layer = model.base_model.model[0]
    >>> layer.lotr_shared["user-2"] is layer.lotr_shared["user-5"], y.shape
    (True, torch.Size([3, 64]))
    """
    check_model(model)
    if train not in (None, "cores"):
        raise OptionError(
            f"train is {shown(train)}; expected 'cores', which leaves the bases to the adapters "
            "that share them, or None"
        )
    found = pack if isinstance(pack, Pack) else Pack(pack)
    chosen = _choose(found, names)
    tuner = _tuner(model)
    held = tuner.lotr_factors if tuner is not None else ()
    layers = base_layers(model if tuner is None else tuner.model)
    members = {}
    for name, stored in chosen.items():  # all that can be refused is, before the model changes
        if tuner is not None and name in tuner.peft_config:
            raise FormatError(f"the model has an adapter {name!r} already; give this one another")
        members[name] = found.member(stored)
        config = _config(members[name], train)
        check_sharing(config, name, held)
        check_plans(config.plans(), layers)
        check_carried(config, model if tuner is None else tuner.model)
        if train is not None and config.train != train:
            raise OptionError(
                f"{stored} is stored by itself, on no bases, and has no cores to train; unpack it"
            )
    _check_once_only(members, tuner)
    return _load(model, members, train)


def _choose(pack: Pack, names: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Return the adapters to load: names in the pack by those in the model."""
    names = pack.names if names is None else names
    if isinstance(names, str | bytes) or not isinstance(names, Sequence | Mapping):
        raise OptionError(f"names is {shown(names)}; expected a list of names, or a mapping")
    pairs = list(names.items()) if isinstance(names, Mapping) else [(n, n) for n in names]
    if not pairs:
        raise FormatError(f"no adapter of {pack.path} is chosen; expected at least one")
    for stored, own in pairs:
        pack.row(stored)
        if not isinstance(own, str):
            raise OptionError(f"{stored} is to be named {shown(own)}; expected a string")
    chosen = {own: stored for stored, own in pairs}
    if len(chosen) < len(pairs):
        raise FormatError("two adapters are to have one name in the model; name one otherwise")
    return chosen


def _check_once_only(members: Mapping[str, Member], tuner: LotrModel | None) -> None:
    """Refuse, of several adapters, one that carries what the base model has once for all of them.

    Raises
    ------
    UnsupportedAdapterError
        Naming it.
    """
    before: Mapping[str, Any] = tuner.peft_config if tuner is not None else {}
    if len(members) + len(before) < 2:
        return
    biased = [name for name, config in before.items() if getattr(config, "bias", "none") != "none"]
    for name, member in members.items():
        carried = carried_tensors(member.extras, member.config)
        once = [key for key, what in carried.items() if what.kind not in ("saved", "tokens")]
        if once or member.config.get("bias", "none") != "none":
            what = once[0] if once else "biases"
            raise UnsupportedAdapterError(
                f"{name} carries {what}, which the model has once for all adapters: load it by "
                "itself"
            )
    if biased:
        raise UnsupportedAdapterError(
            f"{biased[0]} trains biases, which the model has once for all adapters; no other can "
            "be loaded beside it"
        )


def _tuner(model: nn.Module) -> LotrModel | None:
    if not isinstance(model, PeftModel):
        return None
    if not isinstance(model.base_model, LotrModel):
        raise UnsupportedAdapterError(
            "the model has adapters of another PEFT method; load a pack into its base model"
        )
    return model.base_model


def _config(member: Member, train: str | None) -> LotrConfig:
    known = {field.name for field in fields(LotrConfig)}
    plans = parts_plans(member.groups)
    config = LotrConfig(
        **{key: value for key, value in member.config.items() if key in known},
        groups=[write_group(plan) for plan in plans],
        format_version=version_of(plans),
        train="cores" if any(min(plan.rank) for plan in plans) else "all",
        inference_mode=train is None,
    )
    config.expect(member.extras)
    return config


def _load(model: nn.Module, members: dict[str, Member], train: str | None) -> PeftModel:
    wrapped = model if isinstance(model, PeftModel) else None
    alone, before, added = not getattr(model, "peft_config", {}), Snapshot(model), list(members)
    try:
        for name in added:
            member = members.pop(name)  # its numbers go with it
            config = _config(member, train)
            if wrapped is None:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel)
                wrapped = kind(model, config, name)
            else:
                config.held = _twins(wrapped.base_model.model, member.groups)
                wrapped.add_adapter(name, config)
            config.held = {}
            _fill(wrapped, name, member)
    except BaseException:
        if wrapped is model:
            for name in set(added) & set(wrapped.peft_config):
                wrapped.delete_adapter(name)
        before.restore()
        raise
    assert wrapped is not None
    if alone and wrapped is model:
        wrapped.set_adapter(added[0], inference_mode=train is None)
    if wrapped is not model and train is None:
        wrapped.eval()
    return wrapped


def _twins(model: Any, groups: Sequence[GroupParts]) -> dict[str, SharedFactors]:
    """Return the factors in the model that are those of a group to the bit, by its name.

    Not those that train with the adapter that has them: they will be others.
    """
    found = {}
    for group, plan in zip(groups, parts_plans(groups), strict=True):
        layer = model.get_submodule(group.modules[0]) if min(group.rank) else None
        if not isinstance(layer, LotrLayer):
            continue
        numbers: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        training = {id(layer.lotr_shared.get(n)) for n, x in layer.lotr_trains_factors.items() if x}
        for held in dict.fromkeys(layer.lotr_shared.values()):
            if not isinstance(held, SharedFactors) or held.left.is_meta or id(held) in training:
                continue
            if (held.shape, held.rank) != (group.shape, group.rank):
                continue
            if held.left.dtype not in numbers:
                own = group_numbers(plan, group, held.left.dtype)
                numbers[held.left.dtype] = own.left, own.right
            left, right = numbers[held.left.dtype]
            if torch.equal(left, held.left.cpu()) and torch.equal(right, held.right.cpu()):
                found[group.name] = held
    return found


def _fill(model: PeftModel, name: str, member: Member) -> None:
    state = plain_numbers(member.groups, LotrModel.expected(model, name))
    state |= {key: from_numpy(array) for key, array in member.extras.items()}
    found: Any = set_peft_model_state_dict(model, state, adapter_name=name)
    stray = [key for key in found.unexpected_keys if key in member.extras]
    if stray:
        raise FormatError(f"{name} carries {stray[0]}, which has no place in the model")
