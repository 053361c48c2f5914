"""A linear layer that keeps its weight packed."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.core.contracts import Basis
from mezzotint.engines.product import product
from mezzotint.formats.native import CHECKSUM, Scheme


class QuantizedLinear(nn.Module):
    """``nn.Linear`` on a packed weight, for inference: no gradient flows through it.

    The tensors of the format are buffers under the names they have in the file, so the state of a model is what is
    stored. Nothing decoded is kept between calls. Buffers keep their dtype whatever the model is cast to: they hold
    codes, and scales that were rounded once already.

    Args:
        scheme: how the weight is stored.
        bias: whether there is one.
        dtype: of the bias.
        device: of everything.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._seen: tuple[tuple[Tensor | None, ...], Mapping[str, Tensor], Basis | None] | None = None
        self.out_features, self.in_features = scheme.shape
        for name, (kind, shape) in scheme.specs().items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        made = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The tensors of the format, by their names in the module."""
        return {name: self.get_buffer(name) for name in self.scheme.specs()}

    def verify(self, name: str) -> None:
        """Check the tensors against their checksum; ``name`` is for the message.

        Raises:
            FormatError: they are not those that were written.
        """
        self.scheme.verify(name, self.stored)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for."""
        return self.scheme.restore(self.stored).dense(dtype)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """``x W^T + bias``, in the dtype of ``x``."""
        parts, basis = self._prepared()
        flat = x.reshape(-1, self.in_features)
        if basis is not None:
            flat = basis.input(flat)
        y = product(flat.detach(), self.scheme, parts, x.dtype)
        if basis is not None:
            y = basis.output(y)
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _prepared(self) -> tuple[Mapping[str, Tensor], Basis | None]:
        """The format's tensors and the basis, made again whenever a buffer was replaced: loading and moving do that."""
        buffers = tuple(self._buffers.values())
        if self._seen is None or any(a is not b for a, b in zip(self._seen[0], buffers, strict=True)):
            parts = {name.removeprefix("weight_"): value for name, value in self.stored.items() if name != CHECKSUM}
            self._seen = buffers, parts, self.scheme.basis(parts)
        return self._seen[1], self._seen[2]

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        grid = self.scheme.grid
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={grid.kind}, bits={grid.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        before = dict(self.stored)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if self.get_buffer(name).dtype != value.dtype:
                self._buffers[name] = value.to(self.get_buffer(name).device)
        return self
