"""Modules that keep their weight packed: linears, embeddings, and heads that share an embedding's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mezzotint.core.contracts import Basis
from mezzotint.engines.product import product, rows_of
from mezzotint.formats.native import CHECKSUM, Scheme
from mezzotint.transforms.hadamard import HadamardBasis


class Packed(nn.Module):
    """A matrix as it is stored, for inference: no gradient flows through it.

    The tensors of the format are buffers under the names they have in the file, so the state of a model is what is
    stored. Nothing decoded is kept between calls. Buffers keep their dtype whatever the model is cast to: they hold
    codes, and scales that were rounded once already.
    """

    scheme: Scheme
    _seen: tuple[tuple[Tensor | None, ...], Mapping[str, Tensor], Basis | None] | None

    def hold(self, scheme: Scheme, device: torch.device | str | None) -> None:
        """Make room for a matrix.

        Args:
            scheme: how it is stored.
            device: of its tensors.
        """
        self.scheme = scheme
        self._seen = None
        for name, (kind, shape) in scheme.specs().items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))

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
    def times(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """``x W^T``, in the dtype of ``x``."""
        parts, basis = self.prepared()
        rows, columns = self.scheme.shape
        flat = x.reshape(-1, columns)
        if basis is not None:
            flat = basis.input(flat)
        y = product(flat.detach(), self.scheme, parts, x.dtype)
        if basis is not None:
            y = basis.output(y)
        return y.to(x.dtype).reshape(*x.shape[:-1], rows)

    def prepared(self) -> tuple[Mapping[str, Tensor], Basis | None]:
        """The format's tensors and the basis, made again whenever a buffer was replaced: loading and moving do that."""
        buffers = tuple(self._buffers.values())
        if self._seen is None or any(a is not b for a, b in zip(self._seen[0], buffers, strict=True)):
            parts = {name.removeprefix("weight_"): value for name, value in self.stored.items() if name != CHECKSUM}
            self._seen = buffers, parts, self.scheme.basis(parts)
        return self._seen[1], self._seen[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        before = dict(self.stored)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if self.get_buffer(name).dtype != value.dtype:
                self._buffers[name] = value.to(self.get_buffer(name).device)
        return self

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        grid, (rows, columns) = self.scheme.grid, self.scheme.shape
        return f"{columns}, {rows}, grid={grid.kind}, bits={grid.bits}"


class QuantizedLinear(Packed):
    """``nn.Linear`` on a packed weight.

    ``weight`` is decoded whenever model code reads it instead of calling the module (Mamba does, and GPT-BigCode).

    Args:
        scheme: how the weight is stored.
        bias: whether there is one.
        dtype: of the bias and of the decoded weight: that in which the model runs.
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
        self.hold(scheme, device)
        self.out_features, self.in_features = scheme.shape
        made = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)
        self.register_buffer("like_weight", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """The dense weight, in the dtype in which the model runs."""
        return self.dense(self.get_buffer("like_weight").dtype)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """``x W^T + bias``, in the dtype of ``x``."""
        y = self.times(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Packed, nn.Embedding):
    """``nn.Embedding`` on a packed table: only the rows that are looked up are decoded.

    ``weight`` is a table without rows: it says in which dtype the model runs, and is no part of what is stored.
    """

    @classmethod
    def pack(cls, module: nn.Embedding, scheme: Scheme) -> "QuantizedEmbedding":
        """Turn an embedding into a packed one in its place.

        What a subclass adds to the lookup (Gemma multiplies by a number) stays: its class comes before this one.
        """
        kind: Any = type(module)
        weight = module.weight
        del module.weight
        module.__class__ = cls if kind is nn.Embedding else type(f"Quantized{kind.__name__}", (kind, cls), {})
        assert isinstance(module, QuantizedEmbedding)
        module.padding_idx = None  # for gradients only; transformers would write to that row of the empty table
        module.register_buffer("weight", weight.new_empty(0, weight.shape[1]), persistent=False)
        module.hold(scheme, weight.device)
        return module

    @torch.no_grad()
    def forward(self, ids: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens width"]:
        """Rows of the table, in the dtype that the model runs in."""
        parts, basis = self.prepared()
        flat = ids.reshape(-1)
        values = rows_of(flat, self.scheme, parts)
        if basis is not None:
            assert isinstance(basis, HadamardBasis), "the format refuses others for what is looked up"
            values = basis.take_rows(flat).inverse(values)
        return values.to(self.weight.dtype).reshape(*ids.shape, -1)


class TiedHead(nn.Module):
    """A head whose matrix is an embedding's: it stores nothing but its bias.

    Args:
        embedding: where the matrix is.
        bias: its own.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._shared = (embedding,)  # not a submodule: its tensors are in the state of the model once
        self.out_features, self.in_features = embedding.scheme.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """``x W^T + bias``, in the dtype of ``x``."""
        y = self._shared[0].times(x)
        return y if self.bias is None else y + self.bias
