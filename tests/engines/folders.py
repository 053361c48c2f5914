"""Folders of tiny models that several tests look at."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runs import tiny


def made_once(
    factory: pytest.TempPathFactory, quantize: Callable[[str, Path, Path], object]
) -> Callable[[str], tuple[Path, Path]]:
    """Original and packed folder of a tiny architecture, made at the first call; not to be changed.

    Args:
        factory: of folders.
        quantize: takes the name of the architecture, its folder, and the one to make.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def folder(name: str) -> tuple[Path, Path]:
        if name not in made:
            place = factory.mktemp(name)
            model = tiny(name, place, dtype=torch.float32)
            quantize(name, model, place / "out")
            made[name] = model, place / "out"
        return made[name]

    return folder
