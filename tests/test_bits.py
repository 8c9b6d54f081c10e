"""Columns in bits: grids, streams, codebooks, terms, shared parts, against naive oracles."""

from __future__ import annotations

import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotrtensor import (
    FormatError,
    LoraAdapter,
    LoraModule,
    LowRankStack,
    RankError,
    compare,
    compress,
    tucker2,
)
from lotrtensor.core.bits import grid, stream
from lotrtensor.core.bits.common import common_spaces, part_between
from lotrtensor.core.bits.gauge import equalising_rotation
from lotrtensor.core.bits.grid import (
    NORMAL,
    ROUNDING,
    WIDEST,
    _even_step,
    check_width,
    column_cost,
    grid_cost,
    round_to_grid,
    round_to_width,
)
from lotrtensor.core.bits.shared import core_kinds, corner_sums, quantise_tucker2
from lotrtensor.core.bits.stack import StackInBits
from lotrtensor.core.bits.terms import lost2, predicted_total, quantise_slice, slope
from lotrtensor.core.slice_svd import slice_svds
from tests.strategies import factors

LARGEST = stream.LARGEST_CODE
SEEDS = st.integers(0, 2**32 - 1)


def entropy(codes):
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return -float(np.sum(shares * np.log2(shares)))


def random_stack(seed, slices=4, m=60, n=40, rank=4, decay=0.6):
    rng = np.random.default_rng(seed)
    values = decay ** np.arange(rank)
    return LowRankStack(
        rng.normal(size=(slices, m, rank)) * values, rng.normal(size=(slices, rank, n))
    )


# --- the grid


@pytest.mark.parametrize("deviation", [0.2, 0.5, 1.0, 3.0, 20.0, 200.0, 400.0])
def test_the_cost_of_a_normal_column_is_what_one_costs(deviation):
    codes = np.random.default_rng(0).normal(size=400_000) * deviation
    rounded = round_to_grid(codes, 1.0)
    cost = grid_cost(np.array([deviation]))
    assert float(cost.bits[0]) == pytest.approx(entropy(rounded), rel=0.02)
    scale = float(rounded @ codes) / float(rounded @ rounded)
    lost = float(np.mean((codes - scale * rounded) ** 2)) / deviation**2
    assert float(cost.distortion[0]) == pytest.approx(lost, rel=0.03)


def test_a_column_far_below_a_step_costs_and_keeps_nothing():
    cost = grid_cost(np.array([0.0, 1e-9]))
    assert cost.bits.tolist() == [0.0, 0.0]
    assert cost.distortion.tolist() == [1.0, 1.0]


def test_rounding_in_any_library(xp):
    x = np.random.default_rng(1).normal(size=50) * 3
    codes = xp.numpy(round_to_grid(xp.array(x), 0.5))
    assert xp.owns(round_to_grid(xp.array(x), 0.5))
    naive = [np.sign(v) * np.floor(abs(v) / 0.5 + ROUNDING) for v in x]
    assert codes.tolist() == naive


# --- streams


@given(SEEDS, st.lists(st.tuples(st.integers(1, 300), st.floats(0, 5000)), max_size=12))
def test_columns_come_back_to_the_bit(seed, shapes):
    rng = np.random.default_rng(seed)
    columns = [
        np.clip(np.round(rng.normal(size=n) * s), -LARGEST, LARGEST).astype(int) for n, s in shapes
    ]
    kinds = stream.kinds_of(columns)
    content = stream.pack(columns, kinds)
    found, size = stream.unpack(content, kinds, [len(c) for c in columns])
    assert size == len(content)
    for column, back in zip(columns, found, strict=True):
        assert column.tolist() == back.tolist()


@pytest.mark.parametrize("deviation", [0.5, 1.0, 4.0, 30.0, 900.0])
def test_a_stream_takes_little_more_than_its_entropy(deviation):
    codes = np.round(np.random.default_rng(2).normal(size=100_000) * deviation).astype(int)
    bits = 8 * len(stream.pack([codes], stream.kinds_of([codes]))) / codes.size
    assert bits <= 1.03 * entropy(codes) + 0.06


@given(SEEDS, st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_stream_is_refused_or_read_in_bounds(seed, place, value):
    rng = np.random.default_rng(seed)
    columns = [np.round(rng.normal(size=80) * s).astype(int) for s in (0.7, 3.0, 300.0)]
    kinds = stream.kinds_of(columns)
    content = bytearray(stream.pack(columns, kinds))
    content[place % len(content)] = value
    try:
        found, _ = stream.unpack(bytes(content), kinds, [80, 80, 80])
    except FormatError:
        return
    assert [len(column) for column in found] == [80, 80, 80]


def test_a_stream_of_another_length_is_refused():
    codes = np.arange(-20, 20)
    kinds = stream.kinds_of([codes])
    content = stream.pack([codes], kinds)
    for damaged, length in ((content[:-1], 40), (content, 39), (b"", 40)):
        with pytest.raises(FormatError):
            stream.unpack(damaged, kinds, [length])


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_stream_that_is_told_to_be_of_another_kind_is_refused(shift):
    codes = np.arange(-20, 20)
    kinds = stream.kinds_of([codes])
    content = stream.pack([codes], kinds)
    kind, *rest = stream._HEADER.unpack_from(content)
    changed = stream._HEADER.pack(kind + shift, *rest) + content[stream._HEADER.size :]
    with pytest.raises(FormatError, match="are damaged"):
        stream.unpack(changed, kinds, [40])


@pytest.mark.parametrize("columns", [[np.array([3, -1, 0, 2] * 10)], [np.arange(-300, 300)]])
def test_a_byte_too_many_within_a_stream_is_refused(columns):
    """Told of by its header, so that all that comes after it is where it should be."""
    kinds = stream.kinds_of(columns)
    content = stream.pack(columns, kinds)
    kind, largest, together, low, size = stream._HEADER.unpack_from(content)
    header = stream._HEADER.pack(kind, largest, together, low, size + 1)
    with pytest.raises(FormatError, match="fetch the file again"):
        stream.unpack(header + content[stream._HEADER.size :] + b"\0", kinds, [len(columns[0])])


# --- columns of one width


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.003495)]
)
def test_even_levels_lose_what_max_found(bits, distortion):
    """Max (1960), table II."""
    cost = column_cost(np.ones(1), bits)
    assert float(cost.distortion[0]) == pytest.approx(distortion, rel=1e-3)
    assert float(cost.bits[0]) <= bits


@pytest.mark.parametrize("bits", range(1, WIDEST + 1))
def test_a_normal_column_of_one_width_loses_what_is_told(bits):
    # Above NORMAL bits grids reach to the largest entry, of columns as layers have them.
    rows = 100_000 if bits <= NORMAL else 4000
    x = np.random.default_rng(3).normal(size=(rows, 2)) * [5, 1e-3]
    codes = round_to_width(x, bits)
    if bits <= NORMAL:
        assert set(np.unique(codes)) <= set(range(1 - 2**bits, 2**bits, 2))
    else:
        assert np.array_equal(codes, np.round(codes))
        assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    scales = np.sum(codes * x, axis=0) / np.sum(codes**2, axis=0)
    lost = np.mean((x - scales * codes) ** 2, axis=0) / np.mean(x**2, axis=0)
    told = float(column_cost(np.ones(1), bits).distortion[0])
    np.testing.assert_allclose(lost, told, rtol=0.03 if bits < 4 else 0.25)  # rare tails count


