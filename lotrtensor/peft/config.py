"""LotrConfig: what a user says of a LoTR adapter, and what its ``adapter_config.json`` holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from huggingface_hub import hf_hub_download
from peft import PeftConfig

from lotrtensor.adapters.compressed import CompressedAdapter
from lotrtensor.adapters.compressed_group import CompressedGroup
from lotrtensor.adapters.formats.directory import CONFIG_NAME
from lotrtensor.adapters.formats.group_record import GroupRecord
from lotrtensor.adapters.formats.native import (
    COMPRESSED_VERSION,
    FORMAT_VERSION,
    PEFT_TYPE,
    check_known,
)
from lotrtensor.adapters.formats.plain import read_plain
from lotrtensor.adapters.formats.tensors import WEIGHTS_NAME
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.adapters.lotr_group import FitRecord
from lotrtensor.errors import OptionError
from lotrtensor.torch.expert_slices import check_targets
from lotrtensor.torch.groups import (
    DEFAULT_ALPHA,
    PAPER_ALPHA,
    GroupPlan,
    check_grouping,
    check_numbers,
    check_rank,
)
from lotrtensor.torch.init import INITS

SETTLED_FIELDS = (
    *("groups", "format_version", "init", "train", "share_factors", "target_modules"),
    "target_parameters",
)
"""What a model decides when it makes the adapter."""


@dataclass
class LotrConfig(PeftConfig):
    """Configuration of a LoTR adapter: ΔW_k = scale · U G_k Vᵀ, U and V shared by a group.

    Parameters
    ----------
    r : int or (int, int)
        Left and right rank (p, q) of every group; one number stands for both.
    target_modules : list of str or str, optional
        Layers to adapt, as in LoRA: ends of paths, a regular expression, or ``"all-linear"``.
    exclude_modules : list of str or str, optional
        Layers to leave out.
    target_parameters : list of str, optional
        3-D parameters of fused experts to adapt, a matrix an expert, by the ends of their paths:
        ``["experts.gate_up_proj", "experts.down_proj"]``. Experts of a layer share U and V. Without
        ``target_modules`` nothing else is adapted.
    group_by : str
        Which layers share U and V: ``"type"``, ``"shape"`` or patterns such as
        ``"qv=query|value"``; see `lotrtensor.adapters.grouping.group_modules`.
    lotr_alpha : float, optional
        The scale is lotr_alpha / r with r = √(p q); 32 if not given, 1 for ``init="paper"``.
    use_rslora : bool
        Scale by lotr_alpha / √r instead.
    lotr_dropout : float
        Dropout on the input of every update.
    init : str
        ``"orthogonal"``, ``"paper"`` or ``"svd"`` (see `lotrtensor.torch.init.init_factors`), with
        zero cores and so ΔW = 0; or the directory of a trained LoRA or LoTR to start from; or
        that of a pack (`lotrtensor.pack`), whose bases, those of its largest cluster, are then U
        and V, with zero cores: with
        ``train="cores"`` what is trained is a few kilobytes that the pack takes (`save_cores`).
    init_weights : bool
        As in PEFT's other methods: False draws the cores at random instead of zero, so that the
        adapter changes the model from the start. For tests of code around a model, not for
        training.
    train : str
        ``"all"`` or ``"cores"``: the latter leaves the factors as they are, so that a layer of any
        size trains p · q numbers.
    share_factors : str, optional
        Name of an adapter of the same model whose factors this one uses, training cores alone.
        Adapters that share factors run in one mixed batch at little more than the cost of one.
    ensure_weight_tying : bool
        Give layers that share the weight of an adapted layer, a head tied to the embedding say, the
        same update. Without it they keep the base weight, and merging is refused.
    bias, fan_in_fan_out, modules_to_save, layers_to_transform, layers_pattern, layer_replication, \
