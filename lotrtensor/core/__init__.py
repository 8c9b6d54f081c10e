"""The mathematics: Tucker-2 decompositions of stacks of matrices, on arrays of any library.

Nothing here knows of files, layers or adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lotrtensor.core.algorithms import hooi, hosvd, st_hosvd
    from lotrtensor.core.bits.basis import QuantisedBasis
    from lotrtensor.core.bits.shared import QuantisedTucker2
    from lotrtensor.core.bits.stack import QuantisedStack
    from lotrtensor.core.bits.terms import QuantisedTerms
    from lotrtensor.core.fit.hooi import Hooi
    from lotrtensor.core.fit.hosvd import Hosvd
    from lotrtensor.core.fit.truncate import truncate_tucker2
    from lotrtensor.core.operands import as_stack
    from lotrtensor.core.stacks.protocol import Sweep

__all__ = [
    "Hooi",
    "Hosvd",
    "QuantisedBasis",
    "QuantisedStack",
    "QuantisedTerms",
    "QuantisedTucker2",
    "Sweep",
    "as_stack",
    "hooi",
    "hosvd",
    "st_hosvd",
    "truncate_tucker2",
]

_HOMES = {
    "Hooi": "fit.hooi",
    "Hosvd": "fit.hosvd",
    "QuantisedBasis": "bits.basis",
    "QuantisedStack": "bits.stack",
    "QuantisedTerms": "bits.terms",
    "QuantisedTucker2": "bits.shared",
    "Sweep": "stacks.protocol",
    "as_stack": "operands",
    "hooi": "algorithms",
    "hosvd": "algorithms",
    "st_hosvd": "algorithms",
    "truncate_tucker2": "fit.truncate",
}
"""The module of each name, imported when the name is first asked for: every import of a part of the
core passes through here, and few parts need the others."""


def __getattr__(name: str) -> object:
    """Import what a public name stands for, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lotrtensor.core' has no attribute {name!r}")
    value = getattr(import_module(f"lotrtensor.core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
