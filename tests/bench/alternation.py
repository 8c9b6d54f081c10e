"""What further rounds of alternation between a shared and a private part in bits would gain.

`lotrtensor.compress` fits the shared part, rounds it, and takes the terms of what it leaves: one
round. Here the shared part is fitted again to what the terms leave, and so on. The slices have a
planted shared part and private terms of falling size: on the bundled adapter no group has both.

    python -m tests.bench.alternation
"""

from __future__ import annotations

import numpy as np

from lotrtensor.core.arrays import to_numpy
from lotrtensor.core.bits.shared import quantise_tucker2
from lotrtensor.core.bits.stack import FLOAT16, QuantisedStack, StackInBits
from lotrtensor.core.fit.reduced_stack import ReducedStack
from lotrtensor.core.fit.reduction import reduce_stack
from lotrtensor.core.stacks.low_rank import LowRankStack

SLICES, SIDE, SHARED, PRIVATE = 24, 256, 8, (4.0, 2.0, 1.0)
STRENGTHS, STEPS, ROUNDS = (0.3, 1.0, 2.0), (0.05, 0.1, 0.2), 8


def planted(strength: float) -> LowRankStack:
    """U G_k Vᵀ of rank `SHARED`, and terms of a slice's own."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(SIDE, SHARED)))[0] for _ in range(2))
    b, a = [], []
    for _ in range(SLICES):
        own = strength / SIDE * rng.normal(size=(SIDE, len(PRIVATE))) * np.array(PRIVATE)
        b.append(np.hstack([left @ rng.normal(size=(SHARED, SHARED)), own]))
        a.append(np.vstack([right.T, rng.normal(size=(len(PRIVATE), SIDE))]))
    return LowRankStack(b, a)


def again(stack: StackInBits, found: QuantisedStack, step: float) -> tuple[QuantisedStack, float]:
    """One round more: the shared part of what the terms leave, then the terms of its residual."""
    own = [terms.factors() for terms in found.private]
    pairs = [stack.stack.factors(k) for k in range(len(own))]
    rest = LowRankStack(
        [np.hstack([b, t]) for (b, _), (t, _) in zip(pairs, own, strict=True)],
        [np.vstack([a, -t]) for (_, a), (_, t) in zip(pairs, own, strict=True)],
    )
    reduced = ReducedStack(rest, reduce_stack(rest, kind="exact"))
    fit = reduced.tucker2(found.shared_ranks, reduced.hosvd.left.dtype)
    parts = [to_numpy(x) for x in (fit.left, fit.core, fit.right)]
    made, lost2, _ = stack._beside(quantise_tucker2(*parts, step, None), 0.0, step, FLOAT16)
    return made, lost2


def main() -> None:
    """Print the relative errors, and the least of all further rounds."""
    print("| private part | step | ranks | one round | best of 8 more | gain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for strength in STRENGTHS:
        stack = StackInBits(planted(strength), "both")
        for step in STEPS:
            found, lost2 = stack.quantise(step)
            if not min(found.shared_ranks):
                continue
            losses = [lost2]
            for _ in range(ROUNDS):
                found, lost2 = again(stack, found, step)
                losses.append(lost2)
            first, best = (np.sqrt(x / stack.norm2) for x in (losses[0], min(losses[1:])))
            print(
                f"| {strength} | {step} | {found.shared_ranks} | {first:.4f} | {best:.4f} "
                f"| {1 - best / first:.2%} |"
            )


if __name__ == "__main__":
    main()
