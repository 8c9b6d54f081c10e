"""What an analysis consists of: frozen rows."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from lotrtensor.core.rates import RatePoint


class Kind(StrEnum):
    """Ways to store an adapter; what people call them is the `Choice.representation`.

    Examples
    --------
    >>> from lotrtensor.analysis import Kind
    >>> [kind.value for kind in Kind if not kind.shares_factors]
    ['lora-best-ranks', 'lora-one-rank']
    """

    LOTR_BY_TYPE = "lotr-by-type"
    LOTR_BY_SHAPE = "lotr-by-shape"
    LOTR_CLUSTERED = "lotr-clustered"
    LORA_BEST_RANKS = "lora-best-ranks"
    LORA_ONE_RANK = "lora-one-rank"

    @property
    def shares_factors(self) -> bool:
        """Whether it is a LoTR."""
        return self not in (Kind.LORA_BEST_RANKS, Kind.LORA_ONE_RANK)


class Choice(NamedTuple):
    """One representation at one size.

    ``kind`` tells which one it is, ``representation`` what people call it. ``budget`` is the share
    of the adapter's bytes allowed, ``bytes`` what is stored, ``relative_error`` a relative
    Frobenius error; ``lower_bound`` is None for truncated LoRA, whose error is the smallest of its
    ranks. ``measured`` tells a converted adapter, refined and rounded to its storage type, from the
    curves' truncated HOSVD, which converting does not exceed but for that rounding.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 3, 12, 2))
    >>> modules = [lt.LoraModule(f"layers.{k}.query", b, a.T) for k, (b, a) in enumerate(zip(B, A))]
    >>> analysis = lt.analyze(lt.LoraAdapter(tuple(modules), {}, np.dtype("float32")), shares=(50,))
    >>> analysis.choices[0].representation, analysis.choices[0].budget
    ('LoTR by type', 0.5)
    """

    kind: Kind
    representation: str
    budget: float
    parameters: int
    bytes: int
    relative_error: float
    lower_bound: float | None
    measured: bool = False


class CurvePoint(NamedTuple):
    """Stored numbers, relative Frobenius error of the HOSVD, and what no fit goes below."""

    parameters: int
    relative_error: float
    lower_bound: float | None


class Target(NamedTuple):
    """The smallest size at which a representation comes within ``tolerance``; None: at no size."""

    representation: str
    tolerance: float
    point: CurvePoint | None


class Curve(NamedTuple):
    """Size against error of one representation of the whole adapter, by rising size."""

    representation: str
    points: tuple[CurvePoint, ...]


class GroupPoint(NamedTuple):
    """One group at one size: ranks, stored numbers, error, bound, and the error of each slice."""

    p: int
    q: int
    parameters: int
    relative_error: float
    lower_bound: float
    slice_errors: np.ndarray


class AdapterPoint(NamedTuple):
    """All groups at one size, in their order."""

    parameters: int
    relative_error: float
    lower_bound: float
    groups: tuple[GroupPoint, ...]


class Step(NamedTuple):
    """LoTR by type at one rank, and the same size shared out by energy.

    ``alternatives`` holds the other representations' errors at that size, those that get there.
    """

    rank: int
    one_rank: AdapterPoint
    shared: AdapterPoint
    alternatives: dict[str, float]


class ModuleRow(NamedTuple):
    """One module: where it stands, ‖ΔW‖, LoRA rank, and how many directions hold most of it."""

    name: str
    layer: str
    norm: float
    lora_rank: int
    directions: int


class GroupAnalysis(NamedTuple):
    """One group of modules that would share factors.

    ``rates`` is the efficient frontier, thinned out; ``left_values`` and ``right_values`` are the
    singular values of the two unfoldings; ``left_overlap`` and ``right_overlap`` (K × K) tell how
    far the leading column and row spaces of two layers agree, ``chance`` (left, right) what
    unrelated spaces of those dimensions would show on average.
    """

    name: str
    shape: tuple[int, int]
    modules: tuple[ModuleRow, ...]
    parameters: int
    norm: float
    rates: tuple[RatePoint, ...]
    left_values: np.ndarray
    right_values: np.ndarray
    left_overlap: np.ndarray
    right_overlap: np.ndarray
    chance: tuple[float, float]


class Analysis(NamedTuple):
    """All choices of one adapter, what they are made of, and one sentence that names the best.

    ``left_overlap`` and ``right_overlap`` (groups × groups) are means over the layers that both
    groups have; NaN where the sides are unlike.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 3, 12, 2))
    >>> modules = [lt.LoraModule(f"layers.{k}.query", b, a.T) for k, (b, a) in enumerate(zip(B, A))]
    >>> analysis = lt.analyze(lt.LoraAdapter(tuple(modules), {}, np.dtype("float32")), shares=(50,))
    >>> analysis.source_bytes, len(analysis.groups[0].modules)
    (576, 3)
    """

    source_parameters: int
    source_bytes: int
    itemsize: int
    choices: tuple[Choice, ...]
    recommendation: str
    recommended: Choice | None
    targets: tuple[Target, ...]
    curves: tuple[Curve, ...]
    steps: tuple[Step, ...]
    groups: tuple[GroupAnalysis, ...]
    left_overlap: np.ndarray
    right_overlap: np.ndarray


class Similarity(NamedTuple):
    """How alike several adapters are.

    ``cosine`` (A × A) is ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖) over all modules, ``by_kind`` the same a kind of
    module; NaN where two have no module of one shape in common. ``shared`` counts those.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> found = lt.similarity([adapter])
    >>> found.cosine.round(6).tolist(), found.shared.tolist(), len(found.by_kind)
    ([[1.0]], [[36]], 6)
    """

    cosine: np.ndarray
    by_kind: dict[str, np.ndarray]
    shared: np.ndarray
