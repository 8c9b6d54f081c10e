"""PEFT's LoRA config, field by field: what each means for the update that a file holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lotrtensor.adapters.formats.patterns import Patterns
from lotrtensor.errors import FormatError, LotrWarning, UnsupportedAdapterError

Role = Literal["honoured", "carried", "refused", "idle"]


class Field(NamedTuple):
    """What a field of the config is to a reader of the update.

    Attributes
    ----------
    role : str
        ``"honoured"``: goes into the factors when they are read, and is written anew.
        ``"carried"``: says to what the update applies, or what is beside it, and is written as
        it was read. ``"refused"``: makes the update something else than a plain B A.
        ``"idle"``: a matter of training alone; a trained adapter computes the same with any value.
    holds : callable
        Whether a value, not null, is of the field's type.
    expected : str
        That type in words.
    method : str
        Name of the method, of a field that is refused.
    """

    role: Role
    holds: Callable[[Any], bool]
    expected: str
    method: str = ""


def _is(*types: type) -> Callable[[Any], bool]:
    # JSON's true is no number, though Python's True is one.
    return lambda v: isinstance(v, types) and (bool in types or not isinstance(v, bool))


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(map(holds, v))


def _table_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and all(map(holds, v.values()))


def _any_of(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: any(holds(v) for holds in kinds)


def _biases(value: Any) -> bool:
    """PEFT's words for which biases are trained; a method's own end in ``_only``."""
    return isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))


_text, _number, _whole = _is(str), _is(int, float), _is(int)
_switch = (_is(bool), "true or false")
_texts = (_list_of(_text), "a list of module names")
_targets = (_any_of(_text, _list_of(_text)), "a list of names or a regular expression")
_indices = _list_of(_whole)
_options = (_is(dict), "an object")
_anything = (_is(object), "anything")

FIELDS: Mapping[str, Field] = {
    "peft_type": Field("honoured", _text, "a string"),
    "r": Field("honoured", _whole, "an integer such as 8"),
    "lora_alpha": Field("honoured", _number, "a number such as 16"),
    "use_rslora": Field("honoured", *_switch),
    "rank_pattern": Field("honoured", _table_of(_whole), "patterns and numbers"),
    "alpha_pattern": Field("honoured", _table_of(_number), "patterns and numbers"),
    "auto_mapping": Field("carried", *_options),
    "base_model_name_or_path": Field("carried", _text, "a string"),
    "bias": Field("carried", _biases, "'none', 'all' or 'lora_only'"),
    "ensure_weight_tying": Field("carried", *_switch),
    "exclude_modules": Field("carried", *_targets),
    "fan_in_fan_out": Field("carried", *_switch),
    "inference_mode": Field("carried", *_switch),
    "layer_replication": Field("carried", _list_of(_indices), "a list of pairs of layers"),
    "layers_pattern": Field("carried", *_targets),
    "layers_to_transform": Field("carried", _any_of(_whole, _indices), "numbers of layers"),
    "modules_to_save": Field("carried", *_texts),
    "revision": Field("carried", _text, "a string"),
    "target_modules": Field("carried", *_targets),
    "target_parameters": Field("carried", _list_of(_text), "a list of parameter names"),
    "task_type": Field("carried", _text, "a string"),
    "trainable_token_indices": Field(
        "carried", _any_of(_indices, _table_of(_indices)), "indices of tokens"
    ),
    "alora_invocation_tokens": Field("refused", *_anything, "activated LoRA"),
    "arrow_config": Field("refused", *_anything, "Arrow routing"),
    "enable_lora": Field("refused", *_anything, "a merged linear layer"),
    "kasa_config": Field("refused", *_anything, "KaSA"),
    "lora_bias": Field("refused", *_switch, "lora_bias"),
    "monteclora_config": Field("refused", *_anything, "MonteCLoRA"),
    "use_bdlora": Field("refused", *_anything, "block-diagonal LoRA"),
    "use_dora": Field("refused", *_switch, "DoRA"),
    "use_qalora": Field("refused", *_switch, "QALoRA"),
    "corda_config": Field("idle", *_options),
    "eva_config": Field("idle", *_options),
    "init_lora_weights": Field("idle", _any_of(_is(bool), _text), "true, false or a name"),
    "loftq_config": Field("idle", *_options),
    "lora_dropout": Field("idle", _number, "a number such as 0.1"),
    "lora_ga_config": Field("idle", *_options),
    "megatron_config": Field("idle", *_options),
    "megatron_core": Field("idle", _text, "a string"),
    "merge_weights": Field("idle", *_switch),
    "peft_version": Field("idle", _text, "a string"),
    "qalora_group_size": Field("idle", _whole, "an integer"),
    "runtime_config": Field("idle", *_options),
    "velora_config": Field("idle", *_options),
}
"""Every field of PEFT's LoRA config; null is allowed for each."""

