"""Stops a forward pass inside a block, at the inputs of each input group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mezzotint.blockwise.bypass import Call, Passage, split_call
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


class _Paused(greenlet.greenlet):
    """One batch's pass through a block, which can stand still inside the block.

    Attributes:
        streams: what branches are added to: inputs of modules, by their paths (`InputGroup.stream`).
        added: outputs that a parallel block has added to its stream.
        noted: calls of the modules that are to be noted, by their paths.
    """

    added: Tensor | None = None

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.streams: dict[str, Tensor] = {}
        self.noted: dict[str, Call] = {}


class BlockRun:
    """One batch's pass through a block that stops at the input of each group.

    The block's own forward runs in a greenlet; a hook at the first linear of each group switches back to the caller,
    so a group can be quantized while every batch waits before it, and no prefix is ever computed twice.

    Args:
        module: the block.
        block: its index.
        hidden: ``[windows, seqlen, width]``.
        passage: has the other arguments.
        keep: stay inside the block between stops; otherwise memory is freed and the next stop starts from the front.

    Attributes:
        noted: calls of the modules that `stops` was told to note, by their paths, as far as the block has run.
    """

    def __init__(
        self, module: nn.Module, block: int, hidden: Callable[[], Tensor], passage: Passage, *, keep: bool = True
    ) -> None:
        self._module = module
        self._block = block
        self._hidden = hidden
        self._passage = passage
        self._keep = keep
        self._run: _Paused | None = None
        self.noted: Mapping[str, Call] = {}

    @property
    def call(self) -> Call:
        """Arguments of the block besides the hidden states."""
        return self._passage.call(self._block)

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
        return "end", self._passage.through(self._module, self._block, self._hidden())


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
    for path in dict.fromkeys(group.stream for group in block.groups if group.stream is not None):
        handles.append(skeleton.get_submodule(path).register_forward_pre_hook(_note_stream(path)))
    for index, group in enumerate(block.groups):
        module_path, _, attribute = group.parameters[0].rpartition(".")
        module = skeleton.get_submodule(module_path)
        if group.experts:
            observed.setdefault(module, {})[attribute] = index
            continue
        handles.append(module.register_forward_pre_hook(_linear_stop(index, group.stream)))
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
            current.noted[path] = split_call(args, kwargs)[1]

    return hook


def _note_stream(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        current = _current()
        if current is not None:
            current.streams[path] = args[0]

    return hook


def _note_added(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    current = _current()
    if current is not None:
        current.added = output if current.added is None else current.added + output


def _linear_stop(index: int, path: str | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        current = _current()
        if current is None:
            return
        stream = None if path is None else current.streams[path]
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
