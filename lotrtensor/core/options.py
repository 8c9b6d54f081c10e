"""Checks of options that are plain numbers, at the doors that take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lotrtensor.errors import OptionError


def check_integer(value: Any, name: str, least: int) -> int:
    """Return an option that is an integer of at least ``least``.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} is {value!r}; expected an integer of at least {least}")
    return int(value)


def check_number(value: Any, name: str) -> float:
    """Return an option that is a finite number of at least 0.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (real and np.isfinite(value) and value >= 0):
        raise OptionError(f"{name} is {value!r}; expected a finite number of at least 0")
    return float(value)


def check_flag(value: Any, name: str) -> bool:
    """Return an option that is True or False.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name} is {value!r}; expected True or False")
    return bool(value)
