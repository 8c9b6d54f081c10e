"""Checkpoints of real classes: PEFT and the merged model compute what the tuned one does."""

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.numpy

from lotrtensor import FormatError, LotrWarning, UnsupportedAdapterError, extract, load, merge
from lotrtensor.adapters.architecture import read_architecture
from tests.adapters_fixtures import assert_refused, lotr, quiet, write_lora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from tests.architectures import CONFIGS, build, output, relative, tune  # noqa: E402

MODELS = [*CONFIGS, "llava", "qwen2-vl"]
CARRIED = {
    "deberta": {"rel_embeddings"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "opt": {"embed_positions"},
    "bart": {"embed_positions"},
}
pytestmark = [
    quiet,
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to:UserWarning"),
    # Every weight was tuned, those too that a text alone does not reach.
    pytest.mark.filterwarnings("ignore:.*did not run in the forward:lotrtensor.errors.LotrWarning"),
    pytest.mark.filterwarnings("ignore:.*in one place and reads:lotrtensor.errors.LotrWarning"),
]


def both(tmp_path, name):
    """The base and its tuned version on disk; what the latter computes."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    before = output(model)
    tune(model).save_pretrained(tmp_path / "tuned")
    after = output(model)
    assert relative(before, after) > 0.1
    return type(model), after


def extracted(tmp_path, form="lora", **options):
    """The exact adapter in float32, with what was said."""
    goal = {"rank": 1} if form == "lora" else {"tolerance": 1e-6}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        arguments = {"form": form, "dtype": "float32", **goal, **options}
        adapter = extract(tmp_path / "base", tmp_path / "tuned", **arguments)
    return adapter, [str(w.message) for w in told if w.category is LotrWarning]


def merged(tmp_path, adapter, base="base", **options):
    """The merged checkpoint's directory, and what was said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merge(tmp_path / base, adapter, tmp_path / "merged", **options)
    return tmp_path / "merged", [str(w.message) for w in told if w.category is LotrWarning]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["lora", "lotr"])
def test_both_ways_compute_the_tuned_model(tmp_path, name, form):
    """Every matrix was tuned; PEFT finds every key of what is written, and so does merge."""
    import lotrtensor.peft  # noqa: F401 - registers LoTR

    model_class, expected = both(tmp_path, name)
    adapter, told = extracted(tmp_path, form)
    carried = {key.rpartition(".")[0].rpartition(".")[2] for key in adapter.extras}
    assert carried == CARRIED.get(name, set())
    assert any("carried in full" in text for text in told) == bool(carried)
    adapter.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        base = model_class.from_pretrained(tmp_path / "base")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative(output(adapted.get_base_model()), expected) < 2e-4
    path, told = merged(tmp_path, load(tmp_path / "adapter"))
    assert any("replace the base's" in text for text in told) == bool(carried)
    found, report = model_class.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert relative(output(found.eval()), expected) < 2e-4


def test_a_head_that_one_checkpoint_stores_again(tmp_path):
    """Tied by the config: adapted like the embeddings, with a word."""
    model_class, expected = both(tmp_path, "llama, tied")
    path = tmp_path / "tuned" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    adapter, told = extracted(tmp_path)
    assert any("lm_head.weight" in text and "model.embed_tokens.weight" in text for text in told)
    path, _ = merged(tmp_path, adapter)
    assert relative(output(model_class.from_pretrained(path).eval()), expected) < 2e-4


def test_models_that_take_no_run_without_numbers(tmp_path):
    """What was not seen is not said to be clear."""
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=40)
    model = transformers.XLNetLMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    tune(model).save_pretrained(tmp_path / "tuned")
    _, told = extracted(tmp_path)
    assert any("XLNetLMHeadModel does not take a run without numbers" in text for text in told)


# ---------------------------------------------------------------- merge against PEFT


