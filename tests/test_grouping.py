"""Which modules share factors, in which order, under which names."""

from __future__ import annotations

import random

import pytest

from lotrtensor import FormatError, LotrError, ShapeError
from lotrtensor.adapters.grouping import Slot, group_modules, layer_order, module_kind


def slots(*names: str, shape: tuple[int, int] = (4, 4)) -> list[Slot]:
    """Slots of one shape."""
    return [Slot(name, shape) for name in names]


def named(groups: dict[str, list[Slot]]) -> dict[str, list[str]]:
    """Groups as plain names."""
    return {name: [slot.name for slot in members] for name, members in groups.items()}


def bert(layers: int) -> list[Slot]:
    """Query, value (4 × 4) and dense (8 × 4) of every layer."""
    found = []
    for i in range(layers):
        found += slots(f"encoder.layer.{i}.query", f"encoder.layer.{i}.value")
        found += slots(f"encoder.layer.{i}.dense", shape=(8, 4))
    return found


@pytest.mark.parametrize("group_by", ["type", "shape", "query|value"])
def test_slices_come_by_layer_number(group_by):
    members = bert(120)
    random.Random(0).shuffle(members)
    for group in group_modules(members, group_by).values():
        numbers = [int(slot.name.split(".")[2]) for slot in group]
        assert numbers == sorted(numbers)
        assert numbers[-1] == 119


def test_type_is_one_group_per_kind():
    groups = named(group_modules(bert(12)))
    assert list(map(len, groups.values())) == [12, 12, 12]
    assert groups["query"] == [f"encoder.layer.{i}.query" for i in range(12)]
    assert set(groups) == {"query", "value", "dense"}


def test_shape_brings_query_and_value_together():
    groups = named(group_modules(bert(3), "shape"))
    assert {name: len(members) for name, members in groups.items()} == {"4x4": 6, "8x4": 3}
    assert groups["4x4"][:2] == ["encoder.layer.0.query", "encoder.layer.0.value"]


def test_shape_keeps_embeddings_apart():
    members = [Slot("layers.0.a", (4, 9)), Slot("words", (4, 9), embedding=True)]
    assert sorted(map(len, group_modules(members, "shape").values())) == [1, 1]


def test_type_splits_unlike_shapes():
    members = [Slot(f"layers.{i}.kv", (4 if i % 2 else 8, 4)) for i in range(6)]
    groups = named(group_modules(members))
    assert len(groups) == 2
    assert sorted(groups.values()) == [
        [f"layers.{i}.kv" for i in (k, k + 2, k + 4)] for k in (0, 1)
    ]
    assert all(name.startswith("kv") for name in groups)


def test_type_keeps_embeddings_apart_from_a_matrix_of_their_shape():
    members = [Slot("blocks.0.x", (4, 9)), Slot("blocks.1.x", (4, 9), embedding=True)]
    assert len(group_modules(members)) == 2


def test_a_kind_with_one_slice():
    groups = named(group_modules([*bert(2), *slots("pooler.dense")]))
    assert ["pooler.dense"] in groups.values()
    assert ["encoder.layer.0.dense", "encoder.layer.1.dense"] in groups.values()


def test_a_module_without_any_number_or_dot():
    assert named(group_modules(slots("head"))) == {"head": ["head"]}


def test_experts_of_one_layer_share_and_those_of_all_layers_where_a_pattern_says_so():
    layers = {i: [f"model.layers.{i}.mlp.experts.{e}.w1" for e in range(12)] for i in range(11)}
    names = [name for own in layers.values() for name in own]
    members = slots(*names)
    random.Random(1).shuffle(members)
    expected = {f"model.layers.{i}.mlp.experts.*.w1": own for i, own in layers.items()}
    assert named(group_modules(members)) == expected
    assert named(group_modules(members, "w1")) == {"w1": names}
    assert named(group_modules(slots(*layers[0]))) == {"w1": layers[0]}


