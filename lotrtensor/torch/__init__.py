"""LoTR as trainable torch modules for any ``nn.Module``.

>>> import torch, lotrtensor.torch as lotr
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
>>> model = lotr.apply_lotr(model, ["0", "2"], rank=2)
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
40
"""

from lotrtensor.torch.apply import apply_lotr, param_groups, set_trainable
from lotrtensor.torch.calibration import calibrate
from lotrtensor.torch.experts import LotrExperts, LotrExpertsUpdate
from lotrtensor.torch.exporting import to_adapter
from lotrtensor.torch.factors import FactorTable, SharedFactors
from lotrtensor.torch.healing import Healed, heal
from lotrtensor.torch.linear import LotrLinear
from lotrtensor.torch.merging import merge, unload, unmerge
from lotrtensor.torch.packs import load_pack
from lotrtensor.torch.state import load_lotr, lotr_state_dict, save_lotr
from lotrtensor.torch.watch import LayerUse, check_adapted

__all__ = [
    "FactorTable",
    "Healed",
    "LayerUse",
    "LotrExperts",
    "LotrExpertsUpdate",
    "LotrLinear",
    "SharedFactors",
    "apply_lotr",
    "calibrate",
    "check_adapted",
    "heal",
    "load_lotr",
    "load_pack",
    "lotr_state_dict",
    "merge",
    "param_groups",
    "save_lotr",
    "set_trainable",
    "to_adapter",
    "unload",
    "unmerge",
]
