"""Experts stored as 3-D parameters, computed so that their inputs can be watched.

transformers looks the computation of such modules up by name (``config._experts_implementation``); the one registered
here does what the eager one does, expert by expert, and shows each stage's inputs to an observer before it reads the
weights of that stage.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "mezzotint"
_SLOT = "_mezzotint_observer"

Observer = Callable[[str, dict[int, Tensor], dict[int, Tensor]], None]


def install(skeleton: PreTrainedModel) -> None:
    """Make every module with 3-D experts of ``skeleton`` run through ``forward``."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    skeleton.set_experts_implementation(IMPLEMENTATION)


def set_observer(module: nn.Module, observer: Observer | None, *, dry: bool = False) -> None:
    """Let ``observer`` see the inputs of each stage of the experts in ``module``; None removes it.

    It is called as ``observer(parameter, inputs, tokens)`` with the name of the parameter in ``module``, per expert
    the rows it will be applied to, and the indices of these rows among the flattened tokens. It runs before the
    parameter is read, so it may change its values.

    Args:
        module: looked up by ``forward``.
        observer: see above.
        dry: compute only what depends on what: every expert gets every token, and the result has no meaning. Always
            so without data (on ``meta``).
    """
    if observer is None:
        module.__dict__.pop(_SLOT, None)
    else:
        # past nn.Module.__setattr__: an observer that is a module must not become a part of this one
        module.__dict__[_SLOT] = (observer, dry)


@contextmanager
def taken_apart(module: nn.Module, parameter: str) -> Iterator[Sequence[Tensor]]:
    """Let ``forward`` read a parameter expert by expert, from tensors that can have gradients of their own.

    The gradient of an expert taken from the whole parameter is as large as the parameter, and most of it is zero.

    Args:
        module: holds the parameter.
        parameter: its name in the module.
    """
    pieces = [piece.detach() for piece in module.get_parameter(parameter)]
    module.__dict__[parameter] = pieces  # found before what nn.Module.__getattr__ looks up
    try:
        yield pieces
    finally:
        del module.__dict__[parameter]


def forward(
    module: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens chosen"],
    top_k_weights: Float[Tensor, "tokens chosen"],
) -> Tensor:  # no named axes: a pass may wait inside while others run, and shape checks keep one stack a thread
    """Sum over the chosen experts of ``weight * down(act(gate_up(x)))``.

    Args:
        module: holds ``gate_up_proj`` or ``up_proj``, and ``down_proj``, ``[experts, out, in]`` or, if
            ``is_transposed``, ``[experts, in, out]``.
        hidden_states: input of the experts, one row per token.
        top_k_index: experts of each token; values past the last expert mean none.
        top_k_weights: their weights.
    """
    observe, dry = module.__dict__.get(_SLOT, (_ignore, False))
    up = "gate_up_proj" if module.has_gate else "up_proj"
    if dry or hidden_states.device.type == "meta":
        return _without_data(module, hidden_states, top_k_weights, up, observe)
    tokens, slots, states = {}, {}, {}
    for expert in _chosen(top_k_index, len(getattr(module, up))):
        position = (top_k_index == expert).t().nonzero()  # sorted by slot, then by token
        slots[expert], tokens[expert] = position[:, 0], position[:, 1]
        states[expert] = hidden_states[tokens[expert]]
    observe(up, states, tokens)
    states = {expert: _activate(module, _apply(module, up, expert, state)) for expert, state in states.items()}
    observe("down_proj", states, tokens)
    result = torch.zeros_like(hidden_states)
    for expert, state in states.items():
        out = _apply(module, "down_proj", expert, state)
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        out = out * top_k_weights[tokens[expert], slots[expert], None]
        result.index_add_(0, tokens[expert], out.to(result.dtype))
    return result


def _ignore(_parameter: str, _inputs: dict[int, Tensor], _tokens: dict[int, Tensor]) -> None:
    pass


def _chosen(top_k_index: Tensor, experts: int) -> list[int]:
    return [expert for expert in torch.unique(top_k_index).tolist() if expert < experts]


def _apply(module: Any, name: str, expert: int, state: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if module.is_transposed:
        out = state @ weight
        return out if bias is None else out + bias
    return nn.functional.linear(state, weight, bias)


def _activate(module: Any, state: Tensor) -> Tensor:
    # the interface of transformers for gates that are not the usual one
    return module._apply_gate(state) if module.has_gate else module.act_fn(state)  # noqa: SLF001


def _without_data(module: Any, hidden_states: Tensor, top_k_weights: Tensor, up: str, observe: Observer) -> Tensor:
    """Shapes and dependencies only: which expert a token goes to is not known, so each goes to all of them."""
    experts = len(getattr(module, up))
    everything = torch.arange(len(hidden_states), device=hidden_states.device)
    state = hidden_states
    for name in (up, "down_proj"):
        observe(name, dict.fromkeys(range(experts), state), dict.fromkeys(range(experts), everything))
        # one expert stands for all: they have the same shapes and the same inputs
        state = _apply(module, name, 0, state)
        state = _activate(module, state) if name == up else state
    if module.has_post_expert_norm:
        state = module.post_expert_norm(state)
    return state * top_k_weights.sum(dim=-1, keepdim=True)
