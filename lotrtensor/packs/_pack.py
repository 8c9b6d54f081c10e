"""pack: many adapters of one base model into one pack."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from lotrtensor.adapters.formats.directory import SINGLE_FILE, expand
from lotrtensor.adapters.hub import is_remote
from lotrtensor.adapters.sizes import budget_bytes
from lotrtensor.core.options import check_flag, check_integer, is_count, shown
from lotrtensor.core.ranks.goal import make_goal
from lotrtensor.errors import FormatError, LotrError, OptionError, RankError
from lotrtensor.packs.building import SHARES, Request, build
from lotrtensor.packs.executors import running
from lotrtensor.packs.files import (
    BUILD,
    LOCK,
    Index,
    clear_build,
    is_pack,
    locked,
    plain_names,
    publish,
    read_index,
    sweep,
)
from lotrtensor.packs.pack import Pack
from lotrtensor.packs.spool import Source
from lotrtensor.verbs._fit_groups import Progress


def pack(
    adapters: Mapping[str, Source] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    tolerance: float | None = None,
    budget: int | str | None = None,
    rank: int | None = None,
    clusters: int = 1,
    share: str = "auto",
    executor: Executor | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Pack:
    """Pack adapters of one base model: what they share once, what is their own in bits.

    ΔW = U (w Ḡ + G) Vᵀ + P Qᵀ for every module of every adapter. U, V and the mean core Ḡ are
    stored once; the core G and the private terms P Qᵀ are the adapter's own. Exactly one of
    ``tolerance``, ``budget`` and ``rank`` says how far.

    Parameters
    ----------
    adapters : mapping of str to path or adapter, or sequence of paths
        The adapters by name; paths alone are named by their last part. Ranks, scales, modules
        and types may differ.
    path : path-like
        The directory of the pack.
    tolerance : float, optional
        Relative Frobenius error, in (0, 1), that no adapter exceeds.
    budget : int or str, optional
        Bytes of all files, tensors carried along not counted: a number, ``"8MB"``, or a share of
        the adapters' bytes together, ``"5%"``.
    rank : int, optional
        Ranks p = q of every basis. Adapters then are cores alone, nothing is private: what ranks
        leave is their error, and the grid adds 1 % to it. ``share`` is ``"adapters"`` or ``"both"``
        with it, and ``"auto"`` the former.
    clusters : int
        Clusters of adapters, at most, that share bases of their own, by average linkage of their
        cosines (`lotrtensor.analyze_collection` tells how many there are).
    share : str
        ``"adapters"``: every module shares a basis over all adapters; ``"both"``: over the layers
        too; ``"layers"``: only the layers of each adapter share, as in `compress`; ``"none"``:
        nothing is shared; ``"auto"``: what takes the fewest bytes, kind by kind of modules and
        adapter by adapter.
    executor : concurrent.futures.Executor, optional
        Runs the pieces of work, a cell or an adapter each: threads if not given, processes, or
        those of Dask (``client.get_executor()``) or MPI, where all see the directory.
    skip_bad : bool
        Leave out adapters that cannot be read, with a warning, instead of refusing all.
    force : bool
        Replace a pack that stands there; it stays readable until the new one is complete.
    progress : callable, optional
        Told of every piece of work.

    Returns
    -------
    Pack
        The pack. Its ``rows`` say what every adapter kept, beside the mean of all alone.

    Raises
    ------
    FormatError
        If an adapter cannot be read, two have one name or unlike shapes, or the output exists.
    RankError
        If not exactly one goal is given, or it is out of reach.
    OptionError
        If ``share`` is unknown, or means nothing with a rank or with clusters.

    Notes
    -----
    Every adapter weighs the same, whatever its norm. With ``share="auto"`` every adapter is also
    compressed by itself, and is kept so where its part of the pack would be larger; where all
    that is gained is less than the bases take, nothing is shared. Memory is that of one cell,
    a module over all adapters or over some hundred of them, and of one adapter, for each worker. A
    build that was stopped goes on when the same call is made again.

    Examples
    --------
    >>> import tempfile, numpy as np, lotrtensor as lt
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(64, 4)), rng.normal(size=(4, 64))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(64, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("layers.0.q", own, A),), {}, np.dtype("float32"))
    >>> family = {f"user-{i}": tuned(0.1) for i in range(8)}
    >>> packed = lt.pack(family, tempfile.mkdtemp() + "/pack", tolerance=0.15)
    >>> alone = sum(lt.compress(a, tolerance=0.15).file_bytes for a in family.values())
    >>> packed.bytes < alone, max(row.relative_error for row in packed.rows) <= 0.15
    (True, True)
    """
    if not isinstance(share, str) or share not in SHARES:
        raise OptionError(f"share is {share!r}; expected one of {', '.join(SHARES)}")
    force, skip_bad = check_flag(force, "force"), check_flag(skip_bad, "skip_bad")
    named = name_adapters(adapters)
    target = expand(path)
    given = None if budget is None else budget_bytes(budget, 2**40)
    make_goal(rank, tolerance, None, given, size="budget")
    check_integer(clusters, "clusters", 1)
    if clusters > 1 and share in ("none", "layers"):
        raise OptionError(f"share is {share!r}, so that clusters share nothing; leave them out")
    if rank is not None:
        if not is_count(rank):
            raise RankError(f"rank is {shown(rank)}; expected an integer of at least 1")
        if share not in ("auto", "adapters", "both"):
            raise OptionError(f"share is {share!r}; expected adapters or both beside a rank")
        share = "both" if share == "both" else "adapters"
    check_pack_output(target, force=force)
    with running(executor) as used:
        request = Request(
            names=tuple(named),
            sources=tuple(named.values()),
            tolerance=tolerance,
            budget=budget,
            rank=rank,
            clusters=clusters,
            share=share,
            executor=used,
            skip_bad=skip_bad,
            progress=progress,
        )
        return build_in_place(target, request)


def name_adapters(
    adapters: Mapping[str, Source] | Sequence[str | os.PathLike[str]],
) -> dict[str, Source]:
    """Return adapters by name; a path alone has the name of its last part.

    Raises
    ------
    FormatError
        If there are none, or two have one name.
    OptionError
        If they are neither a mapping nor a sequence of paths.
    """
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    elif isinstance(adapters, Sequence) and not isinstance(adapters, str):
        pairs = [(_name(path), path) for path in adapters]
    else:
        raise OptionError(
            f"adapters is a {type(adapters).__name__}; expected paths, or adapters by name"
        )
    if not pairs:
        raise FormatError("there are no adapters to pack; expected at least one")
    plain_names([name for name, _ in pairs])
    return dict(pairs)


def _name(path: str | os.PathLike[str]) -> str:
    if not isinstance(path, str | os.PathLike):
        raise OptionError(
            f"an adapter is given as a {type(path).__name__}; expected a path, or a mapping that "
            "gives it a name"
        )
    last = str(path).rstrip("/").rpartition("/")[2] if is_remote(path) else expand(path).name
    return last.removesuffix(SINGLE_FILE)


def check_pack_output(path: Path, *, force: bool) -> None:
    """Refuse an output that stands, unless it is a pack and ``force`` is given, or unfinished.

    Raises
    ------
    FormatError
        Saying what stands there.
    """
    try:
        names = {p.name for p in path.iterdir()} - {LOCK} if path.exists() else set()
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    if is_pack(path):
        if not force:
            raise FormatError(
                f"{path} exists; choose another output, add --force to replace it, or lotr add to "
                "it"
            )
    elif names and BUILD not in names:
        raise FormatError(f"{path} exists and is no pack; it is not replaced")


def build_in_place(path: Path, request: Request) -> Pack:
    """Build a pack, where another may stand until it is complete; see `pack`."""
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    before = None
    try:
        with locked(path):
            before = read_index(path) if is_pack(path) else None
            sweep(path, before)
            index = build(path, request, before or Index())
            publish(path, index)
            clear_build(path)
    except LotrError:
        if made and not (path / BUILD).exists():  # nothing is left behind but what goes on
            sweep(path, before)
            (path / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    return Pack(path, index.bounds)
