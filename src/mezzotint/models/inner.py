"""The computation between the linears of attention and of an MLP, run with the model's own code.

The outputs of the linears are given, and what attention multiplies, or what goes into the last linear, is looked at
where the model itself would use it: so norms, positions, fused layouts and activations are the model's, whatever the
architecture.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mezzotint.errors import ModelError
from mezzotint.models.infer_map import run_without_data

IMPLEMENTATION = "mezzotint_observed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Arguments of one call of attention.

    Attributes:
        visible: keys (last axis) that each query sees; None: itself and all before it.
        sinks: scores per head that compete for attention and bring no value.
    """

    query: Float[Tensor, "windows heads seqlen dim"]
    key: Float[Tensor, "windows groups seqlen dim"]
    value: Float[Tensor, "windows groups seqlen value_dim"]
    visible: Bool[Tensor, "some seqlen seqlen"] | None
    scaling: float
    softcap: float | None
    sinks: Float[Tensor, " heads"] | None


class _ReachedError(Exception):
    """Leaves a module's forward with what was looked for."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


def attended(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Mapping[nn.Module, Tensor]
) -> Attended:
    """What attention multiplies when its linears give ``outputs``.

    Args:
        module: holds the linears.
        args: of its forward; of the hidden states only the shape is used.
        kwargs: the rest of them.
        outputs: of every linear before attention.
    """
    with _observed(module), _giving(outputs):
        try:
            module(*args, **kwargs)
        except _ReachedError as reached:
            return reached.found
    raise ModelError(f"{type(module).__name__} does not call attention through transformers' interface.")


def last_input(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Mapping[nn.Module, Tensor],
    last: nn.Module,
) -> Tensor:
    """What goes into ``last`` when other linears of ``module`` give ``outputs``.

    Args:
        module: an MLP, or a block in which its linears lie.
        args: of its forward; linears that are not in ``outputs`` multiply the first.
        kwargs: the rest of them.
        outputs: of some of its linears.
        last: one of its linears.
    """

    def leave(value: Tensor) -> Tensor:
        raise _ReachedError(value)

    with _giving(outputs), _replaced(last, leave):
        try:
            module(*args, **kwargs)
        except _ReachedError as reached:
            return reached.found
    raise ModelError(f"{type(module).__name__} does not run its last linear.")


def attention_unseen(skeleton: PreTrainedModel, paths: Mapping[str, str]) -> dict[str, str]:
    """Of some modules those whose attention `attended` cannot see, with why; runs the model without data.

    Args:
        skeleton: its parameters are on ``meta`` before and after.
        paths: of the modules, by any name.
    """
    modules = {name: skeleton.get_submodule(path) for name, path in paths.items()}
    seen: dict[nn.Module, str | None] = {}

    def note(
        module: nn.Module,
        query: Tensor,
        _key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        seen[module] = None if attention_mask is None else _odd_mask(attention_mask)
        windows, heads, seqlen, _dim = query.shape
        return query.new_zeros(windows, seqlen, heads, value.shape[-1]), None

    def run(device: str) -> None:
        skeleton(input_ids=torch.zeros((1, 4), dtype=torch.long, device=device))

    with ExitStack() as stack, torch.no_grad():
        for module in modules.values():
            for hook in _switching(module, note):
                stack.callback(hook.remove)
        run_without_data(skeleton, run)
    uncalled = "its attention is not called through transformers' interface, so its heads cannot be seen"
    found = {name: seen.get(module, uncalled) for name, module in modules.items()}
    return {name: why for name, why in found.items() if why is not None}


def underivable(module: nn.Module) -> str | None:
    """Why `torch.func` cannot differentiate what a module does between its linears, or None.

    Args:
        module: an MLP; its functions without parameters are tried.
    """
    for name, part in module.named_modules():
        if next(part.children(), None) is not None or next(part.parameters(), None) is not None:
            continue
        try:
            torch.func.vjp(part, torch.zeros(1, 2))
        except RuntimeError as error:
            if "autograd.Function" in str(error):
                return f"{name} ({type(part).__name__}) is written for plain gradients only"
        except (TypeError, ValueError, IndexError):
            continue  # it takes something else than one tensor of this shape
    return None


def _see(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *_: Any,
    **options: Any,
) -> None:
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scaling = options.get("scaling")
    raise _ReachedError(
        Attended(
            query=query,
            key=key,
            value=value,
            visible=_visible(attention_mask, query, causal=causal),
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
    )


def _visible(mask: Tensor | None, query: Tensor, *, causal: bool) -> Tensor | None:
    seqlen = query.shape[2]
    if mask is None:
        return None if causal else torch.ones(1, seqlen, seqlen, dtype=torch.bool, device=query.device)
    why = _odd_mask(mask)
    if why is not None:
        raise ModelError(f"{why}. Use --set submodules.parts=[updown].")
    mask = mask[:, 0, :, :seqlen]
    if mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if bool(mask.masked_select(visible).any()):
        raise ModelError("attention adds a bias to its scores, which submodules cannot see. Leave qk and vo out.")
    return visible


def _odd_mask(mask: Tensor) -> str | None:
    if mask.dim() == 4 and mask.shape[1] == 1:
        return None
    return f"attention has a mask of shape {tuple(mask.shape)}, where one for all heads is understood"


@contextmanager
def _observed(module: nn.Module) -> Iterator[None]:
    """Attention of ``module`` goes to ``_see`` instead."""
    hooks = _switching(module, _see)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _switching(module: nn.Module, function: Callable[..., Any]) -> list[Any]:
    """Hooks under which attention of ``module`` is computed by ``function``."""
    config = getattr(module, "config", None)
    if config is None:
        return []
    before: list[str | None] = []

    def enter(*_: Any) -> None:
        AttentionInterface.register(IMPLEMENTATION, function)
        before.append(config._attn_implementation_internal)  # noqa: SLF001 (the public setter changes sub-configurations)
        config._attn_implementation_internal = IMPLEMENTATION  # noqa: SLF001

    def leave(*_: Any) -> None:
        config._attn_implementation_internal = before.pop()  # noqa: SLF001

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


@contextmanager
def _giving(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Linears give tensors that are known."""
    with ExitStack() as stack:
        for linear, output in outputs.items():
            # a copy: some models change it in place
            stack.enter_context(_replaced(linear, lambda *_, output=output: output.clone()))
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
