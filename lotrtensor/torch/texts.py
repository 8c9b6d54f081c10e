"""A base model with its tokenizer, and a file of texts in batches, as commands take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lotrtensor.adapters.formats.carried import PREFIX
from lotrtensor.adapters.formats.paths import open_regular, unreadable
from lotrtensor.adapters.loading import Adapter
from lotrtensor.errors import FormatError, MissingPackageError
from lotrtensor.torch.sources import from_numpy

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""Class of transformers for each ``task_type`` of an adapter; ``AutoModel`` for any other."""

LARGEST = 256 * 2**20
"""Bytes of a file of texts that are read at most."""


def base_model(base: Path, adapter: Adapter) -> nn.Module:
    """Load the model that an adapter is for, with the tensors that the adapter carries in full.

    Parameters
    ----------
    base : Path
        A directory as transformers writes it.
    adapter : LoraAdapter, LotrAdapter or CompressedAdapter
        Its ``task_type`` says which class.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    FormatError
        If the directory cannot be loaded, or carried tensors do not fit.
    """
    transformers = _transformers()
    if not base.is_dir():
        raise FormatError(f"{base} is no directory; expected a base model as transformers saves it")
    carried = {key.removeprefix(PREFIX): np.asarray(x) for key, x in adapter.extras.items()}
    kind = CLASSES.get(str(adapter.config.get("task_type")), "AutoModel")
    labels = [x.shape[0] for key, x in carried.items() if _HEAD.search(key) and x.ndim == 2]
    options = {"num_labels": labels[0]} if labels and kind.endswith("Classification") else {}
    try:
        model: nn.Module = getattr(transformers, kind).from_pretrained(base, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{base} cannot be loaded as {kind}: {error}") from error
    _load(model, carried)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


_HEAD = re.compile(r"(classifier|score|out_proj)\.weight$")


def _load(model: nn.Module, carried: Mapping[str, np.ndarray]) -> None:
    own = model.state_dict()
    for name, value in carried.items():
        if name not in own or tuple(own[name].shape) != value.shape:
            found = tuple(own[name].shape) if name in own else "missing"
            raise FormatError(
                f"the adapter carries {name} of shape {value.shape}, which is {found} in the base "
                "model; expected the model that it was trained on"
            )
        own[name].copy_(from_numpy(value))


def text_batches(
    base: Path, texts: Path, *, length: int, batch: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the texts of a file, a line each, in batches of about one length.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    FormatError
        If the file cannot be read or is empty, or the model has no tokenizer.
    """
    lines = [line for line in _read(texts).splitlines() if line.strip()]
    if not lines:
        raise FormatError(f"{texts} holds no text; expected a text a line")
    try:
        tokenizer: Any = _transformers().AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FormatError(f"{base} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(lines, truncation=True, max_length=length)["input_ids"]
    # Rows of like length need little padding; every so-manieth is of every length, so that what is
    # held out of the batches is of the same kind.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = []
    for start in range(0, len(order), batch):
        some = [rows[i] for i in order[start : start + batch]]
        padded = tokenizer.pad({"input_ids": some}, return_tensors="pt")
        found.append({key: value.to(device) for key, value in padded.items()})
    return found


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if len(content) > LARGEST:
        raise FormatError(f"{path} takes more than {LARGEST} bytes; give a part of it")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no UTF-8 text: {error.reason}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "this needs transformers, which is not installed: pip install 'lotrtensor[peft]'"
        ) from error
    # A command says itself what there is to say.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers
