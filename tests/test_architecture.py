"""The direction of imports, the size budgets and a few habits, read from the syntax trees of the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "mezzotint"

# A part imports from the rows below its own only; parts in one row do not know each other.
ROWS = (
    {"cli"},
    {"jobs"},
    {"budgeting", "report"},
    {"sweep"},
    {"planning", "evaluation"},
    {"blockwise", "recipes", "engines"},
    {"formats", "allocation", "submodules", "models", "calibration"},
    {"targets", "transforms", "rounding", "storage"},
    {"grids"},
    {"kernels", "process"},
    {"core"},
    {"registry", "errors"},
)
LEVEL = {part: len(ROWS) - row for row, parts in enumerate(ROWS) for part in parts}
# registry and errors share the last row and are plain files, which may know each other.
LEVEL |= {"": len(ROWS) + 1, "__main__": len(ROWS) + 2, "testing": len(ROWS) + 2, "errors": 0}
UNIMPORTABLE = {"testing"}  # shipped for users; nothing of ours may lean on it

TENSORS_ONLY = {"core", "grids", "transforms", "targets", "rounding"}
NOT_FOR_TENSORS = {"transformers", "safetensors", "os", "logging"}

MAX_FILE, MAX_FUNCTION, MAX_POSITIONAL = 400, 60, 5


def part_of(module: str) -> str:
    """``mezzotint.grids.uniform`` -> ``grids``; the package itself -> ``""``."""
    return module.split(".")[1] if "." in module else ""


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, relative ones and those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") + ["."] * is_package
                base = ".".join([*parents[: -node.level], *([base] if base else [])])
            if base == "mezzotint":  # `from mezzotint import errors` imports a part, or a name of the package itself
                yield from ((node.lineno, f"mezzotint.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def import_faults(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    importer = part_of(module)
    for line, name in imports_of(tree, module, is_package):
        top = name.split(".")[0]
        if importer in TENSORS_ONLY and top in NOT_FOR_TENSORS:
            yield line, f"{importer} knows tensors only: it may not import {name}"
        if top != "mezzotint":
            continue
        imported = part_of(name)
        if imported == importer:
            continue
        if imported in UNIMPORTABLE:
            yield line, f"nothing imports {imported}: {module} imports {name}"
        elif importer not in LEVEL:
            yield line, f"part {importer!r} has no row in tests/test_architecture.py; DESIGN says where it belongs"
        elif imported not in LEVEL:
            # A name re-exported by the package itself, which only what lies above everything may use.
            if LEVEL[importer] < LEVEL[""]:
                yield line, f"imports go downwards: {module} imports {name} from the package itself"
        elif LEVEL[imported] >= LEVEL[importer]:
            yield line, f"imports go downwards: {importer} may not import {imported or 'the package itself'}"


def budget_faults(tree: ast.AST, lines: int) -> Iterator[tuple[int, str]]:
    if lines > MAX_FILE:
        yield lines, f"file has {lines} lines, limit {MAX_FILE}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = body_lines(node)
        if length > MAX_FUNCTION:
            yield node.lineno, f"function {node.name} has {length} lines without its docstring, limit {MAX_FUNCTION}"
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        positional = len(names) - (names[:1] in (["self"], ["cls"]))
        if positional > MAX_POSITIONAL:
            yield node.lineno, f"function {node.name} has {positional} positional parameters, limit {MAX_POSITIONAL}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function; its docstring does not count, so that nobody saves on it."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    saved = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - saved


def habit_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print(): use a log, or the command line's console"
        if isinstance(node, ast.ExceptHandler) and is_blanket(node.type) and not ends_in_raise(node):
            caught = ast.unparse(node.type) if node.type else "everything"
            yield node.lineno, f"except catches {caught} and does not raise it again: name the errors you expect"


def is_blanket(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(is_blanket(e) for e in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def ends_in_raise(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def faults(source: str, module: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and description of everything the rules forbid in one file."""
    tree = ast.parse(source)
    lines = len(source.splitlines())
    return [*import_faults(tree, module, is_package), *budget_faults(tree, lines), *habit_faults(tree)]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_file(path: Path):
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(relative.parent.parts if is_package else relative.parts)
    found = faults(path.read_text(encoding="utf-8"), module, is_package=is_package)
    assert not found, "\n" + "\n".join(f"src/{path.relative_to(PACKAGE.parent)}:{line}: {what}" for line, what in found)


