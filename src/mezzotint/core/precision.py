"""The arithmetic of matrix products in the streams and their statistics."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


class RoundedLinears(TorchFunctionMode):
    """While it is entered, linears multiply bfloat16 tensors, and round their outputs to bfloat16 too.

    That is what a model stored in bfloat16 does; the stream that outputs are added to stays float32. It takes half the
    time of `products_in`, where torch rounds the factors anew for every product. What is to be differentiated is left
    alone, and so is everything that is no linear.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is not torch.nn.functional.linear or torch.is_grad_enabled():
            return func(*args, **given)
        return _rounded_linear(*args, **given)


def _rounded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's name
    factors = (None if value is None else value.bfloat16() for value in (input, weight, bias))
    return torch.nn.functional.linear(*factors).to(input.dtype)  # pyright: ignore[reportArgumentType]
