"""The error of a Tucker-2 decomposition against its stack, slice by slice."""

from __future__ import annotations

from lotrtensor.core.arrays import Array, as_accumulator, as_working, namespace
from lotrtensor.core.linalg import norms2
from lotrtensor.core.stacks.protocol import SliceStack
from lotrtensor.core.tucker2 import Tucker2
from lotrtensor.errors import ShapeError


def error_norms2(stack: SliceStack | Tucker2, tucker2: Tucker2) -> Array:
    """Squared errors ‖ΔW_k − U G_k Vᵀ‖², one per slice (K), for any factors and cores.

    With the QRs U = Q_U T_U and V = Q_V T_V the error splits into three orthogonal parts,

        ‖ΔW_k − Q_U Q_Uᵀ ΔW_k Q_V Q_Vᵀ‖² + ‖Q_Uᵀ ΔW_k Q_V − T_U G_k T_Vᵀ‖²

    (the first term is two of them: see `SliceStack.residual_norms2`). Each is the norm of a
    residual; the difference of the norms of ΔW and G would lose all relative errors below 1e-8. The
    slices of another
    Tucker2 are subtracted in its form, factors side by side and cores block-diagonal.

    Raises
    ------
    ShapeError
        If the two do not have the same K, m and n.
    """
    if stack.shape != tucker2.shape:
        raise ShapeError(
            f"the stack is (K, m, n) = {stack.shape}, the decomposition {tucker2.shape}"
        )
    if isinstance(stack, Tucker2):
        return norms2((stack.accumulated() - tucker2.accumulated()).orthogonalised().core)
    xp = namespace(tucker2.left)
    # Triangles in the widest type, so that this adds no error to that of factors in float32.
    left, left_triangle = xp.linalg.qr(as_accumulator(tucker2.left))
    right, right_triangle = xp.linalg.qr(as_accumulator(tucker2.right))
    written = as_accumulator(left_triangle) @ as_accumulator(as_working(tucker2.core))
    written = written @ as_accumulator(right_triangle).T
    working = stack.empty().dtype
    core, residuals = stack.project(xp.astype(left, working), xp.astype(right, working))
    inside = as_accumulator(core) - written
    return residuals + xp.sum(inside * inside, axis=(1, 2))
