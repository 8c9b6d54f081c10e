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
    >>> [kind.value for kind in Kind if kind.family == "truncated LoRA"]
    ['lora-best-ranks', 'lora-one-rank']
    """

    COMPRESSED = "compressed"
    TERMS_IN_BITS = "terms-in-bits"
    SHARED_IN_BITS = "shared-in-bits"
    LOTR_BY_TYPE = "lotr-by-type"
    LOTR_BY_SHAPE = "lotr-by-shape"
    LOTR_CLUSTERED = "lotr-clustered"
    LORA_BEST_RANKS = "lora-best-ranks"
    LORA_ONE_RANK = "lora-one-rank"

    @property
    def family(self) -> str:
        """What it is one of: an adapter in bits, a LoTR, or a truncated LoRA."""
        if self in (Kind.LORA_BEST_RANKS, Kind.LORA_ONE_RANK):
            return "truncated LoRA"
        in_bits = self in (Kind.COMPRESSED, Kind.TERMS_IN_BITS, Kind.SHARED_IN_BITS)
        return "bits" if in_bits else "LoTR"


class Choice(NamedTuple):
    """One representation at one size.

    ``kind`` tells which one it is, ``representation`` what people call it. ``budget`` is the share
    of the adapter's bytes allowed, ``bytes`` what is stored, ``relative_error`` a relative
    Frobenius error; ``lower_bound`` is None where the form has none beside its error.
    ``parameters`` is None for forms in bits. ``measured`` tells an adapter that was really made
    from the curves: truncated HOSVDs, which converting does not exceed but for rounding, and
    predictions of bits, which are within 5 %.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> B, A = np.random.default_rng(0).normal(size=(2, 3, 12, 2))
    >>> modules = [lt.LoraModule(f"layers.{k}.query", b, a.T) for k, (b, a) in enumerate(zip(B, A))]
    >>> analysis = lt.analyze(lt.LoraAdapter(tuple(modules), {}, np.dtype("float32")), shares=(50,))
    >>> analysis.choices[0].representation, analysis.choices[0].budget
    ('compressed', 0.5)
    """

    kind: Kind
    representation: str
    budget: float
    bytes: int
    relative_error: float
    lower_bound: float | None
    parameters: int | None
    measured: bool = False


class CurvePoint(NamedTuple):
    """Stored bytes, relative Frobenius error, what no fit goes below, and stored numbers."""

    bytes: int
    relative_error: float
    lower_bound: float | None = None
    parameters: int | None = None


class Target(NamedTuple):
    """The smallest size at which a representation comes within ``tolerance``; None: at no size."""

    kind: Kind
    representation: str
    tolerance: float
    point: CurvePoint | None


class Curve(NamedTuple):
    """Size against error of one representation of the whole adapter, by rising size."""

    kind: Kind
    representation: str
    points: tuple[CurvePoint, ...]


class GroupPoint(NamedTuple):
    """One group at one size: shared ranks, private terms, bytes, error, error of each slice.

    Ranks are (0, 0) where nothing is shared; ``lower_bound`` is None in bits.
    """

    p: int
    q: int
    terms: int
    bytes: int
    relative_error: float
    lower_bound: float | None
    slice_errors: np.ndarray


class AdapterPoint(NamedTuple):
    """All groups at one size, in their order."""

    bytes: int
    relative_error: float
    lower_bound: float | None
    groups: tuple[GroupPoint, ...]


class Step(NamedTuple):
    """One stop of the slider: a size in bytes, and what fits in it.

    ``compressed`` is the adapter in bits, ``lotr`` LoTR by type with its ranks shared out by
    energy; None where the form needs more. ``alternatives`` holds the errors of all
    representations that get there.
    """

    bytes: int
    compressed: AdapterPoint | None
    lotr: AdapterPoint | None
    alternatives: dict[Kind, float]


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
    singular values of the two unfoldings; ``left_overlap`` and ``right_overlap`` tell how far the
    leading column and row spaces of every two of the modules numbered ``compared`` agree,
    ``chance`` (left, right) what unrelated spaces of those dimensions would show on average. All
    modules are compared up to 128, and so many, evenly spaced, where there are more.
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
    compared: tuple[int, ...] = ()


class Analysis(NamedTuple):
    """All choices of one adapter, what they are made of, and one sentence that names the best.

    ``left_overlap`` and ``right_overlap`` are means over the layers that two groups both have, of
    every two of the groups numbered ``compared``; NaN where the sides are unlike. All groups are
    compared up to 128, as the modules of a group are.

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
    compared: tuple[int, ...] = ()


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


class CollectionRow(NamedTuple):
    """An adapter of a collection.

    ``norm`` is √Σ ‖ΔW‖² over its modules, ``nearest`` the adapter of the largest cosine, which
    is ``cosine``, both None where there is no other; ``cluster`` the number of its cluster, and
    ``outlier`` whether that has no other member.

    Examples
    --------
    >>> from lotrtensor.analysis import CollectionRow
    >>> CollectionRow("a", 2.0, "b", 0.9, 1, False).nearest
    'b'
    """

    name: str
    norm: float
    nearest: str | None
    cosine: float | None
    cluster: int
    outlier: bool


class Duplicate(NamedTuple):
    """Two adapters that are the same: names, and ‖ΔW − ΔW'‖ over the larger norm.

    Differences of squares: a distance below 1e-7 is as good as none.

    Examples
    --------
    >>> from lotrtensor.analysis import Duplicate
    >>> Duplicate("a", "b", 0.0).distance
    0.0
    """

    first: str
    second: str
    distance: float


class Collection(NamedTuple):
    """How the adapters of a collection are related.

    ``cosine`` (A × A) is ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖) over all modules, in the order of ``names``.

    Examples
    --------
    >>> from importlib.resources import files
    >>> import lotrtensor as lt
    >>> adapter = lt.load(files("lotrtensor") / "data" / "amazon-sentiment")
    >>> found = lt.analyze_collection({"a": adapter})
    >>> found.names, found.cosine.round(6).tolist(), found.rows[0].outlier
    (('a',), [[1.0]], False)
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    rows: tuple[CollectionRow, ...]
    duplicates: tuple[Duplicate, ...]
