"""Passes through blocks that stop at each input group: what they see, and how often blocks run."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.blockwise.bypass import Call, Passage, surroundings
from mezzotint.blockwise.stops import BlockRun, GroupInputs, Inputs, stops
from mezzotint.core.contracts import Block
from mezzotint.errors import ModelError
from mezzotint.models import Source, dematerialize, materialize, open_model
from mezzotint.storage.stores import Budget, Shelf
from mezzotint.sweep.statistics import aligned, token_weights
from mezzotint.sweep.sweep import Sweep
from runs import TINY_LLAMA, assert_same_bits, least_memory, quantized, stock

Folder = Callable[[str], Path]
DENSE_BLOCKS = [
    "llama", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2", "falcon_multi_query",
    "falcon_new_decoder", "olmo2",
]  # fmt: skip
EXPERTS = ["mixtral", "qwen3_moe"]


def passage_of(calls: list[Call]) -> Passage:
    return Passage(calls, Shelf(Budget(None), Path()))


def tokens_of(count: int = 3, length: int = 24) -> Tensor:
    return torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def filled(source: Source, block: Block) -> Iterator[nn.Module]:
    module = source.skeleton.get_submodule(block.path)
    materialize(module, block.path, source.checkpoint, dtype=torch.float32, device="cpu")
    with stops(source.skeleton, block, parallel=source.map.parallel_residual):
        yield module
    dematerialize(module)


def walk(source: Source, batches: list[Tensor], *, keep: bool) -> Iterator[tuple[int, list[list[GroupInputs]], list]]:
    """Each block's index, its inputs by group and batch, and its outputs by batch; batches wait for each other."""
    with surroundings(source, head=False, dtype=torch.float32, device="cpu") as bypass:
        recorded = [bypass.record(batch, None) for batch in batches]
    hidden = [embedded for embedded, _ in recorded]
    for block in source.map.blocks:
        with filled(source, block) as module:
            runs = [
                BlockRun(module, block.index, lambda h=h: h, passage_of(calls), keep=keep)
                for h, (_, calls) in zip(hidden, recorded, strict=True)
            ]
            seen = [[one.reach(group) for one in runs] for group in range(len(block.groups))]
            hidden = [one.finish() for one in runs]
        yield block.index, seen, hidden