def test_experts_of_experts_and_layers_inside_of_them_share_over_their_numbers():
    names = [f"a.0.experts.{e}.layers.{i}.up" for e in range(3) for i in range(2)]
    assert named(group_modules(slots(*names))) == {"up": names}


def test_clashing_tails_get_names_of_their_own():
    towers = [f"{tower}.layers.{i}.q_proj" for tower in ("vision", "text") for i in range(3)]
    groups = named(group_modules(slots(*towers)))
    assert len(groups) == 2
    assert sorted(map(len, groups.values())) == [3, 3]
    for name, members in groups.items():
        tower = members[0].split(".")[0]
        assert tower in name
        assert {m.split(".")[0] for m in members} == {tower}


def test_group_names_are_unique_when_a_kind_is_another_kinds_tail():
    members = slots("q", "a.0.q", "b.0.q", "a.1.q")
    groups = named(group_modules(members))
    assert sorted(groups.values()) == [["a.0.q", "a.1.q"], ["b.0.q"], ["q"]]


def test_digits_inside_a_word_stay():
    assert module_kind("blocks.3.conv1.w2") == "blocks.*.conv1.w2"
    assert len(group_modules(slots("blocks.0.w1", "blocks.0.w2"))) == 2


def test_patterns_with_names_and_a_rest_by_type():
    groups = named(group_modules(bert(2), "qv=query|value"))
    assert groups == {
        "qv": [f"encoder.layer.{i}.{kind}" for i in range(2) for kind in ("query", "value")],
        "dense": ["encoder.layer.0.dense", "encoder.layer.1.dense"],
    }


def test_first_pattern_wins():
    groups = named(group_modules(bert(2), "first=layer\\.0\\.query,all=query|value"))
    assert groups["first"] == ["encoder.layer.0.query"]
    assert len(groups["all"]) == 3


def test_a_rest_kind_of_the_same_name_as_a_pattern_keeps_its_modules():
    groups = named(group_modules(bert(2), "query=value"))
    assert sum(map(len, groups.values())) == 6
    assert groups["query"] == ["encoder.layer.0.value", "encoder.layer.1.value"]
    assert ["encoder.layer.0.query", "encoder.layer.1.query"] in groups.values()


def test_two_patterns_of_one_name_are_not_silently_one():
    try:
        groups = named(group_modules(bert(2), "mine=query,mine=value"))
    except LotrError as error:
        assert "mine" in str(error)
        return
    assert len(groups["mine"]) == 4


@pytest.mark.parametrize("group_by", ["", " ", ",", "qv=", "query,,value"])
def test_an_empty_pattern_is_refused(group_by):
    with pytest.raises(LotrError):
        group_modules(bert(2)[:2], group_by)


@pytest.mark.parametrize("group_by", ["(", "qv=[", "a=query,b=*"])
def test_a_bad_regular_expression_is_named(group_by):
    with pytest.raises(FormatError, match="no regular expression") as caught:
        group_modules(bert(1), group_by)
    assert group_by.split(",")[-1] in str(caught.value)


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(FormatError, match=r"'k_proj'.*encoder\.layer\.0"):
        group_modules(bert(1), "k_proj")


def test_a_pattern_of_unlike_shapes_names_both():
    with pytest.raises(ShapeError) as caught:
        group_modules(bert(1), "query|dense")
    message = str(caught.value)
    assert "encoder.layer.0.query" in message
    assert "encoder.layer.0.dense" in message
    assert "(4, 4)" in message
    assert "(8, 4)" in message


def test_every_module_is_in_exactly_one_group():
    members = [*bert(11), *slots("pooler.dense", "embeddings.word")]
    for group_by in ("type", "shape", "query", "a=layer\\.1\\.query,value"):
        found = [s.name for group in group_modules(members, group_by).values() for s in group]
        assert sorted(found) == sorted(s.name for s in members)


@pytest.mark.parametrize("name", ["x1²2", "²", "a.٣.b", "1", "", "9" * 50])
def test_any_name_has_an_order(name):
    assert sorted([name, "layers.1.a", "layers.a.1"], key=layer_order)
