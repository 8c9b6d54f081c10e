"""Fused experts of a checkpoint: every expert of a 3-D tensor as a weight of its own.

An expert is a range of bytes of the tensor, so that it is read, compared and written alone.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

from lotrtensor.adapters.architecture import Architecture
from lotrtensor.adapters.formats.checkpoint import FLOAT_TYPES, Checkpoint
from lotrtensor.adapters.formats.experts import DOWN, parameter_path
from lotrtensor.adapters.layers import WEIGHT
from lotrtensor.adapters.quantised import is_scaled
from lotrtensor.errors import FormatError

PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Names that the matrices of an expert have one by one, those of a fused one in their order."""

HOLDERS = (".mlp.", ".block_sparse_moe.")
"""What the blocks of Mixtral are called today, and in checkpoints."""

_FUSED = re.compile(r"(?:.*\.)?experts\.(?![^.]*_scale(?:_inv)?$)[^.]*[^.\d][^.]*")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """A checkpoint whose fused experts are weights, and what is known of them.

    Attributes
    ----------
    checkpoint : Checkpoint
        With ``<experts>.<e>.<parameter>.weight`` in the place of ``<experts>.<parameter>``.
    parameters : mapping of str to str
        The parameter that every expert, by its path, is a slice of.
    layouts : mapping of str to bool
        Whether an expert is stored in × out, where that is known.
    """

    checkpoint: Checkpoint
    parameters: Mapping[str, str]
    layouts: Mapping[str, bool]

    def check_known(self, module: str, pattern: object) -> None:
        """Refuse an expert of which nothing tells how it is stored.

        Parameters
        ----------
        module : str
            Path of the expert.
        pattern : object
            What the user says of modules in × out, which tells.

        Raises
        ------
        FormatError
            Naming the parameter, and the option that tells.
        """
        if module in self.parameters and module not in self.layouts and not pattern:
            name = self.parameters[module]
            size = " × ".join(map(str, self.checkpoint.tensors[module + WEIGHT].shape))
            raise FormatError(
                f"{self.checkpoint.place(module + WEIGHT)}: nothing tells whether the experts of "
                f"{name}, {size} each, are stored out × in or in × out; name the modules that are "
                "in × out with --fan-in-fan-out PATTERN (fan_in_fan_out), '^$' if there are none"
            )


def expert_weights(checkpoint: Checkpoint, architecture: Architecture | None) -> ExpertWeights:
    """Return a checkpoint with every fused expert as a weight of its own.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its tensors under today's names.
    architecture : Architecture or None
        Its class, where it is known.
    """
    tensors, parameters, layouts = {}, {}, {}
    for name, stored in checkpoint.tensors.items():
        count = stored.shape[0] if len(stored.shape) == 3 else 0
        plain = stored.dtype in FLOAT_TYPES and not is_scaled(checkpoint, name)
        if not count or not plain or not _FUSED.fullmatch(name):
            tensors[name] = stored
            continue
        holder, _, parameter = name.rpartition(".")
        size = (stored.stop - stored.start) // count
        layout = _layout(checkpoint, name, architecture)
        for k in range(count):
            start = stored.start + k * size
            module = f"{holder}.{k}.{parameter}"
            tensors[module + WEIGHT] = stored._replace(
                shape=stored.shape[1:], start=start, stop=start + size
            )
            parameters[module] = name
            if layout is not None:
                layouts[module] = layout
    return ExpertWeights(replace(checkpoint, tensors=tensors), parameters, layouts)


def fused_hint(module: str, names: Container[str], ending: str = "") -> str:
    """Return what to do with an expert's module where ``names`` have it in a fused one.

    Parameters
    ----------
    module : str
        Path of a module that is not found, such as ``layers.0.mlp.experts.3.gate_proj``.
    names : container of str
        What there is: paths of modules, with ``ending``.
    ending : str
        End of all names.

    Returns
    -------
    str
        A sentence; empty for any other module.

    Examples
    --------
    >>> fused_hint("mlp.experts.3.w1", {"mlp.experts.3.gate_up_proj"})[:48]
    'its experts are one by one, and fused in the mod'
    >>> fused_hint("mlp.experts.3.w1", {"mlp.experts.3.w1"})
    ''
    """
    path, _, part = module.rpartition(".")
    new, old = HOLDERS
    for name, options in PARTS.items():
        fused = f"{path.replace(old, new)}.{name}"
        if fused != module and any(part in parts for parts in options) and fused + ending in names:
            return (
                "its experts are one by one, and fused in the model: lay them out anew with lotr "
                "export --experts parameters, which gives a LoRA"
            )
    return ""


def joined_experts(
    weights: Iterable[str], checkpoint: Checkpoint, architecture: Architecture | None
) -> dict[str, tuple[str, ...]]:
    """Return the experts of fused parameters that a checkpoint holds one by one.

    transformers joins them when it loads such a checkpoint: a model has no module for them.

    Parameters
    ----------
    weights : iterable of str
        Modules; all experts of a parameter that one of them is a part of are returned.
    checkpoint : Checkpoint
        Its tensors.
    architecture : Architecture or None
        Its class, which says what is fused; nothing is joined where it is not known.

    Returns
    -------
    dict of str to tuple of str
        The modules whose rows make the matrix of an expert, in their order, by its path.
    """
    shapes = architecture.shapes if architecture is not None else {}
    new, old = HOLDERS
    wanted = set()
    for module in weights:
        path = parameter_path(module)
        holder, _, part = (path or "").replace(old, new).rpartition(".")
        fused = (n for n, parts in PARTS.items() if any(part in names for names in parts))
        wanted |= {
            f"{holder}.{name}" for name in fused if len(shapes.get(f"{holder}.{name}", ())) == 3
        }
    found: dict[str, tuple[str, ...]] = {}
    for parameter in sorted(wanted):
        holder, _, name = parameter.rpartition(".")
        for k in range(shapes[parameter][0]):
            candidates = (
                tuple(f"{own}.{k}.{part}" for part in parts)
                for own in (holder, holder.replace(new, old))
                for parts in PARTS[name]
            )
            stored = (c for c in candidates if all(m + WEIGHT in checkpoint.tensors for m in c))
            own = next(stored, None)
            if own is not None:
                found[f"{holder}.{k}.{name}"] = own
    return found


def _layout(checkpoint: Checkpoint, name: str, architecture: Architecture | None) -> bool | None:
    """Whether a parameter is stored in × out: by its class, its bias, or its counterpart."""
    holder, _, parameter = name.rpartition(".")
    known = architecture.turned_experts.get(holder) if architecture is not None else None
    if known is not None:
        return known
    _, rows, columns = checkpoint.tensors[name].shape
    bias = checkpoint.tensors.get(f"{name}_bias")
    if bias is not None and rows != columns and bias.shape[-1] in (rows, columns):
        return bias.shape[-1] == columns
    gated = parameter == "gate_up_proj"
    other = checkpoint.tensors.get(f"{holder}.{DOWN[0] if gated else 'gate_up_proj'}")
    if other is None or len(other.shape) != 3 or not (gated or parameter in DOWN):
        return None
    up, down = ((rows, columns), other.shape[1:]) if gated else (other.shape[1:], (rows, columns))
    fits = [
        in_up == out_down and out_up == 2 * in_down
        for (out_up, in_up), (out_down, in_down) in ((up, down), (up[::-1], down[::-1]))
    ]
    return fits[1] if fits[0] != fits[1] else None
