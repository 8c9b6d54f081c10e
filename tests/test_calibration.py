"""Calibration: moments beside dense ones, and adapters compressed by it beside dense outputs."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import lotrtensor as lt
from lotrtensor.core.bits.weighted import WeightedStackInBits
from lotrtensor.verbs import _metrics

torch = pytest.importorskip("torch")
import lotrtensor.torch as lotr  # noqa: E402

SIDES = {"query": (20, 32), "key": (24, 32), "last": (5, 20)}


class Model(torch.nn.Module):
    """Two layers of one input, and a third on the first of them."""

    def __init__(self, kind="logits"):
        super().__init__()
        torch.manual_seed(0)
        for name, (m, n) in SIDES.items():
            self.add_module(name, torch.nn.Linear(n, m))
        self.kind = kind

    def forward(self, x, attention_mask=None):
        y = self.last(torch.tanh(self.query(x)) + torch.tanh(self.key(x))[..., :20])
        return SimpleNamespace(**{self.kind: y}) if self.kind else y


@pytest.fixture
def lora():
    rng = np.random.default_rng(0)
    modules = [
        lt.LoraModule(name, 0.3 * rng.normal(size=(m, 4)), 0.5 * rng.normal(size=(4, n)))
        for name, (m, n) in SIDES.items()
    ]
    return lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))


@pytest.fixture
def batches():
    """Inputs that lie about a few directions, as those of layers do."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0, -3, 32).exp()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    return (torch.randn(40, 16, 32, generator=generator) * spread) @ turn


def dense(model, adapter):
    model = copy.deepcopy(model)
    for module in (adapter if isinstance(adapter, lt.LoraAdapter) else adapter.to_lora()).modules:
        delta = torch.as_tensor(module.B.astype(float) @ module.A.astype(float))
        model.get_submodule(module.name).weight.data += delta.float()
    return model.eval()


def whole(moment):
    """The matrix that a moment stands for, where nothing was cut."""
    return moment.factor.T.astype(float) @ moment.factor


def test_moments_of_inputs_are_those_of_dense_rows(lora, batches):
    found = lotr.calibrate(Model(), lora, batches)
    rows = batches.reshape(-1, 32).double().numpy()
    np.testing.assert_allclose(whole(found.modules["query"].inputs), rows.T @ rows / 640, atol=1e-5)
    assert found.modules["query"].inputs is found.modules["key"].inputs
    adapted = dense(Model(), lora)
    inner = torch.tanh(adapted.query(batches)) + torch.tanh(adapted.key(batches))[..., :20]
    rows = inner.detach().reshape(-1, 20).double().numpy()
    np.testing.assert_allclose(whole(found.modules["last"].inputs), rows.T @ rows / 640, atol=1e-5)
    assert found.places == 640


def test_moments_of_gradients_are_the_information_of_logits(lora, batches):
    """Drawn classes against the exact E = Jᵀ (diag p − p pᵀ) J of every row."""
    found = lotr.calibrate(Model(), lora, batches.repeat(20, 1, 1))
    logits = dense(Model(), lora)(batches.reshape(-1, 32)).logits.double()
    p = logits.softmax(-1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0).numpy()
    drawn = whole(found.modules["last"].outputs)  # of the logits themselves: J = 1
    assert np.linalg.norm(drawn - exact) < 0.05 * np.linalg.norm(exact)


def test_moments_of_gradients_of_other_outputs_are_those_of_jacobians(lora, batches):
    model = Model("")
    found = lotr.calibrate(model, lora, batches.repeat(20, 1, 1))
    np.testing.assert_allclose(whole(found.modules["last"].outputs), np.eye(5), atol=0.1)
    adapted = dense(model, lora)
    x = batches.reshape(-1, 32)
    slope = (1 - torch.tanh(adapted.query(x)) ** 2).detach().double()
    w = adapted.last.weight.detach().double()
    exact = ((slope[:, :, None] * (w.T @ w)) * slope[:, None, :]).mean(0).numpy()
    drawn = whole(found.modules["query"].outputs)
    assert np.linalg.norm(drawn - exact) < 0.1 * np.linalg.norm(exact)


