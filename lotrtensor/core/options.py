"""Checks of plain options, for the public functions that take them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from lotrtensor.errors import OptionError


def is_huge(value: object) -> bool:
    """Whether a value is an integer of more digits than any size has; Python refuses to print some.

    Examples
    --------
    >>> is_huge(10**5000), is_huge(1e300), is_huge("9")
    (True, False, False)
    """
    return isinstance(value, int) and abs(value) >= 10**30


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1.

    >>> is_count(3), is_count(0), is_count(True), is_count(1.0)
    (True, False, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def shown(value: object) -> str:
    """Return a value as a message shows it: any value, and not too much of it.

    Examples
    --------
    >>> shown("x"), shown([10**5000])
    ("'x'", 'a list with a number of very many digits')
    """
    if is_huge(value):
        return "a number of more than 30 digits"
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} with a number of very many digits"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


_LONGEST = 200


def check_integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """Return an option that is an integer of at least ``least``, and at most ``most`` if given.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise OptionError(f"{name} is {shown(value)}; expected an integer {limits}")
    return int(value)


def check_number(value: Any, name: str) -> float:
    """Return an option that is a finite number of at least 0.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (real and not is_huge(value) and np.isfinite(value) and value >= 0):
        raise OptionError(f"{name} is {shown(value)}; expected a finite number of at least 0")
    return float(value)


def check_flag(value: Any, name: str) -> bool:
    """Return an option that is True or False.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option.
    """
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def check_choice(value: Any, name: str, choices: Collection[str]) -> str:
    """Return an option that is one of a few words.

    Raises
    ------
    OptionError
        If it is anything else; the message names the option and the words.
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise OptionError(f"{name} is {shown(value)}; expected {', '.join(others)} or {last}")
    return value
