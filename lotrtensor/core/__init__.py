"""The mathematics: Tucker-2 decompositions of stacks of matrices, on arrays of any library.

Nothing here knows of files, layers or adapters.
"""

from lotrtensor.core.algorithms import hooi, hosvd, st_hosvd
from lotrtensor.core.fit.truncate import truncate_tucker2
from lotrtensor.core.operands import as_stack

__all__ = ["as_stack", "hooi", "hosvd", "st_hosvd", "truncate_tucker2"]
