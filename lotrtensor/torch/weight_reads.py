"""Layers whose weight a model reads without calling them, found in the model's source.

An update sits in the forward of its layer: whoever takes ``self.q_proj.weight`` and never calls
``self.q_proj`` gets the base weight, and the adapter neither acts nor trains. Fused attention,
state-space kernels and heads that borrow an embedding's weight are written so.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from lotrtensor.errors import LotrWarning, UnsupportedAdapterError

Path = tuple[str, ...]
"""What is reached from ``self``: attributes and places, ``"*"`` for one that is not known."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules whose children their owner calls."""

_PROPERTIES_OF_A_TENSOR = frozenset(
    ("dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta")
)
_ASKS_ONLY = frozenset(("isinstance", "hasattr", "len", "type", "id", "callable"))
_WALKS = frozenset(
    ("children", "modules", "named_children", "named_modules", "get_submodule", "_modules")
)


_DEPTH = 8
"""Calls within calls that are followed; what lies deeper is taken for a use that is not known."""


class Read(NamedTuple):
    """A read of a layer's weight: in which function, and whether the layer is called as well."""

    where: str
    called: bool


@dataclass
class Uses:
    """What the forward of a class does with the things it holds."""

    called: set[Path] = field(default_factory=set)
    read: dict[Path, str] = field(default_factory=dict)
    unknown: set[Path] = field(default_factory=set)


def check_called(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse to adapt layers that the model never calls.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : iterable of str
        Paths of the layers that are to be adapted.

    Raises
    ------
    UnsupportedAdapterError
        Naming the first such layer and who reads its weight.

    Warns
    -----
    LotrWarning
        If layers are called, and their weight is read as well: on another path of the model, say.
    """
    reads = weight_reads(model, layers)
    never = {name: read for name, read in reads.items() if not read.called}
    if never:
        name, read = next(iter(never.items()))
        more = f" (as it does with {len(never) - 1} more)" if len(never) > 1 else ""
        raise UnsupportedAdapterError(
            f"{name}: {read.where} reads the weight of this layer{more} and never calls it, so "
            "that an update would have no effect and would not train; leave it out of the target "
            "modules"
        )
    if reads:
        name, read = next(iter(reads.items()))
        warnings.warn(
            f"{name}: {read.where} calls this layer in one place and reads its weight in another, "
            f"where the update has no effect ({len(reads)} of the adapted layers are used so); "
            "lotrtensor.torch.check_adapted says which path a batch takes",
            LotrWarning,
            stacklevel=2,
        )


def weight_reads(model: nn.Module, layers: Iterable[str]) -> dict[str, Read]:
    """Return the layers whose weight is read by a module that holds them.

    The source of every holder's forward, and of what it calls, is followed; where that cannot be
    read, or a layer goes to a function that cannot be followed, nothing is claimed.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : iterable of str
        Paths of the layers to look for.

    Returns
    -------
    dict of str to Read
        By path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[type, Uses] = {}
    found = {}
    for name in layers:
        read = _read_of(name, modules, known)
        if read is not None:
            found[name] = read
    return found


def _read_of(name: str, modules: Mapping[str, nn.Module], known: dict[type, Uses]) -> Read | None:
    where, called, direct = None, False, True
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        holder = modules[".".join(parts[:depth])]
        if isinstance(holder, CONTAINERS):
            continue
        cls, path = type(holder), tuple(parts[depth:])
        if cls not in known:
            known[cls] = _uses(cls)
        uses = known[cls]
        # A holder that hands the layer on, or the list that it is in, may call it anywhere.
        handed = [path[:end] for end in range(0 if direct else len(path), len(path) + 1)]
        if any(_matches(pattern, part) for pattern in uses.unknown for part in handed):
            return None
        here = next((at for pattern, at in uses.read.items() if _matches(pattern, path)), None)
        called = called or any(_matches(pattern, path) for pattern in uses.called)
        if here is not None:
            called = called or _called_elsewhere(cls, path)
            where = where or here
        direct = False
    return None if where is None else Read(where, called)


def _matches(pattern: Path, path: Path) -> bool:
    return len(pattern) == len(path) and all(
        a in ("*", b) for a, b in zip(pattern, path, strict=True)
    )


def _uses(cls: type) -> Uses:
    uses = Uses()
    forward = getattr(cls, "forward", None)
    if isinstance(forward, FunctionType):
        _Reader(cls, uses, set()).follow(forward, [()], {})
    return uses


def _called_elsewhere(cls: type, path: Path) -> bool:
    """Whether a method that forward does not reach calls the layer."""
    uses = Uses()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, FunctionType):
                _Reader(cls, uses, set()).follow(function, [()], {})
    return any(_matches(pattern, path) for pattern in uses.called)


