"""What every representation of an adapter costs and keeps; what its modules have in common."""

from lotrtensor.analysis._analyze import analyze
from lotrtensor.analysis._similarity import similarity
from lotrtensor.analysis.rows import (
    AdapterPoint,
    Analysis,
    Choice,
    Curve,
    CurvePoint,
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
    "Curve",
    "CurvePoint",
    "GroupAnalysis",
    "GroupPoint",
    "Kind",
    "ModuleRow",
    "Similarity",
    "Step",
    "Target",
    "analyze",
    "similarity",
]
