"""Which modules share their factors: by kind, by shape, or by patterns of the user's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from lotrtensor.core.options import shown
from lotrtensor.errors import FormatError, OptionError, ShapeError

FLAT_PREFIXES = ("lora_", "lycoris_")
"""What kohya's flattened module names begin with."""


class Slot(NamedTuple):
    """What grouping needs to know of a module."""

    name: str
    shape: tuple[int, int]
    embedding: bool = False


def layer_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple(_by_number(p) for p in re.split(r"(\d+)", name))


def _by_number(part: str) -> tuple[int, int, str]:
    if not part.isdecimal():
        return 0, 0, part
    if len(part) > _DIGITS:  # no number of a layer; Python refuses to read much longer ones
        return 2, len(part), part
    return 1, int(part), ""


_DIGITS = 18


def module_kind(name: str) -> str:
    """Module path with every layer number replaced by ``*``.

    >>> module_kind("model.layers.12.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'

    kohya's names have underscores for dots:

    >>> module_kind("lora_te1_text_model_encoder_layers_3_mlp_fc1")
    'lora_te1_text_model_encoder_layers_*_mlp_fc1'
    """
    dot = "_" if name.startswith(FLAT_PREFIXES) and "." not in name else "."
    return dot.join("*" if part.isdecimal() else part for part in name.split(dot))


def sharing_kind(name: str) -> str:
    """Module path with the numbers replaced over which factors are shared by default.

    Those are the numbers of layers; of experts they are the experts' own, as the experts of one
    layer see the same input:

    >>> sharing_kind("model.layers.12.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    >>> sharing_kind("model.layers.12.mlp.experts.3.down_proj")
    'model.layers.12.mlp.experts.*.down_proj'
    """
    match = _EXPERT.match(name)
    if match is None:
        return module_kind(name)
    return f"{match['experts']}.*{module_kind(name[match.end() :])}"


_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.\d+(?=\.)")


def group_modules(slots: Iterable[Slot], group_by: str = "type") -> dict[str, list[Slot]]:
    """Return the groups of modules that are to share their factors, slices in layer order.

    Parameters
    ----------
    slots : iterable of Slot
        The modules.
    group_by : str
        ``"type"``: modules whose paths differ in numbers only, all ``q_proj`` say; of experts those
        of one layer (``experts.0.down_proj``, ``experts.1.down_proj``). Where such modules differ
        in shape, a group for each shape. ``"shape"``: all modules of one m × n.
        Anything else: regular expressions, separated by commas and each with an optional name
        (``qv=query|value,mlp=dense``); a module joins the first that occurs in its path, and
        modules that none matches are grouped by type.

    Returns
    -------
    dict of str to list of Slot
        Group name to its modules. Names are unique and as short as that allows.

    Raises
    ------
    OptionError
        If ``group_by`` is no text.
    FormatError
        If a pattern is no regular expression or matches no module.
    ShapeError
        If a pattern brings modules of unlike shapes together.
    """
    if not isinstance(group_by, str):
        raise OptionError(f"group_by is {shown(group_by)}; expected 'type', 'shape' or patterns")
    ordered = sorted(slots, key=lambda slot: layer_order(slot.name))
    if group_by == "type":
        return _by_type(ordered)
    if group_by == "shape":
        return _collect((_shape_name(slot), slot) for slot in ordered)
    return _by_patterns(ordered, _parse_patterns(group_by))


def _collect(pairs: Iterable[tuple[str, Slot]]) -> dict[str, list[Slot]]:
    groups: dict[str, list[Slot]] = {}
    for name, slot in pairs:
        groups.setdefault(name, []).append(slot)
    return groups


def _shape_name(slot: Slot) -> str:
    return f"{slot.shape[0]}x{slot.shape[1]}" + ("-embedding" if slot.embedding else "")


def _by_type(slots: list[Slot]) -> dict[str, list[Slot]]:
    kinds = _collect((sharing_kind(slot.name), slot) for slot in slots)
    # What follows the last layer number is the name, unless two kinds would share it.
    tails = {kind: re.split(r"\*[._]", kind)[-1] for kind in kinds}
    clash = {tail for tail in tails.values() if list(tails.values()).count(tail) > 1}
    groups: dict[str, list[Slot]] = {}
    for kind, members in kinds.items():
        name = kind if tails[kind] in clash else tails[kind]
        shapes = _collect((_shape_name(slot), slot) for slot in members)
        for shape, same in shapes.items():
            groups[name if len(shapes) == 1 else f"{name}[{shape}]"] = same
    return groups


def _parse_patterns(text: str) -> dict[str, re.Pattern[str]]:
    patterns: dict[str, re.Pattern[str]] = {}
    for item in text.split(","):
        name, equals, pattern = item.strip().partition("=")
        if not name or (equals and not pattern):
            raise FormatError(
                f"grouping {text!r} has an empty pattern; expected 'type', 'shape' or patterns "
                "such as 'qv=query|value,mlp=dense'"
            )
        if name in patterns:
            raise FormatError(f"grouping {text!r} names {name!r} twice; join the patterns with |")
        try:
            patterns[name] = re.compile(pattern if equals else name)
        except re.error as error:
            raise FormatError(
                f"grouping {item.strip()!r} is no regular expression ({error}); expected 'type', "
                "'shape' or patterns such as 'qv=query|value'"
            ) from error
    return patterns


def _by_patterns(slots: list[Slot], patterns: dict[str, re.Pattern[str]]) -> dict[str, list[Slot]]:
    groups: dict[str, list[Slot]] = {name: [] for name in patterns}
    rest = []
    for slot in slots:
        found = (name for name, pattern in patterns.items() if pattern.search(slot.name))
        name = next(found, None)
        if name is None:
            rest.append(slot)
        else:
            groups[name].append(slot)
    for name, members in groups.items():
        if not members:
            raise FormatError(
                f"grouping pattern {name!r} matches none of the {len(slots)} modules, such as "
                f"{slots[0].name!r}"
            )
        unlike = next((slot for slot in members if _unlike(slot, members[0])), None)
        if unlike is not None:
            raise ShapeError(
                f"grouping pattern {name!r} brings {members[0].name} {members[0].shape} and "
                f"{unlike.name} {unlike.shape} together; modules that share factors have one shape"
            )
    for name, members in _by_type(rest).items():
        groups[name if name not in groups else f"{name} (rest)"] = members
    return groups


def _unlike(slot: Slot, other: Slot) -> bool:
    return (slot.shape, slot.embedding) != (other.shape, other.embedding)
