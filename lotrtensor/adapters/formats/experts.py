"""LoRA factors of fused experts: how files stack them, and the path that every expert has here.

A model with fused experts has no module an expert; the update of expert e of the parameter
``<experts>.gate_up_proj`` is given the path that a model with a list of experts has,
``<experts>.<e>.gate_up_proj``. Two layouts stack the factors of K experts:

=====================  ====================================  ==================================
PEFT's parameters      ``<experts>[.base_layer].lora_A``     K r × n, an expert's rows together
                       ``<experts>[.base_layer].lora_B``     m × r K, the expert running fastest
stacked, shared outer  ``<experts>.<parameter>.lora_A``      K × r × n, or 1 × r × n for all
                       ``<experts>.<parameter>.lora_B``      K × m × r, or 1 × m × r for all
=====================  ====================================  ==================================

PEFT's keys do not name the parameter: two that one module holds are told by the depth of the key,
as the wrapper of the first is inside that of the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lotrtensor.adapters.formats.factors import Factor
from lotrtensor.adapters.formats.lora_config import Scales
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.errors import FormatError, UnsupportedAdapterError

ExpertsLayout = Literal["parameters", "modules", "shared-outer"]
"""PEFT's ``target_parameters``; a module an expert; or stacks of which one side is shared."""

TARGETS = "target_parameters"
DOWN = ("down_proj", "w2")
"""Parameters on the way down: the second that a module holds, and those whose B is shared."""

Pairs = dict[str, dict[str, Factor]]

_INNER = ".base_layer"
_EXPERT = re.compile(
    r"(?P<experts>(?:.*\.)?[^.]*[^.\d][^.]*)\.(?P<number>\d+)\.(?P<parameter>[^.]+)"
)
_STACKED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<parameter>[^.]*[^.\d][^.]*)")


def parameter_path(module: str) -> str | None:
    """Return the path of the parameter that an expert's path stands for; None of any other.

    >>> parameter_path("layers.0.mlp.experts.3.down_proj")
    'layers.0.mlp.experts.down_proj'
    """
    match = _EXPERT.fullmatch(module)
    return f"{match['experts']}.{match['parameter']}" if match else None


def split_experts(
    pairs: Pairs, config: Mapping[str, Any], scales: Scales, where: object
) -> tuple[Pairs, list[str]]:
    """Return the pairs of a file with those of stacked experts taken apart, one an expert.

    Parameters
    ----------
    pairs : dict
        Factors of every module by side, as the file has them.
    config : mapping
        The LoRA config.
    scales : Scales
        Its ranks.
    where : object
        The file, named in messages.

    Returns
    -------
    pairs, targets : dict, list of str
        The pairs, and ``target_parameters``: those of the config, or those that stacks stand for.

    Raises
    ------
    FormatError
        If ``target_parameters`` and tensors contradict each other.
    UnsupportedAdapterError
        If nothing tells which parameter a factor belongs to.
    """
    targets = list(config.get(TARGETS) or [])
    found: Pairs = {}
    stacked: set[str] = set()
    wrapped: dict[str, list[str]] = {}
    for name, sides in pairs.items():
        match = _STACKED.fullmatch(name)
        if match and all(factor.tensor.ndim == 3 for factor in sides.values()):
            _check_sides(name, sides, where)
            found |= _unstacked(match["experts"], match["parameter"], sides, where)
            stacked.add(match["parameter"])
        elif targets and (_without_wrappers(name) != name or _holds(name, config)):
            wrapped.setdefault(_without_wrappers(name), []).append(name)
        else:
            found[name] = sides
    for experts, names in wrapped.items():
        found |= _of_parameters(experts, names, pairs, config, scales, where)
    if "gate_up_proj" in stacked and not targets:
        targets = [f"experts.{parameter}" for parameter in sorted(stacked)]
    return found, targets


def _without_wrappers(name: str) -> str:
    while name.endswith(_INNER):
        name = name.removesuffix(_INNER)
    return name


def _holds(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a module holds parameters of ``target_parameters``, rather than being a target."""
    targets = config.get(TARGETS) or []
    if _named(path, targets):
        return True
    modules = config.get("target_modules") or []
    if isinstance(modules, str):
        chosen = re.fullmatch(modules, path) is not None
    else:
        chosen = any(path == name or path.endswith(f".{name}") for name in modules)
    return any("." not in target for target in targets) and not chosen


def _named(experts: str, targets: Sequence[str]) -> list[str]:
    """Names of the parameters of a module that ``target_parameters`` may mean, by path."""
    found = []
    for target in targets:
        path, _, parameter = target.rpartition(".")
        if path and (experts == path or experts.endswith(f".{path}")):
            found.append(parameter)
    return list(dict.fromkeys(found))


def _of_parameters(
    experts: str,
    names: list[str],
    pairs: Pairs,
    config: Mapping[str, Any],
    scales: Scales,
    where: object,
) -> Pairs:
    """Take the wrappers of one module apart, the inner one first."""
    targets = config.get(TARGETS) or []
    held = _named(experts, targets) or [t for t in targets if "." not in t]
    names = sorted(names, key=len, reverse=True)
    if len(names) == 1 and held == ["weight"]:  # of a module after all, a router's say
        return {experts: pairs[names[0]]}
    for name in names:
        _check_sides(name, pairs[name], where)
    ordered = sorted(held, key=lambda parameter: parameter in DOWN)
    known = len(held) == 1 or (len(held) == 2 and ordered[1] in DOWN and ordered[0] not in DOWN)
    if len(held) != len(names) or not known:
        raise UnsupportedAdapterError(
            f"{where}: {pairs[names[0]]['A'].key} is one of {len(names)} factors of parameters of "
            f"{experts}, and target_parameters is {targets!r}; nothing tells which is which: "
            "expected one parameter of a module, or the two that lead up and down"
        )
    sizes = [(pairs[n]["A"].tensor.shape, pairs[n]["B"].tensor.shape) for n in names]
    turned = len(names) == 2 and _is_turned(sizes)
    found: Pairs = {}
    for name, parameter in zip(names, ordered, strict=True):
        found |= _unwrapped(experts, parameter, pairs[name], scales, where, turned=turned)
    return found


def _is_turned(sizes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether A and B stand for out × in: PEFT before 0.19 took every parameter for in × out.

    What leads down takes what leads up gives, whole or gated, and gives what that takes.
    """
    (_, up_in), (up_out, _) = sizes[0]
    (_, down_in), (down_out, _) = sizes[1]
    if up_in == down_out and up_out in (down_in, 2 * down_in):
        return False
    return up_out == down_in and up_in in (down_out, 2 * down_out)


def _unwrapped(
    experts: str,
    parameter: str,
    sides: Mapping[str, Factor],
    scales: Scales,
    where: object,
    *,
    turned: bool,
) -> Pairs:
    a, b = sides["A"], sides["B"]
    rank = scales.rank((f"{experts}.{parameter}",))
    rows = a.tensor.shape[0]
    if type(rank) is not int or rank < 1 or rows % rank or b.tensor.shape[1] != rows:
        raise FormatError(
            f"{where}: {a.key} is {a.tensor.shape} and {b.key} is {b.tensor.shape}; expected "
            f"(K r, n) and (m, r K) for K experts and the rank {rank!r} of the config"
        )
    count = rows // rank
    thin = a.entries.reshape(count, rank, a.tensor.shape[1])
    wide = b.entries.reshape(b.tensor.shape[0], rank, count)
    found: Pairs = {}
    for k in range(count):
        own_a, own_b = thin[k], np.ascontiguousarray(wide[:, :, k])
        if turned:
            own_a, own_b = own_b.T, own_a.T
        name = f"{experts}.{k}.{parameter}"
        found[name] = {"A": Factor(a.key, own_a), "B": Factor(b.key, own_b)}
    return found


def _unstacked(experts: str, parameter: str, sides: Mapping[str, Factor], where: object) -> Pairs:
    a, b = sides["A"], sides["B"]
    counts = a.tensor.shape[0], b.tensor.shape[0]
    count = max(counts)
    if not {*counts} <= {1, count} or a.tensor.shape[1] != b.tensor.shape[2]:
        raise FormatError(
            f"{where}: {a.key} is {a.tensor.shape} and {b.key} is {b.tensor.shape}; expected "
            "(K, r, n) and (K, m, r) with one r, or 1 in the place of K on a side that all experts "
            "share"
        )
    stacks = {"A": (a.key, a.entries), "B": (b.key, b.entries)}
    return {
        f"{experts}.{k}.{parameter}": {
            side: Factor(key, entries[min(k, len(entries) - 1)])
            for side, (key, entries) in stacks.items()
        }
        for k in range(count)
    }


def _check_sides(name: str, sides: Mapping[str, Factor], where: object) -> None:
    if set(sides) != {"A", "B"}:
        found = next(iter(sides.values())).key
        raise FormatError(f"{where}: {found} has no partner; expected lora_A and lora_B of {name}")


def fused_parameters(modules: Iterable[str], targets: Sequence[str] | None) -> dict[str, str]:
    """Return the parameter of every module that is an expert of ``target_parameters``, by name."""
    found = {}
    for module in modules:
        path = parameter_path(module)
        if path and any(path == t or path.endswith(f".{t}") for t in targets or ()):
            found[module] = path
    return found


def join_parts(modules: Sequence[LoraModule]) -> tuple[LoraModule, ...]:
    """Return modules with the gate and the way up of every expert as one, as models fuse them.

    ΔW of ``gate_up_proj`` is that of ``gate_proj`` (``w1``) over that of ``up_proj`` (``w3``), one
    below the other; ranks add up. ``w2`` becomes ``down_proj``.
    """
    parts: dict[str, dict[str, LoraModule]] = {}
    found = []
    for module in modules:
        match = _EXPERT.fullmatch(module.name)
        side = _PARTS.get(match["parameter"]) if match else None
        if match is None or side is None or match["experts"].split(".")[-1] != "experts":
            found.append(module)
            continue
        holder = f".{match['experts']}".replace(".block_sparse_moe.", ".mlp.")[1:]
        parts.setdefault(f"{holder}.{match['number']}", {})[side] = module
    for expert, sides in parts.items():
        if "down" in sides:
            b, a = sides["down"].factors()
            found.append(LoraModule(f"{expert}.down_proj", b, a, stored=sides["down"].stored))
        pair = [sides.get("gate"), sides.get("up")]
        given = [module for module in pair if module is not None]
        if given:
            m = given[0].shape[0]
            lefts = [x.B if x is not None else np.zeros((m, 0)) for x in pair]
            inner = lefts[0].shape[1]
            wide = np.zeros((2 * m, inner + lefts[1].shape[1]), np.result_type(*lefts))
            wide[:m, :inner], wide[m:, inner:] = lefts
            thin = np.vstack([module.A for module in given])
            found.append(LoraModule(f"{expert}.gate_up_proj", wide, thin))
    return tuple(found)


_PARTS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}


