"""LoTR: weight updates of many layers as U · G_k · Vᵀ with U and V shared (arXiv 2402.01376).

The base package needs NumPy and SciPy only; it imports no deep-learning framework.
"""

from importlib.metadata import version

from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import LotrAdapter
from lotrtensor.convert import compare, convert
from lotrtensor.core.dense import DenseStack, LazyStack
from lotrtensor.core.fit import tucker2
from lotrtensor.core.problem import Tucker2Fit
from lotrtensor.core.stacks import LowRankStack, SliceStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import (
    DataError,
    FormatError,
    LotrError,
    LotrWarning,
    RankError,
    ShapeError,
    UnsupportedAdapterError,
)

__version__ = version("lotrtensor")

__all__ = [
    "DataError",
    "DenseStack",
    "FormatError",
    "LazyStack",
    "LoraAdapter",
    "LotrAdapter",
    "LotrError",
    "LotrWarning",
    "LowRankStack",
    "RankError",
    "ShapeError",
    "SliceStack",
    "Tucker2",
    "Tucker2Fit",
    "UnsupportedAdapterError",
    "compare",
    "convert",
    "load",
    "tucker2",
]
