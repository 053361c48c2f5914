"""Folds keep the function of every architecture: judged by transformers' own models, in float64."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mezzotint.core.contracts import Block, InputGroup
from mezzotint.models import Source, open_model
from mezzotint.models.folds import Fold, apply_fold, fold_of
from mezzotint.models.skeleton import quiet
from mezzotint.testing.models import TINY, make_tiny_model

Open = Callable[[str], Source]
IDS = torch.arange(3, 35).view(2, 16)
# between up and down lies something that is not linear in up: GELU, and (up + 1) with limits
NOT_A_FACTOR = {"gpt_neox", "gpt2", "falcon_multi_query", "falcon_new_decoder", "gpt_oss"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model in float64."""
    return lambda name: make_tiny_model(name, tmp_path_factory.mktemp(name), dtype=torch.float64)


def folds(source: Source) -> Iterator[tuple[Block, InputGroup, Fold | None]]:
    for block in source.map.blocks:
        for group in block.groups:
            experts = {source.map.matrices[name].expert for name in group.matrices}
            for expert in [None] if group.norm is not None else sorted(experts, key=str):
                yield block, group, fold_of(source.map, block, group, expert)


def width(source: Source, group: InputGroup) -> int:
    return source.map.matrices[group.matrices[0]].shape[1]


def logits(folder: Path, values: Mapping[str, Tensor]) -> Tensor:
    """Of transformers' own model with these parameters in place of the folder's, its gains in float64 too."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # what Gemma's norms compute in
            return model(input_ids=IDS, use_cache=False).logits


def folded(source: Source, seed: int, *, gated: bool) -> dict[str, Tensor]:
    """Every parameter that changes when random scales are folded wherever they can be."""
    generator, changed = torch.Generator().manual_seed(seed), {}
    for block, group, fold in folds(source):
        kinds = {role.kind for role in block.roles if role.matrix in group.matrices}
        if fold is None or (kinds == {"down"} and not gated):
            continue
        scale = torch.randn(width(source, group), generator=generator, dtype=torch.float64).exp()
        changed |= dict.fromkeys(apply_fold(source.checkpoint, fold, fold.tied(scale)))
    return {name: source.checkpoint.parameter(name) for name in changed}


@pytest.mark.parametrize("name", TINY)
def test_logits_stay_where_they_are(name: str, wide: Callable[[str], Path]) -> None:
    folder = wide(name)
    values = folded(open_model(folder), 0, gated=name not in NOT_A_FACTOR)
    assert len(values) >= len(open_model(folder).map.blocks)
    # a few hundred roundings of 1e-16 in sums of numbers of the size of one
    torch.testing.assert_close(logits(folder, values), logits(folder, {}), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma3"])
def test_a_forgotten_parameter_shows(name: str, wide: Callable[[str], Path]) -> None:
    folder = wide(name)
    values = folded(open_model(folder), 0, gated=True)
    expected = logits(folder, {})
    for left_out in list(values)[:4]:
        changed = logits(folder, {n: v for n, v in values.items() if n != left_out})
        assert float((changed - expected).abs().max()) > 1e-3, left_out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "norm v norm up"),
        ("opt", "norm v norm up"),
        ("gemma3", "norm v norm up"),
        ("phi3", "norm v norm up"),
        ("olmo2", "- v - up"),
        ("falcon_multi_query", "norm v up"),
        ("mixtral", "norm v norm up up up up"),
    ],
)
def test_where_scales_go(name: str, expected: str, tiny_source: Open) -> None:
    source = tiny_source(name)
    first = [fold for block, _, fold in folds(source) if block.index == 0]
    kinds = {role.matrix: role.kind for role in source.map.blocks[0].roles if role.kind in ("v", "up")}
    found = ["-" if f is None else "norm" if f.producer is None else kinds[f.producer.matrix.name] for f in first]
    assert " ".join(found) == expected


def test_readers_of_a_norm_include_routers(tiny_source: Open) -> None:
    for name, router in (("mixtral", "gate"), ("qwen3_moe", "gate"), ("gpt_oss", "router")):
        group = next(g for g in tiny_source(name).map.blocks[0].groups if g.experts and g.norm is not None)
        assert group.norm is not None
        assert f"model.layers.0.mlp.{router}.weight" in {reader.parameter for reader in group.norm.readers}


def test_grouped_heads_share_their_scales(tiny_source: Open) -> None:
    source = tiny_source("llama")  # four query heads of 16 on two heads of values
    fold = next(fold for _, _, fold in folds(source) if fold is not None and fold.producer is not None)
    values = torch.arange(64.0)
    tied = fold.tied(values).view(2, 2, 16)
    torch.testing.assert_close(tied, values.view(2, 2, 16).mean(1, keepdim=True).expand(2, 2, 16))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_gain_is_rounded_and_its_readers_make_up_for_it(name: str, tiny_folder: Callable[[str], Path]) -> None:
    source, plain = open_model(tiny_folder(name)), open_model(tiny_folder(name)).checkpoint
    group = source.map.blocks[0].groups[0]
    fold = fold_of(source.map, source.map.blocks[0], group)
    assert fold is not None
    assert fold.norm is not None
    matrices = {source.map.matrices[name].parameter for name in group.matrices}
    scale = torch.linspace(0.3, 3.0, width(source, group))
    apply_fold(source.checkpoint, fold, scale, matrices)
    shift = 1.0 if fold.norm.gain == "1+w" else 0.0
    gain, before = (c.parameter(fold.norm.parameter).double() + shift for c in (source.checkpoint, plain))
    exactly = (gain - shift).bfloat16().double() + shift
    torch.testing.assert_close(gain, exactly, rtol=0, atol=0)
    torch.testing.assert_close(gain, before / scale.double(), rtol=0.02, atol=0.01)  # eight bits
    for parameter in matrices:
        ratio = source.checkpoint.parameter(parameter).double() / plain.parameter(parameter).double()
        torch.testing.assert_close(ratio * gain, before.expand_as(ratio), rtol=1e-6, atol=1e-6)


def test_a_gain_that_would_overflow_stays(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "large"))
    tensors = {name: value.to(torch.float16) for name, value in load_file(folder / "model.safetensors").items()}
    gain = "model.layers.0.input_layernorm.weight"
    tensors[gain][:2] = torch.tensor([6e4, 0.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_model(folder)
    _, group, fold = next(folds(source))
    assert fold is not None
    reader = group.matrices[0] + ".weight"
    before = source.checkpoint.parameter(reader)
    apply_fold(source.checkpoint, fold, torch.full((width(source, group),), 0.5, dtype=torch.float64))
    # twice 60000 is more than float16 holds, and nothing is twice 0: their columns stay too
    stored, now = tensors[gain].float(), source.checkpoint.parameter(gain).float()
    torch.testing.assert_close(now[:2], stored[:2], rtol=0, atol=0)
    torch.testing.assert_close(now[2:], 2 * stored[2:], rtol=0, atol=0)
    found, before = source.checkpoint.parameter(reader).float(), before.float()
    torch.testing.assert_close(found[:, :2], before[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(found[:, 2:], before[:, 2:] / 2, rtol=0, atol=0)
