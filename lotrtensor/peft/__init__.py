"""LoTR as a PEFT method: importing this package registers it.

>>> import torch, lotrtensor.peft as lotr
>>> from peft import get_peft_model
>>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
>>> model = get_peft_model(base, lotr.LotrConfig(r=2, target_modules=["0", "2"]))
>>> model.get_nb_trainable_parameters()[0]
40
"""

from lotrtensor.peft.register import PeftVersionError, check_peft, register

check_peft()

from lotrtensor.peft.config import LotrConfig  # noqa: E402 - imports hooks that the check looks for
from lotrtensor.peft.cores import save_cores  # noqa: E402
from lotrtensor.peft.hotswap import hotswap_adapter  # noqa: E402
from lotrtensor.peft.layer import LotrLayer  # noqa: E402
from lotrtensor.peft.model import LotrModel  # noqa: E402
from lotrtensor.peft.packs import load_pack  # noqa: E402

register(LotrConfig, LotrModel, LotrModel.prefix)

__all__ = [
    "LotrConfig",
    "LotrLayer",
    "LotrModel",
    "PeftVersionError",
    "hotswap_adapter",
    "load_pack",
    "save_cores",
]
