"""Packs: what they hold against the originals, and against each adapter compressed alone."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lotrtensor as lt
from adapters_fixtures import write_lora
from lotrtensor.adapters.formats.coded_row import from_row, to_row
from lotrtensor.packs import coding, tasks
from pack_decoder import read_adapter
from pack_fixtures import contents, dense, dense_error, family, strangers

INDEX_BYTES = 300
"""What the index of a pack takes, beside what its adapters save in headers and configs."""


def alone_bytes(adapters, tolerance):
    return sum(lt.compress(a, tolerance=tolerance).file_bytes for a in adapters.values())


@pytest.mark.parametrize("share", ["auto", "adapters", "both", "layers", "none"])
def test_every_adapter_is_within_the_tolerance(tmp_path, share):
    adapters = family(5)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.15, share=share)
    assert found.names == tuple(adapters)
    for row in found.rows:
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error == pytest.approx(row.relative_error, rel=1e-4)
        assert error <= 0.15
    assert (found.shared_bytes > 0) == (share in ("auto", "adapters", "both"))
    assert found.bytes == sum(map(len, contents(tmp_path / "pack").values()))


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.02])
@pytest.mark.parametrize(
    "adapters",
    [family(6), family(6, common=0.0, own=0.02), strangers(6), family(2), family(1)],
    ids=["family", "variants", "strangers", "two", "one"],
)
def test_a_pack_is_never_larger_than_each_alone(tmp_path, adapters, tolerance):
    found = lt.pack(adapters, tmp_path / "pack", tolerance=tolerance)
    assert found.bytes <= alone_bytes(adapters, tolerance) + INDEX_BYTES
    assert max(row.relative_error for row in found.rows) <= tolerance


@given(
    count=st.integers(1, 3),
    common=st.sampled_from([0.0, 0.3]),
    own=st.sampled_from([0.0, 0.05, 1.0]),
    layers=st.integers(1, 3),
    side=st.integers(2, 40),
    tolerance=st.sampled_from([0.6, 0.2, 0.05]),
    seed=st.integers(0, 99),
    named=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_pack_is_larger_than_the_directories(
    count, common, own, layers, side, tolerance, seed, named
):
    """Neither where nothing is worth sharing, nor of few and small adapters."""
    kinds = {"query": (side, side + 1)}
    sizes = {"common": common, "own": own, "layers": layers, "seed": seed}
    adapters = family(count, mean=1.0 - own / 2, rank=2, kinds=kinds, **sizes)
    if named:
        config = {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM"}
        adapters = {name: replace(own, config=config) for name, own in adapters.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = lt.pack(adapters, folder + "/pack", tolerance=tolerance)
        stored = sum(len(x) for x in contents(Path(folder) / "pack").values())
        each = 0
        for name, adapter in adapters.items():
            lt.compress(adapter, tolerance=tolerance).save(f"{folder}/{name}")
            each += sum(len(x) for x in contents(Path(folder) / name).values())
    assert found.bytes == stored <= each + INDEX_BYTES


def test_a_family_takes_a_fraction(tmp_path):
    adapters = family(12, common=0.1, own=0.02)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.1)
    assert found.bytes < alone_bytes(adapters, 0.1) / 2.8
    assert all(row.uses_bases for row in found.rows)


def test_strangers_share_nothing(tmp_path):
    found = lt.pack(strangers(5), tmp_path / "pack", tolerance=0.2)
    assert found.shared_bytes == 0 and found.cells == ()
    assert not any(row.uses_bases for row in found.rows)


def test_one_whom_the_basis_does_not_suit_is_stored_by_itself(tmp_path):
    found = lt.pack(family(7, common=0.05, own=0.02), tmp_path / "pack", tolerance=0.15)
    other = strangers(1, seed=9)["user-0"]
    row = found.add("other", other)
    assert not row.uses_bases and row.relative_error <= 0.15
    assert row.bytes < lt.compress(other, tolerance=0.15).file_bytes + 100
    assert found.add("akin", family(8, common=0.05, own=0.02)["user-7"]).uses_bases


def test_the_mean_alone(tmp_path):
    """Against a dense mean of the adapters, each brought to norm 1."""
    adapters = family(5, own=0.4)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.2)
    slices = [{m.name: m.B.astype(float) @ m.A for m in a.modules} for a in adapters.values()]
    norms = [np.sqrt(sum(np.sum(x**2) for x in s.values())) for s in slices]
    units = [{k: x / n for k, x in s.items()} for s, n in zip(slices, norms, strict=True)]
    mean = {k: sum(u[k] for u in units) / len(units) for k in units[0]}
    for row, unit in zip(found.rows, units, strict=True):
        lost2 = sum(np.sum((unit[k] - mean[k]) ** 2) for k in unit)
        assert row.mean_error == pytest.approx(np.sqrt(lost2), rel=1e-4)
        assert row.relative_error < row.mean_error


@pytest.mark.parametrize("share_of_bytes", [0.08, 0.15, 0.6])
@pytest.mark.parametrize("share", ["auto", "none"])
def test_a_budget_holds_for_all_files(tmp_path, share_of_bytes, share):
    adapters = family(6)
    limit = share_of_bytes * sum(a.bytes for a in adapters.values())
    found = lt.pack(adapters, tmp_path / "pack", budget=f"{100 * share_of_bytes}%", share=share)
    assert found.bytes <= limit
    errors = [dense_error(found.member(name).updates(), adapters[name]) for name in adapters]
    assert found.bytes > 0.8 * limit or max(errors) < 0.005
    assert max(errors) < 0.6


def test_more_bytes_are_less_error(tmp_path):
    adapters, means = family(6), []
    for size in (9000, 12_000, 18_000):
        found = lt.pack(adapters, tmp_path / str(size), budget=size)
        means.append(np.mean([row.relative_error for row in found.rows]))
    assert means[0] > means[1] > means[2]


def test_a_budget_that_is_too_small_leaves_nothing(tmp_path):
    with pytest.raises(lt.RankError, match="budget is 900 bytes; the smallest pack"):
        lt.pack(family(4), tmp_path / "pack", budget=900)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_unlike_ranks_scales_modules_and_types(tmp_path):
    """From files: rank 2 and 4, alpha, rsLoRA, bfloat16; one lacks a module, one has another."""
    rng = np.random.default_rng(0)
    base = {f"layers.{k}.proj": (rng.normal(size=(40, 4)), rng.normal(size=(4, 30)))
            for k in range(3)}  # fmt: skip
    low = {name: (b[:, :2], a[:2]) for name, (b, a) in base.items()}
    head = {"head": (rng.normal(size=(8, 4)), rng.normal(size=(4, 30)))}
    extra = dict(list(base.items())[1:]) | head
    paths = [
        write_lora(tmp_path / "a", base, lora_alpha=4),
        write_lora(tmp_path / "b", low, r=2, lora_alpha=8, use_rslora=True),
        write_lora(tmp_path / "c", base, dtype="bfloat16"),
        write_lora(tmp_path / "d", extra),
    ]
    found = lt.pack(paths, tmp_path / "pack", tolerance=0.1)
    for path in paths:
        original, unpacked = lt.load(path), found.unpack(path.name)
        assert unpacked.dtype == original.dtype
        assert dense_error(found.member(path.name).updates(), original) <= 0.1
        assert lt.compare(original, unpacked).relative_error <= 0.11
        ranks = {m.name: m.rank for m in original.modules}
        assert all(m.rank <= ranks[m.name] for m in unpacked.modules)


def test_what_adapters_carry_comes_back(tmp_path):
    extras = {"base_model.model.classifier.weight": np.arange(16, dtype="float16").reshape(2, 8)}
    adapters = {
        name: replace(a, extras=extras, config={"modules_to_save": ["classifier"],
                                                "base_model_name_or_path": "org/base"})
        for name, a in family(3).items()
    }  # fmt: skip
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.2).unpack("user-1")
    assert found.config["base_model_name_or_path"] == "org/base"
    (key,) = found.extras
    np.testing.assert_array_equal(found.extras[key], extras[key])
    assert found.extras[key].dtype == np.float16


def test_an_adapter_of_zeros_is_one_of_many(tmp_path):
    zero = tuple(replace(m, B=0 * m.B) for m in family(1)["user-0"].modules)
    adapters = family(4) | {"fresh": lt.LoraAdapter(zero, {}, np.dtype("float32"))}
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.2)
    assert found.row("fresh").relative_error == 0.0
    assert all(not (m.B @ m.A).any() for m in found.member("fresh").updates())


def test_the_gauge_of_an_adapter_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    adapters = family(5)
    gauged = {}
    for name, adapter in adapters.items():
        modules = []
        for m in adapter.modules:
            turn = np.linalg.qr(rng.normal(size=(m.rank, m.rank)))[0] * rng.uniform(0.5, 2, m.rank)
            b, a = m.B @ turn, np.linalg.inv(turn) @ m.A
            modules.append(replace(m, B=b.astype("float32"), A=a.astype("float32")))
        gauged[name] = replace(adapter, modules=tuple(modules))
    first, second = (
        lt.pack(x, tmp_path / n, tolerance=0.15) for x, n in ((adapters, "a"), (gauged, "b"))
    )
    assert first.bytes == pytest.approx(second.bytes, rel=0.01)
    for mine, other in zip(first.rows, second.rows, strict=True):
        assert mine.mean_error == pytest.approx(other.mean_error, rel=1e-3)
        assert mine.relative_error == pytest.approx(other.relative_error, rel=0.02)


def test_verify_measures(tmp_path):
    adapters = family(4)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.1, share="adapters")
    for row in found.verify(adapters):
        assert row.relative_error == pytest.approx(found.row(row.name).relative_error, rel=1e-3)
        assert row.mean_error == pytest.approx(found.row(row.name).mean_error, abs=0.04)
        assert row.source_bytes == adapters[row.name].bytes


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_any_executor_makes_the_same_bytes(tmp_path, kind):
    adapters = family(4)
    lt.pack(adapters, tmp_path / "one", tolerance=0.2, executor=ThreadPoolExecutor(1))
    with kind(2) as executor:
        lt.pack(adapters, tmp_path / "two", tolerance=0.2, executor=executor)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_one_adapter_opens_without_the_others(tmp_path, monkeypatch):
    adapters = family(40, layers=1, common=0.1, own=0.05)
    made = lt.pack(adapters, tmp_path / "pack", tolerance=0.1, share="adapters")
    read = []
    opened = lt.packs.files.read_some

    def counting(path, shard, prefix=""):
        found = opened(path, shard, prefix)
        read.append((prefix, sum(tensor.nbytes for tensor in found.values())))
        return found

    monkeypatch.setattr("lotrtensor.packs.reading.read_some", counting)
    lt.Pack(tmp_path / "pack").member("user-33")
    own = sum(size for prefix, size in read if prefix)
    assert [bool(prefix) for prefix, _ in read] == [True, False] or len(read) == 2
    assert own <= made.row("user-33").bytes
    assert len([f for f in made.files if f.startswith("adapters")]) == 3


def test_a_plan_for_a_server(tmp_path):
    """Counted by hand: four modules of two shapes, slots over m + n."""
    adapters = family(4, common=0.05, own=0.02)
    made = lt.pack(adapters, tmp_path / "pack", tolerance=0.2)
    sides = sum(sum(m.shape) for m in adapters["user-0"].modules)
    plan = made.serve_plan(max_loras=3)
    ranks = [m.rank for n in made.names for m in made.unpack(n).modules]
    assert plan.unpacked_rank >= max(ranks) and plan.original_rank == 4
    assert (plan.max_lora_rank, plan.fits) == (8, True)
    assert plan.slot_bytes == plan.original_slot_bytes == 2 * 3 * 8 * sides
    bases = [c.basis for c in made.cells]
    numbers = sum(x.size for b in bases for x in (b.left, b.right, b.mean))
    assert plan.base_bytes == 2 * numbers
    assert plan.own_bytes < plan.slot_bytes / 10
    assert not made.serve_plan(max_lora_rank=1).fits or plan.unpacked_rank == 1
    with pytest.raises(lt.OptionError, match="max_loras"):
        made.serve_plan(max_loras=0)


@pytest.mark.parametrize("share", ["adapters", "both"])
def test_the_bounds_of_the_bases(tmp_path, share):
    """No fit of these ranks is better, and the best one is not far from it."""
    adapters = family(6, own=0.3)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.15, share=share)
    assert len(found.bounds) == len(found.cells)
    assert lt.Pack(found.path).bounds == ()
    for cell, bound in zip(found.cells, found.bounds, strict=True):
        pairs = []
        for adapter in adapters.values():
            norm = np.sqrt(sum(np.linalg.norm(m.B @ m.A) ** 2 for m in adapter.modules))
            pairs += [(m.B / norm, m.A) for m in adapter.modules if m.name in cell.modules]
        fit = lt.tucker2(pairs, rank=cell.basis.rank)
        assert bound <= fit.relative_error * 1.05  # adapters weigh a little differently in a cell
        assert bound >= 0.8 * fit.lower_bound


def test_every_module_is_verified(tmp_path):
    adapters = family(3)
    found = lt.pack(adapters, tmp_path / "pack", tolerance=0.2)
    for row in found.verify(adapters):
        stored = {m.name: m.B @ m.A for m in found.member(row.name).updates()}
        for module in row.modules:
            (own,) = (m for m in adapters[row.name].modules if m.name == module.name)
            delta = own.B.astype(float) @ own.A.astype(float)
            lost = np.linalg.norm(delta - stored[module.name]) / np.linalg.norm(delta)
            assert module.relative_error == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("share", ["auto", "adapters", "both"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_pack_of_a_rank(tmp_path, share, rank):
    """Cores alone: the error is that of the best bases of the rank, but for rounding."""
    adapters = family(6, own=0.2)
    found = lt.pack(adapters, tmp_path / "pack", rank=rank, share=share)
    assert all(max(cell.basis.rank) <= rank for cell in found.cells)
    assert all(row.uses_bases for row in found.rows)
    lost2 = norm2 = 0.0
    for cell in found.cells:
        pairs = []
        for adapter in adapters.values():
            norm = np.sqrt(sum(np.linalg.norm(m.B @ m.A) ** 2 for m in adapter.modules))
            pairs += [(m.B / norm, m.A) for m in adapter.modules if m.name in cell.modules]
        fit = lt.tucker2(pairs, rank=rank)
        size2 = lt.norm(pairs) ** 2
        lost2, norm2 = lost2 + fit.relative_error**2 * size2, norm2 + size2
    stated2 = np.mean([row.relative_error**2 for row in found.rows])
    assert np.sqrt(stated2) == pytest.approx(np.sqrt(lost2 / norm2), rel=0.02)
    for row in found.rows:
        assert not any(any(g.private_ranks) for g in found.member(row.name).own.groups)
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error == pytest.approx(row.relative_error, rel=1e-4)
    more = family(7, own=0.2)["user-6"]
    row = found.add("more", more, max_error=1.0)
    assert row.uses_bases and not any(any(g.private_ranks) for g in found.member("more").own.groups)
    assert found.add("exactly", more, tolerance=0.05).relative_error <= 0.05


def test_one_adapter_of_a_rank(tmp_path):
    """There is nothing to share a basis with."""
    found = lt.pack(family(1), tmp_path / "pack", rank=4)
    assert found.cells == () and found.rows[0].relative_error < 0.1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, lt.RankError),
        ({"rank": 2.5}, lt.RankError),
        ({"rank": 2, "tolerance": 0.1}, lt.RankError),
        ({"rank": 2, "share": "none"}, lt.OptionError),
        ({"rank": 2, "share": "layers"}, lt.OptionError),
    ],
)
def test_ranks_that_mean_nothing(tmp_path, options, error):
    with pytest.raises(error):
        lt.pack(family(2), tmp_path / "pack", **options)
    assert not (tmp_path / "pack").exists()


def two_families(count=4):
    """Families of two origins, mixed, and one adapter of neither."""
    first, second = family(count + 1, seed=1, common=0.1), family(count, seed=2, common=0.1)
    found = {}
    for i in range(count):
        found |= {f"a{i}": first[f"user-{i}"], f"b{i}": second[f"user-{i}"]}
    return found | {f"a{count}": first[f"user-{count}"]}


@pytest.mark.parametrize("share", ["auto", "adapters", "both"])
@pytest.mark.parametrize("goal", [{"tolerance": 0.1}, {"budget": "12%"}, {"rank": 3}])
def test_clusters_have_bases_of_their_own(tmp_path, share, goal):
    adapters = two_families()
    found = lt.pack(adapters, tmp_path / "pack", clusters=2, share=share, **goal)
    assert {cell.cluster for cell in found.cells} == {0, 1}
    used = {name: {cell.cluster for cell in found.member(name).cells.values()} for name in adapters}
    assert used == {name: {0} if name.startswith("a") else {1} for name in adapters}
    for row in found.rows:
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error == pytest.approx(row.relative_error, rel=1e-4)
        decoded = read_adapter(found.path, row.name)
        for module in found.member(row.name).updates():
            np.testing.assert_allclose(decoded[module.name], module.B @ module.A, atol=1e-9)
    found.check()


def test_clusters_take_fewer_bytes_where_there_are_two_origins(tmp_path):
    adapters = two_families(8)
    one = lt.pack(adapters, tmp_path / "one", tolerance=0.05)
    two = lt.pack(adapters, tmp_path / "two", tolerance=0.05, clusters=2)
    assert two.bytes < one.bytes
    row = two.add("more", family(9, seed=2, common=0.1)["user-8"])
    assert row.uses_bases and row.relative_error <= 0.05
    assert {cell.cluster for cell in two.member("more").cells.values()} == {1}
    again = lt.refit(two, adapters)
    assert {cell.cluster for cell in again.cells} == {0, 1}


@pytest.mark.parametrize("goal", [{"tolerance": 0.1, "share": "adapters"}, {"rank": 3}])
def test_one_of_a_cluster_of_its_own_uses_no_bases(tmp_path, goal):
    adapters = family(3, common=0.1) | {"alone": strangers(1, seed=9)["user-0"]}
    found = lt.pack(adapters, tmp_path / "pack", clusters=2, **goal)
    assert [row.uses_bases for row in found.rows] == [True, True, True, False]
    error = dense_error(found.member("alone").updates(), adapters["alone"])
    assert error == pytest.approx(found.row("alone").relative_error, rel=1e-4)


@pytest.mark.parametrize("cluster", [1, -1, [0], "0", True])
def test_a_cluster_that_is_not_there_is_refused(tmp_path, cluster):
    found = lt.pack(family(3), tmp_path / "pack", tolerance=0.1, share="adapters")
    tensors = coding.member_to_tensors(found.member("user-0"), found.cells)
    coded, rest = from_row(tensors["coded"], "row")
    row = to_row(coded._replace(records=coded.records | {"cluster": cluster}), rest)
    with pytest.raises(lt.FormatError, match="shares no bases"):
        coding.member_from_tensors({"coded": row}, found.cells, "here")


def test_more_clusters_than_adapters(tmp_path):
    found = lt.pack(family(2, layers=1), tmp_path / "pack", tolerance=0.2, clusters=5)
    assert found.cells == () and all(row.relative_error <= 0.2 for row in found.rows)


@pytest.mark.parametrize("options", [{"clusters": 0}, {"clusters": 2, "share": "none"}])
def test_clusters_that_mean_nothing(tmp_path, options):
    with pytest.raises(lt.LotrError, match="clusters"):
        lt.pack(family(2), tmp_path / "pack", tolerance=0.2, **options)
    assert not (tmp_path / "pack").exists()


# --- many adapters: bases of a sample -------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """Cells are made of 16 slices."""
    monkeypatch.setattr(tasks, "ENTRIES", 1)
    monkeypatch.setattr(tasks, "FEWEST", 16)


@pytest.mark.parametrize(
    ("share", "goal"),
    [
        ("auto", {"tolerance": 0.1}),
        ("adapters", {"tolerance": 0.1}),
        ("adapters", {"budget": "8%"}),
        ("both", {"rank": 4}),
    ],
)
def test_a_pack_of_a_sample(tmp_path, sampled, share, goal):
    count = 32
    adapters = family(count, layers=2 if share == "both" else 1, own=0.02)
    found = lt.pack(adapters, tmp_path / "pack", share=share, **goal)
    assert found.bounds == (None,) * len(found.cells)
    assert share == "auto" or all(row.uses_bases for row in found.rows)
    whole = {name: dense(adapter.modules) for name, adapter in adapters.items()}
    for own in whole.values():
        norm = np.sqrt(sum(np.linalg.norm(x) ** 2 for x in own.values()))
        own.update({n: x / norm for n, x in own.items()})
    mean = {n: sum(own[n] for own in whole.values()) / count for n in whole["user-0"]}
    for row in found.rows:
        own = whole[row.name]
        error = dense_error(found.member(row.name).updates(), adapters[row.name])
        assert error == pytest.approx(row.relative_error, rel=1e-4)
        expected = np.sqrt(sum(np.linalg.norm(own[n] - mean[n]) ** 2 for n in own))
        assert row.mean_error == pytest.approx(expected, rel=1e-3)


def test_a_sample_of_two_families_in_turn_has_both(tmp_path, sampled):
    two = zip(family(24, layers=1).values(), family(24, layers=1, seed=9).values(), strict=True)
    adapters = {f"user-{i}": adapter for i, adapter in enumerate(a for pair in two for a in pair)}
    found = lt.pack(adapters, tmp_path / "pack", rank=8, share="adapters")
    assert max(row.relative_error for row in found.rows) < 0.3


def test_a_rank_above_that_of_the_sample(tmp_path, sampled):
    adapters = family(30, layers=1, own=0.5, own_rank=3)
    found = lt.pack(adapters, tmp_path / "pack", rank=80, share="adapters")
    assert {cell.basis.rank for cell in found.cells} == {(80, 80)}


def test_a_sample_does_not_go_by_the_first_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "ENTRIES", 2**15)
    monkeypatch.setattr(tasks, "FEWEST", 2)
    seen = []
    whole = tasks.CollectionInBits

    def kept(stack, *options):
        seen.append(stack)
        return whole(stack, *options)

    monkeypatch.setattr(tasks, "CollectionInBits", kept)
    small = family(1, layers=1, rank=1, own_rank=1)
    adapters = small | {f"wide-{i}": a for i, a in enumerate(strangers(20, own_rank=24).values())}
    lt.pack(adapters, tmp_path / "pack", tolerance=0.3, share="adapters")
    sizes = [sum(stack.ranks) * sum(stack.shape[1:]) for stack in seen]
    assert max(sizes) < 2 * 2**15, sizes
