"""What every representation of an adapter costs and keeps; what its modules have in common."""

from lotrtensor.analyze.rows import Analysis, Choice, Similarity
from lotrtensor.analyze.similarity import similarity
from lotrtensor.analyze.verb import analyze

__all__ = ["Analysis", "Choice", "Similarity", "analyze", "similarity"]
