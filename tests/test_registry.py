"""Names to stages: what is there, when it is imported, and what a wrong name says."""

import subprocess
import sys

import pytest

from mezzotint import registry
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.registry import FORMATS, GRIDS, ROUNDINGS, TARGETS, TRANSFORMS, Registry

ALL = {r.what: r for r in (TARGETS, TRANSFORMS, GRIDS, ROUNDINGS, FORMATS)}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, entries in ALL.items() for name in entries])
def test_every_entry_can_be_imported(what, name):
    assert isinstance(ALL[what][name], type)


def test_is_a_mapping_in_the_order_it_was_written():
    entries = Registry("number", {"pi": "math:pi", "e": "math:e"})
    assert list(entries) == ["pi", "e"]
    assert len(entries) == 2
    assert "pi" in entries
    assert "tau" not in entries
    assert entries["pi"] > entries["e"]
    assert set(registry.ROUNDINGS) >= {"nearest", "gptq"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gptQ", "unknown rounding 'gptQ'. Did you mean 'gptq'? Known: gptq, nearest."),
        ("neerest", "unknown rounding 'neerest'. Did you mean 'nearest'? Known: gptq, nearest."),
        ("xyz", "unknown rounding 'xyz'. Known: gptq, nearest."),
    ],
)
def test_an_unknown_name_is_explained(name, message):
    entries = Registry("rounding", {"nearest": "math:pi", "gptq": "math:e"})
    with pytest.raises(ConfigError) as caught:
        entries[name]
    assert str(caught.value) == message
    assert isinstance(caught.value, MezzotintError)


def test_a_registry_does_not_change_with_its_source():
    source = {"pi": "math:pi"}
    entries = Registry("number", source)
    source["e"] = "math:e"
    assert list(entries) == ["pi"]


def test_a_name_of_ones_own():
    entries = Registry("number", {"pi": "math:pi"})
    entries.add("e", "math:e")
    entries.add("e", "math:e")
    assert list(entries) == ["pi", "e"]
    with pytest.raises(ConfigError, match=r"number 'pi' exists: math:pi\. Choose another name"):
        entries.add("pi", "math:tau")


def test_nothing_is_imported_before_it_is_used():
    program = (
        "import sys; from mezzotint.registry import ROUNDINGS; list(ROUNDINGS), 'gptq' in ROUNDINGS;"
        "print([m for m in sys.modules if m.startswith(('mezzotint.rounding', 'torch'))])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