@pytest.mark.parametrize("bits", [4, 8])
def test_a_column_of_few_large_entries_is_not_cut_off(bits):
    """As the cores of one width are: at the step for a normal column they lose far more."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2000, 3)) * np.geomspace(1, 1e-3, 2000)[:, None]

    def lost(codes):
        scales = np.sum(codes * x, axis=0) / np.sum(codes**2, axis=0)
        return float(np.sum((x - scales * codes) ** 2))

    step = np.sqrt(np.mean(x**2, axis=0)) * _even_step(bits)
    most = 2 ** (bits - 1)
    normal = 2 * np.clip(np.floor(x / step), -most, most - 1) + 1
    assert lost(round_to_width(x, bits)) < (0.7 if bits == 4 else 0.2) * lost(normal)


def test_the_bits_of_large_codes_are_those_that_are_stored():
    """Not the entropy of so few entries, which ends at the logarithm of their number."""
    codes = round_to_width(np.random.default_rng(7).normal(size=(400, 20)), 16).astype(np.int16)
    columns = list(codes.T)
    stored = 8 * len(stream.pack(columns, stream.kinds_of(columns)))
    assert stream.entropy_bits(columns) == pytest.approx(stored, rel=0.05)


@pytest.mark.parametrize("bits", [0, 17, -1, 2.5, "four", True])
def test_a_width_out_of_range_is_refused(bits):
    with pytest.raises(RankError, match="from 1 to 16"):
        check_width(bits)


def test_widths_in_any_library(xp):
    x = np.random.default_rng(4).normal(size=(30, 3))
    codes = round_to_width(xp.array(x), 3)
    assert xp.owns(codes)
    np.testing.assert_array_equal(xp.numpy(codes), round_to_width(x, 3))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20))
def test_the_rotation_equalises_and_is_orthogonal(values):
    values = np.array(values)
    rotation = equalising_rotation(values)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(len(values)), atol=1e-12)
    diagonal = np.diag(rotation.T @ np.diag(values) @ rotation)
    np.testing.assert_allclose(diagonal, values.mean(), atol=1e-9 * max(1.0, values.max()))


@pytest.mark.parametrize(("decay", "accuracy"), [(0.3, 0.4), (0.7, 0.1), (1.0, 0.05)])
def test_at_one_width_the_equal_gauge_loses_what_the_nuclear_norm_says(decay, accuracy):
    """2 d (Σσ)² / c against 2 d Σσ² at the singular vectors, both measured.

    Where one value outweighs the others all turned columns are nearly parallel, and their errors
    are no longer independent.
    """
    rng = np.random.default_rng(4)
    m, c, bits = 4000, 8, 5
    values = decay ** np.arange(c)
    left, right = (np.linalg.qr(rng.normal(size=(m, c)))[0] for _ in range(2))
    d = float(column_cost(np.ones(1), bits).distortion[0])
    for rotation, predicted in (
        (np.eye(c), 2 * d * np.sum(values**2)),
        (equalising_rotation(values), 2 * d * np.sum(values) ** 2 / c),
    ):
        factors = [(x * np.sqrt(values)) @ rotation for x in (left, right)]
        rounded = []
        for factor in factors:
            codes = round_to_width(factor, bits)
            rounded.append(codes * np.sum(codes * factor, axis=0) / np.sum(codes**2, axis=0))
        lost = np.linalg.norm(factors[0] @ factors[1].T - rounded[0] @ rounded[1].T) ** 2
        assert lost == pytest.approx(predicted, rel=accuracy)


# --- terms


@given(factors(), st.floats(1e-3, 3.0))
def test_the_error_of_terms_is_that_of_the_dense_product(case, step):
    stack = case.stack()
    for k, svd in enumerate(slice_svds(stack)):
        terms = quantise_slice(svd, step)
        b, a = terms.factors()
        dense = stack.slice(k) - b @ a
        assert lost2(svd, terms) == pytest.approx(np.linalg.norm(dense) ** 2, rel=1e-6, abs=1e-12)


@given(SEEDS)
def test_the_prediction_is_near_what_is_reached(seed):
    stack = random_stack(seed, m=400, n=300)
    svds = slice_svds(stack)
    spectra = [svd.values for svd in svds]
    for step in (0.02, 0.2, 1.0):
        _, predicted = predicted_total(spectra, [(400, 300)] * 4, step)
        reached = sum(lost2(svd, quantise_slice(svd, step)) for svd in svds)
        assert reached == pytest.approx(predicted, rel=0.1)


@given(SEEDS)
def test_a_finer_step_costs_more_and_loses_less(seed):
    spectra = [svd.values for svd in slice_svds(random_stack(seed))]
    points = [predicted_total(spectra, [(60, 40)] * 4, step) for step in np.geomspace(1e-3, 10, 30)]
    for fine, coarse in itertools.pairwise(points):
        assert fine[0] >= coarse[0] - 1e-9
        assert fine[1] <= coarse[1] + 1e-9


def test_far_above_every_value_nothing_is_left():
    svd = slice_svds(random_stack(0))[0]
    assert quantise_slice(svd, 1e6).rank == 0
    assert lost2(svd, quantise_slice(svd, 1e6)) == pytest.approx(float(np.sum(svd.values**2)))


# --- shared and private parts


def test_the_kinds_of_cores_follow_from_the_factors():
    fit = tucker2(random_stack(5), rank=(6, 7)).tucker2
    found = quantise_tucker2(fit.left, fit.core, fit.right, 0.05)
    kinds = core_kinds(found.left, found.right, 4)
    assert kinds.shape == found.core.shape[1:]
    columns = [found.core[:, i, j] for i in range(found.rank[0]) for j in range(found.rank[1])]
    content = stream.pack(columns, kinds.ravel())
    back, _ = stream.unpack(content, kinds.ravel(), [4] * len(columns))
    assert all((a == b).all() for a, b in zip(columns, back, strict=True))


@pytest.mark.parametrize("width", [None, 1, 4])
@pytest.mark.parametrize("parts", ["shared", "private", "both"])
@given(SEEDS, st.sampled_from([0.01, 0.1, 0.5]))
def test_the_error_of_a_stack_is_that_of_its_slices(parts, width, seed, step):
    stack = random_stack(seed)
    found, error2 = StackInBits(stack, parts, width).quantise(step)
    dense = [stack.slice(k) - np.matmul(*found.factors(k)) for k in range(4)]
    assert error2 == pytest.approx(sum(np.linalg.norm(x) ** 2 for x in dense), rel=1e-6)


@pytest.mark.parametrize("parts", ["shared", "private", "both"])
@given(SEEDS, st.sampled_from([0.01, 0.1, 0.5]))
def test_no_parts_of_the_ranks_fall_below_the_bound(parts, seed, step):
    """Beside singular values of the dense slices and unfoldings; rounding alone lies between."""
    stack = random_stack(seed)
    job = StackInBits(stack, parts)
    found, error2 = job.quantise(step)
    dense = [stack.slice(k) for k in range(4)]
    (p, q), terms = found.shared_ranks, [own.rank for own in found.private]
    values = [np.linalg.svd(x, compute_uv=False) for x in dense]
    bounds2 = [sum(np.sum(v[min(p, q) + c :] ** 2) for v, c in zip(values, terms, strict=True))]
    if parts != "private":
        for rank, sides in ((p, dense), (q, [x.T for x in dense])):
            v = np.linalg.svd(np.hstack(sides), compute_uv=False)
            bounds2.append(np.sum(v[rank + sum(terms) :] ** 2))
    assert job.lower_bound2(found) == pytest.approx(max(bounds2), rel=1e-9, abs=1e-12 * job.norm2)
    assert error2 >= job.lower_bound2(found) * (1 - 1e-9) - 1e-12 * job.norm2


def test_the_bound_of_fine_codes_is_nearly_reached():
    """A shared part in sixteen bits loses what its ranks lose: within what HOOI leaves open."""
    job = StackInBits(random_stack(3), "shared", 16)
    found, error2 = job.of_ranks((3, 3))
    assert job.lower_bound2(found) <= error2 <= 1.2 * job.lower_bound2(found)


def lagrangian(stack, parts, step):
    prediction = StackInBits(stack, parts).predict(step)
    return prediction.lost2 + slope(step) * prediction.bits


@given(SEEDS, st.floats(1e-2, 2.0))
def test_both_parts_are_never_worse_than_either(seed, step):
    stack = random_stack(seed)
    alone = min(lagrangian(stack, parts, step) for parts in ("shared", "private"))
    assert lagrangian(stack, "both", step) <= alone * (1 + 1e-12)


def test_what_all_slices_have_in_common_is_shared():
    """Sixty slices between one pair of factors: their own terms would cost many times as much."""
    rng = np.random.default_rng(6)
    left, right = rng.normal(size=(80, 3)), rng.normal(size=(3, 50))
    stack = LowRankStack([left @ rng.normal(size=(3, 3)) for _ in range(60)], [right] * 60)
    found, _ = StackInBits(stack, "both").quantise(0.5)
    assert found.shared_ranks == (3, 3)
    assert sum(terms.rank for terms in found.private) == 0
    separate, _ = StackInBits(random_stack(7, slices=2, m=500, n=500), "both").quantise(0.5)
    assert separate.shared_ranks == (0, 0)


def planted(seed, slices=12, ratio=3.0, own=2):
    """Slices of a small part between common spaces, and of large terms of their own."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (200, 150))
    pairs = []
    for _ in range(slices):
        first, second = (ratio * np.linalg.qr(rng.normal(size=(n, own)))[0] for n in (200, 150))
        core = rng.normal(size=(4, 4))
        pairs.append((np.hstack([left @ core, first]), np.vstack([right.T, second.T])))
    return LowRankStack(*map(list, zip(*pairs, strict=True))), (left, right)


