"""The gauge for one width: factors turned so that all their columns have one norm.

A slice P Qᵀ, P = U √Σ R and Q = V √Σ R, is the same for every orthogonal R. Where each column is
rounded with the same relative distortion d, and the errors of columns are independent, they are

    2 d Σ_j ‖p_j‖² ‖q_j‖²   with   ‖p_j‖² = ‖q_j‖² = (RᵀΣR)_jj ,

which is largest at the singular vectors, 2 d Σ_j σ_j², and least where all diagonal entries are
equal: 2 d (Σ_j σ_j)² / c, the nuclear norm's square over the rank (the Schur–Horn theorem says that
such an R exists; that nothing is less, the inequality of the arithmetic and quadratic mean). With
widths chosen column by column the singular vectors are best instead.
"""

from __future__ import annotations

import math

import numpy as np


def equalising_rotation(values: np.ndarray) -> np.ndarray:
    """Return an orthogonal R with every diagonal entry of Rᵀ diag(values) R their mean.

    Parameters
    ----------
    values : ndarray (c,)
        Singular values.

    Returns
    -------
    ndarray (c, c)
        A product of c − 1 plane rotations, each of which brings one diagonal entry to the mean:
        between an entry above and one below it there is an angle that does (Chan and Li, J. Math.
        Anal. Appl. 91 (1983)).
    """
    count = len(values)
    rotation, matrix = np.eye(count), np.diag(np.asarray(values, dtype=np.float64))
    mean = float(np.mean(values)) if count else 0.0
    open_ = list(range(count))
    while len(open_) > 1:
        diagonal = matrix[open_, open_]
        i, j = open_[int(np.argmax(diagonal))], open_[int(np.argmin(diagonal))]
        turn = _angle(matrix[i, i], matrix[j, j], matrix[i, j], mean)
        cosine, sine = math.cos(turn), math.sin(turn)
        plane = np.array([[cosine, -sine], [sine, cosine]])
        matrix[:, [i, j]] = matrix[:, [i, j]] @ plane
        matrix[[i, j], :] = plane.T @ matrix[[i, j], :]
        rotation[:, [i, j]] = rotation[:, [i, j]] @ plane
        open_.remove(i)
    return rotation


def _angle(a: float, b: float, c: float, mean: float) -> float:
    """Angle θ with cos²θ a + sin²θ b + 2 sin θ cos θ c = mean, for b ≤ mean ≤ a."""
    # With t = tan θ: (b − mean) t² + 2 c t + (a − mean) = 0, whose discriminant is not negative.
    first, last = b - mean, a - mean
    if last <= 0.0:
        return 0.0
    if first >= 0.0:
        return math.pi / 2
    root = math.sqrt(max(c * c - first * last, 0.0))
    return math.atan((-c - root) / first)
