"""The command about the user's cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.storage.cache import LIMIT, Cache


def test_what_lies_there_is_shown_and_removed(
    mezzotint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(LIMIT, "10000")
    Cache().tensors("x", {}, lambda: {"a": torch.zeros(4)})
    told = mezzotint("cache", "--json").last_object
    assert told["files"] == 1
    assert told["bytes"] > 16
    shown = mezzotint("cache", "--clear")
    assert shown.code == 0
    assert "0 files" in shown.stdout
    assert Cache().files() == []
