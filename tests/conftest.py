"""What all tests share: a fixed stream of examples and one thread, so that a run repeats bit for bit; tiny models."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import shapes
import sums

shapes.set_up()

from mezzotint.storage.cache import LIMIT  # noqa: E402
from runs import tiny  # noqa: E402  imports what is to be checked

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, max_examples=15, **_COMMON)
# a search for new failures: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile("default")

sums.set_up()
os.environ[LIMIT] = "0"  # every test computes for itself


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, made once; not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder
