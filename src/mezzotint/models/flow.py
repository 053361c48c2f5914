"""Result of one traced forward pass as data: products, norms and streams."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Value:
    """What a tensor was made of, since its block began.

    Attributes:
        number: the same for views and copies, and for nothing else.
        parameter: name of the parameter that this is.
        terms: parameters whose products are unchanged summands of it.
        upstream: parameters whose products it depends on.
        nearest: those reached without passing the product of another parameter.
        stream: it is the residual stream of the block.
        mixed: a product of two things that both depend on the input is part of it: attention.
    """

    number: int
    parameter: str | None = None
    terms: frozenset[str] = frozenset()
    upstream: frozenset[str] = frozenset()
    nearest: frozenset[str] = frozenset()
    stream: bool = False
    mixed: bool = False


@dataclass(slots=True)
class Product:
    """A parameter that was multiplied with something.

    Attributes:
        operand: what it was multiplied with, at its first run.
        transposed: the product is ``x @ parameter``.
        observable: the operand is the input of the module that owns the parameter.
        block: index of the block it ran in.
        runs: how often it ran.
    """

    parameter: str
    operand: Value
    transposed: bool
    observable: bool
    block: int | None
    runs: int = 1


@dataclass(slots=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        products: by parameter, in running order.
        added: parameters whose product reaches the residual stream unchanged, with the number of what it is added to.
        before: of a residual stream to which products were added: the number of the stream before.
        stream_readers: path of the first module without children whose input is a residual stream, by its block and
            number.
        given: parameters whose module gives their product as it is.
        ranked: parameters whose product is ranked, to choose among things.
        stages: parameters of observed experts with their input, in running order.
        norms: path of a module without products and without children, by the number of its output.
        norm_runs: how often such a module ran.
        norms_of_stream: those whose input is the residual stream.
        read: numbers of values that something else than a product reads.
        block_order: indices of the blocks as they ran.
        embeddings: parameters that were looked up with the token ids.
        near_embeddings: those that were looked up with something made of them, as wrappers do.
        returned: of every block that returned several values, which of them are tensors.
        width: numbers of the hidden states a token.
        bridged: blocks whose input is not what the block before gave.
    """

    products: dict[str, Product] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)
    stream_readers: dict[tuple[int | None, int], str] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    ranked: set[str] = field(default_factory=set)
    stages: dict[str, Value] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    norm_runs: dict[str, int] = field(default_factory=dict)
    norms_of_stream: set[str] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    block_order: list[int] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    near_embeddings: list[str] = field(default_factory=list)
    returned: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    bridged: list[int] = field(default_factory=list)
    width: int = 0
