"""One word, one unit: the dictionary of the conventions page, held against names in the code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lotrtensor"
ROOMS = ("core", "verbs", "analysis")
FILES = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))

FORBIDDEN = {
    "core": {
        "budget": "parameters",  # a budget is what people write; the core counts numbers
        "bytes": "parameters",
        "energies": "squares with the suffix 2",
    },
    "verbs": {"energies": "squares with the suffix 2"},
    "analysis": {"energies": "squares with the suffix 2"},
}


def names(tree):
    """All names that a module gives to something, with the node that does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_have_one_meaning(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name, node in names(ast.parse(path.read_text("utf-8"))):
        assert name not in FORBIDDEN[room], f"line {node.lineno}: say {FORBIDDEN[room][name]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_energy_is_a_share(path):
    """An option, or a field of what was asked; never an array or a sum of squares."""
    tree = ast.parse(path.read_text("utf-8"))
    fields = {n.target for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)}
    for name, node in names(tree):
        if name == "energy":
            assert isinstance(node, ast.arg) or node in fields, node.lineno
        if isinstance(node, ast.arg) and name == "energy":
            assert ast.unparse(node.annotation) in ("float", "float | None"), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_squares_are_numbers_or_arrays_of_them(path):
    """A parameter or field whose name ends in 2 holds squares: never text, a rank or an option."""
    squares = ("float", "np.ndarray", "dict[int, float]", "dict[Pair, float]", "Array")
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.arg) and node.arg.endswith("2") and node.annotation:
            kind = ast.unparse(node.annotation)
            assert node.arg == "tucker2" or kind.startswith(squares) or "float" in kind, node.arg
