"""Remove the names that wrappers such as FSDP put into module paths.

A compiled, distributed or checkpointed model is the same model in a wrapper, and a file saved from
inside one names modules that the plain model does not have: loaded there, it does nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.errors import FormatError, LotrWarning

# Private names, at any place of a path: torch.compile, FSDP (1 and older), activation
# checkpointing, Lightning, Opacus.
_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_module"),
}
# What DDP, DataParallel and DeepSpeed call the model inside, which a model may call a part too:
# it is taken for a wrapper only where it is around everything.
_MODULE = "module"


def unwrapped(keys: Iterable[str], where: object) -> dict[str, str]:
    """Return the key that every tensor of a file has in the plain model, with PEFT's prefix.

    Parameters
    ----------
    keys : iterable of str
        Keys of the file, with or without ``base_model.model.``.
    where : object
        The file, named in messages.

    Returns
    -------
    dict of str to str
        The plain key of every key.

    Raises
    ------
    FormatError
        If two keys would become one.

    Warns
    -----
    LotrWarning
        Once, naming what was left out; and where a part is called ``module`` further inside, which
        is kept, because it may be the model's own.
    """
    keys = list(keys)
    plain = {key: PREFIX + path for key, path in _plain_paths(keys, peft=True).items()}
    _check_distinct(plain, where)
    changed = [key for key in keys if plain[key] not in (key, PREFIX + key)]
    if changed:
        _warn(changed[0], plain[changed[0]], len(changed), where)
    _warn_of_modules_inside(plain.values(), where)
    return plain


def unwrapped_names(
    keys: Iterable[str], where: object, part_of: Callable[[str], str | None] = lambda _: None
) -> dict[str, str]:
    """Return the key of every tensor without what wrappers put into it.

    As `unwrapped`, but for names that have no prefix of PEFT's, or keep it. ``part_of`` tells the
    part of a pipeline that a key begins with: each may have a wrapper of its own.
    """
    keys = list(keys)
    plain = _plain_paths(keys, peft=False)
    for part in {part_of(path) for path in plain.values()} - {None}:
        start = f"{part}."
        own = {k: p.removeprefix(start) for k, p in plain.items() if part_of(p) == part}
        inner = _plain_paths(list(own.values()), peft=False)
        plain |= {key: start + inner[path] for key, path in own.items()}
    _check_distinct(plain, where)
    changed = [key for key in keys if plain[key] != key]
    if changed:
        _warn(changed[0], plain[changed[0]], len(changed), where)
    return plain


def without_wrappers(value: Any) -> Any:
    """Return a field of a config, names of modules, without the private names of wrappers."""
    if isinstance(value, str):
        return ".".join(part for part in value.split(".") if part not in _WRAPPERS)
    if isinstance(value, list):
        return [without_wrappers(item) for item in value]
    return value


def matched_names(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Return for every name the one of ``own`` that differs by private names of wrappers alone.

    Parameters
    ----------
    names : iterable of str
        Names of a file, or of a model in a wrapper.
    own : collection of str
        Names that there are: of a compiled model with the wrapper's, say.

    Returns
    -------
    dict of str to str
        The name of ``own`` for every name, which is kept where there is none, or itself.

    Examples
    --------
    >>> matched_names(["layers.0._orig_mod.q", "other"], ["layers.0.q", "layers.1.q"])
    {'layers.0._orig_mod.q': 'layers.0.q', 'other': 'other'}
    """
    names = list(names)
    if all(name in own for name in names):
        return {name: name for name in names}
    plain = {without_wrappers(name): name for name in own}
    return {n: n if n in own else plain.get(without_wrappers(n), n) for n in names}


def _plain_paths(keys: list[str], *, peft: bool) -> dict[str, str]:
    """Take private names off everywhere, and around everything what else a wrapper adds."""
    paths = {key: without_wrappers(key) for key in keys}
    if peft:
        # PEFT's prefix is the root: what is in front of it, in every key, is around PEFT's model.
        heads = {path.partition(PREFIX)[0] if PREFIX in path else None for path in paths.values()}
        if len(heads) == 1 and None not in heads:
            paths = {key: path.removeprefix(*heads) for key, path in paths.items()}
        paths = {key: _BEFORE_PREFIX.sub("", path) for key, path in paths.items()}
    around = (PREFIX, f"{_MODULE}.") if peft else (f"{_MODULE}.",)
    while found := [p for p in around if paths and all(x.startswith(p) for x in paths.values())]:
        paths = {key: path.removeprefix(found[0]) for key, path in paths.items()}
    return paths


_BEFORE_PREFIX = re.compile(rf"^({_MODULE}\.)*{re.escape(PREFIX)}")


def _check_distinct(plain: dict[str, str], where: object) -> None:
    owners: dict[str, str] = {}
    for key, path in plain.items():
        if path in owners:
            raise FormatError(
                f"{where}: {owners[path]} and {key} are the same tensor, {path}; expected one"
            )
        owners[path] = key


def _warn(key: str, plain: str, count: int, where: object) -> None:
    warnings.warn(
        f"{where}: {count} keys have names of wrappers around the model in them and are read "
        f"without: {key} as {plain}",
        LotrWarning,
        stacklevel=4,
    )


def _warn_of_modules_inside(keys: Iterable[str], where: object) -> None:
    inside = [key for key in keys if _MODULE in key.split(".")]
    if inside:
        warnings.warn(
            f"{where}: {inside[0]} has a part called {_MODULE}, which is kept; if it is not the "
            "model's own but a wrapper's, the plain model has no such layer: take it off the keys",
            LotrWarning,
            stacklevel=3,
        )