def test_common_spaces_are_those_that_were_planted():
    stack, planted_spaces = planted(0)
    found = common_spaces(slice_svds(stack))
    for basis, expected in zip(found, planted_spaces, strict=True):
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-10)
        cosines = np.linalg.svd(basis.T @ expected, compute_uv=False)
        np.testing.assert_allclose(cosines, 1.0, atol=1e-6)
    assert common_spaces(slice_svds(random_stack(1, slices=8, m=300, n=300))) is None
    assert common_spaces(slice_svds(random_stack(1, slices=2))) is None


def test_the_part_between_spaces_is_the_dense_projection():
    stack, (left, right) = planted(1)
    svds = slice_svds(stack)
    part = part_between((left, right), svds)
    for k in range(stack.shape[0]):
        expected = left @ left.T @ stack.slice(k) @ right @ right.T
        np.testing.assert_allclose(part.slice(k), expected, atol=1e-9)
    energies = np.sum(part.core**2, axis=(0, 2)), np.sum(part.core**2, axis=(0, 1))
    assert all(np.all(np.diff(x) <= 1e-9) for x in energies)
    np.testing.assert_allclose(part_between((left, right), svds, svds).core, 0.0, atol=1e-9)


def test_what_is_common_is_shared_beside_large_terms_of_single_slices():
    """Both ends: ranks by energy alone would share the large terms, or nothing."""
    stack, _ = planted(2)
    for step in (0.05, 0.2):
        found = {parts: StackInBits(stack, parts) for parts in ("both", "shared", "private")}
        cost = {}
        for parts, in_bits in found.items():
            made, lost = in_bits.quantise(step)
            content = [t for terms in made.private for t in (terms.left, terms.right)]
            if made.shared is not None:
                shared = made.shared
                content += [shared.left, shared.right, shared.core.reshape(-1, 1)]
            bits = stream.entropy_bits([c for side in content for c in side.T])
            cost[parts] = lost + slope(step) * bits
            if parts == "both":
                assert made.shared_ranks == (4, 4)
                assert {terms.rank for terms in made.private} <= {2, 3}
        assert cost["both"] < 0.8 * min(cost["shared"], cost["private"])


