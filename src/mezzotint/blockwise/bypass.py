"""The model's own code around its blocks, and the path of one batch through the blocks."""

import json
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mezzotint.core.structure import Block
from mezzotint.errors import ModelError
from mezzotint.models import Source, dematerialize, materialize
from mezzotint.storage.stores import Shelf


@dataclass(frozen=True, slots=True)
class Returned:
    """Stands in a call for what an earlier block returned beside its hidden states.

    Attributes:
        name: of the value in the state of a `Passage`.
    """

    name: str


@dataclass(frozen=True, slots=True)
class SharedDict:
    """Stands in a call for the dictionary in which blocks leave tensors for later blocks (keys and values).

    Attributes:
        kind: its class.
    """

    kind: type[UserDict[Any, Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one block besides the hidden states.

    Attributes:
        axis: of the hidden states of the model on which windows lie; everywhere else it is the first one.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axis: int = 0

    def first(self, windows: int, of: int) -> "Call":
        """The same for the first windows of its batch; what all ``of`` windows share stays."""

        def cut(value: Any) -> Any:
            if isinstance(value, UserDict):
                return type(value)(tree_map(cut, value.data))
            own = isinstance(value, Tensor) and value.dim() > 1 and len(value) == of
            return value[:windows] if own else value

        return self.mapped(cut)

    def mapped(self, change: Callable[[Any], Any]) -> "Call":
        """The same with every argument changed."""
        args, kwargs = tree_map(change, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.axis)


@dataclass(slots=True)
class Beside:
    """What a block read and wrote beside the hidden states, for gradients.

    Attributes:
        read: leaves that require a gradient, by name and by the block that wrote them.
        written: values by name.
    """

    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)


class Passage:
    """One batch's way through the blocks: their calls, and what blocks hand on beside the hidden states.

    Some blocks read more of earlier blocks than hidden states: their keys and values (Gemma 3n and 4), the places that
    an indexer chose (GLM-5), the states of a router (Zaya). Every value is kept with the block that wrote it, and a
    block reads what was written before it: so it may run any number of times.

    Args:
        calls: of the blocks, in running order.
        shelf: keeps the values.
        history: keep what every block wrote, to run the blocks again from last to first; otherwise only what the
            current block and those behind it read.
    """

    def __init__(self, calls: Sequence[Call], shelf: Shelf, *, history: bool = False) -> None:
        self._calls = calls
        self._shelf = shelf
        self._history = history
        self._written: dict[str, dict[int, int]] = {}
        self._last_read = {name: block for block, call in enumerate(calls) for name in _links(call)}

    def through(self, module: nn.Module, block: int, hidden: Tensor, beside: Beside | None = None) -> Tensor:
        """The block's output; what later blocks read of it is kept.

        Args:
            module: the block.
            block: its index.
            hidden: ``[windows, seqlen, width]``.
            beside: is told what was read and written; then nothing is kept.
        """
        call, shared = self._filled(block, beside)
        before = [dict(one) for one in shared]
        output = module(_to_model(hidden, call.axis), *call.args, **call.kwargs)
        found = output if isinstance(output, tuple | list) else (output,)
        written = {f"{block}.{place}": value for place, value in enumerate(found) if place}
        written = {name: value for name, value in written.items() if name in self._last_read}
        for one, known in zip(shared, before, strict=True):
            changed = {key: values for key, values in one.items() if values is not known.get(key)}
            written |= {
                json.dumps([key, i]): value for key, values in changed.items() for i, value in enumerate(values)
            }
        if beside is None:
            for name, value in written.items():
                self._write(name, block, value)
            if not self._history:
                self._forget_before(block)
        else:
            beside.written |= written
        return _from_model(found[0], call.axis)

    def call(self, block: int) -> Call:
        """What a block is called with besides the hidden states."""
        return self._filled(block, None)[0]

    def state(self) -> dict[str, Tensor]:
        """What the blocks so far have left for those behind them."""
        return {name: self._shelf.held(written[max(written)]) for name, written in self._written.items() if written}

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Start at a later block than the first, with the `state` of another passage there."""
        for name, value in state.items():
            self._write(name, -1, value)

    def branch(self, block: int) -> "Passage":
        """Another way with the same calls, from that block on."""
        other = Passage(self._calls, self._shelf)
        other.begin({name: self._shelf.held(written[self._writer(name, block)]) for name, written in self._at(block)})
        return other

    def close(self) -> None:
        """Forget what is kept."""
        for written in self._written.values():
            for key in written.values():
                self._shelf.release(key)
        self._written.clear()

    def _at(self, block: int) -> Iterator[tuple[str, dict[int, int]]]:
        for name, written in self._written.items():
            if any(writer < block for writer in written):
                yield name, written

    def _writer(self, name: str, block: int) -> int:
        """The last block before one that wrote a value."""
        return max(writer for writer in self._written[name] if writer < block)

    def _filled(self, block: int, beside: Beside | None) -> tuple[Call, list[UserDict[Any, Any]]]:
        """The call with values in the place of what stands for them, and the dictionaries among them."""
        shared: list[UserDict[Any, Any]] = []

        def read(name: str) -> Tensor:
            writer = self._writer(name, block)
            value = self._shelf.held(self._written[name][writer])
            if beside is not None and value.is_floating_point():
                value = beside.read[name, writer] = value.detach().requires_grad_(True)
            return value

        def fill(value: Any) -> Any:
            if isinstance(value, Returned):
                return read(value.name)
            if not isinstance(value, SharedDict):
                return value
            places: dict[Any, list[str]] = {}
            for name in sorted(name for name, _ in self._at(block) if name.startswith("[")):
                places.setdefault(json.loads(name)[0], []).append(name)
            shared.append(value.kind({key: tuple(map(read, names)) for key, names in places.items()}))
            return shared[-1]

        return self._calls[block].mapped(fill), shared

    def _write(self, name: str, block: int, value: Tensor) -> None:
        written = self._written.setdefault(name, {})
        if block in written:
            self._shelf.release(written.pop(block))
        written[block] = self._shelf.hold(value)

    def _forget_before(self, block: int) -> None:
        """Forget what neither a block nor those behind it read."""
        for name, written in self._written.items():
            last = self._last_read.get(name, len(self._calls))
            needed = max((writer for writer in written if writer < block), default=block)
            for writer in [writer for writer in written if writer < needed or last < block]:
                self._shelf.release(written.pop(writer))


class _LastBlockReachedError(Exception):
    """Leaves the model's forward: nothing after the blocks is wanted."""


class _HeadReachedError(Exception):
    """Leaves the model's forward: logits are not wanted."""


class Bypass:
    """Runs the real model code around the blocks, with every block replaced by one that hands the hidden states on.

    One cheap forward gives the embedded tokens and each block's own masks, positions and rotary tables; another one
    turns the last block's output into logits, whatever the model does to them.

    Both can be differentiated in whatever of it has been asked to have a gradient; usually nothing has.

    Args:
        skeleton: the model, with what is run outside the blocks materialised.
        blocks: in running order.
    """

    def __init__(self, skeleton: nn.Module, blocks: Sequence[Block]) -> None:
        self._skeleton = skeleton
        self._blocks = [(skeleton.get_submodule(block.path), block.returns) for block in blocks]
        self._seen: list[Tensor] = []

    def record(self, tokens: Int[Tensor, "windows seqlen"], mask: Tensor | None) -> tuple[Tensor, list[Call]]:
        """The embedded tokens, and the call of each block."""
        calls: list[Call] = []
        embedded: list[Tensor] = []
        names: dict[int, str] = {}

        def see(hidden: Tensor, call: Call, beside: Sequence[Tensor | None]) -> Tensor:
            embedded.append(hidden)
            calls.append(call.mapped(lambda value: self._kept(value, names)))
            if len(calls) == len(self._blocks):
                raise _LastBlockReachedError
            names.update({id(value): f"{len(calls) - 1}.{i}" for i, value in enumerate(beside, 1) if value is not None})
            alive.extend(beside)
            return hidden

        alive: list[Tensor | None] = []  # an identity stands for a tensor only while that lives
        try:
            self._forward(see, tokens, mask)
        except _LastBlockReachedError:
            return embedded[0], calls
        raise ModelError(
            "the model's forward never ran its last block; this architecture cannot be run block by block."
        )

    def logits(
        self, tokens: Int[Tensor, "windows seqlen"], hidden: Tensor, positions: Int[Tensor, " kept"]
    ) -> Float[Tensor, "windows kept vocab"]:
        """Logits at some positions, given the last block's output."""
        output = self._forward(lambda *_: hidden, tokens, None, logits_to_keep=positions)
        return output.logits if output.logits.shape[1] == len(positions) else output.logits[:, positions]

    def head_input(
        self, tokens: Int[Tensor, "windows seqlen"], hidden: Tensor
    ) -> Float[Tensor, "windows seqlen width"]:
        """What the head multiplies, given the last block's output; the head itself need not be there."""
        found: list[Tensor] = []

        def leave(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _HeadReachedError

        head: Any = self._skeleton.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(leave)
        try:
            self._forward(lambda *_: hidden, tokens, None)
        except _HeadReachedError:
            return found[0]
        finally:
            handle.remove()
        raise ModelError("the model's forward never ran its head; its inputs cannot be observed. Keep the head.")

    def _forward(self, see: Callable[..., Tensor], tokens: Tensor, mask: Tensor | None, **extra: Any) -> Any:
        def stand_in(returns: Sequence[bool]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split_call(args, kwargs)
                axis = _window_axis(hidden, tokens)
                beside = [hidden.new_empty(0) if tensor else None for tensor in returns[1:]]
                result = see(_from_model(hidden, axis), replace(call, axis=axis), beside)
                result = _to_model(result, axis)
                return (result, *beside) if returns else result

            return forward

        try:
            for block, returns in self._blocks:
                block.forward = stand_in(returns)
            return self._skeleton(input_ids=tokens, attention_mask=mask, use_cache=False, **extra)
        finally:
            for block, _ in self._blocks:
                block.__dict__.pop("forward", None)

    def _kept(self, value: Any, names: Mapping[int, str]) -> Any:
        """An argument as it is recorded: equal masks and rotary tables are kept once, not per block and batch."""
        if isinstance(value, UserDict):
            return SharedDict(type(value))
        if not isinstance(value, Tensor):
            return value
        if id(value) in names:
            return Returned(names[id(value)])
        for seen in self._seen:
            alike = seen.shape == value.shape and seen.dtype == value.dtype
            if seen is value or (alike and torch.equal(seen, value)):
                return seen
        self._seen.append(value)
        return value


@contextmanager
def surroundings(source: Source, *, head: bool, dtype: torch.dtype, device: str) -> Iterator[Bypass]:
    """What lies around the blocks, in memory: embedding, positions, final norm and, if asked for, the head."""
    skeleton = source.skeleton
    paths = [block.path for block in source.map.blocks]
    output = None if head else skeleton.get_output_embeddings()
    parts = [(name, part, own) for name, part, own in _outside(skeleton, "", paths) if part is not output]
    for name, part, own in parts:
        materialize(part, name, source.checkpoint, dtype=dtype, device=device, recurse=not own)
    try:
        yield Bypass(skeleton, source.map.blocks)
    finally:
        for _, part, own in parts:
            dematerialize(part, recurse=not own)


def _outside(module: nn.Module, name: str, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """The largest parts of a model that hold no block, and of modules around blocks what is theirs alone (``True``)."""
    if name in paths:
        return
    if name and not any(path.startswith(f"{name}.") for path in paths):
        yield name, module, False
        return
    yield name, module, True
    for child_name, child in module.named_children():
        yield from _outside(child, f"{name}.{child_name}".lstrip("."), paths)


def _window_axis(hidden: Tensor, tokens: Int[Tensor, "windows seqlen"]) -> int:
    """Where windows lie in the hidden states of a model, with the tokens behind them."""
    windows, seqlen = tokens.shape
    pairs = zip(hidden.shape, hidden.shape[1:], strict=False)
    return next((axis for axis, pair in enumerate(pairs) if pair == (windows, seqlen)), 0)


def _from_model(hidden: Tensor, axis: int) -> Tensor:
    """Hidden states with windows and tokens on the first axes (Gemma 3n has its four streams there)."""
    return hidden.movedim((axis, axis + 1), (0, 1)).contiguous() if axis else hidden


def _to_model(hidden: Tensor, axis: int) -> Tensor:
    return hidden.movedim((0, 1), (axis, axis + 1)) if axis else hidden


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a call, and the rest of it."""
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _links(call: Call) -> Iterator[str]:
    for leaf in tree_leaves((call.args, dict(call.kwargs))):
        if isinstance(leaf, Returned):
            yield leaf.name