def adapted(tmp_path, name, **fields):
    """A PEFT LoRA of random factors on a base; what merge_and_unload makes of it."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, **fields)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "lora")
    return model


GPT2_TARGETS = [
    ["attn.c_proj", "lm_head"],
    ["c_attn", "lm_head"],
    ["lm_head", "c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"],
    ["wte", "wpe", "attn.c_proj"],
]


@pytest.mark.parametrize("targets", GPT2_TARGETS)
@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("form", ["lora", "lotr"])
def test_conv1d_and_linear_are_merged_as_peft_does(tmp_path, targets, flag, form):
    """Whatever the one flag of the config says."""
    model = adapted(tmp_path, "gpt2", target_modules=targets)
    if flag is not None:
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": flag}))
    expected = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
    adapter = load(tmp_path / "lora")
    if form == "lotr":
        from lotrtensor import convert

        adapter = convert(adapter, tolerance=1e-6, dtype="float32")
    path, _ = merged(tmp_path, adapter)
    for key, x in safetensors.numpy.load_file(path / "model.safetensors").items():
        assert x == pytest.approx(expected[key], abs=1e-4), key


@pytest.mark.parametrize("name", ["llama", "bert", "phi", "qwen2-vl", "t5"])
def test_linear_layers_are_merged_as_peft_does(tmp_path, name):
    """All of them, by outputs."""
    targets = {"bert": ["query", "value", "dense"], "t5": ["q", "v", "wo"]}
    model = adapted(tmp_path, name, target_modules=targets.get(name, ["q_proj", "v_proj"]))
    expected = output(model.merge_and_unload())
    path, _ = merged(tmp_path, load(tmp_path / "lora"))
    assert relative(output(type(build(name)).from_pretrained(path).eval()), expected) < 1e-5


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_shared_weight_is_not_moved_for_one_of_its_uses(tmp_path, targets):
    """A tied head: an update for it alone, for the embeddings alone, or one for each."""
    adapted(tmp_path, "llama, tied", target_modules=[*targets, "q_proj"])
    found = lotr("merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert_refused(found, "lm_head", "embed_tokens", "tie_word_embeddings")
    assert not (tmp_path / "out").exists()


def test_a_shared_weight_moves_where_all_uses_agree(tmp_path):
    """PEFT ties the adapters of tied layers on request."""
    fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = adapted(tmp_path, "llama, tied", **fields)
    expected = output(model.get_base_model())
    path, _ = merged(tmp_path, load(tmp_path / "lora"))
    found = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    assert relative(output(found), expected) < 1e-5


def test_modules_to_save_of_a_shared_weight(tmp_path):
    """Embeddings that were trained in full under a head that was not."""
    model = adapted(
        tmp_path, "llama, tied", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.add_(1)
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(FormatError, match=r"embed_tokens.*lm_head"):
        merged(tmp_path, load(tmp_path / "lora"))


def test_modules_to_save_are_merged_as_peft_does(tmp_path):
    """A classifier's head that was trained in full."""
    model = adapted(
        tmp_path, "deberta", target_modules=["query_proj"], modules_to_save=["classifier", "pooler"]
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path / "lora")
    expected = output(model.merge_and_unload())
    path, _ = merged(tmp_path, load(tmp_path / "lora"))
    found = transformers.DebertaV2ForSequenceClassification.from_pretrained(path).eval()
    assert relative(output(found), expected) < 1e-5


# ---------------------------------------------------------------- names


def rename_keys(path, pattern, replacement):
    """Write a checkpoint's keys as an older release did."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    renamed = {re.sub(pattern, replacement, key): x for key, x in tensors.items()}
    safetensors.numpy.save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return set(tensors), set(renamed)


OLDER = [
    ("llava", r"^model\.language_model\.", "language_model.model."),
    ("llava", r"^language_model\.model\.", "model.language_model."),
    ("qwen2-vl", r"^model\.language_model\.", "model."),
    ("qwen2-vl", r"^model\.(?!language_model|visual)", "model.language_model."),
    ("gpt2", r"^transformer\.", ""),
    ("bert", r"^bert\.", ""),
]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(("name", "pattern", "replacement"), OLDER)
def test_keys_of_another_release(tmp_path, name, pattern, replacement, side):
    """transformers renames them when it loads; the adapter has today's, the merged file its own."""
    model_class, expected = both(tmp_path, name)
    old, new = rename_keys(tmp_path / side, pattern, replacement)
    adapter, _ = extracted(tmp_path)
    paths = {path for path, _ in build(name).named_modules()}
    assert {module.name for module in adapter.modules} <= paths
    path, _ = merged(tmp_path, adapter)
    found = safetensors.numpy.load_file(path / "model.safetensors")
    assert set(found) == (new if side == "base" else old)
    assert relative(output(model_class.from_pretrained(path).eval()), expected) < 2e-4


