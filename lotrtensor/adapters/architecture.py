"""What the class of a base model says about its weights, where transformers is installed.

The only module of the base package that imports a framework, and only when it is called. The model
is built without weights (on torch's meta device) from ``config.json`` alone: no download, and no
code but transformers' own.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lotrtensor.adapters.dry_run import DryRun, dry_run

Kind = Literal["linear", "conv1d", "embedding", "other"]
"""What a two-dimensional weight belongs to: a linear layer (out × in), transformers' Conv1D
(in × out), an embedding (tokens × dim), or a layer of its own kind, which PEFT does not adapt."""


def read_architecture(directory: Path, config: Mapping[str, Any]) -> Architecture | None:
    """Build the class that a checkpoint's config names.

    Parameters
    ----------
    directory : Path
        Holds ``config.json``.
    config : mapping
        Its content.

    Returns
    -------
    Architecture or None
        None where the config names no class, transformers is not installed or does not have it.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or "model_type" not in config:
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        return None
    try:
        with _silence(transformers), torch.device("meta"):
            settings = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            return Architecture(model_class(settings).eval())
    except Exception:  # a class may raise anything on a foreign config
        return None


class Architecture:
    """A model without weights, and what it says of them.

    Names of weights are those of today's transformers, which renames the keys of older
    checkpoints when it loads them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = type(model).__name__

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its name, tied ones under each of theirs."""
        parameters = self._model.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in parameters}

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every module that has a weight, by its path."""
        modules = self._model.named_modules(remove_duplicate=False)
        return {path: _kind(module) for path, module in modules if hasattr(module, "weight")}

    @cached_property
    def turned_experts(self) -> dict[str, bool]:
        """Whether fused experts are stored in × out, by the path of their module."""
        modules = self._model.named_modules(remove_duplicate=False)
        return {
            path: bool(module.is_transposed)
            for path, module in modules
            if hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        }

    @cached_property
    def ties(self) -> dict[str, frozenset[str]]:
        """Every parameter that shares its numbers with others, and the names of them all."""
        groups: dict[str, set[str]] = {}
        for target, source in self._tied_pairs():
            members = groups.get(target, {target}) | groups.get(source, {source})
            for member in members:
                groups[member] = members
        return {name: frozenset(members) for name, members in groups.items()}

    def _tied_pairs(self) -> Iterator[tuple[str, str]]:
        """Pairs that the class ties by name, and those that are one parameter."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        if isinstance(tied, dict):
            yield from tied.items()
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                yield name, first[id(parameter)]

    @cached_property
    def _renamings(self) -> list[Any]:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # transformers 4: patterns of the class itself
            return []
        found = get_model_conversion_mapping(self._model)
        return [item for item in found if isinstance(item, WeightRenaming)]

    def rename(self, key: str) -> str:
        """Return the name that transformers gives a key of a checkpoint when it loads it.

        A key that no parameter answers to keeps its name.
        """
        if key in self.shapes:
            return key
        name = key
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        if not self._renamings:
            patterns = getattr(self._model, "_checkpoint_conversion_mapping", None) or {}
            for pattern, replacement in patterns.items():
                name, count = re.subn(pattern, replacement, key)
                if count:
                    break
        prefix = getattr(self._model, "base_model_prefix", "") + "."
        for candidate in (name, prefix + name, name.removeprefix(prefix), prefix + key):
            if candidate in self.shapes:
                return candidate
        return key

    @cached_property
    def read_directly(self) -> DryRun:
        """Parameters that the model uses without calling the module they belong to.

        An adapter wraps a module's call, so that one on such a module changes nothing: DeBERTa's
        relative embeddings, the projections of WavLM's attention.
        """
        import transformers

        with _silence(transformers):
            seen = dry_run(self._model)
        # Fused kernels of state-space models, which run on other devices, take the weights of
        # these projections as arguments.
        fused = (
            f"{path}.{name}.weight"
            for path, module in self._model.named_modules()
            for name in ("x_proj", "dt_proj", "out_proj")
            if hasattr(module, "A_log") and hasattr(module, name)
        )
        return seen._replace(read=seen.read | frozenset(fused))


def _kind(module: Any) -> Kind:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    # An embedding with a forward of its own (positions with an offset, say) is not adapted by
    # PEFT as it is called; one that only scales is.
    plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
    return "embedding" if isinstance(module, torch.nn.Embedding) and plain else "other"


@contextlib.contextmanager
def _silence(transformers: Any) -> Iterator[None]:
    """Keep transformers quiet: its messages do not concern a model built only for inspection."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
