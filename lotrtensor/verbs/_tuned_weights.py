"""The weights in which two checkpoints differ: modules to update, weights carried in full."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lotrtensor.adapters.architecture import Architecture, Kind, read_architecture
from lotrtensor.adapters.deltas import Deltas, Resized, compare_checkpoints, with_tied
from lotrtensor.adapters.expert_weights import expert_weights, joined_experts
from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.adapters.formats.checkpoint import Checkpoint, open_checkpoint
from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.experts import parameter_path
from lotrtensor.adapters.formats.tensors import BFLOAT16, Tensors
from lotrtensor.adapters.grouping import Slot, layer_order
from lotrtensor.adapters.layers import WEIGHT, Layers
from lotrtensor.core.options import check_choice
from lotrtensor.errors import FormatError, LotrWarning


@dataclass(frozen=True, eq=False)
class TunedWeights:
    """The modules that differ between two checkpoints.

    Attributes
    ----------
    deltas : Deltas
        The checkpoints and what differs.
    kinds : dict of str to str
        What every module that differs is.
    kept : frozenset of str
        Those that an adapter carries in full, since an update would change nothing there.
    parameters : mapping of str to str
        The fused parameter of every module that is an expert of one.
    joined : mapping of str to tuple of str
        Of experts that are stored one by one, the modules that hold the rows of each.
    """

    deltas: Deltas
    kinds: dict[str, Kind]
    kept: frozenset[str]
    parameters: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]

    def slots(self) -> list[Slot]:
        """Modules that get an update, in the order of their layers."""
        return [
            Slot(name, self._shape(name), self.kinds[name] == "embedding")
            for name in sorted(self.kinds.keys() - self.kept, key=layer_order)
        ]

    def read(self, module: str) -> np.ndarray:
        """Return ΔW (m × n) of a module, out × in."""
        if module in self.joined:
            return np.concatenate([self.deltas.read(key) for key in self.keys(module)])
        delta = self.deltas.read(module + WEIGHT)
        return delta.T if self._turned(module) else delta

    def keys(self, module: str) -> list[str]:
        """Names of the weights that a module's ΔW is of."""
        return [part + WEIGHT for part in self.joined.get(module, (module,))]

    def dtype(self) -> np.dtype:
        """Type of the tuned weights, or the next that adapters are stored in."""
        found = self.deltas.tuned.dtype(self.deltas.names[0])
        return found if found.itemsize > 1 else BFLOAT16

    def carried(self, dtype: np.dtype) -> Tensors:
        """All tensors of the modules that are carried in full, as the tuned checkpoint has them.

        Those in eight bits are widened to ``dtype``.
        """
        found = {}
        for name in self.deltas.tuned.tensors:
            if name.rpartition(".")[0] in self.kept:
                tensor = self.deltas.tuned.read(name)
                found[PREFIX + name] = tensor if tensor.dtype.itemsize > 1 else tensor.astype(dtype)
        return found

    def config(self, base: str) -> dict[str, Any]:
        """Fields of the adapter's config: the base model and what is adapted in it."""
        adapted = sorted(self.kinds.keys() - self.kept - self.parameters.keys())
        config: dict[str, Any] = {
            "base_model_name_or_path": base,
            "fan_in_fan_out": any(self.kinds[name] == "conv1d" for name in adapted),
            "target_modules": self._targets(adapted),
        }
        fused = {self.parameters[name] for name in self.kinds if name in self.parameters}
        config |= {"target_parameters": sorted(fused)} if fused else {}
        return config | ({"modules_to_save": sorted(self.kept)} if self.kept else {})

    def _targets(self, adapted: list[str]) -> list[str] | str:
        """Paths as PEFT looks for them: it takes a name for every path that ends with it.

        Where that would be another module too (a head called ``output``, and a block's part), one
        regular expression for whole paths.
        """
        paths = {name.rpartition(".")[0] for name in self.deltas.base.tensors}
        paths |= {path[:at] for path in paths for at in range(len(path)) if path[at] == "."}
        names = set(adapted)
        for path in paths - names:
            if any(path[at + 1 :] in names for at in range(len(path)) if path[at] == "."):
                return "|".join(map(re.escape, adapted))
        return adapted

    def _turned(self, module: str) -> bool:
        return self.kinds[module] in ("embedding", "conv1d")

    def _shape(self, module: str) -> tuple[int, int]:
        if module in self.joined:
            shapes = [self.deltas.base.tensors[key].shape for key in self.keys(module)]
            return sum(rows for rows, _ in shapes), shapes[0][1]
        rows, columns = self.deltas.base.tensors[module + WEIGHT].shape
        return (columns, rows) if self._turned(module) else (rows, columns)


