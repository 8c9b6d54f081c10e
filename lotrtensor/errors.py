"""Every error that a user's input can cause.

A message says what was found, what was expected and what to do, and names the file, the key or
the argument. The command line prints the same sentence and exits with 1.
"""

from __future__ import annotations


def printable(message: object) -> str:
    """Return the message on one line: names in it come from files and may hold line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


class LotrError(Exception):
    """Base class of all errors raised on purpose by lotrtensor.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> try:
    ...     lt.load("no/such/adapter")
    ... except lt.LotrError as error:
    ...     print(type(error).__name__)
    FormatError
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class ShapeError(LotrError, ValueError):
    """Arrays whose shapes do not fit together, or are empty.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.LowRankStack(np.ones((2, 4, 1)), np.ones((3, 1, 4)))
    Traceback (most recent call last):
    lotrtensor.errors.ShapeError: ...
    """


class RankError(LotrError, ValueError):
    """A rank, tolerance, energy or budget that no decomposition of this stack can meet.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.tucker2(np.ones((3, 4, 5)), rank=9)
    Traceback (most recent call last):
    lotrtensor.errors.RankError: rank is (p, q) = (9, 9); this stack has at most (4, 5) ...
    """


class OptionError(LotrError, ValueError):
    """An option that has no such value: a method, allocation, form, dtype, weights, seed.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.tucker2(np.ones((3, 4, 5)), rank=1, method="hoi")
    Traceback (most recent call last):
    lotrtensor.errors.OptionError: method is 'hoi'; expected one of auto, exact, ...
    """


class MissingPackageError(LotrError, ImportError):
    """An optional package that is not installed; the message says how to install it.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> issubclass(lt.MissingPackageError, ImportError)
    True
    """


class DataError(LotrError, ValueError):
    """Values that have no decomposition: NaN or infinite entries, integer or complex types.

    Examples
    --------
    >>> import numpy as np, lotrtensor as lt
    >>> lt.norm(np.array([[[1.0, np.nan]]]))
    Traceback (most recent call last):
    lotrtensor.errors.DataError: ... NaN or infinite values; expected finite numbers
    """


class FormatError(LotrError, ValueError):
    """A file that is missing, damaged, contradicts itself or already exists.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.load("no/such/adapter")
    Traceback (most recent call last):
    lotrtensor.errors.FormatError: no/such/adapter ...
    """


class UnsupportedAdapterError(LotrError, ValueError):
    """An adapter that is not a plain ΔW = s · B · A update, or a file type that is not read.

    Examples
    --------
    >>> import lotrtensor as lt
    >>> lt.convert("adapter_dir")
    Traceback (most recent call last):
    lotrtensor.errors.UnsupportedAdapterError: expected a LoraAdapter or a LotrAdapter, ...
    """


class LotrWarning(UserWarning):
    """Something a careful user wants to know: a fit that did not converge, a choice made.

    Examples
    --------
    >>> import warnings, lotrtensor as lt
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", lt.LotrWarning)
    """
