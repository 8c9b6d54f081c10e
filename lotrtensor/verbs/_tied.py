"""Tied weights: an update for one module would change the others that share its weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lotrtensor.adapters.architecture import Architecture
from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.errors import FormatError
from lotrtensor.verbs._changes import Change

_WAY_OUT = (
    "load the base, set tie_word_embeddings to false, give the other module a copy of the weight "
    "and save it; or use the adapter without merging"
)


def check_tied(
    source: Checkpoint, architecture: Architecture | None, changes: Mapping[str, Change]
) -> None:
    """Refuse a change of a shared weight that is not the same for all that share it.

    Parameters
    ----------
    source : Checkpoint
        The base; a tied weight under each of its names.
    architecture : Architecture or None
        Its class, which says what is tied.
    changes : mapping of str to Change
        What is to be written.

    Raises
    ------
    FormatError
        Naming both modules.
    """
    if architecture is None:
        _check_vocabulary(source, changes)
        return
    for name, change in changes.items():
        for other in sorted(architecture.ties.get(name, frozenset()) - {name}):
            if other not in source.tensors or not _shared(source, name, other):
                continue
            if other not in changes:
                raise FormatError(
                    f"{source.directory}: {name} is also {other}, which the adapter leaves as it "
                    f"is and merging would move; {_WAY_OUT}"
                )
            if not change.equals(changes[other]):
                raise FormatError(
                    f"{source.directory}: {name} is also {other}, and the adapter has another "
                    f"update for each; {_WAY_OUT}"
                )


def _shared(source: Checkpoint, name: str, other: str) -> bool:
    """Whether two names mean one weight: stored once, or twice with equal numbers."""
    if source.tensors[name] == source.tensors[other]:
        return True
    return bool(np.array_equal(source.read(name), source.read(other)))


def _check_vocabulary(source: Checkpoint, changes: Mapping[str, Change]) -> None:
    """Refuse to change word embeddings that the config ties, where the class cannot be asked.

    A config that names a class and says nothing means tied: transformers' default.
    """
    config = source.config
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is None:
        tied = "architectures" in config
    size = config.get("vocab_size", text.get("vocab_size"))
    for name in changes:
        if tied and size is not None and source.tensors[name].shape[:1] == (size,):
            raise FormatError(
                f"{source.directory}: {name} has a row for every token, and its config ties such "
                "weights to others, which merging would move too; install transformers, which "
                f"tells which they are, or {_WAY_OUT}"
            )
