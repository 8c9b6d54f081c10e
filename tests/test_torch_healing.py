"""Healing: values of terms fitted to the original's outputs, beside models with dense weights."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import lotrtensor as lt

torch = pytest.importorskip("torch")
import lotrtensor.torch as lotr  # noqa: E402

NAMES = ("first", "second")


class Model(torch.nn.Module):
    """Two layers, and what is made of them."""

    def __init__(self, kind="tensor", side=24):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(side, side), torch.nn.Linear(side, side)
        self.kind = kind

    def forward(self, x, attention_mask=None):
        y = self.second(torch.tanh(self.first(x)))
        if self.kind == "tensor":
            return y
        return SimpleNamespace(**{self.kind: y})


@pytest.fixture
def lora():
    rng = np.random.default_rng(0)
    pairs = [(0.3 * rng.normal(size=(24, 4)), rng.normal(size=(4, 24))) for _ in NAMES]
    modules = [lt.LoraModule(name, b, a) for name, (b, a) in zip(NAMES, pairs, strict=True)]
    return lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))


@pytest.fixture
def small(lora):
    return lt.compress(lora, tolerance=0.6, form="lora")


@pytest.fixture
def batches():
    return torch.randn(60, 16, 24, generator=torch.Generator().manual_seed(1))


def dense(model, adapter):
    """The model with every ΔW added to its weight."""
    model = copy.deepcopy(model)
    for module in adapter.to_lora().modules if hasattr(adapter, "to_lora") else adapter.modules:
        delta = torch.as_tensor(module.B.astype(float) @ module.A.astype(float))
        model.get_submodule(module.name).weight.data += delta.float()
    return model.eval()


@torch.no_grad()
def relative(model, one, other, held):
    """Mean squared relative error of outputs over the held-out batches."""
    found = []
    for batch in held:
        y, wanted = dense(model, one)(batch), dense(model, other)(batch)
        found.append(float((y - wanted).square().sum() / wanted.square().sum()))
    return np.mean(found)


def test_the_distances_are_those_of_models_with_dense_weights(lora, small, batches):
    model = Model()
    healed = lotr.heal(model, small, lora, batches)
    assert healed.before == pytest.approx(relative(model, small, lora, batches[::5]), rel=1e-4)
    exported = healed.adapter
    assert healed.after == pytest.approx(relative(model, exported, lora, batches[::5]), rel=1e-4)
    assert healed.after < 0.9 * healed.before


def test_codes_stay_and_the_error_is_that_of_the_new_values(lora, small, batches, tmp_path):
    healed = lotr.heal(Model(), small, lora, batches).adapter
    for group, other in zip(small.groups, healed.groups, strict=True):
        for one, new in zip(group.stack.private, other.stack.private, strict=True):
            np.testing.assert_array_equal(one.left, new.left)
            np.testing.assert_array_equal(one.right, new.right)
            assert (one.values != new.values).any()
    assert healed.relative_error == pytest.approx(lt.compare(lora, healed).relative_error, rel=1e-6)
    healed.save(tmp_path / "out")
    small.save(tmp_path / "before")
    again = lt.load(tmp_path / "out")
    assert again.relative_error == pytest.approx(healed.relative_error, rel=1e-4)  # four digits
    for one, new in zip(healed.to_lora().modules, again.to_lora().modules, strict=True):
        np.testing.assert_array_equal(one.B, new.B)
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in ("out", "before")
    ]
    assert abs(sizes[0] - sizes[1]) < 100  # digits of the errors


def test_the_model_is_as_it_was(lora, small, batches):
    model = Model().train()
    model.first.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    lotr.heal(model, small, lora, batches)
    with pytest.raises(lt.DataError, match="not finite"):
        lotr.heal(model, small, lora, batches * float("nan"))
    assert model.training
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    assert not model.first._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_values_that_come_no_nearer_are_not_taken(lora, small, batches):
    found = lotr.heal(Model(), small, lora, batches, rate=100.0)
    assert found.adapter is small
    assert found.after == found.before


def test_logits_are_compared_by_their_divergence(lora, small, batches):
    model = Model("logits")
    healed = lotr.heal(model, small, lora, batches)
    found = []
    for batch in batches[::5]:
        wanted, y = (dense(Model(), x)(batch).detach() for x in (lora, small))
        p = torch.distributions.Categorical(logits=wanted)
        q = torch.distributions.Categorical(logits=y)
        found.append(float(torch.distributions.kl_divergence(p, q).mean()))
    assert healed.before == pytest.approx(np.mean(found), rel=1e-4)
    assert healed.after < healed.before


def test_places_that_are_padded_do_not_count(lora, small, batches):
    model = Model("last_hidden_state")
    mask = torch.ones(16, 8, dtype=torch.long)
    mask[:, 5:] = 0
    x = torch.randn(10, 16, 8, 24, generator=torch.Generator().manual_seed(2))
    padded = x.clone()
    padded[:, :, 5:] = 100.0
    found = [
        lotr.heal(model, small, lora, [{"x": b, "attention_mask": mask} for b in some])
        for some in (x, padded)
    ]
    assert found[0].before == found[1].before
    assert found[0].after == found[1].after


def test_a_mask_of_places_is_none_of_classes(lora, small):
    """Sequences may have as many places as there are classes: every row's output counts whole."""
    model = Model("logits")
    x = torch.randn(20, 16, 24, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(16, 24, dtype=torch.long)
    mask[:, 9:] = 0
    healed = lotr.heal(model, small, lora, [{"x": b, "attention_mask": mask} for b in x])
    assert healed.before == pytest.approx(divergence(small, lora, x[::5]), rel=1e-4)


@torch.no_grad()
def divergence(one, other, held):
    """Mean over batches of the divergence of softmax outputs, by torch's own distributions."""
    found = []
    for batch in held:
        p, q = (
            torch.distributions.Categorical(logits=dense(Model(), a)(batch)) for a in (other, one)
        )
        found.append(float(torch.distributions.kl_divergence(p, q).mean()))
    return np.mean(found)


class Regression(Model):
    """Outputs that are no classes: one number, or several by the model's config."""

    def __init__(self, width, problem_type=None):
        super().__init__("logits")
        self.width = width
        self.config = SimpleNamespace(problem_type=problem_type)

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x).logits[..., : self.width])


