"""Every error that a user's input can cause.

A message says what was found, what was expected and what to do, and names the file, the key or
the argument. The command line prints the same sentence and exits with 1.
"""

from __future__ import annotations


def printable(message: object) -> str:
    """Return the message on one line: names in it come from files and may hold line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


class LotrError(Exception):
    """Base class of all errors raised on purpose by lotrtensor."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class ShapeError(LotrError, ValueError):
    """Arrays whose shapes do not fit together, or are empty."""


class RankError(LotrError, ValueError):
    """A rank, tolerance, energy or budget that no decomposition of this stack can meet."""


class OptionError(LotrError, ValueError):
    """An option that has no such value: a method, allocation, form, dtype, weights, seed."""


class MissingPackageError(LotrError, ImportError):
    """An optional package that is not installed; the message says how to install it."""


class DataError(LotrError, ValueError):
    """Values that have no decomposition: NaN or infinite entries, integer or complex types."""


class FormatError(LotrError, ValueError):
    """A file that is missing, damaged, contradicts itself or already exists."""


class UnsupportedAdapterError(LotrError, ValueError):
    """An adapter that is not a plain ΔW = s · B · A update, or a file type that is not read."""


class LotrWarning(UserWarning):
    """Something a careful user wants to know: a fit that did not converge, a choice made."""