@pytest.mark.parametrize(("name", "pattern", "replacement"), OLDER)
def test_adapters_with_the_names_of_another_release(tmp_path, name, pattern, replacement):
    """What was trained before the renaming goes into a checkpoint written after it."""
    targets = {"gpt2": ["c_attn", "attn.c_proj"], "bert": ["query"]}.get(name, ["q_proj"])
    model = adapted(tmp_path, name, target_modules=targets)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = {
        prefix + re.sub(pattern, replacement, key.removeprefix(prefix)): x
        for key, x in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    expected = output(model.merge_and_unload())
    path, _ = merged(tmp_path, load(tmp_path / "lora"))
    assert relative(output(type(build(name)).from_pretrained(path).eval()), expected) < 1e-5


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_moved_containers_of_an_unknown_class(tmp_path, prefix):
    """Without a config: found under other containers, with a word."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.self_attn.q_proj" for i in range(2)]
    pairs = {
        f"model.language_model.{n}": (rng.random((6, 2), "float32"), rng.random((2, 6), "float32"))
        for n in names
    }
    write_lora(tmp_path / "lora", pairs)
    (tmp_path / "base").mkdir()
    weights = {f"{prefix}{n}.weight": rng.random((6, 6), "float32") for n in names}
    safetensors.numpy.save_file(weights, tmp_path / "base" / "model.safetensors")
    path, told = merged(tmp_path, load(tmp_path / "lora"))
    assert len(told) == (prefix != "model.language_model.")
    found = safetensors.numpy.load_file(path / "model.safetensors")
    for n in names:
        b, a = pairs[f"model.language_model.{n}"]
        assert found[f"{prefix}{n}.weight"] == pytest.approx(
            weights[f"{prefix}{n}.weight"] + 2 * b @ a, abs=1e-5
        )


def test_two_towers_that_find_one_weight(tmp_path):
    """Neither update overwrites the other."""
    ones = np.ones((4, 1), np.float32)
    pairs = {f"{tower}.layers.0.q": (ones, ones.T) for tower in ("text_model", "vision_model")}
    write_lora(tmp_path / "lora", pairs)
    (tmp_path / "base").mkdir()
    weights = {"layers.0.q.weight": np.zeros((4, 4), np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(FormatError, match=r"text_model\.layers.*vision_model\.layers.*one tower"):
        merged(tmp_path, load(tmp_path / "lora"))
    write_lora(tmp_path / "one", dict([pairs.popitem()]))
    _, told = merged(tmp_path, load(tmp_path / "one"))
    assert "vision_model.layers.0.q of the adapter is taken for layers.0.q" in told[0]


def test_replicated_layers_are_refused(tmp_path):
    """Their copies are in no checkpoint; a LoTR of them remembers."""
    from lotrtensor import convert

    fields = {"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}
    adapted(tmp_path, "llama", **fields)
    adapter = load(tmp_path / "lora")
    for found in (adapter, convert(adapter, rank=8)):
        with pytest.raises(UnsupportedAdapterError, match=r"layer_replication.*merge_and_unload"):
            merged(tmp_path, found)
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- where the class is not known


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["NoSuchModel"], "model_type": "gpt2"},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "nothing"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": "GPT2LMHeadModel", "model_type": "gpt2"},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_head": 5},
        {"architectures": ["AutoConfig"], "model_type": "gpt2"},
    ],
)
def test_configs_that_name_no_class(tmp_path, config):
    """No class is better than a wrong one; nothing is raised, and nothing is run."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path, config) is None


def test_code_beside_a_config_is_not_run(tmp_path):
    """Whatever auto_map says."""
    config = {"architectures": ["MyModel"], "model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    assert read_architecture(tmp_path, config) is None


def nameless(path):
    """Take the class out of a checkpoint's config."""
    (path / "config.json").write_text("{}")


def test_biases_tell_what_is_stored_in_by_out(tmp_path):
    """A GPT-2 without its config: the square projection is asked for, all others are told."""
    both(tmp_path, "gpt2")
    nameless(tmp_path / "base")
    arguments = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--form", "lora"]
    found = lotr("extract", *arguments, "--rank", 1, "-o", tmp_path / "out", "--modules", "h.0")
    assert found.code == 0, found.err  # mlp.c_proj, of the same name, tells
    for module in load(tmp_path / "out").modules:
        name = f"{module.name}.weight"
        sides = [
            safetensors.numpy.load_file(tmp_path / s / "model.safetensors")[name]
            for s in ("base", "tuned")
        ]
        assert pytest.approx((sides[1] - sides[0]).T, abs=1e-3) == module.B @ module.A


@pytest.mark.parametrize("flag", [False, True])
def test_square_weights_that_nothing_tells_of(tmp_path, flag):
    """Layers of both layouts, and a square one of a name of its own: asked, not guessed."""
    rng = np.random.default_rng(0)
    base = {
        "up.weight": rng.random((4, 8), "float32"),
        "up.bias": np.zeros(8, np.float32),
        "down.weight": rng.random((3, 4), "float32"),
        "down.bias": np.zeros(3, np.float32),
        "mix.weight": rng.random((4, 4), "float32"),
        "mix.bias": np.zeros(4, np.float32),
    }
    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(base, tmp_path / "base" / "model.safetensors")
    b, a = rng.random((4, 1), "float32"), rng.random((1, 4), "float32")
    write_lora(tmp_path / "lora", {"mix": (b, a)}, fan_in_fan_out=flag)
    command = ["merge", tmp_path / "lora", "--base", tmp_path / "base"]
    found = lotr(*command, "-o", tmp_path / "out")
    assert_refused(found, "mix", "--fan-in-fan-out")
    assert not (tmp_path / "out").exists()
    for pattern, turned in (("mix", True), ("^$", False)):
        found = lotr(*command, "-o", tmp_path / pattern, "--fan-in-fan-out", pattern)
        assert found.code == 0, found.err
        x = safetensors.numpy.load_file(tmp_path / pattern / "model.safetensors")["mix.weight"]
        delta = 2 * b @ a
        assert x - base["mix.weight"] == pytest.approx(delta.T if turned else delta, abs=1e-5)
    with pytest.raises(FormatError, match=r"no regular expression"):
        merged(tmp_path, load(tmp_path / "lora"), fan_in_fan_out="(")


def test_a_pattern_that_the_class_contradicts(tmp_path):
    """The class knows better."""
    both(tmp_path, "gpt2")
    with pytest.raises(FormatError, match=r"lm_head, which GPT2LMHeadModel makes a linear layer"):
        extracted(tmp_path, fan_in_fan_out="c_|lm_head")
    with pytest.raises(FormatError, match=r"c_attn, which GPT2LMHeadModel makes a Conv1D"):
        extracted(tmp_path, embeddings="c_attn")
    adapter, _ = extracted(tmp_path, fan_in_fan_out=True)  # for all whose class is not known
    head = next(module for module in adapter.modules if module.name == "lm_head")
    assert head.shape == (64, 32)


def test_names_that_speak_of_embeddings(tmp_path):
    """Without the class a relative embedding is asked for, not taken for a linear layer."""
    both(tmp_path, "deberta")
    nameless(tmp_path / "base")
    options = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--rank", 1]
    found = lotr("extract", *options, "-o", tmp_path / "out")
    assert_refused(found, "rel_embeddings", "--embeddings")
    adapter, _ = extracted(tmp_path, embeddings="embeddings")
    turned = {module.name for module in adapter.modules if module.embedding}
    assert turned == {"deberta.embeddings.word_embeddings", "deberta.encoder.rel_embeddings"}


BLOCKED = """
import sys, warnings
sys.modules["transformers"] = sys.modules["torch"] = None
import lotrtensor as lt
warnings.simplefilter("ignore")
"""


def without_transformers(code, directory):
    """Run code where transformers and torch are not installed."""
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_without_transformers(tmp_path):
    """Biases tell of GPT-2's layers; what its config ties is refused."""
    adapted(tmp_path, "gpt2", target_modules=["c_attn", "attn.c_proj", "lm_head"])
    run = without_transformers('lt.merge("base", lt.load("lora"), "out")', tmp_path)
    assert run.returncode == 0, run.stderr
    path, _ = merged(tmp_path, load(tmp_path / "lora"))
    found, expected = (
        safetensors.numpy.load_file(p / "model.safetensors") for p in (tmp_path / "out", path)
    )
    assert all(np.array_equal(found[key], x) for key, x in expected.items())


def test_tied_embeddings_without_transformers(tmp_path):
    """The config says that there is a tie, not of what."""
    adapted(tmp_path, "llama, tied", target_modules=["embed_tokens"])
    run = without_transformers('lt.merge("base", lt.load("lora"), "out")', tmp_path)
    assert "FormatError" in run.stderr
    assert "embed_tokens" in run.stderr
    assert "install transformers" in run.stderr
    assert not (tmp_path / "out").exists()


def test_transformers_is_imported_only_in_doubt(tmp_path):
    """Not for weights whose shapes and names tell all."""
    code = """
        assert "torch" not in sys.modules
    """.strip()
    adapted(tmp_path, "llama", target_modules=["up_proj", "down_proj"])
    script = (
        f'import sys\nimport lotrtensor as lt\nlt.merge("base", lt.load("lora"), "out")\n{code}'
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
