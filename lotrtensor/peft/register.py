"""Make PEFT know the method, by entries in its own tables and nothing else."""

from __future__ import annotations

import peft
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner

from lotrtensor.adapters.formats.native import PEFT_TYPE
from lotrtensor.errors import LotrError

OLDEST = (0, 21)

_HOOKS = (
    "_get_adapter_state_dict",
    "_remove_adapter_name_from_key",
    "_remap_adapter_state_dict_for_load",
)


class PeftVersionError(LotrError, ImportError):
    """A PEFT release that the method cannot work with."""


def check_peft(version: str = peft.__version__, tuner: type = BaseTuner) -> None:
    """Refuse a PEFT that has no hooks for a tuner's state dict.

    Raises
    ------
    PeftVersionError
        Naming the version found and what to install.
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    missing = [hook for hook in _HOOKS if not hasattr(tuner, hook)]
    if found < OLDEST or missing:
        lacks = f", and lacks {missing[0]}" if missing else ""
        wanted = ".".join(map(str, OLDEST))
        raise PeftVersionError(
            f"lotrtensor.peft needs peft {wanted} or newer; found {version}{lacks}: run "
            f"pip install 'peft>={wanted}', or a newer lotrtensor where peft is newer still"
        )


def register(config: type, model: type, prefix: str) -> None:
    """Enter the method under the plain string "LOTR".

    ``register_peft_method`` takes only names of PEFT's own enum; the tables are looked up by value,
    and the enum's members are strings.
    """
    name: object = PEFT_TYPE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = model  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = prefix  # type: ignore[index]
