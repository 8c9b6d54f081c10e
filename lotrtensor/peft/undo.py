"""What a model was before an adapter was put in, and how to make it so again."""

from __future__ import annotations

from typing import Any

from torch import nn


class Snapshot:
    """The tree of modules of a model and what trains; holds references, copies no weight.

    Parameters
    ----------
    model : nn.Module
        The model as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trains = [(p, p.requires_grad) for p in model.parameters()]
        self._config = getattr(model, "config", None)
        self._depth = getattr(self._config, "num_hidden_layers", None)

    def restore(self) -> None:
        """Put every module back in its place, and every flag."""
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in self._trains:
            parameter.requires_grad = requires_grad
        # Only replicated layers change it, and not every config lets it be set.
        config: Any = self._config
        if self._depth is not None and config.num_hidden_layers != self._depth:
            config.num_hidden_layers = self._depth
