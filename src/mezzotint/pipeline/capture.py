"""Running a model block by block: what goes into each block, and what goes into each input group of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mezzotint.core.structure import Block
from mezzotint.errors import ModelError
from mezzotint.models.experts import set_observer


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one batch puts into a matrix.

    Attributes:
        values: ``[tokens, in]``.
        tokens: flat index of each row in the batch; None when every token is there, in order.
        stream: the residual stream that the matrix's output will be added to, where it is added unchanged.
    """

    values: Float[Tensor, "tokens in"]
    tokens: Int[Tensor, " tokens"] | None = None
    stream: Float[Tensor, "tokens out"] | None = None


GroupInputs = Mapping[int | None, Inputs]  # by expert; None for a matrix that is not an expert


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def first(self, windows: int, of: int) -> "Call":
        """The same for the first windows of its batch; what all ``of`` windows share stays."""

        def cut(value: Any) -> Any:
            own = isinstance(value, Tensor) and value.dim() > 1 and len(value) == of
            return value[:windows] if own else value

        args, kwargs = tree_map(cut, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)


def through(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The block's output."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


class _LastBlockReachedError(Exception):
    """Leaves the model's forward: nothing after the blocks is wanted."""


class Bypass:
    """Runs the real model code around the blocks, with every block replaced by one that hands the hidden states on.

    One cheap forward gives the embedded tokens and each block's own masks, positions and rotary tables; another one
    turns the last block's output into logits, whatever the model does to them.

    Both can be differentiated in whatever of it has been asked to have a gradient; usually nothing has.

    Args:
        skeleton: the model, with what is run outside the blocks materialised.
        paths: of the blocks, in running order.
    """

    def __init__(self, skeleton: nn.Module, paths: Sequence[str]) -> None:
        self._skeleton = skeleton
        self._blocks = [skeleton.get_submodule(path) for path in paths]
        self._seen: list[Tensor] = []
        self._returns_tuple: dict[type, bool] = {}

    def record(self, tokens: Int[Tensor, "windows seqlen"], mask: Tensor | None) -> tuple[Tensor, list[Call]]:
        """The embedded tokens, and the call of each block."""
        calls: list[Call] = []
        embedded: list[Tensor] = []

        def see(hidden: Tensor, call: Call) -> Tensor:
            embedded.append(hidden)
            calls.append(Call(*tree_map(self._shared, (call.args, dict(call.kwargs)))))
            if len(calls) == len(self._blocks):
                raise _LastBlockReachedError
            return hidden

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
        output = self._forward(lambda _, __: hidden, tokens, None, logits_to_keep=positions)
        return output.logits if output.logits.shape[1] == len(positions) else output.logits[:, positions]

    def _forward(self, see: Callable[[Tensor, Call], Tensor], tokens: Tensor, mask: Tensor | None, **extra: Any) -> Any:
        def stand_in(block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                result = see(hidden, call)
                return (result,) if self._tuple(block, original, hidden, call) else result

            return forward

        try:
            for block in self._blocks:
                block.forward = stand_in(block, block.forward)
            return self._skeleton(input_ids=tokens, attention_mask=mask, use_cache=False, **extra)
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    def _tuple(self, block: nn.Module, forward: Callable[..., Any], hidden: Tensor, call: Call) -> bool:
        """Whether the block returns a tuple: found once per class by running it on the meta device."""
        known = self._returns_tuple.get(type(block))
        if known is None:
            moved = tree_map(
                lambda x: x.to("meta") if isinstance(x, Tensor) else x, (hidden, call.args, dict(call.kwargs))
            )
            known = isinstance(forward(moved[0], *moved[1], **moved[2]), tuple)
            self._returns_tuple[type(block)] = known
        return known

    def _shared(self, value: Any) -> Any:
        """The same tensor for equal values: masks and rotary tables are kept once, not per block and batch."""
        if not isinstance(value, Tensor):
            return value
        for seen in self._seen:
            alike = seen.shape == value.shape and seen.dtype == value.dtype
            if seen is value or (alike and torch.equal(seen, value)):
                return seen
        self._seen.append(value)
        return value


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


class _Paused(greenlet.greenlet):
    """One batch's pass through a block, which can stand still inside the block.

    Attributes:
        stream: input of the norm that ran last: what the branch behind it will be added to.
        added: outputs that a parallel block has added to the stream since.
        noted: calls of the modules that are to be noted, by their paths.
    """

    stream: Tensor | None = None
    added: Tensor | None = None

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.noted: dict[str, Call] = {}


class BlockRun:
    """One batch's pass through a block that stops at the input of each group.

    The block's own forward runs in a greenlet; a hook at the first linear of each group switches back to the caller,
    so a group can be quantized while every batch waits before it, and no prefix is ever computed twice.

    Args:
        block: the module.
        hidden: ``[windows, seqlen, width]``.
        call: the other arguments.
        keep: stay inside the block between stops; otherwise memory is freed and the next stop starts from the front.

    Attributes:
        call: as it was given.
        noted: calls of the modules that `stops` was told to note, by their paths, as far as the block has run.
    """

    def __init__(self, block: nn.Module, hidden: Callable[[], Tensor], call: Call, *, keep: bool = True) -> None:
        self._block = block
        self._hidden = hidden
        self.call = call
        self._keep = keep
        self._run: _Paused | None = None
        self.noted: Mapping[str, Call] = {}

    def reach(self, group: int) -> GroupInputs:
        """Run on to a group and give its inputs."""
        while True:
            stop = self._advance()
            if not (isinstance(stop, tuple) and stop[0] == "stop"):
                raise ModelError(f"input group {group} of the block did not run on this batch; the map is wrong.")
            if stop[1] == group:
                assert self._run is not None
                self.noted = self._run.noted
                if not self._keep:
                    self._leave()
                return stop[2]

    def restart(self) -> None:
        """Leave the block: the next stop starts from the front, with the weights as they are then."""
        self._leave()

    def finish(self) -> Tensor:
        """Run to the end and give the block's output."""
        while True:
            result = self._advance()
            if not (isinstance(result, tuple) and result[0] == "stop"):
                self._run = None
                return result[1]

    def _leave(self) -> None:
        """Unwind the forward where it stands; merely forgotten, it would hold its activations as garbage."""
        run, self._run = self._run, None
        if run is not None:
            run.throw()

    def _advance(self) -> tuple[Any, ...]:
        if self._run is None:
            self._run = _Paused(self._forward)
        # here, not inside: a thread has one switch for gradients, and what waits must not leave it turned
        with torch.no_grad():
            return self._run.switch()

    def _forward(self) -> tuple[str, Tensor]:
        return "end", through(self._block, self._hidden(), self.call)


def _current() -> _Paused | None:
    current = greenlet.getcurrent()
    return current if isinstance(current, _Paused) else None


def _stop(group: int, inputs: GroupInputs) -> None:
    current = _current()
    if current is not None:
        assert current.parent is not None
        current.parent.switch("stop", group, inputs)


@contextmanager
def stops(skeleton: nn.Module, block: Block, *, parallel: bool, noted: Sequence[str] = ()) -> Iterator[None]:
    """Make every `BlockRun` of this block stop at the inputs of its groups.

    Args:
        skeleton: the model that the block is part of.
        block: its groups.
        parallel: attention and MLP are added to the same stream (`ModelMap.parallel_residual`).
        noted: paths of modules whose calls every run notes.
    """
    handles = [
        skeleton.get_submodule(path).register_forward_pre_hook(_note_call(path), with_kwargs=True) for path in noted
    ]
    observed: dict[nn.Module, dict[str, int]] = {}
    for norm in dict.fromkeys(group.norm for group in block.groups if group.norm is not None):
        module = skeleton.get_submodule(norm.parameter.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(_note_stream))
    for index, group in enumerate(block.groups):
        module_path, _, attribute = group.parameters[0].rpartition(".")
        module = skeleton.get_submodule(module_path)
        if group.experts:
            observed.setdefault(module, {})[attribute] = index
            continue
        handles.append(module.register_forward_pre_hook(_linear_stop(index, group.added_to_residual)))
        if parallel and group.added_to_residual:
            handles.append(module.register_forward_hook(_note_added))
    for module, indices in observed.items():
        set_observer(module, _expert_stop(indices))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in observed:
            set_observer(module, None)


def _note_call(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = _current()
        if current is not None:
            current.noted[path] = _split(args, kwargs)[1]

    return hook


def _note_stream(_: nn.Module, args: tuple[Any, ...]) -> None:
    current = _current()
    if current is not None:
        if args[0] is not current.stream:  # a parallel block norms the same stream twice
            current.added = None
        current.stream = args[0]


def _note_added(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    current = _current()
    if current is not None:
        current.added = output if current.added is None else current.added + output


def _linear_stop(index: int, added_to_residual: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        current = _current()
        if current is None:
            return
        stream = current.stream if added_to_residual else None
        if stream is not None:
            stream = (stream if current.added is None else stream + current.added).flatten(0, -2)
        _stop(index, {None: Inputs(values=args[0].flatten(0, -2), stream=stream)})

    return hook


def _expert_stop(indices: Mapping[str, int]) -> Callable[[str, Mapping[int, Tensor], Mapping[int, Tensor]], None]:
    def callback(attribute: str, inputs: Mapping[int, Tensor], tokens: Mapping[int, Tensor]) -> None:
        if attribute in indices:
            by_expert: dict[int | None, Inputs] = {e: Inputs(values=x, tokens=tokens[e]) for e, x in inputs.items()}
            _stop(indices[attribute], by_expert)

    return callback