def tuned_weights(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    modules: str | None,
    resized: Resized,
    fan_in_fan_out: bool | str,
    embeddings: str | None = None,
) -> TunedWeights:
    """Compare two checkpoints under the names that the base's class has for its weights.

    Parameters are those of `extract`, which says what is raised and warned of.
    """
    check_choice(resized, "resized", ("refuse", "common-rows"))
    before, after = open_checkpoint(expand(base)), open_checkpoint(expand(tuned))
    architecture = read_architecture(before.directory, before.config)
    if architecture is not None:
        before, after = (side.renamed(architecture.rename) for side in (before, after))
        _tell_untied(before, after, architecture)
        before, after = (with_tied(side, architecture.ties) for side in (before, after))
    experts = expert_weights(before, architecture)
    fused = experts.parameters
    after = expert_weights(after, architecture).checkpoint
    deltas = compare_checkpoints(experts.checkpoint, after, modules, resized)
    if not deltas.names:
        raise deltas.nothing()
    deltas = _with_whole_parameters(deltas, fused)
    if deltas.others:
        _warn(
            f"{len(deltas.others)} tensors differ, or are in one checkpoint only, and are not part "
            f"of the adapter, such as {deltas.others[0]}"
        )
    layers = Layers(deltas.base, architecture, fan_in_fan_out, embeddings, experts.layouts)
    names = [name.removesuffix(WEIGHT) for name in deltas.names]
    for name in names:
        experts.check_known(name, fan_in_fan_out)
    kinds = {name: layers.kind(name) for name in names}
    joined = joined_experts(names, deltas.base, architecture)
    parts = {part for members in joined.values() for part in members}
    kinds = {n: k for n, k in kinds.items() if n not in parts} | dict.fromkeys(joined, "linear")
    fused = {**fused, **{name: str(parameter_path(name)) for name in joined}}
    kept = _uncalled(kinds, architecture)
    if len(kept) == len(kinds):
        raise FormatError(
            f"{tuned} differs from {base} in weights alone that are used without their layer being "
            f"called, such as {min(kept)}; an adapter would change nothing there"
        )
    return TunedWeights(deltas, kinds, kept, fused, joined)


def _with_whole_parameters(deltas: Deltas, parameters: Mapping[str, str]) -> Deltas:
    """Return deltas with all experts of a fused parameter of which one differs."""
    found = {parameters.get(name.removesuffix(WEIGHT)) for name in deltas.names} - {None}
    whole = [name + WEIGHT for name, parameter in parameters.items() if parameter in found]
    missing = [name for name in whole if name not in deltas.tuned.tensors]
    if missing:
        raise FormatError(
            f"{deltas.tuned.directory} has no {missing[0].removesuffix(WEIGHT)}, which "
            f"{deltas.base.directory} has; they belong to different models"
        )
    return replace(deltas, names=tuple(dict.fromkeys((*deltas.names, *whole))))


def _uncalled(kinds: dict[str, Kind], architecture: Architecture | None) -> frozenset[str]:
    """Modules in which an adapter would change nothing, or that PEFT has no layer for."""
    if architecture is None:
        return frozenset()
    direct, complete = architecture.read_directly
    if not complete:
        _warn(
            f"{architecture.name} does not take a run without numbers, which would tell the "
            "weights that it uses without calling their layer: an adapter changes nothing in such"
        )
    found = {name for name, kind in kinds.items() if kind == "other" or name + WEIGHT in direct}
    if found:
        _warn(
            f"{len(found)} weights are used without their layer being called, or belong to a layer "
            f"that PEFT does not adapt, such as {min(found)}; they are carried in full"
        )
    return frozenset(found)


def _tell_untied(before: Checkpoint, after: Checkpoint, architecture: Architecture) -> None:
    """Say which shared weights one checkpoint holds once, the other more often."""
    for name in sorted((before.tensors.keys() ^ after.tensors.keys()) & architecture.ties.keys()):
        others = sorted(architecture.ties[name] & before.tensors.keys() & after.tensors.keys())
        if others:
            side = before if name in before.tensors else after
            _warn(f"{name} is in {side.directory} only; the other checkpoint has it as {others[0]}")


def _warn(message: str) -> None:
    warnings.warn(message, LotrWarning, stacklevel=4)
