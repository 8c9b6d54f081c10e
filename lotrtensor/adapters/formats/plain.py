"""Format version 2 in plain numbers: what PEFT saves of a compressed adapter that was trained on.

As version 1, but that a module may have private factors, P_k and Q_k, and a group may share
nothing. It is read as a LoRA, of just the same updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lotrtensor.adapters.formats.carried import PREFIX, split_extras
from lotrtensor.adapters.formats.group_record import GroupRecord
from lotrtensor.adapters.formats.lora_config import CARRIED_FIELDS, check_types
from lotrtensor.adapters.formats.native import (
    COMPRESSED_VERSION,
    CORE,
    LEFT,
    PEFT_TYPE,
    PRIVATE_LEFT,
    PRIVATE_RIGHT,
    RIGHT,
    check_version,
    take_tensor,
    take_wrappers_off,
)
from lotrtensor.adapters.formats.tensors import Tensors, read_config, read_tensors
from lotrtensor.adapters.modules import LoraModule
from lotrtensor.adapters.parts import thin_module
from lotrtensor.errors import FormatError

PlainContent = tuple[tuple[LoraModule, ...], Mapping[str, Any], np.dtype, Mapping[str, np.ndarray]]
"""Modules, config, storage type and carried tensors: the fields of a `LoraAdapter`."""


def read_plain(directory: Path) -> PlainContent:
    """Read a directory of version 2 whose config has the groups.

    Returns
    -------
    modules, config, dtype, extras
        The fields of a `LoraAdapter`.

    Raises
    ------
    FormatError, DataError
        If the files are damaged, incomplete, or contradict each other.
    """
    config = read_config(directory)
    check_version(config, COMPRESSED_VERSION, directory)
    entries = config.get("groups")
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{directory}: the config has no groups; expected a list of them")
    check_types(config, CARRIED_FIELDS, directory)
    records = [GroupRecord.from_json(entry, directory, private=True) for entry in entries]
    tensors, records = take_wrappers_off(read_tensors(directory), records, directory)
    dtypes: list[np.dtype] = []
    modules = [
        module for record in records for module in _read_group(record, tensors, dtypes, directory)
    ]
    adapted = {module.name: module.embedding for module in modules}
    extras = split_extras(tensors, config, adapted, directory)
    common = {key: config[key] for key in CARRIED_FIELDS if key in config}
    common["peft_type"] = PEFT_TYPE  # what it is on disk: no LoRA yet
    return tuple(modules), common, dtypes[0] if dtypes else np.dtype("float32"), extras


def _read_group(
    record: GroupRecord, tensors: Tensors, dtypes: list[np.dtype], directory: Path
) -> list[LoraModule]:
    """Take the tensors of a group out of ``tensors``, and note their types."""

    def take(key: str, shape: tuple[int, int]) -> np.ndarray:
        found = take_tensor(tensors, key, shape, directory)
        dtypes.append(found.dtype)
        return found

    (m, n), (p, q) = record.shape, record.rank
    if p:
        left, right = take(LEFT + record.name, (m, p)), take(RIGHT + record.name, (n, q))
    modules = []
    for module, private_rank in zip(
        record.modules, record.private_ranks or (0,) * len(record.modules), strict=True
    ):
        shared = private = None
        if p:
            core = take(PREFIX + module + CORE, (p, q)).astype(np.float64)
            shared = left, record.scale * core, right
        if private_rank:
            key = PREFIX + module
            own_left = take(key + PRIVATE_LEFT, (m, private_rank))
            private = own_left, take(key + PRIVATE_RIGHT, (n, private_rank))
        modules.append(
            thin_module(module, shared, private, record.shape, embedding=record.embedding)
        )
    return modules