CARRIED_FIELDS = tuple(name for name, field in FIELDS.items() if field.role == "carried")

# Written anew, and what goes with an initialisation that is over.
OWN_FIELDS = {name for name, field in FIELDS.items() if field.role == "honoured"} | {
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}

# Initialisations that change the base weights: ΔW counts from another base than the user's.
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_plain(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a LoRA config whose update is no plain BA, and warn of fields that are not known.

    Raises
    ------
    FormatError
        If a field has the wrong type.
    UnsupportedAdapterError
        By the name of the variant.
    """
    check_types(config, FIELDS, where)
    for name, field in FIELDS.items():
        if field.role == "refused" and config.get(name):
            raise UnsupportedAdapterError(
                f"{where} uses {field.method} ({name} = {config[name]!r}); only plain LoRA, "
                "ΔW = s · B · A, has a LoTR form"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UnsupportedAdapterError(
            f"{where} has init_lora_weights = {init!r}, which changes the base weights; save "
            "it as a plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    unknown = sorted(name for name, value in config.items() if name not in FIELDS and value)
    if unknown:
        warnings.warn(
            f"{where}: the config has {', '.join(unknown)}, which no LoRA known here has; if that "
            "changes what the adapter computes, the result does not",
            LotrWarning,
            stacklevel=2,
        )


def check_types(config: Mapping[str, Any], names: Iterable[str], where: object) -> None:
    """Refuse a field, of those in ``names``, whose value is not of its type.

    Raises
    ------
    FormatError
        Naming it.
    """
    for name in names:
        value, field = config.get(name), FIELDS[name]
        if value is not None and not field.holds(value):
            raise FormatError(f"{where}: {name} is {repr(value)[:40]}; expected {field.expected}")


class Scales:
    """The scale of every module, by PEFT's rules.

    Parameters
    ----------
    config : mapping
        The LoRA config.
    where : Path
        Named in messages.

    Raises
    ------
    FormatError
        If a pattern cannot be read; see `Patterns`.
    """

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self._config, self._where = config, where
        self._patterns = {
            field: Patterns(config.get(field) or {}, f"{where}: {field}")
            for field in ("rank_pattern", "alpha_pattern")
        }
        self._values = {field: list((config.get(field) or {}).values()) for field in self._patterns}

    def rank(self, names: tuple[str, ...]) -> Any:
        """Return the rank that the config gives a module, by its paths; as it stands there."""
        return self._value(names, "rank_pattern", self._config.get("r", 8))

    def of(self, names: tuple[str, ...], key: str, rank: int) -> float:
        """Return the scale of a module, after checking its rank against the config.

        Parameters
        ----------
        names : tuple of str
            Path of the module; any others are those that it had in the model that was trained.
        key : str
            Key of its factor A, named in messages.
        rank : int
            Rank r that the factor has.

        Raises
        ------
        FormatError
            If the config gives another rank, or an alpha that is no number of ordinary size.
        """
        wanted = self.rank(names)
        alpha = self._value(names, "alpha_pattern", self._config.get("lora_alpha", 8))
        if not _number(alpha) or not abs(alpha) < 1e30:
            raise FormatError(
                f"{self._where}: lora_alpha of {names[0]} is {repr(alpha)[:40]}; expected a number "
                "such as 16"
            )
        if wanted != rank:
            raise FormatError(
                f"{self._where}: the config gives {names[0]} the rank {repr(wanted)[:40]}, but "
                f"{key} has rank {rank}; they belong to different adapters"
            )
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _value(self, names: tuple[str, ...], field: str, default: Any) -> Any:
        """Look a module up as PEFT does: the first pattern that its path ends with."""
        found = [self._patterns[field].first(name) for name in set(names)]
        label = min((x for x in found if x is not None), default=None)
        return default if label is None else self._values[field][label]