@pytest.mark.parametrize("seed", range(3))
def test_the_table_is_read_as_numpy_reads_it(seed):
    rng = np.random.default_rng(seed)
    places = np.arange(grid.FIRST_PLACE, 8.01, 1 / grid.PLACES)
    columns = [rng.normal(size=len(places)) for _ in range(2)]
    near = np.concatenate([places, np.nextafter(places, np.inf), np.nextafter(places, -np.inf)])
    place = np.concatenate([rng.uniform(-6, 10, 10_000), near, [-np.inf, np.inf, 0.0, -1e-300]])
    for found, column in zip(grid.interpolated(place, columns), columns, strict=True):
        np.testing.assert_array_equal(found, np.interp(place, places, column))


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (1, 5), (7, 4)])
def test_corner_sums_are_those_of_all_corners(shape):
    x = np.random.default_rng(0).normal(size=shape)
    found = corner_sums(x)
    assert found.shape == shape
    np.testing.assert_array_equal(found, np.cumsum(np.cumsum(x, axis=0), axis=1))
    for p, q in np.ndindex(shape):
        assert found[p, q] == pytest.approx(x[: p + 1, : q + 1].sum())


def stream_of(symbols, *, largest, low=0, rest=b"", kind=0):
    """A stream of symbols of one code each, as a file has it."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY)
    content = coder.compress(bytes(symbols)) + coder.flush() + rest
    together = stream._together(largest)
    return struct.pack("<bBBBI", kind, largest, together, low, len(content)) + content


def test_codes_beyond_16_bits_are_refused():
    low = 16
    content = stream_of([200, 100], largest=100, low=low, rest=bytes(4))
    with pytest.raises(FormatError, match="beyond ±32767"):
        stream.unpack(content, np.zeros(1, np.int8), [2])


def test_more_symbols_than_bits_are_refused():
    """Runs of one symbol, which Huffman codes do not shorten and other strategies do."""
    content = stream_of([100] * 100_000, largest=100)
    with pytest.raises(FormatError, match="do not come from"):
        stream.unpack(content, np.zeros(1, np.int8), [100_000])
    assert stream.unpack(stream.pack([np.full(9999, 3)], np.array([3])), np.array([3]), [9999])


def test_a_zero_column_of_any_kind_is_refused():
    content = stream_of([100, 100], largest=100)
    with pytest.raises(FormatError, match="is zero"):
        stream.unpack_nonzero(content, np.zeros(1, np.int8), [2])
    with pytest.raises(FormatError, match="is zero"):
        stream.unpack_nonzero(b"", np.full(1, stream.ZERO, np.int8), [2**22])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gauge", [1.0, 1e-9, 1e9])
def test_squares_of_cores_do_not_depend_on_how_a_slice_is_written(gauge, dtype):
    """(g B)(A / g) is the same slice: its part of a Gram matrix of all columns would be lost."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(60, 3)), rng.normal(size=(3, 40))) for _ in range(4)]
    dense = np.stack([b @ a for b, a in pairs])
    left = np.linalg.svd(np.hstack(list(dense)))[0][:, :12]
    right = np.linalg.svd(np.hstack(list(dense.transpose(0, 2, 1))))[0][:, :12]
    expected = np.sum((left.T @ dense @ right) ** 2, axis=0)
    scales = [gauge, 1.0, gauge, 1.0]
    stack = LowRankStack(
        [(g * b).astype(dtype) for g, (b, _) in zip(scales, pairs, strict=True)],
        [(a / g).astype(dtype) for g, (_, a) in zip(scales, pairs, strict=True)],
    )
    for parts in ("both", "shared"):
        found = StackInBits(stack, parts).squares.sums2
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.sum())


