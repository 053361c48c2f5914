"""Sensitivities against explicit gradients of whole models, and against what noise really costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mezzotint.allocation.sensitivity import Sensitivity
from mezzotint.blockwise import backward, borders
from mezzotint.blockwise.backward import sampled
from mezzotint.blockwise.bypass import Passage
from mezzotint.budgeting.noise import noise_insertion
from mezzotint.budgeting.sensitivity import measure_sensitivity
from mezzotint.calibration import Windows, consecutive_windows, load_tokenizer, read_text
from mezzotint.errors import CalibrationError, ConfigError, NonFiniteError
from mezzotint.models import Source, open_model
from runs import TEXT, TINY_LLAMA, assert_same_bits, stock

Folder = Callable[[str], Path]
F64 = torch.float64


def random_windows(count: int, length: int, below: int = 300) -> Windows:
    tokens = torch.randint(3, below, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows(tokens=tokens, mask=None, source="random")


def text_windows(count: int, length: int) -> Windows:
    return consecutive_windows(
        read_text(str(TEXT)), load_tokenizer(TINY_LLAMA), seqlen=length, windows=count, source="text"
    )


class Labels:
    """Those that were drawn, one tensor a window."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Tensor] = []

        def watched(*args: Any) -> Tensor:
            self.drawn.append(sampled(*args))
            return self.drawn[-1]

        monkeypatch.setattr(backward, "sampled", watched)


