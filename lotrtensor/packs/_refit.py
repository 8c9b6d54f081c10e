"""refit: the bases of a pack anew, for the adapters that it holds by now."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace

from lotrtensor.core.ranks.goal import make_goal
from lotrtensor.errors import FormatError, OptionError, RankError
from lotrtensor.packs._pack import build_in_place
from lotrtensor.packs.building import Request
from lotrtensor.packs.executors import running
from lotrtensor.packs.files import locked, publish, read_index
from lotrtensor.packs.pack import Pack
from lotrtensor.packs.reading import Packed
from lotrtensor.packs.spool import Source
from lotrtensor.verbs._fit_groups import Progress


def refit(
    pack: Pack,
    originals: Mapping[str, Source] | None = None,
    *,
    tolerance: float | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Fit the bases of a pack anew to all adapters that it holds, and code every adapter on them.

    After many were added that the bases were not made for. The old pack stays readable until the
    new one is complete.

    Parameters
    ----------
    pack : Pack
        The pack.
    originals : mapping of str to path or adapter, optional
        Originals of adapters, by their names. One whose original is not given is taken as the pack
        holds it, and loses a second time: its error is then stated as e + e' (1 + e), which the
        true one does not exceed, e being the one before and e' that of the refit.
    tolerance : float, optional
        Relative error that no adapter exceeds, against what it is taken from; that of the pack if
        not given.
    executor : concurrent.futures.Executor, optional
        As for `pack`.
    progress : callable, optional
        As for `pack`.

    Returns
    -------
    Pack
        The new pack.

    Raises
    ------
    FormatError
        If an original has no name of the pack, cannot be read, or another process writes.
    OptionError
        If an argument is of another kind.
    RankError
        If the pack was made for a size, so that it has no tolerance, and none is given.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(64, 4)), rng.normal(size=(4, 64))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(64, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("layers.0.q", own, A),), {}, np.dtype("float32"))
    >>> family = {f"user-{i}": tuned(0.1) for i in range(6)}
    >>> packed = lt.pack(family, tempfile.mkdtemp() + "/pack", tolerance=0.15)
    >>> lt.refit(packed, family).names == packed.names
    True
    """
    if not isinstance(pack, Pack):
        raise OptionError(f"pack is a {type(pack).__name__}; expected a Pack of a directory")
    if originals is not None and not isinstance(originals, Mapping):
        raise OptionError(
            f"originals is a {type(originals).__name__}; expected adapters by their names"
        )
    given, before = dict(originals or {}), read_index(pack.path)
    unknown = next((name for name in given if name not in before.adapters), None)
    if unknown is not None:
        raise FormatError(f"{pack.path} has no adapter {unknown!r}, whose original is given")
    goal = before.goal.get("tolerance") if tolerance is None else tolerance
    if goal is None:
        raise RankError(
            f"{pack.path} was made for a size; give the tolerance of the new one, or pack the "
            "originals again"
        )
    make_goal(None, goal, None, None)
    names = tuple(before.adapters)
    if not names:
        raise FormatError(f"{pack.path} holds no adapter; expected at least one")
    sources = tuple(given.get(name, Packed(str(pack.path.resolve()), name)) for name in names)
    clusters = len({cell.cluster for cell in pack.cells}) or 1
    with running(executor) as used:
        request = Request(
            names, sources, goal, None, None, clusters, before.share, used, progress=progress
        )
        made = build_in_place(pack.path, request)
    twice = {name: before.adapters[name].relative_error for name in names if name not in given}
    if twice:
        _state_both(made, twice)
    return Pack(pack.path, made.bounds)


def _state_both(pack: Pack, twice: Mapping[str, float]) -> None:
    with locked(pack.path):
        index = read_index(pack.path)
        entries = dict(index.adapters)
        for name, error in twice.items():
            own = entries[name].relative_error
            entries[name] = replace(entries[name], relative_error=error + own * (1.0 + error))
        publish(pack.path, replace(index, adapters=entries))