@pytest.mark.parametrize("step", [1 / 8000, 1 / 32767])
@pytest.mark.parametrize("shift", [0.0, 1e-5])
def test_columns_of_many_slices_stay_within_16_bits(step, shift):
    """Those of 16 slices reach four times as far as a singular value of one."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((8, 2)))[0] for _ in range(2))
    core = np.stack([np.diag([1.0 + shift, 0.5])] * 16)
    found = quantise_tucker2(left, core, right, step)
    u, g, v = found.factors()
    assert np.linalg.norm(u @ g @ v.T - left @ core @ right.T) < 4 * step * np.linalg.norm(core)
    single = [found.slice_factors(k) for k in range(16)]
    np.testing.assert_allclose([b @ a for b, a in single], u @ g @ v.T, atol=1e-12)


def test_the_finest_step_of_shared_factors_is_near():
    """A tolerance near the end of 16 bits is met by shared factors of many layers."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 40, 2))
    B = [left @ np.diag([1, 0.5]) for _ in range(64)]
    adapter = LoraAdapter(
        tuple(LoraModule(f"layers.{k}.q", b, right.T) for k, b in enumerate(B)), {}, np.dtype("f4")
    )
    found = compress(adapter, tolerance=4e-5, form="lotr")
    assert compare(adapter, found).relative_error <= 4e-5