trainable_token_indices : optional
        As in LoRA.
    format_version, groups : optional
        Written by ``save_pretrained`` and by ``lotr convert``: what the file holds; those of a
        compressed adapter are read from its tensors. Given, they
        decide which layers are adapted, and the fields above do not.

    Raises
    ------
    RankError, OptionError
        If a field has no meaning.
    FormatError
        If ``format_version`` or a group of a file is not understood.
    """

    r: int | list[int] | tuple[int, int] = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    group_by: str = "type"
    lotr_alpha: float | None = None
    use_rslora: bool = False
    lotr_dropout: float = 0.0
    init: str = "orthogonal"
    init_weights: bool = True
    train: str = "all"
    share_factors: str | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    layer_replication: list[tuple[int, int]] | None = None
    trainable_token_indices: Any = None
    format_version: int = FORMAT_VERSION
    groups: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = MethodName(PEFT_TYPE)
        self._carried: dict[str, tuple[int, ...]] | None = None
        self._settled: dict[str, Any] = {}
        self.keys: frozenset[str] = frozenset()  # modules that are replaced, set with the groups
        self.held: Mapping[str, Any] = {}  # factors of groups that the model has, by their names
        self._asked: list[str] | set[str] | str | None = None
        check_known(self.format_version, "the adapter")
        self.r = check_rank(self.r)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if self.train not in ("all", "cores"):
            raise OptionError(f"train is {self.train!r}; expected 'all' or 'cores'")
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            raise OptionError(f"bias is {self.bias!r}; expected 'none', 'all' or 'lotr_only'")
        if self.source is not None and not self.init_weights:
            raise OptionError(
                f"init_weights is False, which draws cores at random, and init is {self.init!r}, "
                "which takes those of an adapter; leave one of them out"
            )
        if self.target_parameters is not None:
            self.target_parameters = check_targets(self.target_parameters)
        check_grouping(self.group_by)
        check_numbers(self.lotr_alpha, self.lotr_dropout, prefix="lotr_")
        if self.groups is not None:
            self.plans()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read the config of an adapter, and hold the tensors beside it against it.

        PEFT reads the tensors only when the model has been changed for them; a file that is
        missing, damaged or another adapter's is refused here, before that.

        Raises
        ------
        FormatError, DataError
            If the files of a local directory are incomplete or contradict each other.
        """
        name = str(pretrained_model_name_or_path)
        config: Self = super().from_pretrained(name, subfolder, **kwargs)
        if not isinstance(config, LotrConfig):  # PEFT goes by the file's own method
            return config
        if config.is_compressed:
            config._read_compressed(name, subfolder, ignore_mismatched_sizes, kwargs)
            return config
        directory = Path(name, subfolder or "")
        # Of a model hub's repository only the config is here; a pickle is PEFT's to read.
        if config.groups is not None and directory.is_dir() and not _is_pickled(directory):
            if config.format_version == COMPRESSED_VERSION:
                extras = read_plain(directory)[3]
            else:
                extras = LotrAdapter.load(directory).extras
            if not ignore_mismatched_sizes:
                config.expect(extras)
        return config

    @property
    def is_compressed(self) -> bool:
        """Whether the groups are in the tensor file, in bits, and have not been read yet."""
        return self.format_version == COMPRESSED_VERSION and self.groups is None

    def _read_compressed(
        self, name: str, subfolder: str | None, ignore_mismatched_sizes: bool, kwargs: Any
    ) -> None:
        """Read the groups of a compressed adapter, of a local directory or of a model hub."""
        directory = Path(name, subfolder or "")
        if not directory.is_dir():
            options, _, _ = self._split_kwargs(kwargs)  # type: ignore[no-untyped-call]
            hf_hub_download(name, CONFIG_NAME, subfolder=subfolder, **options)
            file = hf_hub_download(name, WEIGHTS_NAME, subfolder=subfolder, **options)
            directory = Path(file).parent
        adapter = CompressedAdapter.load(directory)
        self.groups = [write_group(_plan_of(group)) for group in adapter.groups]
        if not ignore_mismatched_sizes:
            self.expect(adapter.extras)

    def expect(self, extras: Mapping[str, np.ndarray]) -> None:
        """Note the tensors besides the update that will be loaded, for `check_carried`."""
        self._carried = {key: array.shape for key, array in extras.items()}

    @property
    def carried(self) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of the tensors besides the update in the file that was read, by key."""
        return self._carried

    @property
    def alpha(self) -> float:
        """``lotr_alpha``, or the value that suits the initialisation."""
        if self.lotr_alpha is not None:
            return self.lotr_alpha
        return PAPER_ALPHA if self.init == "paper" else DEFAULT_ALPHA

    @property
    def source(self) -> str | None:
        """Directory of the adapter or pack to start from, if ``init`` names one."""
        return None if self.init in INITS else self.init

    def plans(self) -> tuple[GroupPlan, ...]:
        """Return the groups of the file.

        Raises
        ------
        FormatError
            If one of them lacks a field or mistypes it.
        """
        private = self.format_version == COMPRESSED_VERSION
        return tuple(_read_group(entry, private=private) for entry in self.groups or ())

    def fresh(self) -> LotrConfig:
        """Return a copy with the target modules as the user gave them, for the next model."""
        copied = copy.copy(self)
        if self._is_expanded():
            copied.target_modules = self._asked
        copied._settled = {}
        return copied

    def settle(self, adapter: LotrConfig) -> None:
        """Take note of what an adapter became, to be written in place of what was asked for.

        Of the fields only ``target_modules`` changes, as PEFT does it: a default or a word such as
        ``"all-linear"`` is expanded. One config can serve several models: each of them settles
        it anew when its adapter is about to be saved.
        """
        if not self._is_expanded():
            self._asked = self.target_modules
        self._settled = {name: getattr(adapter, name) for name in SETTLED_FIELDS}
        self.target_modules = adapter.target_modules

    def _is_expanded(self) -> bool:
        return bool(self._settled) and self.target_modules == self._settled["target_modules"]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, with the groups of the adapter that was made of it."""
        if not self._settled:
            super().save_pretrained(save_directory, **kwargs)
            return
        written = copy.copy(self)
        written._settled = {}
        vars(written).update(self._settled)
        written.save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them, sets in order so that equal configs are equal."""
        return {name: _as_json(value) for name, value in asdict(self).items()}


class MethodName(str):
    """The method's name where PEFT expects a member of its enum: a string with a value."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    def __str__(self) -> str:
        """As the enum's members print."""
        return f"PeftType.{self.value}"


