"""Observed experts: each sees its tokens, before its weights are read, and the sum stays what it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezzotint.models import Source, open_model
from mezzotint.models.experts import set_observer
from mezzotint.models.skeleton import materialize, quiet
from mezzotint.testing.models import VOCABULARY

Folder = Callable[[str], Path]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]
Seen = list[tuple[str, dict[int, Tensor], dict[int, Tensor]]]


@pytest.fixture
def opened(tiny_folder: Folder) -> Callable[[str], tuple[Source, nn.Module]]:
    def open_filled(name: str) -> tuple[Source, nn.Module]:
        source = open_model(tiny_folder(name))
        materialize(source.skeleton, "", source.checkpoint, dtype=torch.float32, device="cpu")
        return source, source.skeleton.get_submodule(f"{source.map.blocks[0].path}.mlp.experts")

    return open_filled


def run(source: Source) -> Tensor:
    with torch.no_grad():
        return source.skeleton(input_ids=IDS).logits


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_sees_the_tokens_routed_to_it(
    name: str, opened: Callable[[str], tuple[Source, nn.Module]], tiny_folder: Folder
) -> None:
    """Which tokens those are is taken from transformers' own model."""
    source, experts = opened(name)
    with quiet():
        reference = AutoModelForCausalLM.from_pretrained(
            tiny_folder(name), dtype=torch.float32, experts_implementation="eager"
        )
    routed: list[tuple[Tensor, Tensor]] = []
    path = f"{source.map.blocks[0].path}.mlp.experts"
    reference.get_submodule(path).register_forward_pre_hook(lambda _m, args: routed.append((args[0], args[1])))
    with torch.no_grad():
        expected = reference(input_ids=IDS, use_cache=False).logits
    seen: Seen = []
    set_observer(experts, lambda parameter, inputs, tokens: seen.append((parameter, inputs, tokens)))
    torch.testing.assert_close(run(source), expected, rtol=0, atol=0)

    hidden, chosen = routed[0]
    assert [parameter for parameter, _, _ in seen] == ["gate_up_proj", "down_proj"]
    (_, inputs, tokens), (_, middle, same_tokens) = seen
    assert set(inputs) == set(middle) == set(chosen.flatten().tolist())
    assert sum(len(t) for t in tokens.values()) == chosen.numel()
    for expert, index in tokens.items():
        assert set(index.tolist()) == set((chosen == expert).any(-1).nonzero()[:, 0].tolist())
        torch.testing.assert_close(inputs[expert], hidden[index], rtol=0, atol=0)
        torch.testing.assert_close(same_tokens[expert], index, rtol=0, atol=0)
        assert middle[expert].shape == (len(index), source.map.matrices[f"{path}.down_proj[{expert}]"].shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_the_matrices(name: str, opened: Callable[[str], tuple[Source, nn.Module]]) -> None:
    """The second stage's inputs follow from the first's and the matrix as the map gives it."""
    source, experts = opened(name)
    seen: Seen = []
    set_observer(experts, lambda parameter, inputs, tokens: seen.append((parameter, inputs, tokens)))
    run(source)
    for matrix in (source.map.matrices[n] for g in source.map.blocks[0].groups if g.experts for n in g.matrices):
        if "gate_up" not in matrix.name or matrix.expert not in seen[0][1]:
            continue
        assert matrix.expert is not None
        weight = matrix.view(source.skeleton.get_parameter(matrix.parameter))
        bias = 0.0 if matrix.bias is None else source.skeleton.get_parameter(matrix.bias)[matrix.expert]
        after = experts._apply_gate(seen[0][1][matrix.expert] @ weight.T + bias)
        torch.testing.assert_close(seen[1][1][matrix.expert], after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["gate_up_proj", "down_proj"])
def test_observer_may_change_the_weights_it_is_called_for(
    name: str, stage: str, opened: Callable[[str], tuple[Source, nn.Module]]
) -> None:
    source, experts = opened(name)
    before = run(source)

    def halve(parameter: str, _inputs: dict[int, Tensor], _tokens: dict[int, Tensor]) -> None:
        if parameter == stage:
            getattr(experts, parameter).data.mul_(0.5)

    set_observer(experts, halve)
    during = run(source)
    set_observer(experts, None)
    assert (during - before).abs().max() > 0
    torch.testing.assert_close(run(source), during, rtol=0, atol=0)  # and is not called again


def test_observer_is_no_part_of_the_module(opened: Callable[[str], tuple[Source, nn.Module]]) -> None:
    _, experts = opened("mixtral")
    names = [n for n, _ in experts.named_modules()]
    set_observer(experts, nn.Identity())
    assert [n for n, _ in experts.named_modules()] == names
