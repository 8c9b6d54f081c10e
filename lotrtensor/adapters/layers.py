"""The kind of layer that a two-dimensional weight belongs to: it decides on transposing ΔW."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lotrtensor.adapters.architecture import Architecture, Kind
from lotrtensor.adapters.formats.checkpoint import Checkpoint
from lotrtensor.core.options import check_flag
from lotrtensor.errors import FormatError, OptionError

WEIGHT, BIAS = ".weight", ".bias"

EMBEDDINGS = frozenset(
    {
        *("embed_tokens", "embed_positions", "embed_in", "embedding", "embeddings"),
        *("word_embedding", "word_embeddings", "token_embedding", "tok_embeddings"),
        *("tokens_embed", "positions_embed", "wte", "wpe", "shared"),
        *("position_embedding", "position_embeddings", "token_type_embeddings"),
        *("x_position_embeddings", "y_position_embeddings"),
        *("h_position_embeddings", "w_position_embeddings"),
        *("entity_embeddings", "lang_embeddings", "relative_attention_bias"),
    }
)
"""Last names of modules that are embeddings in every model of transformers that has them; asked
only where the class of the model is not known."""


class Layers:
    """The kinds of a checkpoint's weights, from its class, the user's options, or shapes.

    Parameters
    ----------
    checkpoint : Checkpoint
        The base model, its tensors under today's names.
    architecture : Architecture or None
        Its class, where it is known.
    fan_in_fan_out : bool or str
        Modules whose weight is in × out: a regular expression that occurs in their paths, or True
        for all whose class is not known; False to find out.
    embeddings : str, optional
        Modules that are embeddings, likewise; by default they are known by their names.
    seen : mapping of str to bool
        Modules whose layout is known from elsewhere: whether each is in × out.

    Raises
    ------
    FormatError
        If a pattern is no regular expression.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture | None,
        fan_in_fan_out: bool | str = False,
        embeddings: str | None = None,
        seen: Mapping[str, bool] | None = None,
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._pattern, self._all = None, False
        if isinstance(fan_in_fan_out, str):
            self._pattern = pattern(fan_in_fan_out, "fan_in_fan_out")
        else:
            self._all = check_flag(fan_in_fan_out, "fan_in_fan_out")
        self._embeddings = None if embeddings is None else pattern(embeddings, "embeddings")
        self._evidence = {**_by_bias(checkpoint), **(seen or {})}

    def kind(self, module: str) -> Kind:
        """Return what the weight of a module belongs to.

        Raises
        ------
        FormatError
            If that cannot be known, naming the option that tells; or if the user says otherwise
            than the class.
        """
        known = self.known(module)
        if known is not None:
            return known
        if self._is_embedding(module):
            return "embedding"
        return "conv1d" if self.in_by_out(module) else "linear"

    def known(self, module: str) -> Kind | None:
        """Return what the class of the model says, None where it does not know the module."""
        if self._architecture is None:
            return None
        shape = self._checkpoint.tensors[module + WEIGHT].shape
        kind = self._architecture.kinds.get(module)
        if kind is None or self._architecture.shapes.get(module + WEIGHT) != shape:
            return None
        for asked, said in ((self._pattern, "conv1d"), (self._embeddings, "embedding")):
            if asked is not None and asked.search(module) and kind != said:
                option = "fan_in_fan_out" if said == "conv1d" else "embeddings"
                raise FormatError(
                    f"{option} {asked.pattern!r} matches {module}, which {self._architecture.name} "
                    f"makes {_SPOKEN[kind]}; choose a pattern that leaves it out"
                )
        return kind

    def in_by_out(self, module: str) -> bool:
        """Whether a weight that is no embedding is stored in × out.

        Raises
        ------
        FormatError
            If a pattern says otherwise than the bias, or nothing tells.
        """
        known = self.known(module)
        if known is not None:
            return known == "conv1d"
        shown = self._evidence.get(module)
        said = bool(self._pattern.search(module)) if self._pattern else None
        if shown is not None and said is not None and shown != said:
            raise FormatError(
                f"fan_in_fan_out {self._pattern.pattern if self._pattern else ''!r} says that "
                f"{module} is {_layout(said)}, its shape says {_layout(shown)}; choose another "
                "pattern"
            )
        if shown is not None or said is not None:
            return bool(shown if said is None else said)
        rows, columns = self._checkpoint.tensors[module + WEIGHT].shape
        # transformers' Conv1D always has a bias
        if not self._all and (rows != columns or module + BIAS not in self._checkpoint.tensors):
            return False
        last = module.rpartition(".")[2]
        kin = {turned for m, turned in self._evidence.items() if m.rpartition(".")[2] == last}
        votes = kin if len(kin) == 1 else {self._all, *self._evidence.values()}
        if rows != columns:
            return self._all
        if len(votes) == 1:
            return votes.pop()
        raise FormatError(
            f"{self._checkpoint.place(module + WEIGHT)}: {module} is {rows} × {columns}, which "
            "does not tell whether it is stored out × in or in × out; name the modules that are in "
            "× out with --fan-in-fan-out PATTERN (fan_in_fan_out), '^$' if there are none"
        )

    def _is_embedding(self, module: str) -> bool:
        if self._embeddings is not None:
            return bool(self._embeddings.search(module))
        last = module.rpartition(".")[2]
        if last in EMBEDDINGS:
            return True
        speaks = _SPEAKS.search(last) and module + BIAS not in self._checkpoint.tensors
        if speaks and not self._all and self._pattern is None:
            raise FormatError(
                f"{self._checkpoint.place(module + WEIGHT)}: nothing tells whether {module} is an "
                "embedding or a linear layer; name the embeddings with --embeddings PATTERN "
                "(embeddings), '^$' if there are none"
            )
        return False


_SPEAKS = re.compile(r"(^|_)emb(ed|eds|edding|eddings)?$")
"""The end of a name that speaks of an embedding: ``rel_embeddings``, but not ``embed_out``."""

_SPOKEN: dict[Kind, str] = {
    "linear": "a linear layer, stored out × in",
    "conv1d": "a Conv1D, stored in × out",
    "embedding": "an embedding",
    "other": "a layer of its own kind",
}


def pattern(text: str, option: str) -> re.Pattern[str]:
    """Return a regular expression of the user's.

    Raises
    ------
    OptionError
        If it is no text.
    FormatError
        If it is no regular expression. Both name the option.
    """
    if not isinstance(text, str):
        raise OptionError(f"{option} is {text!r}; expected a regular expression")
    try:
        return re.compile(text)
    except re.error as error:
        raise FormatError(f"{option} {text!r} is no regular expression: {error}") from error


def _layout(turned: bool) -> str:
    return "in × out" if turned else "out × in"


def _by_bias(checkpoint: Checkpoint) -> dict[str, bool]:
    """Modules whose bias tells: it has as many entries as there are outputs."""
    found = {}
    for name, stored in checkpoint.tensors.items():
        module = name.removesuffix(WEIGHT)
        bias = checkpoint.tensors.get(module + BIAS)
        if module == name or bias is None or len(stored.shape) != 2 or len(bias.shape) != 1:
            continue
        rows, columns = stored.shape
        if rows != columns and bias.shape[0] in (rows, columns):
            found[module] = bias.shape[0] == columns
    return found