def watched(model: nn.Module, source: Source, tokens: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs of every linear, and outputs of every block, of the model that transformers loads."""
    inputs: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def see(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.update({name: args[0].flatten(0, -2)})

    for matrix in source.map.matrices.values():
        if matrix.expert is None:
            module = model.get_submodule(matrix.parameter.rpartition(".")[0])
            module.register_forward_pre_hook(see(matrix.name))
    for block in source.map.blocks:
        module = model.get_submodule(block.path)
        module.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return inputs, outputs


@pytest.mark.parametrize("name", DENSE_BLOCKS)
def test_groups_and_outputs_are_those_of_the_real_model(name: str, tiny_folder: Folder) -> None:
    source, tokens = open_model(tiny_folder(name)), tokens_of()
    inputs, outputs = watched(stock(tiny_folder(name)), source, tokens)
    for index, seen, hidden in walk(source, [tokens], keep=True):
        block = source.map.blocks[index]
        for group, (found,) in zip(block.groups, seen, strict=True):
            assert set(found) == {None}
            for matrix in group.matrices:
                # the same operations in the same order: no rounding differs
                assert_same_bits(found[None].values, inputs[matrix])
        assert_same_bits(hidden[0], outputs[index])


@pytest.mark.parametrize("name", [*DENSE_BLOCKS, *EXPERTS])
def test_starting_anew_gives_the_same_as_waiting(name: str, tiny_folder: Folder) -> None:
    batches = [tokens_of(3, 24), tokens_of(2, 17)]
    waiting = walk(open_model(tiny_folder(name)), batches, keep=True)
    anew = walk(open_model(tiny_folder(name)), batches, keep=False)
    for (_, seen, hidden), (_, seen_anew, hidden_anew) in zip(waiting, anew, strict=True):
        for group, group_anew in zip(seen, seen_anew, strict=True):
            for found, found_anew in zip(group, group_anew, strict=True):
                assert found.keys() == found_anew.keys()
                for expert, value in found.items():
                    assert_same_bits(found_anew[expert].values, value.values)
                    assert (found_anew[expert].stream is None) == (value.stream is None)
                    if value.stream is not None:
                        assert_same_bits(found_anew[expert].stream, value.stream)
        for value, value_anew in zip(hidden, hidden_anew, strict=True):
            assert_same_bits(value_anew, value)


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_sees_its_own_tokens(name: str, tiny_folder: Folder) -> None:
    source, tokens = open_model(tiny_folder(name)), tokens_of()
    model = stock(tiny_folder(name), experts_implementation="eager")
    routed: list[tuple[Tensor, Tensor]] = []
    for module_name, module in model.named_modules():
        if module_name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, args: routed.append((args[0], args[1])))
    _, outputs = watched(model, source, tokens)
    with_experts = [block for block in source.map.blocks if any(group.experts for group in block.groups)]
    for index, seen, hidden in walk(source, [tokens], keep=True):
        # experts' contributions are summed in another order
        torch.testing.assert_close(hidden[0], outputs[index], rtol=1e-5, atol=1e-5)
        block = source.map.blocks[index]
        if block not in with_experts:
            continue
        states, chosen = routed[with_experts.index(block)]
        first = next(i for i, group in enumerate(block.groups) if group.experts)
        found, later = seen[first][0], seen[first + 1][0]
        assert set(found) == set(later) == set(chosen.unique().tolist())
        for expert, value in found.items():
            rows = (chosen == expert).any(dim=1).nonzero().squeeze(1)
            assert value.tokens is not None
            assert_same_bits(value.tokens.sort().values, rows)
            torch.testing.assert_close(value.values, states[value.tokens], rtol=1e-5, atol=1e-5)
            assert_same_bits(later[expert].tokens, value.tokens)


def test_the_stream_behind_a_branch_is_what_its_output_is_added_to(tiny_folder: Folder) -> None:
    for name in ("llama", "opt", "gpt2", "falcon_multi_query", "gpt_neox"):
        source = open_model(tiny_folder(name))
        block = source.map.blocks[0]
        _, seen, (hidden,) = next(walk(source, [tokens_of()], keep=True))
        last = [group for group, one in enumerate(block.groups) if one.added_to_residual][-1]
        inputs, matrix = seen[last][0][None], source.map.matrices[block.groups[last].matrices[0]]
        weight = matrix.view(source.checkpoint.parameter(matrix.parameter).float())
        bias = 0 if matrix.bias is None else source.checkpoint.parameter(matrix.bias).float()
        assert inputs.stream is not None
        # the sums of a parallel block associate differently: a few roundings of values of size 10
        expected = inputs.stream + inputs.values @ weight.t() + bias
        torch.testing.assert_close(hidden.flatten(0, -2), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def test_post_norms_have_no_stream(tiny_folder: Folder) -> None:
    _, seen, _ = next(walk(open_model(tiny_folder("olmo2")), [tokens_of()], keep=True))
    assert all(found[None].stream is None for (found,) in seen)


@pytest.mark.parametrize("keep", [True, False])
def test_a_group_that_does_not_run_is_an_error(keep: bool, tiny_folder: Folder) -> None:
    source = open_model(tiny_folder("llama"))
    block = source.map.blocks[0]
    with surroundings(source, head=False, dtype=torch.float32, device="cpu") as bypass:
        hidden, calls = bypass.record(tokens_of(), None)
    with filled(source, block) as module:
        one = BlockRun(module, 0, lambda: hidden, passage_of(calls), keep=keep)
        with pytest.raises(ModelError, match="group 9 of the block did not run"):
            one.reach(9)


def test_waiting_blocks_leave_gradients_as_they_were(tiny_folder: Folder) -> None:
    assert torch.is_grad_enabled()
    source = open_model(tiny_folder("llama"))
    for _ in walk(source, [tokens_of(1, 8), tokens_of(2, 8)], keep=True):
        assert torch.is_grad_enabled()
    with surroundings(source, head=False, dtype=torch.float32, device="cpu") as bypass:
        hidden, calls = bypass.record(tokens_of(), None)
    with filled(source, source.map.blocks[0]) as module:
        abandoned = BlockRun(module, 0, lambda: hidden, passage_of(calls))
        assert not abandoned.reach(1)[None].values.requires_grad
        assert torch.is_grad_enabled()
        with torch.no_grad():
            del abandoned
            gc.collect()
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


class Counter:
    """How often each block ran, the stand-ins of `Bypass` apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        start = Sweep.run

        def watched_run(sweep: Sweep) -> None:
            source = sweep._source
            for block in source.map.blocks:
                source.skeleton.get_submodule(block.path).register_forward_pre_hook(self._count(block.path))
            start(sweep)

        monkeypatch.setattr(Sweep, "run", watched_run)

    def _count(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            if "forward" not in module.__dict__:
                self.calls[path] = self.calls.get(path, 0) + 1

        return hook


def test_a_run_that_starts_anew_leaves_nothing_behind() -> None:
    """Activations of a forward that stood still inside a block are freed at once, not when garbage is collected."""
    source = open_model(TINY_LLAMA)
    block = source.map.blocks[0]
    with surroundings(source, head=False, dtype=torch.float32, device="cpu") as bypass:
        hidden, calls = bypass.record(tokens_of(), None)
    made: list[weakref.ref[Tensor]] = []
    with filled(source, block) as module:
        norm = module.get_submodule("post_attention_layernorm")
        handle = norm.register_forward_hook(lambda _, __, output: made.append(weakref.ref(output)))
        run = BlockRun(module, 0, lambda: hidden, passage_of(calls), keep=False)
        gc.disable()
        try:
            run.reach(3)
            run.reach(3)
            assert [one() for one in made] == [None, None]
        finally:
            gc.enable()
            handle.remove()


@pytest.mark.parametrize(
    ("recipe", "memory", "passes"),
    [
        # passes of fit batches and of held-out batches; four groups a block
        ("gptq", None, (1, 2)),
        *((recipe, None, (2, 2)) for recipe in ("qep-gptq", "loaq-gptq", "gptaq", "qronos", "default")),
        ("qep-gptq", "least", (1 + 5, 1 + 5)),
        ("rtn", None, (0, 0)),
    ],
)
def test_each_block_runs_once_a_stream(
    recipe: str, memory: str | None, passes: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tiny_folder: Folder,
    tmp_path: Path,
) -> None:  # fmt: skip
    counter, model = Counter(monkeypatch), tiny_folder("llama")
    # 2 windows a batch: 14 fit windows, 2 held out
    monkeypatch.setattr("mezzotint.blockwise.batches.BATCH_TOKENS", 64)
    limit = None if memory is None else least_memory(model, recipe, samples=16)
    quantized(model, tmp_path / "out", recipe, memory=limit, samples=16)
    expected = 7 * passes[0] + passes[1]
    assert counter.calls == ({block.path: expected for block in open_model(model).map.blocks} if expected else {})
    assert torch.is_grad_enabled()


def test_padding_has_no_weight() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    everything = Inputs(values=torch.zeros(6, 2))
    assert token_weights(None, everything) is None
    torch.testing.assert_close(token_weights(mask, everything), torch.tensor([1.0, 1, 0, 1, 0, 0]))
    some = Inputs(values=torch.zeros(3, 2), tokens=torch.tensor([2, 0, 3]))
    torch.testing.assert_close(token_weights(mask, some), torch.tensor([0.0, 1, 1]))


def test_tokens_of_an_expert_are_aligned_row_by_row() -> None:
    original = Inputs(values=torch.tensor([[1.0], [2.0], [3.0]]), tokens=torch.tensor([7, 0, 4]))
    mine = Inputs(values=torch.tensor([[10.0], [20.0], [30.0], [40.0]]), tokens=torch.tensor([4, 5, 7, 9]))
    torch.testing.assert_close(aligned(original, mine), torch.tensor([[3.0], [20.0], [1.0], [40.0]]))
    nothing = Inputs(values=torch.zeros(0, 1), tokens=torch.zeros(0, dtype=torch.int64))
    torch.testing.assert_close(aligned(nothing, mine), mine.values)
    torch.testing.assert_close(aligned(original, nothing), nothing.values)
