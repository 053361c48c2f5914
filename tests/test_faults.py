"""The table of planted faults is of the code as it stands: every one can be planted, and its tests are there."""

import ast

import pytest

from plant_faults import ROOT, Fault, faults


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_it_can_be_planted(fault: Fault) -> None:
    ast.parse(fault.planted((ROOT / "src" / "mezzotint" / fault.file).read_text(encoding="utf-8")))
    assert all((ROOT / "tests" / name).exists() for name in fault.tests)


def test_names_are_of_one_fault_each() -> None:
    names = [fault.name for fault in faults()]
    assert len(names) == len({*names})
