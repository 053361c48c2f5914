"""The map of a model, inferred from one forward pass without data.

Nothing is known about architectures here except the names of roles: blocks are the list of modules that run in
sequence, matrices are parameters multiplied with the input of their module, and what feeds them is what was seen to.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mezzotint.core.contracts import Block, InputGroup, Matrix, ModelMap, NormEdge, Reader
from mezzotint.errors import ModelError
from mezzotint.models import norms, roles
from mezzotint.models.binding import BoundCheckpoint
from mezzotint.models.flow import Product, Trace
from mezzotint.models.skeleton import dematerialize, quiet
from mezzotint.models.trace import watch

Result = TypeVar("Result")


@dataclass(slots=True)
class _Draft:
    """What is known while a map is made."""

    skeleton: PreTrainedModel
    checkpoint: BoundCheckpoint | None
    trace: Trace
    path: str
    matrices: dict[str, Matrix] = field(default_factory=dict)
    unmapped: dict[str, str] = field(default_factory=dict)
    forms: dict[tuple[type, tuple[torch.Size, ...]], norms.NormForm | None] = field(default_factory=dict)
    names: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)


def infer(skeleton: PreTrainedModel, checkpoint: BoundCheckpoint | None) -> ModelMap:
    """Map ``skeleton``: its parameters are on ``meta`` before and after.

    Args:
        skeleton: in evaluation mode.
        checkpoint: gives the names of the tensors that results are written back under.

    Raises:
        ModelError: the model does not run, or has no sequence of blocks with linears.
    """
    path, blocks, trace = _watch_blocks(skeleton)
    draft = _Draft(skeleton, checkpoint, trace, path)
    embedding = _embedding(draft)
    mapped = tuple(_block(draft, index, block) for index, block in enumerate(blocks))
    if len(draft.matrices) == 1:
        raise ModelError(f"no linear was found in the {len(blocks)} blocks of {path!r}: nothing can be quantized.")
    head, final_norm = _head(draft, draft.matrices[embedding].parameter)
    return ModelMap(
        blocks=mapped,
        matrices=draft.matrices,
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        parallel_residual=any(_is_parallel(trace, index) for index in range(len(blocks))),
        unmapped=draft.unmapped,
        stream_width=trace.width,
        merged=() if checkpoint is None else checkpoint.merged,
    )


# ---- forward pass ---------------------------------------------------------------------------------------------------


def _watch_blocks(skeleton: PreTrainedModel) -> tuple[str, list[nn.Module], Trace]:
    for path, blocks in _candidates(skeleton):
        trace = _watch(skeleton, blocks)
        if trace.block_order == list(range(len(blocks))):
            _check_joints(path, trace)
            return path, blocks, trace
    raise ModelError(
        f"{type(skeleton).__name__} has no list of modules that run once each, in sequence: there are no blocks to "
        "quantize one after the other. Give a decoder."
    )


def _check_joints(path: str, trace: Trace) -> None:
    if trace.bridged:
        index = trace.bridged[0]
        raise ModelError(
            f"the model changes the hidden states between {path}.{index - 1} and {path}.{index}; blocks are run one by "
            "one, each on what the one before gave. Report this model type."
        )


def _candidates(skeleton: PreTrainedModel) -> list[tuple[str, list[nn.Module]]]:
    """Outermost lists of modules, the one with most parameters first."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in skeleton.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0 and not inside:
            found[name] = module
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()}
    return [(name, list(found[name])) for name in sorted(found, key=lambda name: -sizes[name])]


def _watch(skeleton: PreTrainedModel, blocks: list[nn.Module]) -> Trace:
    return run_without_data(skeleton, lambda device: watch(skeleton, blocks, device))


def run_without_data(skeleton: PreTrainedModel, run: Callable[[str], Result]) -> Result:
    """What ``run`` gives on the first of two devices on which the model runs without its weights.

    Args:
        skeleton: its parameters are on ``meta`` before and after.
        run: runs the model on a device, ``meta`` or ``cpu``; parameters and buffers are there.

    Raises:
        ModelError: it runs on neither.
    """
    failures: list[str] = []
    for device in ("meta", "cpu"):
        try:
            with quiet(), _without_data(skeleton, device):
                return run(device)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            failures.append(f"on {device}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    raise ModelError(
        f"{type(skeleton).__name__} cannot run on a few tokens ({'; '.join(failures)}). Check config.json."
    )