def explicit(model: nn.Module, source: Source, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradient of the summed log likelihood of the labels of one window in every matrix, ``[out, in]``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    loss = logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    by_name = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
    return {matrix.name: matrix.view(by_name[matrix.parameter]) for matrix in source.map.matrices.values()}


def assert_is(found: Sensitivity, gradients: list[Tensor], positions: int, weight: Tensor) -> None:
    squares = torch.stack([gradient.square() for gradient in gradients])
    diagonal = squares.sum(0) / positions
    close = {"rtol": 1e-8, "atol": 1e-10 * float(diagonal.sum())}
    torch.testing.assert_close(found.rows, diagonal.sum(1), **close)
    torch.testing.assert_close(found.columns, diagonal.sum(0), **close)
    assert found.energy == pytest.approx(float(weight.square().mean()), rel=1e-10)
    assert found.fisher == pytest.approx(0.5 * found.energy * float(diagonal.sum()), rel=1e-8, abs=1e-300)
    norms = squares.sum((1, 2)).numpy() / (positions / len(gradients))
    if norms.any():
        assert found.relative_error == pytest.approx(norms.std(ddof=1) / len(norms) ** 0.5 / norms.mean(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "falcon_multi_query", "mixtral", "gpt_oss"])
def test_squares_are_those_of_explicit_gradients(
    name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, windows, labels = open_model(tiny_folder(name)), random_windows(3, 12), Labels(monkeypatch)
    found = measure_sensitivity(source, windows, dtype=F64, seed=3)
    experts = {"experts_implementation": "eager"} if name in ("mixtral", "gpt_oss") else {}
    model = stock(tiny_folder(name), F64, **experts)
    gradients = [
        explicit(model, source, windows.tokens[w : w + 1], labels.drawn[w]) for w in range(3)
    ]  # a tied matrix has one parameter in that model, and so the gradient of both uses
    head = source.map.matrices[source.map.head or ""]
    assert list(found) == [name for name in source.map.matrices if name != head.name or head.tied_to is None]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for matrix, value in found.items():
        known = source.map.matrices[matrix]
        weight = known.view(parameters[known.parameter])
        assert_is(value, [g[matrix] for g in gradients], 3 * 11, weight.detach())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary can be enumerated."""
    folder = tmp_path_factory.mktemp("toy")
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.6) if parameter.dim() == 2 else None
    model.save_pretrained(folder)
    return folder


def test_draws_have_the_mean_of_the_enumerated_fisher_information(toy: Path) -> None:
    source, tokens, draws = open_model(toy), random_windows(1, 5, below=12).tokens, 300
    repeated = Windows(tokens=tokens.repeat(draws, 1), mask=None, source="one")
    found = measure_sensitivity(source, repeated, dtype=F64)
    model = stock(toy, F64)
    # of a tied matrix the first name, its owner's
    names = {matrix.parameter: name for name, matrix in reversed(source.map.matrices.items())}
    parameters = {name: parameter.requires_grad_(True) for name, parameter in model.named_parameters() if name in names}
    log_p = model(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    wanted = dict.fromkeys(names, 0.0)
    for t in range(4):
        for label in range(12):
            gradients = torch.autograd.grad(log_p[t, label], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                wanted[name] += float(log_p[t, label].exp().detach() * gradient.square().sum()) / 4
    off = []
    for parameter, expected in wanted.items():
        value = found[names[parameter]]
        assert value.relative_error is not None
        assert value.relative_error < 0.12
        off.append((value.trace / expected - 1) / value.relative_error)
    # ten estimates from the same labels, in units of their standard errors
    assert np.abs(off).max() < 3, off
    assert np.square(off).mean() < 3, off


def test_noise_costs_what_the_sensitivities_say() -> None:
    source, windows = open_model(TINY_LLAMA), text_windows(6, 48)
    found = measure_sensitivity(source, windows)
    names = [source.map.embedding, *(f"model.layers.{part}" for part in (
        "0.self_attn.q_proj", "0.self_attn.v_proj", "0.mlp.down_proj", "1.self_attn.k_proj", "1.mlp.up_proj",
        "2.self_attn.o_proj", "2.mlp.gate_proj")), "lm_head"]  # fmt: skip
    measured = noise_insertion(source, windows, names, energy=1e-3, seed=1)
    predicted = np.array([found[name].fisher for name in names])
    cost = np.array([measured[name] for name in names])
    # one draw of labels and of noise each: a tenth or so, over a spread of a factor of 200
    ratio = predicted / cost
    assert ((ratio > 0.7) & (ratio < 1.4)).all(), ratio
    assert 0.85 < np.exp(np.log(ratio).mean()) < 1.15
    assert np.corrcoef(predicted.argsort().argsort(), cost.argsort().argsort())[0, 1] > 0.95
    assert predicted.max() / predicted.min() > 100


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_noise_reaches_tied_heads_and_single_experts(name: str, tiny_folder: Folder) -> None:
    source, windows = open_model(tiny_folder(name)), random_windows(6, 32)
    assert source.map.head is not None
    found = measure_sensitivity(source, windows)
    experts = [name for name, matrix in source.map.matrices.items() if matrix.expert == 1]
    tied = source.map.matrices[source.map.head].tied_to is not None
    names = [source.map.embedding if tied else source.map.head, *experts[:2]]
    # so little that no token goes to another expert in the next block: what that costs has no second order
    measured = noise_insertion(source, windows, names, energy=1e-8, dtype=F64)
    for one in names:
        assert 0.8 < found[one].fisher / measured[one] < 1.25, (one, found[one].fisher, measured[one])


def test_an_error_is_weighed_where_it_falls() -> None:
    source, windows = open_model(TINY_LLAMA), text_windows(6, 48)
    name = "model.layers.0.mlp.down_proj"
    found = measure_sensitivity(source, windows)[name]
    matrix = source.map.matrices[name]
    weight = matrix.view(source.checkpoint.parameter(matrix.parameter)).float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.square().mean().sqrt()
    energy = float(noise.square().sum() / weight.square().sum())
    assert found.loss(noise) == pytest.approx(found.fisher * energy, rel=0.1)
    order = found.columns.argsort()
    half = len(order) // 2
    quiet, loud = noise.clone(), noise.clone()
    quiet[:, order[half:]] = 0
    loud[:, order[:half]] = 0
    assert found.loss(quiet) + found.loss(loud) == pytest.approx(found.loss(noise))
    assert found.loss(loud) > 3 * found.loss(quiet)
    assert found.loss(2 * noise) == pytest.approx(4 * found.loss(noise))
    nothing = Sensitivity(energy=1.0, rows=torch.zeros(2).double(), columns=torch.zeros(3).double())
    assert nothing.loss(torch.ones(2, 3)) == nothing.fisher == 0.0


def assert_same(first: Any, second: Any, **close: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name].rows, value.rows, **close)
        torch.testing.assert_close(second[name].columns, value.columns, **close)


def test_memory_chunks_and_runs_do_not_show(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows = open_model(tiny_folder("qwen2")), random_windows(3, 20)
    whole = measure_sensitivity(source, windows, seed=5)
    assert_same(whole, measure_sensitivity(source, windows, seed=5, memory=1), rtol=0, atol=0)
    other = measure_sensitivity(source, windows, seed=6)
    assert all(other[name].trace != value.trace for name, value in whole.items())
    noise = noise_insertion(source, windows, ["lm_head"], energy=1e-3)
    assert noise == noise_insertion(source, windows, ["lm_head"], energy=1e-3, memory=1)
    wide = measure_sensitivity(source, windows, seed=5, dtype=F64)
    monkeypatch.setattr(borders, "GRADIENT_BYTES", 3 * 5 * 4 * source.config.vocab_size)  # 3 positions
    assert_same(wide, measure_sensitivity(source, windows, seed=5, dtype=F64), rtol=1e-10, atol=1e-14)


def test_padding_and_empty_windows_do_not_count(tiny_folder: Folder) -> None:
    source, windows = open_model(tiny_folder("qwen2")), random_windows(3, 16)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[:, 10:] = False
    mask[2] = False
    mask[2, 0] = True
    padded = measure_sensitivity(source, Windows(tokens=windows.tokens, mask=mask, source="padded"), dtype=F64)
    # labels are drawn by position: the same ones for the same text
    monkey = Windows(tokens=windows.tokens[:2, :10], mask=None, source="short")
    with pytest.MonkeyPatch.context() as patch:
        rand = torch.rand
        patch.setattr(torch, "rand", lambda n, **options: rand(16, **options)[:n])
        short = measure_sensitivity(source, monkey, dtype=F64)
    assert_same(short, padded, rtol=1e-8, atol=1e-12)
    assert all(padded[name].relative_error == pytest.approx(value.relative_error) for name, value in short.items())
    with pytest.raises(CalibrationError, match="no window has two tokens"):
        measure_sensitivity(source, random_windows(2, 1))


def test_one_block_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(TINY_LLAMA)
    filled: list[set[str]] = []
    through = Passage.through

    def watched(*args: Any) -> Tensor:
        filled.append({name for name, p in source.skeleton.named_parameters() if p.device.type != "meta"})
        return through(*args)

    monkeypatch.setattr(Passage, "through", watched)
    steps: list[tuple[int, int]] = []
    measure_sensitivity(source, random_windows(2, 8), progress=lambda *step: steps.append(step))
    assert steps == [(i, 8) for i in range(1, 9)]
    order = [int(next(iter(names)).split(".")[2]) for names in filled]
    assert order == [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0]
    for index, names in zip(order, filled, strict=True):
        assert all(name.startswith(f"model.layers.{index}.") for name in names)
    assert all(p.device.type == "meta" and not p.requires_grad for p in source.skeleton.parameters())
    assert torch.is_grad_enabled()


def test_experts_are_put_together_again(tiny_folder: Folder) -> None:
    source = open_model(tiny_folder("mixtral"))
    measure_sensitivity(source, random_windows(1, 8))
    experts = [module for module in source.skeleton.modules() if hasattr(module, "down_proj")]
    assert len(experts) == 2
    assert all(isinstance(module.down_proj, nn.Parameter) for module in experts)


def test_labels_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]]).expand(4, 3)
    first = 1 / (1 + np.e)
    uniform = torch.tensor([0.0, first - 1e-6, first + 1e-6, 1 - 1e-12], dtype=F64)
    assert_same_bits(sampled(logits, uniform), torch.tensor([0, 0, 2, 2]))


def test_refusals(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(tiny_folder("llama"))
    with pytest.raises(ConfigError, match="no matrix 'nowhere'"):
        noise_insertion(source, random_windows(1, 8), ["nowhere"], energy=0.01)
    through = Passage.through
    monkeypatch.setattr(Passage, "through", lambda *args: through(*args) / 0)
    with pytest.raises(NonFiniteError, match="block 0 of 'llama' gives NaN or infinity"):
        measure_sensitivity(source, random_windows(1, 8))
    monkeypatch.setattr(Passage, "through", lambda *args: through(*args).sqrt().nan_to_num())
    with pytest.raises(NonFiniteError, match="the gradient before block"):
        measure_sensitivity(source, random_windows(1, 8))
    assert all(p.device.type == "meta" for p in source.skeleton.parameters())


def test_the_diagonal_is_exact_where_one_position_is_scored_and_near_elsewhere() -> None:
    source = open_model(TINY_LLAMA)
    single = random_windows(4, 2)
    exact, cheap = (measure_sensitivity(source, single, dtype=F64, diagonal=d) for d in (False, True))
    assert exact.keys() == cheap.keys()
    for name, one in exact.items():
        assert cheap[name].trace == pytest.approx(one.trace, rel=1e-9), name
        torch.testing.assert_close(cheap[name].rows, one.rows)
        torch.testing.assert_close(cheap[name].columns, one.columns)
    longer = text_windows(8, 64)
    exact, cheap = (measure_sensitivity(source, longer, diagonal=d) for d in (False, True))
    ranks = [np.argsort(np.argsort([found[name].fisher for name in exact])) for found in (exact, cheap)]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.9
    ratios = [cheap[name].fisher / exact[name].fisher for name in exact]
    assert max(ratios) / min(ratios) < 5
