"""What happens between linears, computed from their outputs alone, is what the model that transformers loads does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.errors import ModelError
from mezzotint.models import open_model
from mezzotint.models.inner import attended, attention_unseen, last_input
from mezzotint.planning.parts import Place, places
from mezzotint.submodules.scores import Mixer, Pair, Pattern
from mezzotint.testing.models import TINY, VOCABULARY
from runs import stock

Folder = Callable[[str], Path]
FALCONS = {"falcon_multi_query", "falcon_new_decoder"}  # their attention is their own code
SEQLEN = 20  # more than twice the sliding windows


def watched(model: nn.Module, modules: dict[str, nn.Module], mask: Tensor | None) -> dict[str, Any]:
    """Calls and outputs of modules in one forward pass."""
    seen: dict[str, Any] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: seen.update({name: (args, kwargs, output)})

    hooks = [m.register_forward_hook(see(name), with_kwargs=True) for name, m in modules.items()]
    ids = torch.randint(3, VOCABULARY - 8, (3, SEQLEN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def found_in(source: Any, model: nn.Module, block: int) -> tuple[dict[str, Place], Callable[[str], nn.Module]]:
    return places(source.map.blocks[block], source.map), model.get_submodule


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in TINY if name not in FALCONS])
def test_attention_from_the_outputs_of_its_linears(name: str, padded: bool, tiny_folder: Folder) -> None:
    source, model = open_model(tiny_folder(name)), stock(tiny_folder(name))
    mask = None
    if padded:
        mask = torch.ones(3, SEQLEN, dtype=torch.long)
        mask[1, 15:] = 0
    for block in range(min(2, len(source.map.blocks))):  # both kinds of layers, where there are two
        found, module = found_in(source, model, block)
        parts = {kind: module(found[kind].linear) for kind in ("q", "k", "v", "o")}
        seen = watched(model, {**parts, "attention": module(found["q"].around)}, mask)
        args, kwargs, _ = seen["attention"]
        outputs = {parts[kind]: seen[kind][2] for kind in ("q", "k", "v")}
        call = attended(module(found["q"].around), args, kwargs, outputs)
        pattern = Pattern(scaling=call.scaling, softcap=call.softcap, visible=call.visible, sinks=call.sinks)
        mixer = Mixer(Pair(call.query, call.key), pattern)
        wanted = seen["o"][0][0]
        mixed = torch.zeros_like(wanted)
        for piece, taken in mixer.probabilities():
            mixed[piece.windows, piece.rows] = mixer.mixed(piece, taken, call.value)
        real = slice(None) if mask is None else mask.bool()
        # sums of twenty products in float32, in another order
        torch.testing.assert_close(mixed[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_the_input_of_down_from_the_output_of_up(name: str, tiny_folder: Folder) -> None:
    source, model = open_model(tiny_folder(name)), stock(tiny_folder(name))
    found, module = found_in(source, model, 0)
    up, down, mlp = (module(path) for path in (found["up"].linear, found["down"].linear, found["up"].around))
    seen = watched(model, {"up": up, "down": down, "mlp": mlp}, None)
    hidden = last_input(mlp, seen["mlp"][0], seen["mlp"][1], {up: seen["up"][2]}, down)
    torch.testing.assert_close(hidden, seen["down"][0][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "falcon_multi_query"])
def test_which_attention_can_be_observed(name: str, tiny_folder: Folder) -> None:
    source = open_model(tiny_folder(name))
    paths = {block.path: places(block, source.map)["q"].around for block in source.map.blocks}
    unseen = set(paths) if name in FALCONS else set()
    assert attention_unseen(source.skeleton, paths).keys() == unseen
    assert all(parameter.device.type == "meta" for parameter in source.skeleton.parameters())
    assert source.skeleton.config._attn_implementation != "mezzotint_observed"


def test_attention_that_cannot_be_observed_says_so(tiny_folder: Folder) -> None:
    source, model = open_model(tiny_folder("falcon_multi_query")), stock(tiny_folder("falcon_multi_query"))
    found, module = found_in(source, model, 0)
    seen = watched(model, {"attention": module(found["q"].around)}, None)
    args, kwargs, _ = seen["attention"]
    with pytest.raises(ModelError, match="does not call attention"):
        attended(module(found["q"].around), args, kwargs, {})


def test_a_bias_on_scores_is_refused() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = TINY["llama"]()

        def forward(self, hidden: Tensor) -> Any:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            q = hidden.new_zeros(1, 2, 4, 8)
            return attend(self, q, q, q, torch.full((1, 1, 4, 4), -0.5))

    with pytest.raises(ModelError, match="adds a bias"):
        attended(Biased(), (torch.zeros(1, 4, 16),), {}, {})
