from collections.abc import Callable
from pathlib import Path

import pytest

from mezzotint.models import Source, open_model
from mezzotint.testing.models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny_source(tiny_folder: Callable[[str], Path]) -> Callable[[str], Source]:
    """An opened tiny model, opened once: do not fill its skeleton."""
    opened: dict[str, Source] = {}

    def source(name: str) -> Source:
        if name not in opened:
            opened[name] = open_model(tiny_folder(name))
        return opened[name]

    return source