class _Reader(ast.NodeVisitor):
    """Follows one function, and what it calls, with names bound to paths from ``self``."""

    def __init__(self, cls: type, uses: Uses, seen: set[Any], depth: int = 0) -> None:
        self.depth = depth
        self.cls = cls
        self.uses = uses
        self.seen = seen
        self.names: dict[str, Path] = {}
        self.function: Callable[..., Any] | None = None

    def follow(
        self,
        function: Callable[..., Any],
        args: list[Path | None],
        kwargs: Mapping[str, Path | None],
    ) -> bool:
        """Read ``function`` with its arguments bound; return whether its source was found."""
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or self.depth >= _DEPTH:
            return False
        parameters = list(inspect.signature(function).parameters)
        bound = dict(zip(parameters, args, strict=False)) | dict(kwargs)
        names = {k: v for k, v in bound.items() if v is not None and k in parameters}
        key = (function, tuple(sorted(names.items())))
        if key in self.seen:
            return True
        self.seen.add(key)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError, ValueError):
            return False
        reader = _Reader(self.cls, self.uses, self.seen, self.depth + 1)
        reader.names, reader.function = names, function
        for node in ast.iter_child_nodes(tree):
            for statement in getattr(node, "body", []):
                reader.visit(statement)
        return True

    def path(self, node: ast.AST) -> Path | None:
        """Return what an expression reaches from ``self``, if it does."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._under(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Slice):
                return self.path(node.value)
            place = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
            return self._under(node.value, str(place))
        args = _arguments(node, "getattr")
        if len(args) > 1 and isinstance(args[1], ast.Constant):
            return self._under(args[0], str(args[1].value))
        return None

    def _under(self, node: ast.AST, name: str) -> Path | None:
        start = self.path(node)
        return None if start is None else (*start, name)

    def visit_Name(self, node: ast.Name) -> None:
        """A layer under another name goes somewhere."""
        self._refer(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """A layer in a list goes somewhere."""
        self._refer(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A weight is read, or something goes somewhere."""
        self._refer(node)

    def _refer(self, node: ast.Name | ast.Subscript | ast.Attribute) -> None:
        path = self.path(node)
        if isinstance(node, ast.Subscript):
            self.visit(node.slice)
        if path is None:
            if not isinstance(node, ast.Name):
                self.visit(node.value)
            return
        if not path or not isinstance(node.ctx, ast.Load):
            return
        if "weight" in path[1:]:
            at = path.index("weight", 1)
            if not _PROPERTIES_OF_A_TENSOR.intersection(path[at + 1 : at + 2]):
                self.uses.read.setdefault(path[:at], self._where())
            return
        if path[-1] in _WALKS:
            self.uses.unknown.add(path[:-1])
        self.uses.unknown.add(path)
        found = inspect.getattr_static(self.cls, path[0], None) if len(path) == 1 else None
        if isinstance(found, property) and isinstance(found.fget, FunctionType):
            self.follow(found.fget, [()], {})

    def _where(self) -> str:
        owner = self.cls.__name__
        return f"{owner}.{self.function.__name__}" if self.function else owner

    def visit_Assign(self, node: ast.Assign) -> None:
        """Give a path another name, or see what the value does."""
        target, path = node.targets[0], self.path(node.value)
        if len(node.targets) == 1 and isinstance(target, ast.Name) and path is not None:
            self._name(target, path)
            if "weight" in path[1:]:
                self.visit(node.value)
            return
        self.generic_visit(node)

    def _name(self, target: ast.AST, path: Path) -> None:
        if not isinstance(target, ast.Name):
            self.uses.unknown.add(path[:-1])
            return
        before = self.names.setdefault(target.id, path)
        if before != path:  # one of two: which is not known here
            self.uses.unknown.update((before, path))

    def visit_For(self, node: ast.For) -> None:
        """Name the members of a list."""
        self._iterate(node.target, node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Name the members of a list."""
        self._iterate(node.target, node.iter)
        for test in node.ifs:
            self.visit(test)

    def _iterate(self, target: ast.AST, over: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and (args := _arguments(over, "enumerate")):
            target, over = target.elts[-1], args[0]
        path = self.path(over)
        if path:
            self._name(target, (*path, "*"))
        else:
            self.visit(over)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        """Name the members before they are used."""
        self._comprehend(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        """Name the members before they are used."""
        self._comprehend(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        """Name the members before they are used."""
        self._comprehend(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        """Name the members before they are used."""
        self._comprehend(node)

    def _comprehend(
        self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp
    ) -> None:
        for generator in node.generators:
            self.visit(generator)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        """A layer is called, or a function that may use one is followed."""
        if any(_is_call(node, name) for name in _ASKS_ONLY):
            return
        if (args := _arguments(node, "getattr")) and self.path(node) is None:
            self.uses.unknown.add(self.path(args[0]) or ())
        path = self.path(node.func)
        reached = [self.path(arg) for arg in node.args]
        kwargs = {k.arg: self.path(k.value) for k in node.keywords if k.arg}
        followed = any(
            self.follow(f, [*own, *reached], kwargs) for f, own in self._called(node, path)
        )
        if path is None:
            self.visit(node.func)
        elif "weight" in path[1:] or path[-1] in _WALKS:
            self._refer(node.func)  # type: ignore[arg-type]
        elif path and path[-1] == "forward":
            self.uses.called.add(path[:-1])
        elif path:
            self.uses.called.add(path)
            if len(path) > 1 and isinstance(node.func, ast.Attribute):
                # A method of something held, items() of a list say, may do anything with it.
                self.uses.unknown.add(path[:-1])
        for arg, path in zip(node.args, reached, strict=True):
            self._pass(arg, path, followed)
        for keyword in node.keywords:
            self._pass(keyword.value, self.path(keyword.value), followed)

    def _pass(self, arg: ast.AST, path: Path | None, followed: bool) -> None:
        if path is None or "weight" in path[1:] or not followed:
            self.visit(arg)

    def _called(
        self, node: ast.Call, path: Path | None
    ) -> Iterator[tuple[Callable[..., Any], list[Path | None]]]:
        """Functions of the model's own that a call may reach, with what is bound before."""
        function = node.func
        if path is not None and len(path) == 1:
            method = inspect.getattr_static(self.cls, path[0], None)
            static = isinstance(method, staticmethod)
            method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
            if isinstance(method, FunctionType) and method.__module__ != nn.Module.__module__:
                yield method, [] if static else [()]
        elif isinstance(function, ast.Attribute) and _is_call(function.value, "super"):
            for base in self.cls.__mro__[1:]:
                if isinstance(vars(base).get(function.attr), FunctionType) and base != nn.Module:
                    yield vars(base)[function.attr], [()]
                    return
        elif path is None and any(self.path(arg) is not None for arg in node.args):
            found = self._global(function)
            if isinstance(found, FunctionType) and not found.__module__.startswith("torch."):
                yield found, []

    def _global(self, node: ast.AST) -> object:
        """Return what a name stands for in the function's module."""
        if isinstance(node, ast.Name):
            return getattr(self.function, "__globals__", {}).get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _arguments(node: ast.AST, name: str) -> list[ast.expr]:
    """Return the arguments of a call of ``name``, or none."""
    return node.args if isinstance(node, ast.Call) and _is_call(node, name) else []
