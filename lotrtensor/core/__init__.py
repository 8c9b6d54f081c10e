"""The mathematics: Tucker-2 decompositions of stacks of matrices, on arrays of any library.

Nothing here knows of files, layers or adapters.
"""

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