def test_few_directions_and_few_rows_keep_the_trace(lora, batches, monkeypatch):
    full = lotr.calibrate(Model(), lora, batches).modules["query"].inputs
    few = lotr.calibrate(Model(), lora, batches, rank=3).modules["query"].inputs
    assert few.factor.shape == (3, 32)
    assert few.trace == pytest.approx(full.trace, rel=1e-6)
    values = np.linalg.eigvalsh(whole(full))[::-1]
    assert np.sum(few.factor.astype(float) ** 2) == pytest.approx(values[:3].sum(), rel=0.1)
    assert few.left_out == pytest.approx(few.trace - values[:3].sum(), rel=0.3)
    monkeypatch.setattr("lotrtensor.torch.calibration.PLACES", 320)
    some = lotr.calibrate(Model(), lora, batches).modules["query"].inputs
    assert some.trace == pytest.approx(full.trace, rel=1e-6)
    assert np.linalg.norm(whole(some) - whole(full)) < 0.2 * np.linalg.norm(whole(full))
    assert np.sum(some.factor.astype(float) ** 2) == pytest.approx(some.trace, rel=1e-4)


def test_places_that_a_mask_leaves_out_do_not_count(lora, batches):
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[:, 10:] = 0
    one = [{"x": batches[:8], "attention_mask": mask}]
    other = [{"x": batches[:8, :10], "attention_mask": mask[:, :10]}]
    first, second = (lotr.calibrate(Model(), lora, found * 2) for found in (one, other))
    assert first.places == second.places == 160
    for name in SIDES:
        for side in ("inputs", "outputs"):
            a, b = (whole(getattr(found.modules[name], side)) for found in (first, second))
            np.testing.assert_allclose(a, b, atol=1e-5)


