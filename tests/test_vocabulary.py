"""One word, one unit: the dictionary of the conventions page, held against names in the code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lotrtensor"
EVERY = sorted(PACKAGE.rglob("*.py"))
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


def annotated(tree):
    """Names and annotations of all parameters and fields, and of local names that have one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            yield node.arg, ast.unparse(node.annotation)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)


ARRAYS = ("Array", "Tensor", "ndarray", "nn.Parameter")
MEANINGS = {
    # U and V, or the two sides of a pair: never a rank, a flag or text.
    "left": lambda kind: any(array in kind for array in ARRAYS),
    "right": lambda kind: any(array in kind for array in ARRAYS),
    # LoTR or LoRA, and what else a size may be spent on; a file has a format.
    "form": lambda kind: kind in ("Form", "str") or "'lotr'" in kind,
    # One rank for all modules of a LoRA.
    "uniform": lambda kind: kind == "bool" or "--uniform" in kind,
    # Bits of one code; sparklines and consoles have the width that their libraries call so.
    "width": lambda kind: kind in ("int", "int | None"),
    # Counts.
    "passes": lambda kind: kind == "int",
    "sweeps": lambda kind: kind == "int",
    "rounds": lambda kind: kind == "int",
}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_words_of_the_dictionary_have_one_kind_of_value(path):
    tree = ast.parse(path.read_text("utf-8"))
    for name, kind in annotated(tree):
        if name in MEANINGS:
            assert MEANINGS[name](kind), f"{name}: {kind}"
    # r is the rank of one slice, in loops over slices or ranks. LotrConfig alone has it as a field,
    # by the name that all of PEFT's methods give their rank.
    if path.relative_to(PACKAGE).as_posix() != "peft/config.py":
        assert "r" not in {name for name, _ in annotated(tree)}


# Where numbers are coded; and where text is laid out, whose libraries have a word of their own.
CODED = (
    *("core/bits/", "verbs/_compress.py", "verbs/_compression_job.py", "verbs/_alternatives.py"),
    "packs/",
)
LAID_OUT = ("report/", "cli/")


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_width_is_that_of_a_code(path):
    """Models have sizes, factors a rank, blocks columns."""
    if not path.relative_to(PACKAGE).as_posix().startswith((*CODED, *LAID_OUT)):
        for name, node in names(ast.parse(path.read_text("utf-8"))):
            assert "width" not in name.lower(), f"line {node.lineno}: say rank, columns or size"


def test_every_word_of_the_dictionary_is_in_it():
    page = (PACKAGE.parent / "docs" / "conventions.md").read_text("utf-8")
    words = page.partition("## Words with one meaning")[2]
    for word in (
        "goal",
        "pass",
        "sweep",
        "round",
        "form",
        "left, right",
        "uniform",
        "budget",
        "width",
    ):
        assert f"| {word} |" in words
