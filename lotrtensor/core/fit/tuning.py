"""Tuning constants of a fit, each with its measurement or source.

Times are seconds of one core of a server CPU, for LoRAs in float32. The constants are read as
attributes of this module, so that a test can set them.
"""

from __future__ import annotations

EXACT_FLOPS = 2e11
"""Estimated cost above which ``auto`` is matrix-free. 2e10 flops (32 layers of rank 16, 2048 ×
2048) took 0.3 s, and 0.6 s for every pair of ranks solved; the limit is ten times as much."""

CHEAP = 128
"""Largest side of a small problem that HOOI solves from both starts and to `CHEAP_RTOL`. This takes
0.2 s at that side, as long as one run to `RTOL` at twice the side."""

RTOL = 1e-6
"""HOOI stops when further sweeps are expected to gain less than this share of the squared error."""

CHEAP_RTOL = 1e-9
"""The same where sweeps are cheap: errors then agree to nine digits under any change of basis."""

MAX_SWEEPS = 500
"""Sweeps of HOOI at most. LoRAs with falling spectra took 9 to 36; ties can need any number."""

OVERSAMPLE = 8
"""Columns that a block has beyond the rank wanted, at least. Halko, Martinsson and Tropp, SIAM
Review 53 (2011), recommend 5 to 10 for one-sided problems."""

FACTOR_PASSES = 30
"""Passes over thin factors, at most, and, where a rank is wanted, over a matrix in memory, with as
many more as its columns take; a fit that would need more says so in a warning."""

FACTOR_RTOL = 1e-4
"""These passes stop when more are expected to gain less than this share."""

REFINEMENT_RTOL = 1e-3
"""The same for a round of refinement, two passes."""

LAZY_RTOL = 3e-3
"""The same where a pass costs the reading of all slices."""

LAZY_PASSES = 5
"""Passes over slices that are read on demand; the error of what is returned takes one more."""

FIRST_COLUMNS = 32
"""Columns of the first blocks where a tolerance decides; they double until little is left outside.
Of the blocks of a single matrix, which are joined, at most."""

GRAM_SIDE = 512
"""Side of a Gram matrix up to which its spectrum costs no more than a few passes."""

FULL_SVD_SIDE, FULL_SVD_SHARE = 256, 8
"""Lower side of a matrix up to which its SVD is a full one, and the share of the side beyond which
so many triplets are wanted that it is. 16 triplets of 1024 × 4096 took 0.1 s by blocks and 1.4 s by
a full SVD, 64 of 512 × 4096 half a second either way."""
