"""Match the module names of two files, in which one weight may have different names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lotrtensor.errors import FormatError

_CONTAINERS = {"model", "language_model"}
"""Parts that transformers has moved about in the paths of vision-language models:
``language_model.model.layers`` became ``model.language_model.layers``."""


def without_containers(name: str) -> str:
    """Return a path without the containers that it begins with.

    >>> without_containers("model.language_model.layers.0.self_attn.q_proj")
    'layers.0.self_attn.q_proj'
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _CONTAINERS:
        parts = parts[1:]
    return ".".join(parts)


class NameIndex:
    """Finds the names of one file by those of another.

    Parameters
    ----------
    names : iterable of str
        Names that are there.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._ends: dict[str, list[str]] = {}
        self._bare: dict[str, list[str]] = {}
        for name in self._names:
            self._bare.setdefault(without_containers(name), []).append(name)
            for end in _ends(name):
                self._ends.setdefault(end, []).append(name)

    def find(self, name: str) -> list[str]:
        """Return the names that may stand for ``name``: one if it is clear.

        The name itself; else one with a prefix more or less, as a model saved with a head has;
        else one whose containers are other ones.
        """
        if name in self._names:
            return [name]
        found = self._ends.get(name, [])
        found = found + [end for end in _ends(name) if end in self._names]
        return found or self._bare.get(without_containers(name), [])


def _ends(name: str) -> list[str]:
    """What is left of a path when parts at its beginning are taken away, one by one."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(1, len(parts))]


def check_distinct(found: Mapping[str, str], where: object) -> None:
    """Refuse two modules that found one weight: the one update would overwrite the other.

    Parameters
    ----------
    found : mapping of str to str
        The weight of every module.
    where : object
        What to name in the message.

    Raises
    ------
    FormatError
        Naming both modules and the weight.
    """
    first: dict[str, str] = {}
    for module, name in found.items():
        if first.setdefault(name, module) != module:
            raise FormatError(
                f"{where}: {first[name]} and {module} of the adapter both find {name}; expected a "
                "weight for each: the base is another model, perhaps one tower of two"
            )