@contextlib.contextmanager
def _without_data(skeleton: PreTrainedModel, device: str) -> Iterator[None]:
    """Everything on ``device`` for a while; on the CPU parameters are zeros that take no memory."""
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    with contextlib.ExitStack() as stack:
        if device == "meta":
            for name, buffer in buffers.items():
                _set_buffer(skeleton, name, buffer.to("meta"))
                stack.callback(_set_buffer, skeleton, name, buffer)
        else:
            # an operating system gives memory to pages of zeros only when they are written to
            shared = {id(p): p for p in skeleton.parameters()}
            zeros = {i: nn.Parameter(torch.from_numpy(np.zeros(p.shape, np.float32)), False) for i, p in shared.items()}
            for name, parameter in list(skeleton.named_parameters(remove_duplicate=False)):
                path, _, attribute = name.rpartition(".")
                setattr(skeleton.get_submodule(path), attribute, zeros[id(parameter)])
            stack.callback(dematerialize, skeleton)
        yield


def _set_buffer(skeleton: PreTrainedModel, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(skeleton.get_submodule(path), attribute, value)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _block(draft: _Draft, index: int, block: nn.Module) -> Block:
    path = f"{draft.path}.{index}"
    members: list[roles.Member] = []
    for name, parameter in block.named_parameters():
        if parameter.dim() < 2:
            continue
        reason = _why_kept(draft, f"{path}.{name}", parameter, index)
        if reason is not None:
            draft.unmapped[f"{path}.{name}"] = reason
            continue
        place = f"{path}.{name}".rpartition(".")[0]
        owner, parent = (draft.skeleton.get_submodule(where) for where in (place, place.rpartition(".")[0]))
        members.extend(roles.Member(m, owner, parent) for m in _matrices(draft, f"{path}.{name}", owner))
    order = {name: position for position, name in enumerate(draft.trace.products)}
    members.sort(key=lambda member: order[member.matrix.parameter])
    groups = _groups(draft, index, [member.matrix for member in members])
    number = {name: i for i, group in enumerate(groups) for name in group.matrices}
    config = draft.skeleton.config.get_text_config()
    found = roles.block_roles(config, members, number)
    matrices = [member.matrix for member in members]
    fusions = roles.fusions(path, index, matrices, groups=number, found=found)
    for matrix in matrices:
        if matrix.name in draft.matrices:
            raise ModelError(f"{matrix.name} is in several blocks: shared blocks cannot be quantized one by one.")
        draft.matrices[matrix.name] = replace(matrix, fusion=fusions[matrix.name])
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[index] if index < len(kinds) else "decoder"
    returns = draft.trace.returned.get(index, ())
    return Block(index=index, path=path, groups=groups, roles=found, kind=kind, returns=returns)


def _why_kept(draft: _Draft, name: str, parameter: Tensor, block: int) -> str | None:
    """Why a parameter is not quantized, or None if it is a matrix."""
    product = draft.trace.products.get(name)
    if name.endswith("_bias") and name.removesuffix("_bias") in draft.trace.stages:
        return "the bias of experts"
    if product is None:
        return "not a factor of a matrix product in a forward pass"
    if product.block != block:
        return "used outside of its block"
    if parameter.dim() > 3 or (parameter.dim() == 3 and name not in draft.trace.stages):
        return f"{parameter.dim()} axes, and not experts whose inputs can be observed"
    if name in draft.trace.ranked:
        return "a router: its products are ranked, to choose experts or tokens"
    if not product.observable:
        return "not applied to the input of its module, so its inputs cannot be observed"
    if parameter.dim() == 2 and name not in draft.trace.given:
        return "its module gives something else than its product, as routers do"
    if product.runs > 1 and parameter.dim() == 2:
        return "applied more than once in a forward pass"
    if parameter.dim() == 2 and 1 in parameter.shape:
        return "a vector: one row or one column"
    return _shared(draft, name, parameter, block)


def _shared(draft: _Draft, name: str, parameter: Tensor, block: int) -> str | None:
    """Why a parameter that several blocks share is kept: what is best for it in one block is not in another."""
    names = draft.names[id(parameter)]
    others = [other for other in names if other != name and not other.startswith(f"{draft.path}.{block}.")]
    return f"shared with {others[0]}" if others else None


def _matrices(draft: _Draft, name: str, owner: nn.Module) -> Iterator[Matrix]:
    path, _, attribute = name.rpartition(".")
    parameter = draft.skeleton.get_parameter(name)
    product = draft.trace.products[name]
    rows, columns = (parameter.shape[-2:])[::-1] if product.transposed else parameter.shape[-2:]
    experts = [None] if parameter.dim() == 2 else list(range(parameter.shape[0]))
    plain = path if attribute == "weight" else name
    # of experts a bias is [experts, out]; of a linear [out]
    bias = f"{path}.bias" if attribute == "weight" else f"{name}_bias"
    own = {f"{path}.{n}" for n, _ in owner.named_parameters(recurse=False)}
    for expert in experts:
        yield Matrix(
            name=plain if expert is None else f"{name}[{expert}]",
            parameter=name,
            sources=() if draft.checkpoint is None else draft.checkpoint.sources(name, expert),
            shape=(rows, columns),
            expert=expert,
            transposed=product.transposed,
            linear=isinstance(owner, nn.Linear),
            bias=bias if bias in own else None,
            fusion=plain,
        )


def _groups(draft: _Draft, index: int, matrices: Sequence[Matrix]) -> tuple[InputGroup, ...]:
    gathered: dict[tuple[int, str], list[Matrix]] = {}
    for matrix in matrices:
        operand = _operand(draft, matrix.parameter)
        # experts see different tokens than anything else does
        gathered.setdefault((operand, "" if matrix.expert is None else matrix.parameter), []).append(matrix)
    return tuple(
        InputGroup(
            matrices=tuple(m.name for m in members),
            parameters=tuple(dict.fromkeys(m.parameter for m in members)),
            norm=_norm(draft, operand),
            added_to_residual=all(m.parameter in draft.trace.added for m in members),
            stream=_stream(draft.trace, index, [m.parameter for m in members]),
            experts=members[0].expert is not None,
        )
        for (operand, _), members in gathered.items()
    )


def _stream(trace: Trace, block: int, parameters: Sequence[str]) -> str | None:
    """The module of the block whose input is what the products of these parameters are added to."""
    numbers = {trace.added.get(parameter) for parameter in parameters}
    number = numbers.pop() if len(numbers) == 1 else None
    # a parallel block adds one product after the other, and what is read is the stream before them
    while number is not None and (block, number) not in trace.stream_readers:
        number = trace.before.get(number)
    return None if number is None else trace.stream_readers[block, number]


def _operand(draft: _Draft, parameter: str) -> int:
    stage = draft.trace.stages.get(parameter)
    return draft.trace.products[parameter].operand.number if stage is None else stage.number


def _norm(draft: _Draft, number: int) -> NormEdge | None:
    """The normalisation with that output, if nothing but products reads it: otherwise nothing can be folded into it."""
    path = draft.trace.norms.get(number)
    if path is None or number in draft.trace.read or draft.trace.norm_runs[path] != 1:
        return None
    module = draft.skeleton.get_submodule(path)
    key = (type(module), tuple(p.shape for p in module.parameters()))
    if key not in draft.forms:
        draft.forms[key] = norms.probe(module)
    form = draft.forms[key]
    products, stages = draft.trace.products.values(), draft.trace.stages
    readers = tuple(
        Reader(p.parameter, p.transposed) for p in products if stages.get(p.parameter, p.operand).number == number
    )
    return None if form is None else form.edge(path, readers, on_stream=path in draft.trace.norms_of_stream)


def _embedding(draft: _Draft) -> str:
    """Adds the table that tokens are looked up in; gives its canonical name."""
    looked_up = (*draft.trace.embeddings, *draft.trace.near_embeddings)
    if not looked_up:
        raise ModelError("no parameter is looked up with the token ids. Give a model that reads token ids.")
    name = looked_up[0]
    path, _, attribute = name.rpartition(".")
    plain = path if attribute == "weight" else name
    rows, width = draft.skeleton.get_parameter(name).shape
    draft.matrices[plain] = Matrix(
        name=plain,
        parameter=name,
        sources=() if draft.checkpoint is None else draft.checkpoint.sources(name),
        shape=(rows, width),
        linear=False,
        lookup=isinstance(draft.skeleton.get_submodule(path), nn.Embedding),
        fusion=plain,
    )
    return plain


def _head(draft: _Draft, embedding: str) -> tuple[str | None, NormEdge | None]:
    outside = [p for p in draft.trace.products.values() if p.block is None and p.observable]
    if not outside:
        return None, None
    product = outside[-1]
    name = product.parameter
    parameter = draft.skeleton.get_parameter(name)
    if parameter.dim() != 2:
        return None, None
    tied = parameter is draft.skeleton.get_parameter(embedding)
    matrix = next(iter(_matrices(draft, name, draft.skeleton.get_submodule(name.rpartition(".")[0]))))
    draft.matrices[matrix.name] = replace(matrix, tied_to=embedding if tied else None)
    return matrix.name, _norm(draft, product.operand.number)


def _is_parallel(trace: Trace, block: int) -> bool:
    """Two ends of the block that share no linear before them, one behind attention and one not.

    An end is a product that no other product of the block depends on.
    """
    products: list[Product] = [p for p in trace.products.values() if p.block == block]
    used = frozenset().union(*(p.operand.upstream for p in products))
    ends = [p.operand for p in products if p.parameter not in used and p.operand.upstream]
    return any(a.mixed and not b.mixed and a.upstream.isdisjoint(b.upstream) for a in ends for b in ends)
