"""What every representation of an adapter costs and keeps; what its modules have in common."""

from lotrtensor.analysis._analyze import analyze
from lotrtensor.analysis._collection import analyze_collection
from lotrtensor.analysis._similarity import similarity
from lotrtensor.analysis.rows import (
    AdapterPoint,
    Analysis,
    Choice,
    Collection,
    CollectionRow,
    Curve,
    CurvePoint,
    Duplicate,
    GroupAnalysis,
    GroupPoint,
    Kind,
    ModuleRow,
    Similarity,
    Step,
    Target,
)

__all__ = [
    "AdapterPoint",
    "Analysis",
    "Choice",
    "Collection",
    "CollectionRow",
    "Curve",
    "CurvePoint",
    "Duplicate",
    "GroupAnalysis",
    "GroupPoint",
    "Kind",
    "ModuleRow",
    "Similarity",
    "Step",
    "Target",
    "analyze",
    "analyze_collection",
    "similarity",
]
