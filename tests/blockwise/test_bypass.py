"""What blocks hand on beside the hidden states: shared keys and values, chosen places, states of routers."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mezzotint.blockwise import backward
from mezzotint.blockwise.backward import Backward
from mezzotint.blockwise.batches import batches_of
from mezzotint.blockwise.borders import Borders
from mezzotint.blockwise.bypass import Call, Passage, Returned, surroundings
from mezzotint.blockwise.streams import Resources, Streams
from mezzotint.calibration import Windows
from mezzotint.evaluation.texts import run_blocks
from mezzotint.models import Source, dematerialize, materialize, open_model
from mezzotint.storage.saved import Saved
from mezzotint.storage.stores import Budget, Shelf, Store, temporary_stores
from runs import assert_same_bits
from zoo.models import make

# keys and values of earlier blocks, and four streams on the first axis; keys and values; places that an indexer chose;
# states of a router; several streams a token
LINKED = ["gemma3n_text", "gemma4_text", "glm_moe_dsa", "zaya", "deepseek_v4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("linked")
    return lambda name: place / name if (place / name).is_dir() else make(name, place / name)


def windows_of(count: int, seqlen: int = 24) -> Windows:
    generator = torch.Generator().manual_seed(1)
    return Windows(tokens=torch.randint(3, 200, (count, seqlen), generator=generator), mask=None, source="random")


@pytest.mark.parametrize("name", [*LINKED, "falcon_h1", "bamba", "gptj", "rwkv"])
def test_blocks_one_by_one_give_the_logits_of_the_whole(name: str, folder: Any, tmp_path: Path) -> None:
    source, windows = open_model(folder(name)), windows_of(2)
    batches = list(batches_of(windows, held_out=True))
    budget = Budget(0)  # everything is spilled
    with torch.no_grad():
        store = run_blocks(
            source, batches, Store(budget, tmp_path), Shelf(budget, tmp_path), device="cpu", step=lambda: None
        )
        with surroundings(source, head=True, dtype=torch.float32, device="cpu") as bypass:
            found = bypass.logits(windows.tokens, store.get(0), torch.arange(24))
        model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
        expected = model(windows.tokens, use_cache=False).logits
    # the same operators in the same order; what they read went through a file
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LINKED[:4])
def test_streams_go_on_where_they_were_saved(name: str, folder: Any, tmp_path: Path) -> None:
    def streams(source: Source, saved: Saved | None) -> Streams:
        return Streams(
            source,
            windows_of(3),
            windows_of(2),
            Resources(folder=tmp_path),
            original_fit=True,
            saved=saved,
        )

    def through(source: Source, one: Streams, blocks: slice) -> dict[str, Tensor]:
        for block in source.map.blocks[blocks]:
            module = source.skeleton.get_submodule(block.path)
            materialize(module, block.path, source.checkpoint, dtype=torch.float32, device="cpu")
            one.run_original(block.index, module, {})
            one.finish_quantized(one.quantized_runs(block.index, module))
            dematerialize(module)
        index = one.save(tmp_path / f"{blocks.start}.bin")
        saved = Saved(tmp_path, [index])
        return {key: saved.read(key) for key in saved.names}

    source = open_model(folder(name))
    half = len(source.map.blocks) - 1
    first = streams(source, None)
    through(source, first, slice(0, half))
    saved = Saved(tmp_path, [first.save(tmp_path / "half.bin")])
    assert any("/" in key for key in saved.names)
    expected = through(source, first, slice(half, None))
    found = through(source, streams(open_model(folder(name)), saved), slice(half, None))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value)


class _Watched(Backward):
    def watched(self, block: Any) -> Any:
        return nullcontext()


@pytest.mark.parametrize("name", LINKED)
def test_gradients_are_those_of_the_whole_model(name: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "sampled", lambda logits, _: torch.full((len(logits),), 7))
    source, windows = open_model(folder(name)), windows_of(1)
    with temporary_stores(1, None) as (store, shelf):
        borders = Borders(
            source, windows, store=store, shelf=shelf, device="cpu", dtype=torch.float32, step=lambda: None
        )
        way = _Watched(borders, seed=0)
        way.through_head()
        for block in reversed(source.map.blocks):
            way.through_block(block)
        found = borders.get(0, 0)
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    seen: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0].detach().requires_grad_(True))
        return (seen[0], *args[1:])

    model.get_submodule(source.map.blocks[0].path).register_forward_pre_hook(enter)
    logits = model(windows.tokens, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), 7), reduction="sum").backward()
    expected = seen[0].grad
    assert expected is not None
    if name == "gemma3n_text":
        expected = expected.permute(1, 2, 0, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_block_may_run_again_and_reads_what_was_before_it() -> None:
    """Values are kept by the block that wrote them, and forgotten when nothing behind reads them."""

    class Block(nn.Module):
        def forward(self, hidden: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return hidden, hidden + (0 if before is None else before)

    shelf = Shelf(Budget(None), Path())
    calls = [Call((), {}), *(Call((Returned(f"{i}.1"),), {}) for i in range(3))]
    passage = Passage(calls, shelf)
    module = Block()
    for index in range(4):
        for value in (5.0, 1.0):  # what counts is the last run
            assert float(passage.through(module, index, torch.tensor([value]))) == value
    assert passage.state().keys() == {"2.1"}
    passage.close()
    assert passage.state() == {}
    assert [float(passage.through(module, 0, torch.tensor([2.0])))] == [2.0]
    assert {name: float(value) for name, value in passage.state().items()} == {"0.1": 2.0}
    other = passage.branch(1)
    other.through(module, 1, torch.tensor([3.0]))
    assert float(other.state()["1.1"]) == 5.0
    assert "1.1" not in passage.state()
