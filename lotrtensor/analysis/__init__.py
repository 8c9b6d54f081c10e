"""What every representation of an adapter costs and keeps; what its modules have in common."""

from lotrtensor.analysis._analyze import analyze
from lotrtensor.analysis._similarity import similarity
from lotrtensor.analysis.rows import Analysis, Choice, Kind, Similarity

__all__ = ["Analysis", "Choice", "Kind", "Similarity", "analyze", "similarity"]
