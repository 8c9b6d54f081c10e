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
from lotrtensor.errors import FormatError, MissingPackageError, UnsupportedAdapterError
from lotrtensor.torch.sources import from_numpy

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""Class of transformers for each ``task_type`` of an adapter; ``AutoModel`` for any other."""

PAIRED = ("SEQ_2_SEQ_LM", "QUESTION_ANS")
"""Tasks whose inputs are more than a text."""

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
        If the directory cannot be loaded, carried tensors do not fit, or a head is in neither.
    UnsupportedAdapterError
        If the task takes more than a text.
    """
    transformers = _transformers()
    task = adapter.config.get("task_type")
    if task in PAIRED:
        raise UnsupportedAdapterError(
            f"task_type is {task}, whose inputs are more than a text a line; call "
            "lotrtensor.torch.calibrate or heal with batches of your own"
        )
    if not base.is_dir():
        raise FormatError(f"{base} is no directory; expected a base model as transformers saves it")
    carried = {key.removeprefix(PREFIX): np.asarray(x) for key, x in adapter.extras.items()}
    kind = CLASSES.get(str(task), "AutoModel")
    labels = [x.shape[0] for key, x in carried.items() if _HEAD.search(key) and x.ndim == 2]
    options = {"num_labels": labels[0]} if labels and kind.endswith("Classification") else {}
    try:
        model, told = getattr(transformers, kind).from_pretrained(
            base, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged file or config ends in errors of several packages
        raise FormatError(f"{base} cannot be loaded as {kind}: {_line(error)}") from error
    missing = [key for key in told["missing_keys"] if key not in carried]
    if missing and kind != "AutoModel":  # which has no head; a pooler is not looked at
        raise FormatError(
            f"{base} has no {min(missing)}, nor does the adapter carry it: outputs would be those "
            "of random numbers; call lotrtensor.torch.calibrate or heal with the model that you run"
        )
    _load(model, carried)
    found: nn.Module = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return found


def _line(error: Exception) -> str:
    """What an error of another package says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
    model: nn.Module, base: Path, texts: Path, *, length: int, batch: int
) -> list[dict[str, Tensor]]:
    """Return the texts of a file, a line each, in batches of about one length for the model.

    No text is longer than ``length`` tokens, or than the model's own limit.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    FormatError
        If the file cannot be read or is empty, or the model has no tokenizer that pads.
    """
    lines = [line for line in _read(texts).splitlines() if line.strip()]
    if not lines:
        raise FormatError(f"{texts} holds no text; expected a text a line")
    try:
        tokenizer: Any = _transformers().AutoTokenizer.from_pretrained(base)
    except Exception as error:  # of several packages, as above
        raise FormatError(f"{base} has no tokenizer that can be loaded: {_line(error)}") from error
    config: Any = getattr(model, "config", None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise FormatError(f"the tokenizer of {base} has no token to pad with; set its pad_token")
    if getattr(config, "pad_token_id", 0) is None:  # a classifier looks for the last other token
        config.pad_token_id = tokenizer.pad_token_id
    limits = [length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    length = min(limit for limit in limits if limit)
    rows = tokenizer(lines, truncation=True, max_length=length)["input_ids"]
    # Rows of like length need little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
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
