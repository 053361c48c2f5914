"""Structure of a model as data: matrices, running order and connections. It holds no weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Unit of rounding, allocation and storage: a stored matrix, never a piece of one.

    Attributes:
        name: canonical and unique, e.g. ``model.layers.3.mlp.experts.down_proj[5]``, ``lm_head``.
        parameter: name in the module, e.g. ``model.layers.3.mlp.experts.down_proj``.
        sources: tensor names in the checkpoint; results are written back under these.
        shape: ``(out, in)`` without padding.
        expert: index into a 3-D parameter.
        transposed: stored ``[in, out]`` (Conv1D of GPT-2, gpt-oss experts).
        linear: stored as the weight of an ``nn.Linear``; packed formats of stock engines hold nothing else.
        lookup: stored as the weight of an ``nn.Embedding``: rows are looked up, and have no inputs.
        bias: name of the bias parameter.
        tied_to: parameter this one shares storage with; counted once, quantized once or kept.
        fusion: engines that fuse store one scheme for all matrices of a class: ``3.qkv``, ``3.gate_up``, ``3.experts``.
    """

    name: str
    parameter: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    linear: bool = True
    lookup: bool = False
    bias: str | None = None
    tied_to: str | None = None
    fusion: str

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix as ``[out, in]``: a view of its parameter's tensor."""
        piece = parameter if self.expert is None else parameter[self.expert]
        return piece.t() if self.transposed else piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Rows of a matrix that play one part; fused and interleaved layouts are an index, never a copy.

    Attributes:
        rows: gives the row indices; ``None`` means all rows (NeoX: per head; Phi3: a run).
        head_dim: rows per head of q, k and v.
    """

    kind: Literal["q", "k", "v", "o", "gate", "up", "down"]
    matrix: str
    rows: Callable[[], Int[Tensor, " rows"]] | None = None
    head_dim: int | None = None


class Reader(NamedTuple):
    """A parameter that is multiplied with something; ``transposed`` is stored ``[in, out]``."""

    parameter: str
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NormEdge:
    """A normalisation that feeds an input group, where scales of its input columns can be folded.

    Attributes:
        parameter: name of the gain.
        bias: name of the bias, if it adds one.
        readers: every parameter that its output is multiplied with, routers included; nothing else reads it.
        on_stream: its input is the residual stream.
        gain: ``w`` when the output is multiplied by the gain, ``1+w`` when by one plus the gain (Gemma).
        has_mean: subtracts the mean (LayerNorm).
    """

    parameter: str
    gain: Literal["w", "1+w"]
    has_mean: bool
    bias: str | None
    readers: tuple[Reader, ...]
    on_stream: bool

    @property
    def has_bias(self) -> bool:
        """Adds a bias."""
        return self.bias is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Matrices that receive the same tensor, in running order; they share one set of statistics.

    Attributes:
        matrices: names; of experts all those that run at this point (each has its own tokens).
        parameters: names of the parameters that hold them, in running order.
        norm: the normalisation whose output is the input, if there is one.
        added_to_residual: the output is added unchanged to the residual stream (false under post-norms).
        stream: path of the module whose input is the stream that the output is added to, where there is one.
        experts: tokens differ per member, and so do the statistics.
    """

    matrices: tuple[str, ...]
    parameters: tuple[str, ...]
    norm: NormEdge | None = None
    added_to_residual: bool = False
    stream: str | None = None
    experts: bool = False

    @property
    def sees_residual(self) -> bool:
        """Whether the stream that the outputs are added to can be compared with that of the original."""
        return self.added_to_residual and self.stream is not None and not self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer layer: where it is, what is in it and in which order it runs.

    Attributes:
        returns: of the values that its module returns, which are tensors; empty where it returns the hidden states
            alone.
    """

    index: int
    path: str
    groups: tuple[InputGroup, ...]
    roles: tuple[Role, ...]
    kind: str
    returns: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """A model as data: blocks, matrices and what surrounds them. Holds no weights.

    Attributes:
        blocks: in running order.
        matrices: the token embedding, every matrix of every block, and the head, by canonical name.
        embedding: canonical name of the token embedding's matrix, ``[vocabulary, width]``.
        head: canonical name of the output head's matrix (``tied_to`` says if it shares the embedding), or None.
        final_norm: the normalisation before the head.
        parallel_residual: attention and MLP read the same stream and are added to it together.
        unmapped: parameters of blocks with two or more axes that no matrix of the map holds, with why they are kept.
        stream_width: numbers of the hidden states a token: the hidden size, or several times that.
        merged: parameters that transformers makes of several weights of the checkpoint while it loads.
    """

    blocks: tuple[Block, ...]
    matrices: Mapping[str, Matrix]
    embedding: str
    head: str | None
    final_norm: NormEdge | None
    parallel_residual: bool
    unmapped: Mapping[str, str] = field(default_factory=dict)
    stream_width: int = 0
    merged: tuple[str, ...] = ()

    def looked_up(self, name: str) -> bool:
        """Whether a matrix is a token embedding that is no head: rows of it are taken, and nothing is multiplied."""
        tied = self.head is not None and self.matrices[self.head].tied_to is not None
        return name == self.embedding and not tied
