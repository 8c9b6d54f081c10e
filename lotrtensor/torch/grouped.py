"""One product an expert: rows sorted by expert, each block times its expert's matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes to which PyTorch's own grouped product wants rows and matrices aligned."""


class Routing(NamedTuple):
    """The pairs of a token and an expert, sorted by expert.

    Attributes
    ----------
    order : tensor (S,)
        Which pair of the router's, counted token by token, stands at each place.
    places : tensor (t, k)
        Where the pairs of each token stand: the inverse of ``order``.
    experts : tensor (S,)
        Expert of each pair, ascending.
    ends : tensor (K,)
        Where the pairs of each expert end.
    """

    order: Tensor
    places: Tensor
    experts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, count: int) -> Routing:
        """Sort the choices of a router, ``index`` (t, k), among ``count`` experts."""
        experts, order = torch.sort(index.reshape(-1), stable=True)
        numbers = torch.arange(count, device=index.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return cls(order, places.view(index.shape), experts, ends)

    def spread(self, x: Tensor) -> Tensor:
        """Return the token's row of x (t, n) for every pair, (S, n)."""
        if torch.compiler.is_compiling():
            return _spread(x, self.order, self.places)
        found: Tensor = _Spread.apply(x, self.order, self.places)  # type: ignore[no-untyped-call]
        return found

    def collect(self, rows: Tensor) -> Tensor:
        """Return the sum of the rows (S, n) of each token's pairs, (t, n)."""
        if torch.compiler.is_compiling():
            return rows[self.places].sum(dim=1)
        found: Tensor = _Collect.apply(rows, self.order, self.places)  # type: ignore[no-untyped-call]
        return found


class _Spread(torch.autograd.Function):
    """Rows of tokens to rows of pairs.

    Each of the two is the other's transpose, which autograd does not see: it would add up the
    gradient row by row. A compiler fuses the plain operations and is left alone with them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _spread(x, order, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, places = ctx.saved_tensors
        return _collected(grad, places), None, None


class _Collect(torch.autograd.Function):
    """Rows of pairs summed to rows of tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _collected(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, places = ctx.saved_tensors
        return _spread(grad, order, places), None, None


def _spread(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    return x[order // places.shape[1]]


def _collected(rows: Tensor, places: Tensor) -> Tensor:
    # Sums as it gathers: the gathered rows would be k times the result.
    return torch.nn.functional.embedding_bag(places, rows, mode="sum")


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return the rows of every expert times its matrix.

    PyTorch's own product where it takes these numbers, else one matrix product an expert.

    Parameters
    ----------
    rows : tensor (S, a)
        Rows, those of expert 0 first.
    matrices : tensor (K, a, b)
        A matrix an expert.
    ends : tensor (K,)
        Where the rows of each expert end, as int32.

    Returns
    -------
    tensor (S, b)
    """
    if _is_native(rows, matrices):
        found: Tensor = torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    else:
        found = _grouped(rows, matrices, ends)
    return found


def _is_native(rows: Tensor, matrices: Tensor) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    on_gpu = rows.is_cuda
    if torch.compiler.is_compiling():
        # Inductor has a kernel for brain floats alone.
        if not on_gpu or rows.dtype != torch.bfloat16:
            return False
    elif rows.data_ptr() % ALIGNMENT or matrices.data_ptr() % ALIGNMENT:
        return False
    if on_gpu and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    # Sizes too: they are the strides of the gradients.
    steps = [s for s in (*rows.stride(), *matrices.stride()) if s != 1] + [*matrices.shape[1:]]
    return rows.dtype in _NATIVE and all(s * rows.itemsize % ALIGNMENT == 0 for s in steps)


_NATIVE = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("lotrtensor::grouped", mutates_args=())
def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """One product an expert, opaque to the compiler, which could not fuse blocks of any length."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for k, block in enumerate(_blocks(ends, rows.shape[0])):
        out[block] = rows[block] @ matrices[k]
    return out


@torch.library.custom_op("lotrtensor::grouped_outer", mutates_args=())
def _grouped_outer(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    """Return for every expert the sum of the outer products of its rows, (K, a, b)."""
    out = rows.new_zeros(ends.shape[0], rows.shape[1], grads.shape[1])
    for k, block in enumerate(_blocks(ends, rows.shape[0])):
        out[k] = rows[block].T @ grads[block]
    return out


def _blocks(ends: Tensor, count: int) -> list[slice]:
    stops = [min(end, count) for end in ends.tolist()]
    return [slice(a, b) for a, b in zip([0, *stops[:-1]], stops, strict=True)]


@_grouped.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@_grouped_outer.register_fake
def _(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], grads.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, matrices, ends = ctx.saved_tensors
    to_rows, to_matrices, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        _grouped(grad, matrices.mT, ends) if to_rows else None,
        _grouped_outer(rows, grad, ends) if to_matrices else None,
        None,
    )


_grouped.register_autograd(_backward, setup_context=_save)
