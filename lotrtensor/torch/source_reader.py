"""Follow the source of a module's methods, to see how it uses the layers that it holds."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

Path = tuple[str, ...]
"""What is reached from ``self``: attributes and places, ``"*"`` for one that is not known."""

_PROPERTIES_OF_A_TENSOR = frozenset(
    ("dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta")
)
_ASKS_ONLY = frozenset(("isinstance", "hasattr", "len", "type", "id", "callable"))
_WALKS = frozenset(
    ("children", "modules", "named_children", "named_modules", "get_submodule", "_modules")
)


_DEPTH = 8
"""Depth of nested calls that are followed; a deeper one counts as an unknown use."""


@dataclass
class Uses:
    """What the forward of a class does with the things it holds."""

    called: set[Path] = field(default_factory=set)
    read: dict[Path, str] = field(default_factory=dict)
    unknown: set[Path] = field(default_factory=set)


class SourceReader(ast.NodeVisitor):
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
        reader = SourceReader(self.cls, self.uses, self.seen, self.depth + 1)
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