@pytest.mark.parametrize(
    ("width", "problem"),
    [(1, None), (3, "regression"), (3, "multi_label_classification")],
)
def test_logits_of_no_single_class_are_compared_by_their_error(
    lora, small, batches, width, problem
):
    healed = lotr.heal(Regression(width, problem), small, lora, batches)
    found = []
    with torch.no_grad():
        for batch in batches[::5]:
            y, wanted = (dense(Model(), a)(batch)[..., :width] for a in (small, lora))
            found.append(float((y - wanted).square().sum() / wanted.square().sum()))
    assert healed.before == pytest.approx(np.mean(found), rel=1e-4)
    assert healed.after < healed.before


def test_hidden_states_are_read_where_logits_are_no_tensor(lora, small, batches):
    class Both(Model):
        def forward(self, x):
            return SimpleNamespace(logits=(1, 2), last_hidden_state=super().forward(x))

    healed = lotr.heal(Both(), small, lora, batches)
    assert healed.before == pytest.approx(lotr.heal(Model(), small, lora, batches).before)


def test_every_module_keeps_its_mode(lora, small, batches):
    model = Model().train()
    model.norm = torch.nn.BatchNorm1d(24).eval()  # frozen, as many train on
    lotr.heal(model, small, lora, batches)
    assert model.training
    assert model.first.training
    assert not model.norm.training


def test_what_is_carried_has_to_be_in_the_model(lora, small, batches):
    model = Model()
    key = "base_model.model.second.bias"
    trained = model.second.bias.detach().numpy() + 1
    carrying = dataclasses.replace(lora, extras={key: trained})
    with pytest.raises(lt.DataError, match=r"carries second\.bias.*load them into the model"):
        lotr.heal(model, small, carrying, batches)
    model.second.bias.data += 1
    assert lotr.heal(model, small, carrying, batches).adapter is not small