def test_package_is_found():
    assert PACKAGE / "__init__.py" in files()


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
LONG_DOCSTRING = 'def f():\n    """One.\n' + "\n" * MAX_FUNCTION + '    """\n'


@pytest.mark.parametrize(
    ("source", "module", "message"),
    [
        ("from mezzotint.formats import gguf", "mezzotint.core.linalg", "core may not import formats"),
        ("import mezzotint.planning.plan", "mezzotint.formats.gguf.format", "formats may not import planning"),
        (
            "def f():\n    from mezzotint.models import x",
            "mezzotint.formats.gguf.format",
            "formats may not import models",
        ),
        ("from ..grids import uniform", "mezzotint.core.linalg", "core may not import grids"),
        ("from mezzotint import rounding", "mezzotint.targets.qep", "targets may not import rounding"),
        ("from mezzotint.core import x", "mezzotint.errors", "errors may not import core"),
        ("from mezzotint import quantize", "mezzotint.sweep.sweep", "from the package itself"),
        ("from mezzotint.testing import x", "mezzotint.cli.main", "nothing imports testing"),
        ("from mezzotint.core import x", "mezzotint.gadgets.main", "part 'gadgets' has no row"),
        ("import os.path", "mezzotint.core.linalg", "it may not import os.path"),
        ("from transformers import AutoModel", "mezzotint.rounding.gptq", "it may not import transformers"),
        ("\n" * MAX_FILE + "x = 1", "mezzotint.cli.main", "file has 401 lines, limit 400"),
        (LONG_FUNCTION, "mezzotint.cli.main", "function f has 61 lines without its docstring, limit 60"),
        ("def f(a, b, c, /, d, e, g): ...", "mezzotint.cli.main", "function f has 6 positional parameters, limit 5"),
        ("print('x')", "mezzotint.cli.main", "print()"),
        ("try: f()\nexcept: pass", "mezzotint.cli.main", "except catches everything"),
        ("try: f()\nexcept (KeyError, Exception): g()", "mezzotint.cli.main", "catches (KeyError, Exception)"),
        ("try: f()\nexcept BaseException as e: log(e)", "mezzotint.cli.main", "catches BaseException"),
    ],
)
def test_checker_catches(source, module, message):
    assert any(message in what for _, what in faults(source, module)), faults(source, module)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from mezzotint.core.linalg import x", "mezzotint.formats.gguf.format", False),
        ("from mezzotint.errors import x", "mezzotint.registry", False),
        ("from . import uniform\nfrom .lookup import y", "mezzotint.grids", True),
        ("from .. import errors", "mezzotint.core.linalg", False),
        ("from mezzotint.cli import x\nfrom mezzotint import quantize", "mezzotint.testing.strategies", False),
        ("from mezzotint.jobs import quantize", "mezzotint", True),
        ("import os", "mezzotint.sweep.sweep", False),
        ("class C:\n    def f(self, a, b, c, d, e, *, g): ...", "mezzotint.core.linalg", False),
        (LONG_DOCSTRING, "mezzotint.core.linalg", False),
        ("try: f()\nexcept BaseException:\n    clean()\n    raise", "mezzotint.sweep.sweep", False),
        ("try: f()\nexcept KeyError: pass", "mezzotint.sweep.sweep", False),
    ],
)
def test_checker_accepts(source, module, is_package):
    assert faults(source, module, is_package=is_package) == []
