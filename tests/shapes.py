"""Checks the shapes in our signatures while the tests run.

A module of ours is imported with a check around each public function and each dataclass that names a shape: dtype and
axes of what goes in and comes out, and that axes of one name have one length. What names no shape is left alone: its
types are pyright's work, and checking them at each call takes as long as all the rest. Private functions stand between
public ones, and half of all calls are theirs. ``make test-types`` checks all of it all the same.
"""

import ast
import sys
import zlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import greenlet
import jaxtyping._storage

PACKAGE = "mezzotint"
_KEPT = f".shapes-{zlib.crc32(Path(__file__).read_bytes()):08x}.pyc"  # what this very file makes
_CHECK = "__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)"


def with_checks(tree: ast.Module) -> ast.Module:
    """The module with a decorator at whatever names a shape, or something that stands for one."""
    names = {"Squares"}  # of core.curvature, the one such name that other modules import
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _found(node.value, names):
            names.add(node.targets[0].id)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            # outermost: @dataclass writes the __init__ that is checked
            place, hints = 0, [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.endswith("__")):
            # innermost: @property, @cache and the like hide the function
            place, hints = len(node.decorator_list), _hints(node)
        else:
            continue
        if any(_found(hint, names) for hint in hints):
            check = ast.parse(_CHECK, mode="eval").body
            for part in ast.walk(check):
                ast.copy_location(part, node)
            node.decorator_list.insert(place, check)
    return tree


def _found(hint: ast.expr, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(hint))


def _hints(function: ast.FunctionDef) -> list[ast.expr]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    hints = [argument.annotation for argument in arguments if argument is not None]
    return [hint for hint in [*hints, function.returns] if hint is not None]


class _Loader(SourceFileLoader):
    """Compiles a module with its checks, and keeps the result beside what Python keeps of the plain one."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = with_checks(ast.parse(data, path))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(self._kept(path))

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(self._kept(path), data, _mode=_mode)

    @staticmethod
    def _kept(path: str) -> str:
        return str(Path(path).with_suffix(_KEPT)) if path.endswith(".pyc") else path


class _Finder:
    """Finds modules of ours only."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _PerGreenlet:
    """Where jaxtyping keeps the axes of running functions: a stack per greenlet.

    Its own stack is one per thread. Blocks that wait in greenlets leave functions in another order than they entered
    them, and would take each other's axes away.
    """

    @property
    def memo_stack(self) -> list[Any]:
        return greenlet.getcurrent().__dict__.setdefault("shapes", [])


def set_up() -> None:
    """Check what is imported from now on; where pytest was told to check everything, that goes first."""
    jaxtyping._storage._shape_storage = _PerGreenlet()
    if not any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path):
        assert PACKAGE not in sys.modules, "imported before its shapes could be checked"
        sys.meta_path.insert(0, _Finder)
