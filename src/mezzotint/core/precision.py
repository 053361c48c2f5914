"""The arithmetic of matrix products in the streams and their statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {"float32": "highest", "bfloat16": "medium"}


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Round the factors of float32 matrix products to a type; sums and results stay float32.

    Three to four times as fast on processors with AMX; hardware without such products computes them in float32. A model
    that is stored in bfloat16 is served with products like these, so its activations here carry no error that they
    do not have there.

    Args:
        precision: ``float32`` or ``bfloat16``.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
