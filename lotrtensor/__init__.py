"""LoTR: weight updates of many layers as U · G_k · Vᵀ with U and V shared (arXiv 2402.01376).

The base package needs NumPy and SciPy only; it imports no deep-learning framework.
"""

import lotrtensor.interrupts  # noqa: F401 - before all that takes time to import

# isort: split
from importlib.metadata import version

from lotrtensor.adapters.compressed import CompressedAdapter, CompressedSummary
from lotrtensor.adapters.compressed_group import Alternative, CompressedGroup, SourceRecord
from lotrtensor.adapters.loading import load
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.adapters.lotr import GroupSummary, LotrAdapter
from lotrtensor.adapters.modules import FactoredCore, FitRecord, LoraModule, LotrGroup
from lotrtensor.adapters.parts import GroupParts
from lotrtensor.analysis import Analysis, Choice, Similarity, analyze, similarity
from lotrtensor.core.clusters import Clustering, cluster
from lotrtensor.core.fit.certificate import Tucker2Fit
from lotrtensor.core.fit.tucker2_fit import tucker2
from lotrtensor.core.operands import as_stack
from lotrtensor.core.rates import RatePoint, rate_distortion
from lotrtensor.core.similarity import (
    cosine_similarity,
    inner,
    norm,
    principal_angles,
    subspace_overlap,
)
from lotrtensor.core.stacks.dense import DenseStack, LazyStack
from lotrtensor.core.stacks.low_rank import LowRankStack
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import (
    DataError,
    FormatError,
    LotrError,
    LotrWarning,
    MissingPackageError,
    OptionError,
    RankError,
    ShapeError,
    UnsupportedAdapterError,
)
from lotrtensor.packs._pack import pack
from lotrtensor.packs._refit import refit
from lotrtensor.packs.members import Cell, Member
from lotrtensor.packs.pack import Pack, PackRow, VerifiedRow
from lotrtensor.packs.serving import ServePlan
from lotrtensor.verbs._compare import Difference, ModuleDifference, compare
from lotrtensor.verbs._compress import compress
from lotrtensor.verbs._convert import convert
from lotrtensor.verbs._extract import extract, extraction_error
from lotrtensor.verbs._merge import merge
from lotrtensor.verbs._shared_outer import shared_outer
from lotrtensor.verbs._truncate import truncate

__version__ = version("lotrtensor")

__all__ = [
    "Alternative",
    "Analysis",
    "Cell",
    "Choice",
    "Clustering",
    "CompressedAdapter",
    "CompressedGroup",
    "CompressedSummary",
    "DataError",
    "DenseStack",
    "Difference",
    "FactoredCore",
    "FitRecord",
    "FormatError",
    "GroupParts",
    "GroupSummary",
    "LazyStack",
    "LoraAdapter",
    "LoraModule",
    "LotrAdapter",
    "LotrError",
    "LotrGroup",
    "LotrWarning",
    "LowRankStack",
    "Member",
    "MissingPackageError",
    "ModuleDifference",
    "OptionError",
    "Pack",
    "PackRow",
    "RankError",
    "RatePoint",
    "ServePlan",
    "ShapeError",
    "Similarity",
    "SliceStack",
    "SourceRecord",
    "Tucker2",
    "Tucker2Fit",
    "UnsupportedAdapterError",
    "VerifiedRow",
    "analyze",
    "as_stack",
    "cluster",
    "compare",
    "compress",
    "convert",
    "cosine_similarity",
    "extract",
    "extraction_error",
    "inner",
    "load",
    "merge",
    "norm",
    "pack",
    "principal_angles",
    "rate_distortion",
    "refit",
    "shared_outer",
    "similarity",
    "subspace_overlap",
    "truncate",
    "tucker2",
]
