"""Array libraries under one fixture, and Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from hypothesis import HealthCheck, settings

from lotrtensor import LowRankStack
from tests.strategies import Factors

# What the terminal that starts the tests looks like is not what they are about.
for _name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING"):
    os.environ.pop(_name, None)

# The gate asks the same of every machine; new cases are looked for by `make test-deep`.
settings.register_profile(
    "gate",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep", settings.get_profile("gate"), max_examples=500, derandomize=False, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@dataclass(frozen=True)
class Library:
    """One array library: how to get NumPy arrays in and out of it."""

    name: str
    build: Callable[[np.ndarray, str], Any]
    dtypes: Any

    def array(self, x: np.ndarray, dtype: str = "float64") -> Any:
        """Return ``x`` as an array of this library; always a copy."""
        return self.build(np.array(x, dtype=np.float64), dtype)

    def stack(self, factors: Factors, dtype: str = "float64") -> LowRankStack:
        """Return the stack of these factors."""
        return LowRankStack(
            [self.array(b, dtype) for b in factors.B], [self.array(a, dtype) for a in factors.A]
        )

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of this name."""
        found = getattr(self.dtypes, name)
        return np.dtype(found) if self.dtypes is np else found

    def owns(self, x: Any) -> bool:
        """Whether ``x`` is an array of this library."""
        return array_namespace(x) is array_namespace(self.array(np.zeros(1)))

    def numpy(self, x: Any) -> np.ndarray:
        """Return ``x`` as NumPy float64."""
        if self.name == "torch":
            x = x.detach().to(self.dtypes.float64).cpu().numpy()
        return np.array(x, dtype=np.float64)


def _numpy() -> Library:
    return Library("numpy", lambda x, dtype: x.astype(dtype), np)


def _readonly() -> Library:
    def build(x: np.ndarray, dtype: str) -> np.ndarray:
        y = x.astype(dtype)
        y.flags.writeable = False
        return y

    return Library("readonly", build, np)


def _strict() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library("strict", lambda x, dtype: strict.asarray(x.astype(dtype)), strict)


def _torch() -> Library:
    torch = pytest.importorskip("torch")
    return Library("torch", lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype)), torch)


def _jax() -> Library:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    return Library("jax", lambda x, dtype: jax.numpy.asarray(x, dtype=dtype), jax.numpy)


_LIBRARIES = {
    "numpy": _numpy,
    "readonly": _readonly,
    "strict": _strict,
    "torch": _torch,
    "jax": _jax,
}


@pytest.fixture(scope="session", params=list(_LIBRARIES))
def xp(request: pytest.FixtureRequest) -> Library:
    """Every array library that is installed; read-only NumPy catches a kernel that mutates."""
    return _LIBRARIES[request.param]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let JAX join one case of every test that is about libraries or about kinds of stacks.

    It compiles each operation for each shape, seconds a fit; all cases would take half an hour.
    """
    seen: set[object] = set()
    kept, dropped = [], []
    for item in items:
        function = getattr(item, "function", None)
        on_jax = getattr(getattr(item, "callspec", None), "params", {}).get("xp") == "jax"
        named = any(word in item.name.split("[")[0] for word in ("library", "every_kind"))
        if on_jax and (not named or function in seen):
            dropped.append(item)
            continue
        if on_jax:
            seen.add(function)
        kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
