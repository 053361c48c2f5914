"""Data flow of a model: one forward pass without data, recorded operator by operator.

Every tensor gets a ``Value`` that says what it was made of. Views and copies keep the value of their source, so "the
same tensor" means the same numbers, however they are laid out.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mezzotint.models import experts
from mezzotint.models.flow import Product, Trace, Value

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"})
COPIES = frozenset({"clone", "_to_copy", "copy"})
RANKINGS = frozenset({"topk", "sort", "argmax"})
SCALAR = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 (what Tensor.item calls)
TOKENS = (2, 5)  # unlike any dimension that a model has


class _Call(NamedTuple):
    """An operator that ran; ``mutated`` are the inputs that it wrote to."""

    args: Any
    kwargs: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    mutated: list[Tensor]


class Watcher(TorchDispatchMode):
    """Follows values through the operators of a forward pass and fills a ``Trace``."""

    def __init__(self, skeleton: PreTrainedModel) -> None:
        super().__init__()
        self.trace = Trace()
        self.block: int | None = None
        self._numbers = itertools.count()
        self._values: dict[int, dict[tuple[int, int], Value]] = {}
        self._alive: list[Any] = []  # an address stands for a storage only while that lives
        self._inputs: dict[str, int] = {}
        self._parameters: dict[int, tuple[str, ...]] = {}
        self._rules: dict[Any, tuple[Callable[[_Call], None], tuple[int, ...]]] = {}
        self._chosen: dict[int, frozenset[str]] = {}
        self._ids = -1
        self._of_ids: set[int] = set()
        self._given: int | None = None
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            key = self._storage(parameter)
            self._parameters[key] = (*self._parameters.get(key, ()), name)
        self._names = {names[0]: names for names in self._parameters.values()}

    # ---- values ----------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one seen for the first time is new."""
        key = self._storage(tensor)
        if key in self._parameters:
            return Value(-1 - key, parameter=self._parameters[key][0])
        places = self._values.setdefault(key, {})
        place = (int(tensor.storage_offset()), tensor.numel())
        if place not in places:
            places[place] = Value(next(self._numbers))
        return places[place]

    def set(self, tensor: Tensor, value: Value) -> None:
        """Record the value of a tensor."""
        self._values.setdefault(self._storage(tensor), {})[(int(tensor.storage_offset()), tensor.numel())] = value

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return storage._cdata  # noqa: SLF001 (data addresses are all zero without data)

    def _overwrite(self, tensor: Tensor, value: Value) -> None:
        """A tensor was written to: what overlaps it holds something new as well."""
        places = self._values.get(self._storage(tensor), {})
        mine = (int(tensor.storage_offset()), tensor.numel())
        for place, old in places.items():
            if place != mine:
                places[place] = self._mixed((old, value))
        self.set(tensor, value)

    def _mixed(self, values: Iterable[Value]) -> Value:
        values = tuple(values)
        number = next(self._numbers)
        if any(value.number in self._of_ids for value in values):
            self._of_ids.add(number)
        return Value(
            number,
            upstream=frozenset().union(*(v.upstream for v in values)),
            nearest=frozenset().union(*(v.nearest for v in values)),
            mixed=any(v.mixed for v in values),
        )

    # ---- operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then record what its outputs are made of."""
        if func is SCALAR and args[0].device.type == "meta":
            # without data, questions like "is every token visible?" are answered yes
            return args[0].dtype == torch.bool
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in self._rules:
            arguments = func._schema.arguments  # noqa: SLF001 (no public name)
            written = tuple(i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write)
            self._rules[func] = (self._rule(func.overloadpacket.__name__), written)
        rule, written = self._rules[func]
        inputs = list(_tensors((*args, *kwargs.values())))
        outputs = list(_tensors(result if isinstance(result, (tuple, list)) else (result,)))
        mutated = [args[i] for i in written if i < len(args) and isinstance(args[i], Tensor)]
        rule(_Call(args, kwargs, inputs, outputs, mutated))
        return result

    def _rule(self, name: str) -> Callable[[_Call], None]:
        bare = name.removesuffix("_")
        if bare in PRODUCTS:
            return self._product
        if bare == "add":
            return self._sum
        if bare.startswith("_scaled_dot_product"):
            return self._attention
        if bare in RANKINGS:
            return self._ranking
        if bare == "max":
            return self._maximum
        if bare == "embedding":
            return self._embedding
        return self._copy if bare in COPIES else self._other

    def _record(self, call: _Call, value: Value) -> None:
        for tensor in call.mutated:
            self._overwrite(tensor, value)
        if not call.mutated:
            for tensor in call.outputs:
                self.set(tensor, value)

    def _product(self, call: _Call) -> None:
        left, right = call.args[-2:]
        a, b = self.value(left), self.value(right)
        if (a.parameter is None) == (b.parameter is None):
            self._attention(call)
            return
        weight, operand = (right, a) if b.parameter is not None else (left, b)
        # [in, out] as the right factor of x @ W, [out, in] as the left one of W @ x
        row_major = weight.stride(-1) == 1 and weight.stride(-2) == weight.shape[-1]
        name = self._name(b if weight is right else a, operand)
        known = self.trace.products.get(name)
        if known is None:
            self.trace.products[name] = Product(
                parameter=name,
                operand=operand,
                transposed=row_major == (weight is right),
                observable=self._inputs.get(name.rpartition(".")[0]) == operand.number,
                block=self.block,
            )
        else:
            known.runs += 1
            if known.operand.number != operand.number:
                self.trace.read |= {known.operand.number, operand.number}  # nothing can be folded into both
        made = frozenset({name})
        upstream = operand.upstream | made
        value = Value(next(self._numbers), terms=made, upstream=upstream, nearest=made, mixed=operand.mixed)
        self._record(call, value)

    def _name(self, weight: Value, operand: Value) -> str:
        """Of several names of a tied parameter, that of the module whose input this is."""
        assert weight.parameter is not None
        names = self._names[weight.parameter]
        return next((n for n in names if self._inputs.get(n.rpartition(".")[0]) == operand.number), names[0])

    def _attention(self, call: _Call) -> None:
        self._record(call, replace(self._read(call), mixed=True))

    def _sum(self, call: _Call) -> None:
        values = [self.value(t) for t in call.inputs]
        mixed = self._read(call)
        plain = len(values) == 2 and call.kwargs.get("alpha", 1) == 1
        # a bias may be broadcast; a term of the stream has its shape
        if plain and (any(v.parameter for v in values) or call.inputs[0].shape == call.inputs[1].shape):
            streams = [v for v in values if v.stream]
            mixed = replace(mixed, terms=values[0].terms | values[1].terms, stream=bool(streams))
            if len(streams) == 1:
                (other,) = (v for v in values if not v.stream)
                for term in other.terms:
                    self.trace.added.setdefault(term, streams[0].number)
                if other.terms:
                    self.trace.before[mixed.number] = streams[0].number
        self._record(call, mixed)

    def _ranking(self, call: _Call) -> None:
        value = self._read(call)
        self.trace.ranked |= value.nearest
        self._record(call, value)

    def _maximum(self, call: _Call) -> None:
        """A ranking only if somebody reads the index: attention takes maxima of its scores."""
        value = self._read(call)
        self._record(call, value)
        for index in call.outputs[1:]:
            number = next(self._numbers)
            self._chosen[number] = value.nearest
            self.set(index, replace(value, number=number))

    def _embedding(self, call: _Call) -> None:
        table, ids = self.value(call.args[0]), self.value(call.args[1])
        if table.parameter is not None and ids.number in self._of_ids:
            found = self.trace.embeddings if ids.number == self._ids else self.trace.near_embeddings
            found.append(table.parameter)
        self._record(call, self._read(call))

    def _copy(self, call: _Call) -> None:
        source = call.inputs[-1]
        if source.numel() == call.outputs[0].numel():
            self._record(call, self.value(source))
        else:
            self._record(call, self._read(call))

    def _other(self, call: _Call) -> None:
        alone = len(call.inputs) == 1 and not call.mutated
        if not (alone and all(self._is_view(out, call.inputs[0]) for out in call.outputs)):
            self._record(call, self._read(call))

    def _read(self, call: _Call) -> Value:
        """What is made of all inputs; that they were read is noted."""
        values = [self.value(t) for t in call.inputs]
        for value in values:
            self.trace.read.add(value.number)
            self.trace.ranked |= self._chosen.get(value.number, frozenset())
        return self._mixed(values)

    def _is_view(self, out: Tensor, source: Tensor) -> bool:
        """A view of all of ``source``: the same storage gives it the same value; of a parameter any view does."""
        key = self._storage(out)
        whole = out.numel() == source.numel() and out.storage_offset() == source.storage_offset()
        return key == self._storage(source) and (key in self._parameters or whole)

    # ---- modules ---------------------------------------------------------------------------------------------------

    def token_ids(self, ids: Tensor) -> None:
        """The input of the model."""
        self._ids = self.value(ids).number
        self._of_ids = {self._ids}

    def hooks(self, skeleton: PreTrainedModel, blocks: list[nn.Module]) -> Iterator[Any]:
        """Install everything that must be known about modules; yields what can be removed."""
        for name, module in skeleton.named_modules():
            own = list(module.parameters(recurse=False))
            axes = max((p.dim() for p in own), default=0)
            if axes >= 2:
                yield module.register_forward_pre_hook(self._on_input(name), with_kwargs=True)
                yield module.register_forward_hook(self._on_output)
            elif own and axes == 1 and next(module.children(), None) is None:
                yield module.register_forward_hook(self._on_norm(name), with_kwargs=True)
            if next(module.children(), None) is None:
                yield module.register_forward_pre_hook(self._on_stream(name))
            if axes == 3:
                experts.set_observer(module, self._on_stage(name), dry=True)
                yield _Unobserve(module)
        for index, module in enumerate(blocks):
            yield module.register_forward_pre_hook(self._on_block(index), with_kwargs=True)
            yield module.register_forward_hook(self._after_block(index))

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            first = next(_tensors((*args, *kwargs.values())), None)
            if first is not None:
                self._inputs[name] = self.value(first).number

        return hook

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            terms = self.value(output).terms
            self.trace.given |= terms if len(terms) == 1 else frozenset()

    def _on_stream(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor) and (value := self.value(args[0])).stream:
                self.trace.stream_readers.setdefault((self.block, value.number), name)

        return hook

    def _on_norm(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = list(_tensors((*args, *kwargs.values())))
            if isinstance(output, Tensor) and len(inputs) == 1:
                if self.value(inputs[0]).stream:
                    self.trace.norms_of_stream.add(name)
                self.trace.norms[self.value(output).number] = name
                self.trace.norm_runs[name] = self.trace.norm_runs.get(name, 0) + 1

        return hook

    def _on_stage(self, name: str) -> experts.Observer:
        def observe(parameter: str, inputs: dict[int, Tensor], _tokens: dict[int, Tensor]) -> None:
            operand = self.value(next(iter(inputs.values())))
            self._inputs[name] = operand.number
            self.trace.stages.setdefault(f"{name}.{parameter}", operand)

        return observe

    def _on_block(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.block = index
            self.trace.block_order.append(index)
            hidden = next((t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point()), None)
            if hidden is not None:
                if self._given is not None and self.value(hidden).number != self._given:
                    self.trace.bridged.append(index)
                self.set(hidden, Value(self.value(hidden).number, stream=True))
                self.trace.width = hidden.numel() // math.prod(TOKENS)

        return hook

    def _after_block(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.block = None
            if isinstance(output, tuple | list):
                self.trace.returned[index] = tuple(isinstance(value, Tensor) for value in output)
            first = next(_tensors((output,)), None)
            self._given = None if first is None else self.value(first).number

        return hook


@dataclass(frozen=True, slots=True)
class _Unobserve:
    module: nn.Module

    def remove(self) -> None:
        experts.set_observer(self.module, None)


def watch(skeleton: PreTrainedModel, blocks: list[nn.Module], device: torch.device | str) -> Trace:
    """Run ``skeleton``, whose parameters and buffers are on ``device``, on a few tokens.

    Args:
        skeleton: in evaluation mode.
        blocks: modules whose input is the residual stream.
        device: ``meta``, or one with values.
    """
    watcher = Watcher(skeleton)
    ids = torch.zeros(TOKENS, dtype=torch.long, device=device)
    watcher.token_ids(ids)
    with contextlib.ExitStack() as stack:
        for handle in watcher.hooks(skeleton, blocks):
            stack.callback(handle.remove)
        with torch.no_grad(), watcher:
            skeleton(input_ids=ids)
    return watcher.trace


def _tensors(items: Iterable[Any]) -> Iterator[Tensor]:
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)