def test_an_output_may_be_named(lora, small, batches):
    model = Model("pooled")
    with pytest.raises(lt.OptionError, match="read="):
        lotr.heal(model, small, lora, batches)
    healed = lotr.heal(model, small, lora, batches, read=lambda out: out.pooled)
    assert healed.before == pytest.approx(lotr.heal(Model(), small, lora, batches).before)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a | {"rate": 0.0}, lt.OptionError, "rate is 0; expected a positive"),
        (lambda a: a | {"batches": a["batches"][:9]}, lt.OptionError, "9 batches.*at least 10"),
        (lambda a: a | {"model": 3}, lt.DataError, "expected a torch.nn.Module"),
        (lambda a: a | {"batches": "text"}, lt.DataError, "batches is a str"),
        (lambda a: a | {"batches": 3}, lt.DataError, "batches is a int"),
        (lambda a: a | {"read": 3}, lt.OptionError, "read is a int; expected a function"),
        (lambda a: a | {"original": "lora"}, lt.DataError, "original is a str"),
        (lambda a: a | {"model": torch.nn.Linear(2, 2)}, lt.DataError, "the model has no first"),
        (lambda a: a | {"model": Model(side=8)}, lt.ShapeError, r"first is \(8, 8\) in the model"),
        (
            lambda a: (
                a | {"original": lt.LoraAdapter(a["original"].modules[:1], {}, np.dtype("f4"))}
            ),
            lt.DataError,
            "the original has no second",
        ),
        (
            lambda a: (
                a
                | {
                    "original": lt.LoraAdapter(
                        (
                            *a["original"].modules,
                            lt.LoraModule("third", np.ones((2, 1)), np.ones((1, 2))),
                        ),
                        {},
                        np.dtype("f4"),
                    )
                }
            ),
            lt.DataError,
            "the compressed adapter has no third, which the original has",
        ),
        (
            lambda a: (
                a
                | {
                    "original": lt.LoraAdapter(
                        (
                            a["original"].modules[0],
                            lt.LoraModule("second", np.ones((2, 1)), np.ones((1, 2))),
                        ),
                        {},
                        np.dtype("f4"),
                    )
                }
            ),
            lt.ShapeError,
            r"second is \(2, 2\) in the original and \(24, 24\) in the compressed",
        ),
        (lambda a: a | {"read": lambda y: 3}, lt.OptionError, "read gave a int; expected a tensor"),
        (
            lambda a: (
                a
                | {
                    "model": Model("last_hidden_state"),
                    "batches": [
                        {"x": torch.ones(2, 3, 24), "attention_mask": torch.zeros(2, 3)}
                        for _ in range(10)
                    ],
                }
            ),
            lt.DataError,
            "cannot be compared: its mask leaves nothing",
        ),
        (lambda a: a | {"read": torch.zeros_like}, lt.DataError, "cannot be compared"),
    ],
)
def test_what_cannot_be_healed_is_refused(lora, small, batches, change, error, text):
    options = {"model": Model(), "original": lora, "batches": batches}
    options = change(options)
    with pytest.raises(error, match=text):
        lotr.heal(options.pop("model"), small, options.pop("original"), **options)


def test_a_layer_that_never_runs_is_named(lora, small, batches):
    class Half(Model):
        def forward(self, x):
            return self.first(x)

    with pytest.raises(lt.DataError, match="second did not run"):
        lotr.heal(Half(), small, lora, batches)


def test_shared_parts_alone_have_no_values(batches):
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(24, 2)), rng.normal(size=(2, 24))
    modules = [lt.LoraModule(f"layers.{k}.q", b * k, a) for k in (1, 2)]
    lora = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    small = lt.compress(lora, tolerance=0.3, form="lotr")
    with pytest.raises(lt.OptionError, match="no terms of single modules"):
        lotr.heal(Model(), small, lora, batches)


def test_embeddings_are_refused():
    rng = np.random.default_rng(0)
    modules = (lt.LoraModule("0", rng.normal(size=(8, 4)), rng.normal(size=(4, 30)), True),)
    lora = lt.LoraAdapter(modules, {}, np.dtype("float32"))
    small = lt.compress(lora, tolerance=0.5, form="lora")
    model = torch.nn.Sequential(torch.nn.Embedding(30, 8))
    with pytest.raises(lt.UnsupportedAdapterError, match="0 is an embedding"):
        lotr.heal(model, small, lora, torch.zeros(10, 2, dtype=torch.long))
