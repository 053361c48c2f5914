"""Registers the engine when transformers comes to load quantized models, so that importing mezzotint stays cheap."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "transformers.quantizers.auto"  # where quantizers are registered; loaded before any model is
ENGINE = "mezzotint.engines.transformers"


class _Finder(MetaPathFinder):
    """Finds `WATCHED` as the others do, and imports `ENGINE` once it has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            import_module(ENGINE)

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register the engine now if transformers has loaded its quantizers, else when it does; again does nothing."""
    if WATCHED in sys.modules:
        import_module(ENGINE)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
