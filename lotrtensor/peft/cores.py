"""save_cores: an adapter that was trained on the bases of a pack, as a few kilobytes."""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.lora import LoraAdapter
from lotrtensor.core.options import check_flag
from lotrtensor.errors import DataError, FormatError, UnsupportedAdapterError
from lotrtensor.packs.coding import cells_by_module
from lotrtensor.packs.encoding import common_config
from lotrtensor.packs.members import Cell, first_cluster
from lotrtensor.packs.pack import Pack
from lotrtensor.packs.trained import TrainedCore, code_cores, write_trained
from lotrtensor.peft.experts import cores_by_name
from lotrtensor.peft.model import LotrModel
from lotrtensor.peft.state import is_own
from lotrtensor.torch.factors import SharedFactors
from lotrtensor.torch.sources import from_numpy, to_numpy


def save_cores(
    model: PeftModel,
    pack: Pack | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    force: bool = False,
) -> None:
    """Write the cores of an adapter that was trained on the bases of a pack, without the bases.

    ``Pack.add`` or ``lotr add`` takes the directory into the pack: its codes are then the pack's,
    and nothing more is lost. Codes have 16 bits, an entry of a core is off by 1.5e-5 of the largest
    one at most; where the model holds the bases in half precision, the stated error counts what
    that has rounded off them.

    Parameters
    ----------
    model : PeftModel
        A model whose adapter was made by ``LotrConfig(init=PACK, train="cores")``, or loaded by
        `load_pack` with ``train="cores"`` and has no private parts; of a pack with clusters, on
        the bases of the largest.
    pack : Pack or path-like
        The pack.
    directory : path-like
        The directory to write.
    adapter_name : str
        The adapter.
    force : bool
        Replace a directory that stands there.

    Raises
    ------
    FormatError
        If the model has no such adapter, the factors are not the bases of the pack any more, or
        the directory exists and ``force`` is not given.
    UnsupportedAdapterError
        If the adapter has private parts, which are not trained on a basis, or is no LoTR.
    DataError
        If a core is not finite.

    Examples
    --------
    >>> import tempfile, numpy as np, torch, lotrtensor as lt, lotrtensor.peft as lotr
    >>> from peft import get_peft_model
    >>> rng = np.random.default_rng(0)
    >>> B, A = rng.normal(size=(64, 4)), rng.normal(size=(4, 64))
    >>> def tuned(noise):
    ...     own = B + noise * rng.normal(size=(64, 4))
    ...     return lt.LoraAdapter((lt.LoraModule("0", own, A),), {}, np.dtype("float32"))
    >>> folder = tempfile.mkdtemp()
    >>> family = {f"user-{i}": tuned(0.1) for i in range(6)}
    >>> packed = lt.pack(family, folder + "/pack", tolerance=0.15)
    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> model = get_peft_model(base, lotr.LotrConfig(init=folder + "/pack", train="cores"))
    >>> lotr.save_cores(model, packed, folder + "/mine")
    >>> packed.add("mine", folder + "/mine").bytes < 500
    True
    """
    found = pack if isinstance(pack, Pack) else Pack(pack)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, LotrModel):
        raise UnsupportedAdapterError(
            f"the model is a {type(model).__name__} without LoTR; expected a PeftModel with one"
        )
    if not isinstance(adapter_name, str) or adapter_name not in tuner.peft_config:
        raise FormatError(
            f"the model has no adapter {adapter_name!r}; it has {', '.join(tuner.peft_config)}"
        )
    check_flag(force, "force")
    trained = _trained(tuner, found, adapter_name)
    # PEFT would add the whole weight of an embedding that is adapted.
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    extras = {key: to_numpy(value) for key, value in state.items() if not is_own(key)}
    config = tuner.peft_config[adapter_name]
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    common = common_config(LoraAdapter((), said, np.dtype(np.float32)))
    member = code_cores(trained, found.cells, common, extras)
    write_trained(expand(directory), member, found.cells, found.mark, force=force)


def _trained(tuner: LotrModel, pack: Pack, adapter_name: str) -> dict[str, TrainedCore]:
    """Return factors and cores of an adapter by module in float64, the scale in the cores."""
    cells = cells_by_module(first_cluster(pack.cells))
    places = cores_by_name(tuner.model, adapter_name)
    found = {}
    for group in tuner.plans(adapter_name):
        if any(group.private_ranks):
            raise UnsupportedAdapterError(
                f"{group.modules[0]} has a private part, which no basis holds; save_pretrained "
                "writes all of the adapter, and lotr add codes it anew"
            )
        factors = tuner.factor_table(adapter_name).of(group.name) if min(group.rank) else None
        for name in group.modules:
            cell = cells.get(name)
            if factors is None or cell is None or not _is_basis(factors, cell):
                raise FormatError(
                    f"the factors of {name} are not those of {pack.path}: train with train='cores' "
                    "from init=PACK, or write all of the adapter with save_pretrained"
                )
            left, core, right = (_wide(x) for x in (factors.left, places[name], factors.right))
            if not np.isfinite(core).all():
                raise DataError(f"the core of {name} is NaN or infinite; train with smaller steps")
            found[name] = TrainedCore(left, group.scale * core, right, group.embedding)
    return found


def _wide(x: Tensor) -> np.ndarray:
    return to_numpy(x).astype(np.float64)


def _is_basis(factors: SharedFactors, cell: Cell) -> bool:
    if (factors.shape, factors.rank) != (cell.shape, cell.basis.rank):
        return False
    return all(
        _equal(x, y) for x, y in zip((factors.left, factors.right), cell.basis.factors, strict=True)
    )


def _equal(held: Tensor, told: np.ndarray) -> bool:
    """Whether a factor is that of a basis, in its own type."""
    expected = from_numpy(told.astype(np.float32)).to(held.dtype)
    exact = from_numpy(told).to(held.dtype)
    held = held.detach().cpu()
    return torch.equal(held, expected) or torch.equal(held, exact)
