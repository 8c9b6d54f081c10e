"""LoTR: weight updates of many layers as U · G_k · Vᵀ with U and V shared (arXiv 2402.01376).

The base package needs NumPy and SciPy only; it imports no deep-learning framework.
"""

import lotrtensor.interrupts  # noqa: F401 - before all that takes time to import

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lotrtensor.adapters.calibration import Calibration, ModuleMoments, Moment
    from lotrtensor.adapters.compressed import CompressedAdapter, CompressedSummary
    from lotrtensor.adapters.compressed_group import Alternative, CompressedGroup, SourceRecord
    from lotrtensor.adapters.loading import load
    from lotrtensor.adapters.lora import LoraAdapter
    from lotrtensor.adapters.lotr import GroupSummary, LotrAdapter
    from lotrtensor.adapters.lotr_group import FactoredCore, FitRecord, LotrGroup
    from lotrtensor.adapters.modules import LoraModule
    from lotrtensor.adapters.parts import GroupParts
    from lotrtensor.analysis import (
        Analysis,
        Choice,
        Collection,
        Similarity,
        analyze,
        analyze_collection,
        similarity,
    )
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
    from lotrtensor.packs.pack import Pack, PackRow
    from lotrtensor.packs.serving import ServePlan
    from lotrtensor.packs.verifying import VerifiedRow
    from lotrtensor.verbs._compare import Difference, ModuleDifference, compare
    from lotrtensor.verbs._compress import compress
    from lotrtensor.verbs._convert import convert
    from lotrtensor.verbs._extract import extract, extraction_error
    from lotrtensor.verbs._merge import merge
    from lotrtensor.verbs._shared_outer import shared_outer
    from lotrtensor.verbs._truncate import truncate

    __version__: str

__all__ = [
    "Alternative",
    "Analysis",
    "Calibration",
    "Cell",
    "Choice",
    "Clustering",
    "Collection",
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
    "ModuleMoments",
    "Moment",
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
    "analyze_collection",
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

_HOMES = {
    "adapters.calibration": ("Calibration", "ModuleMoments", "Moment"),
    "adapters.compressed": ("CompressedAdapter", "CompressedSummary"),
    "adapters.compressed_group": ("Alternative", "CompressedGroup", "SourceRecord"),
    "adapters.loading": ("load",),
    "adapters.lora": ("LoraAdapter",),
    "adapters.lotr": ("GroupSummary", "LotrAdapter"),
    "adapters.lotr_group": ("FactoredCore", "FitRecord", "LotrGroup"),
    "adapters.modules": ("LoraModule",),
    "adapters.parts": ("GroupParts",),
    "analysis": (
        "Analysis",
        "Choice",
        "Collection",
        "Similarity",
        "analyze",
        "analyze_collection",
        "similarity",
    ),
    "core.clusters": ("Clustering", "cluster"),
    "core.fit.certificate": ("Tucker2Fit",),
    "core.fit.tucker2_fit": ("tucker2",),
    "core.operands": ("as_stack",),
    "core.rates": ("RatePoint", "rate_distortion"),
    "core.similarity": (
        "cosine_similarity",
        "inner",
        "norm",
        "principal_angles",
        "subspace_overlap",
    ),
    "core.stacks.dense": ("DenseStack", "LazyStack"),
    "core.stacks.low_rank": ("LowRankStack",),
    "core.stacks.protocol": ("SliceStack",),
    "core.tucker2": ("Tucker2",),
    "errors": (
        "DataError",
        "FormatError",
        "LotrError",
        "LotrWarning",
        "MissingPackageError",
        "OptionError",
        "RankError",
        "ShapeError",
        "UnsupportedAdapterError",
    ),
    "packs._pack": ("pack",),
    "packs._refit": ("refit",),
    "packs.members": ("Cell", "Member"),
    "packs.pack": ("Pack", "PackRow"),
    "packs.verifying": ("VerifiedRow",),
    "packs.serving": ("ServePlan",),
    "verbs._compare": ("Difference", "ModuleDifference", "compare"),
    "verbs._compress": ("compress",),
    "verbs._convert": ("convert",),
    "verbs._extract": ("extract", "extraction_error"),
    "verbs._merge": ("merge",),
    "verbs._shared_outer": ("shared_outer",),
    "verbs._truncate": ("truncate",),
}
"""Where each public name is defined. A module is imported when a name of it is first asked for: who
wants one function, or the help of a command, does not wait for all others."""

_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
_PACKAGES = ("adapters", "analysis", "core", "packs", "report", "verbs")


def __getattr__(name: str) -> object:
    """Import what a public name stands for, once."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"lotrtensor.{_MODULE_OF[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("lotrtensor")
    elif name in _PACKAGES:
        return import_module(f"lotrtensor.{name}")
    else:
        raise AttributeError(f"module 'lotrtensor' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