def divergence(model, one, other, x):
    p, q = (dense(model, adapter)(x).logits.double().log_softmax(-1) for adapter in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_outputs_stay_nearer_at_one_size(lora, batches):
    model = Model()
    calibration = lotr.calibrate(model, lora, batches[:30])
    budget = lt.compress(lora, tolerance=0.5, form="lora").file_bytes
    plain = lt.compress(lora, budget=budget, form="lora")
    kept = lt.compress(lora, budget=budget, calibration=calibration)
    assert kept.file_bytes <= budget
    with torch.no_grad():
        x = batches[30:].reshape(-1, 32)
        assert divergence(model, lora, kept, x) < 0.7 * divergence(model, lora, plain, x)
    assert kept.alternatives == ()
    assert plain.weighted_error is None


def test_the_errors_are_those_of_dense_matrices(lora, batches, tmp_path):
    calibration = lotr.calibrate(Model(), lora, batches)
    kept = lt.compress(lora, budget="40%", calibration=calibration)
    kept.save(tmp_path / "kept")
    read = {m.name: m for m in lt.load(tmp_path / "kept").updates()}
    plain = weighted = norm = scale = 0.0
    for module in lora.modules:
        moments = calibration.modules[module.name]
        s, c = (_dense_metric(moment) for moment in (moments.inputs, moments.outputs))
        delta = module.B.astype(float) @ module.A
        error = delta - read[module.name].B @ read[module.name].A
        plain += np.sum(error**2)
        norm += np.sum(delta**2)
        weighted += np.trace(error.T @ c @ error @ s)
        scale += np.trace(delta.T @ c @ delta @ s)
    assert kept.relative_error == pytest.approx(np.sqrt(plain / norm), rel=1e-4)
    assert kept.weighted_error == pytest.approx(np.sqrt(weighted / scale), rel=1e-4)


def _dense_metric(moment):
    floor = (moment.left_out + _metrics.DAMPING * moment.trace) / moment.size
    return whole(moment) + floor * np.eye(moment.size)


def test_the_answer_is_the_update_s_and_not_the_factors_(lora, batches):
    """Another gauge of the same update, B T · T⁻¹ A, gives the same terms."""
    metrics = _metrics.metrics_of(lora, lotr.calibrate(Model(), lora, batches))
    turn = np.random.default_rng(3).normal(size=(4, 4))
    for m in lora.modules:
        pairs = [(m.B, m.A), (m.B @ turn, np.linalg.solve(turn, m.A))]
        stacks = [
            WeightedStackInBits(lt.LowRankStack([b], [a]), [metrics[m.name]]) for b, a in pairs
        ]
        found = [np.matmul(*stack.quantise(0.1)[0].factors(0)) for stack in stacks]
        np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_a_file_holds_what_was_measured(lora, batches, tmp_path):
    found = lotr.calibrate(Model(), lora, batches)
    found.save(tmp_path / "calibration")
    read = lt.Calibration.load(tmp_path / "calibration")
    assert read.places == found.places
    assert read.modules["query"].inputs is read.modules["key"].inputs
    for name, module in found.modules.items():
        np.testing.assert_array_equal(read.modules[name].outputs.factor, module.outputs.factor)
        assert read.modules[name].norm == module.norm
    with pytest.raises(lt.FormatError, match="exists"):
        found.save(tmp_path / "calibration")
    one, other = (lt.compress(lora, budget="40%", calibration=x) for x in (found, read))
    assert lt.compare(one, other).relative_error == 0


def test_the_model_is_left_as_it_was(lora, batches):
    model = Model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lotr.calibrate(model, lora, batches)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


class InPlace(Model):
    def forward(self, x, attention_mask=None):
        y = torch.nn.functional.relu(self.query(x), inplace=True)
        return self.last(y + torch.tanh(self.key(x))[..., :20])


class Plain(Model):
    def forward(self, x, attention_mask=None):
        return self.last(torch.relu(self.query(x)) + torch.tanh(self.key(x))[..., :20])


def test_outputs_of_layers_may_be_changed_in_place(lora, batches):
    one, other = (lotr.calibrate(model(), lora, batches) for model in (InPlace, Plain))
    for name, module in one.modules.items():
        np.testing.assert_allclose(
            whole(module.outputs), whole(other.modules[name].outputs), rtol=1e-4, atol=1e-6
        )


class ChangedInput(torch.nn.Module):
    """Two layers see one tensor, which was changed in place in between."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 20), torch.nn.Linear(32, 20)
        self.inplace = inplace

    def forward(self, x):
        x = x.clone()
        y = self.first(x)
        x = torch.relu_(x) if self.inplace else torch.relu(x)
        return y + self.second(x)


def test_an_input_that_is_changed_in_place_is_another_one(batches):
    rng = np.random.default_rng(0)
    modules = [
        lt.LoraModule(name, rng.normal(size=(20, 4)), rng.normal(size=(4, 32)))
        for name in ("first", "second")
    ]
    lora = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    one, other = (lotr.calibrate(ChangedInput(kind), lora, batches) for kind in (True, False))
    assert one.modules["first"].inputs is not one.modules["second"].inputs
    for name in ("first", "second"):
        found, expected = (whole(c.modules[name].inputs) for c in (one, other))
        np.testing.assert_allclose(found, expected, atol=1e-5)


class Flattened(Model):
    """Its layers see the places of all sequences one below the other."""

    def forward(self, x, attention_mask=None):
        found = super().forward(x.reshape(-1, 32))
        return SimpleNamespace(logits=found.logits.reshape(*x.shape[:2], -1))


def test_places_of_a_mask_are_told_in_flattened_layers_too(lora, batches):
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[:, 10:] = 0
    x = batches[:8].clone()
    x[:, 10:] *= 100
    given = [{"x": x, "attention_mask": mask}] * 2
    one, other = (lotr.calibrate(model(), lora, given) for model in (Flattened, Model))
    assert one.places == other.places == 160
    for name in SIDES:
        np.testing.assert_allclose(
            whole(one.modules[name].inputs), whole(other.modules[name].inputs), atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype, lora, batches):
    whole_model, half = Model(), Model().to(dtype)
    one = lotr.calibrate(whole_model, lora, batches)
    other = lotr.calibrate(half, lora, batches.to(dtype))
    for name in SIDES:
        a, b = (whole(found.modules[name].inputs) for found in (one, other))
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_weights_stored_in_by_out(lora, batches):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, plain = Model(), Model()
    for name, (m, n) in SIDES.items():
        layer = conv1d(m, n)
        layer.weight.data = getattr(plain, name).weight.data.T.clone()
        layer.bias.data = getattr(plain, name).bias.data.clone()
        setattr(model, name, layer)
    one, other = (lotr.calibrate(m, lora, batches) for m in (model, plain))
    for name in SIDES:
        for side in ("inputs", "outputs"):
            a, b = (whole(getattr(found.modules[name], side)) for found in (one, other))
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_ranks_above_the_rows_of_a_layer(batches):
    """A LoRA of rank 8 on a classifier of five labels, say."""
    rng = np.random.default_rng(0)
    modules = [
        lt.LoraModule(name, 0.3 * rng.normal(size=(m, 8)), rng.normal(size=(8, n)))
        for name, (m, n) in SIDES.items()
    ]
    lora = lt.LoraAdapter(tuple(modules), {}, np.dtype("float32"))
    calibration = lotr.calibrate(Model(), lora, batches, rank=1)
    kept = lt.compress(lora, budget="60%", calibration=calibration)
    assert kept.weighted_error < 0.3


def test_the_error_that_is_least_is_the_one_in_the_metric(batches):
    """More bytes never give a file that is worse in it, though its plain error may be larger."""
    rng = np.random.default_rng(0)
    lora = lt.LoraAdapter(
        (lt.LoraModule("0", rng.normal(size=(8, 8)), rng.normal(size=(8, 512))),),
        {},
        np.dtype("float32"),
    )
    few = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 64, 3, generator=torch.Generator().manual_seed(1)) @ few
    calibration = lotr.calibrate(torch.nn.Sequential(torch.nn.Linear(512, 8)), lora, x)
    budgets = (1000, 1500, 2000, 3000, 4000)
    found = [lt.compress(lora, budget=size, calibration=calibration) for size in budgets]
    errors = [adapter.weighted_error for adapter in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_values_beyond_half_precision_are_kept_in_single(lora, batches):
    large = tuple(lt.LoraModule(m.name, 5e4 * m.B, m.A) for m in lora.modules)
    lora = dataclasses.replace(lora, modules=large)
    model = Model("")
    for layer in (model.query, model.key, model.last):
        layer.weight.data *= 1e-3
    calibration = lotr.calibrate(model, lora, batches * 1e-4)
    kept = lt.compress(lora, budget="60%", calibration=calibration)
    assert np.isfinite(kept.relative_error)
    assert kept.weighted_error < 0.5
    assert kept.groups[0].stack.value_dtype == np.float32


def test_values_of_usual_size_are_kept_in_half_precision(lora, batches):
    calibration = lotr.calibrate(Model(""), lora, batches)
    kept = lt.compress(lora, budget="30%", calibration=calibration)
    assert {group.stack.value_dtype.name for group in kept.groups} == {"float16"}


class WithoutGradients(Model):
    def forward(self, x, attention_mask=None):
        with torch.no_grad():
            y = self.query(x)
        return self.last(torch.tanh(y) + torch.tanh(self.key(x))[..., :20])


class Unused(Model):
    def forward(self, x, attention_mask=None):
        self.key(x)
        return self.last(torch.tanh(self.query(x)))


class Uncalled(Model):
    def forward(self, x, attention_mask=None):
        return self.last(torch.tanh(self.query(x)))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Unused, "do not depend on key"),
        (Uncalled, "key did not run on the first batch"),
        (WithoutGradients, "do not depend on query"),
    ],
)
def test_a_layer_without_a_part_in_the_output_is_named(model, text, lora, batches):
    with pytest.raises(lt.DataError, match=text):
        lotr.calibrate(model(), lora, batches)


def test_numbers_that_are_not_finite_are_named(lora, batches):
    batches[3, 2, 1] = float("nan")
    with pytest.raises(lt.DataError, match="not finite"):
        lotr.calibrate(Model(), lora, batches)


@pytest.mark.parametrize(("options", "error"), [({"rank": 0}, "rank is 0"), ({}, "0 batches")])
def test_options_without_a_meaning_are_refused(options, error, lora, batches):
    with pytest.raises(lt.OptionError, match=error):
        lotr.calibrate(Model(), lora, batches if options else [], **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"read": 3}, lt.OptionError, "expected a function"),
        ({"read": lambda output: output.logits.mean()}, lt.OptionError, "is one number"),
        ({"seed": 2**64}, lt.OptionError, "seed"),
        ({"batches": {"x": torch.ones(8, 32)}}, lt.DataError, "batches is a dict"),
        (
            {"batches": [{"x": torch.ones(2, 4, 32), "attention_mask": torch.zeros(2, 4)}]},
            lt.DataError,
            "leave no place",
        ),
    ],
)
def test_slips_get_one_sentence(options, error, text, lora, batches):
    with pytest.raises(error, match=text):
        lotr.calibrate(Model(), lora, **{"batches": batches, **options})


def test_the_caller_s_inputs_get_no_gradients(lora, batches):
    batches.requires_grad_(True)
    lotr.calibrate(Model(), lora, batches)
    assert batches.grad is None


def test_too_few_tokens_are_told(lora, batches):
    with pytest.warns(lt.LotrWarning, match=r"48 places .* 32 columns: expected at least 64"):
        lotr.calibrate(Model(), lora, batches[:3])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tolerance": 0.3}, lt.RankError, "expected a budget"),
        ({"budget": "40%", "form": "lotr"}, lt.OptionError, "terms of single modules"),
        ({"budget": "40%", "bits": 4}, lt.OptionError, "terms of single modules"),
    ],
)
def test_goals_without_a_meaning_are_refused(options, error, text, lora, batches):
    calibration = lotr.calibrate(Model(), lora, batches)
    with pytest.raises(error, match=text):
        lt.compress(lora, calibration=calibration, **options)


def test_a_calibration_of_other_modules_is_refused(lora, batches):
    calibration = lotr.calibrate(Model(), lora, batches)
    some = dict(list(calibration.modules.items())[:2])
    with pytest.raises(lt.DataError, match="has no last"):
        lt.compress(lora, budget="40%", calibration=lt.Calibration(some, 640))
    other = {**calibration.modules, "last": calibration.modules["query"]}
    with pytest.raises(lt.DataError, match=r"last is \(5, 20\) in the adapter and \(20, 32\)"):
        lt.compress(lora, budget="40%", calibration=lt.Calibration(other, 640))
    with pytest.raises(lt.DataError, match="calibration is a dict"):
        lt.compress(lora, budget="40%", calibration=some)


def test_a_calibration_of_another_adapter_is_told(lora, batches):
    calibration = lotr.calibrate(Model(), lora, batches)
    doubled = tuple(lt.LoraModule(m.name, 2 * m.B, m.A) for m in lora.modules)
    with pytest.warns(lt.LotrWarning, match="another adapter, in which query has the norm"):
        lt.compress(
            dataclasses.replace(lora, modules=doubled), budget="40%", calibration=calibration
        )


def test_what_is_too_small_or_large_to_be_stored_is_refused(lora, batches):
    module = lt.LoraModule("0", lora.modules[0].B, lora.modules[0].A)
    lora = dataclasses.replace(lora, modules=(module,))
    for scale, text in ((1e-18, "is zero"), (1e16, "too large")):
        with pytest.raises(lt.DataError, match=text):
            model = torch.nn.Sequential(torch.nn.Linear(32, 20))
            lotr.calibrate(model, lora, batches * scale)
