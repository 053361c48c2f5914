"""That `MEZZOTINT_TEST_SUMS` changes what it says: the order of sums, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
import sums

torch.manual_seed(0)
a, b = torch.randn(9, 64), torch.randn(64, 9)
spd = a.t() @ a + torch.eye(64)


def computed(a, b):
    two = torch.stack([a, a]) @ torch.stack([b, b])
    return [a @ b, torch.nn.functional.linear(a, b.t(), b[0]), two, a @ b[:, 0], a.sum(1), a.mean(1), a @ a.t()]


def solved():
    factor = torch.linalg.cholesky(spd)
    return [factor, torch.linalg.solve_triangular(factor, b, upper=False), torch.linalg.inv(spd)]


whole = (8 * a).round(), (8 * b).round()  # all sums of these are exact; so is a mean of 64 of them
before, exact = computed(a, b) + solved(), computed(*whole)
sums.set_up()
for found, expected in zip(computed(a, b) + solved(), before, strict=True):
    assert not torch.equal(found, expected)
    # 64 terms: sums differ by 64 roundings of 2^-24 of some hundred at most
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
for found, expected in zip(computed(*whole), exact, strict=True):
    assert torch.equal(found, expected)
assert torch.equal(a @ b, a @ b)
assert not torch.equal((a @ b)[:4], a[:4] @ b)
"""


def test_sums_are_the_same_in_another_order() -> None:
    environment = os.environ | {"MEZZOTINT_TEST_SUMS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