def stack_experts(
    modules: Sequence[LoraModule], ranks: Mapping[str, int], layout: ExpertsLayout, where: object
) -> dict[str, np.ndarray]:
    """Return the tensors of experts in a layout that stacks them, by key without prefix.

    Parameters
    ----------
    modules : sequence of LoraModule
        Experts, all of every parameter.
    ranks : mapping of str to int
        Rank that the factors of each parameter are filled up to.
    layout : str
        ``"parameters"`` or ``"shared-outer"``.
    where : object
        The file, named in messages.

    Raises
    ------
    FormatError
        If an expert is missing, or a module holds other parameters than those that can be told.
    UnsupportedAdapterError
        If experts are to share a side in which they differ.
    """
    stacks: dict[str, dict[int, LoraModule]] = {}
    for module in modules:
        match = _EXPERT.fullmatch(module.name)
        assert match
        stacks.setdefault(f"{match['experts']}.{match['parameter']}", {})[int(match["number"])] = (
            module
        )
    holders: dict[str, list[str]] = {}
    for path in stacks:
        holders.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    found: dict[str, np.ndarray] = {}
    for path, experts in stacks.items():
        missing = next((k for k in range(max(experts) + 1) if k not in experts), None)
        if missing is not None:
            raise FormatError(
                f"{where}: expert {missing} of {path} is not among the modules; a fused parameter "
                "is written as a whole"
            )
        rank = ranks[path]
        members = [experts[k] for k in range(len(experts))]
        if len({member.shape for member in members}) > 1:
            raise FormatError(
                f"{where}: experts of {path} are of unlike shapes; a fused parameter has one"
            )
        a = np.stack([_padded(m.A, rank, 0) for m in members])
        b = np.stack([_padded(m.B, rank, 1) for m in members])
        holder, _, parameter = path.rpartition(".")
        if layout == "shared-outer":
            found |= _shared(path, parameter, a, b, where)
            continue
        inner = _depth(parameter, holders[holder], path, where)
        key = holder + _INNER * inner
        found[f"{key}.lora_A.weight"] = a.reshape(-1, a.shape[2])
        found[f"{key}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    return found


def _padded(factor: np.ndarray, rank: int, axis: int) -> np.ndarray:
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, padding)


def _depth(parameter: str, held: list[str], path: str, where: object) -> int:
    """How deep PEFT's wrapper of a parameter is: what leads up is inside of what leads down."""
    if len(held) == 1:
        return 0
    downs = [name for name in held if name in DOWN]
    if len(held) > 2 or len(downs) != 1:
        raise FormatError(
            f"{where}: the module of {path} holds {', '.join(held)}; PEFT's keys tell apart two "
            "parameters alone, one that leads up and one that leads down"
        )
    return 0 if parameter in DOWN else 1


def _shared(
    path: str, parameter: str, a: np.ndarray, b: np.ndarray, where: object
) -> dict[str, np.ndarray]:
    side, shared = ("B", b) if parameter in DOWN else ("A", a)
    if (shared != shared[:1]).any():
        raise UnsupportedAdapterError(
            f"{where}: the experts of {path} have a lora_{side} each, and the layout shares one "
            "among them; bring the adapter into LoTR form first (lotr convert), which shares it"
        )
    tensors = {"A": a, "B": b} | {side: shared[:1]}
    return {f"{path}.lora_{name}.weight": tensor for name, tensor in tensors.items()}