def _as_json(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _is_pickled(directory: Path) -> bool:
    return (directory / "adapter_model.bin").is_file() and not any(
        directory.glob("adapter_model*safetensors*")
    )


def write_group(plan: GroupPlan) -> dict[str, Any]:
    """Return a group as ``adapter_config.json`` lists it."""
    return GroupRecord(
        name=plan.name,
        modules=plan.modules,
        shape=plan.shape,
        rank=plan.rank,
        slice_ranks=plan.slice_ranks,
        scale=plan.scale,
        embedding=plan.embedding,
        fit=FitRecord(**plan.fit) if plan.fit else None,
        private_ranks=plan.private_ranks,
    ).to_json()


def version_of(plans: Iterable[GroupPlan]) -> int:
    """Return the format version that can hold groups: 2 where parts are private, or none shared."""
    native = all(min(plan.rank) and not plan.private_ranks for plan in plans)
    return FORMAT_VERSION if native else COMPRESSED_VERSION


def _plan_of(group: CompressedGroup) -> GroupPlan:
    return GroupPlan(
        name=group.name,
        modules=group.modules,
        shape=group.shape,
        rank=group.stack.shared_ranks,
        scale=1.0,
        slice_ranks=group.slice_ranks,
        embedding=group.embedding,
        private_ranks=group.private_ranks if any(group.private_ranks) else (),
    )


def _read_group(entry: Any, *, private: bool) -> GroupPlan:
    record = GroupRecord.from_json(entry, "the adapter's config", private=private)
    return GroupPlan(
        name=record.name,
        modules=record.modules,
        shape=record.shape,
        rank=record.rank,
        scale=record.scale,
        slice_ranks=record.slice_ranks,
        embedding=record.embedding,
        fit=asdict(record.fit) if record.fit else None,
        private_ranks=record.private_ranks,
    )
