"""Windows in batches, and the split into what is fitted on and what is held out."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.blockwise.batches import BATCH_TOKENS, batches_of
from mezzotint.blockwise.bypass import surroundings
from mezzotint.blockwise.streams import Resources, Streams
from mezzotint.calibration import Windows
from mezzotint.errors import NonFiniteError
from mezzotint.models import open_model
from runs import TINY_LLAMA, assert_same_bits, stock


def windows(count: int, seqlen: int, *, padded: bool = False) -> Windows:
    tokens = torch.arange(count * seqlen).reshape(count, seqlen) % 1000
    mask = torch.arange(seqlen) < torch.arange(1, count + 1)[:, None] if padded else None
    return Windows(tokens=tokens, mask=mask, source="test")


@given(count=st.integers(1, 40), seqlen=st.sampled_from([2, 100, 2048, 5000]), padded=st.booleans())
def test_batches_hold_every_window_once_in_order(count: int, seqlen: int, padded: bool) -> None:
    whole = windows(count, seqlen, padded=padded)
    batches = list(batches_of(whole, held_out=True))
    assert_same_bits(torch.cat([batch.tokens for batch in batches]), whole.tokens)
    assert all((batch.mask is not None) == padded for batch in batches)
    if whole.mask is not None:
        assert_same_bits(torch.cat([batch.mask for batch in batches if batch.mask is not None]), whole.mask)
    assert all(batch.held_out for batch in batches)
    assert all(batch.tokens.numel() <= max(BATCH_TOKENS, seqlen) for batch in batches)


@given(count=st.integers(2, 70), seed=st.integers(0, 99))
def test_one_window_in_eight_is_held_out(count: int, seed: int) -> None:
    whole = windows(count, 3)
    fit, held_out = whole.split(seed=seed)
    assert len(held_out) == max(1, count // 8)
    rows = torch.cat([fit.tokens, held_out.tokens])
    assert_same_bits(rows[rows[:, 0].argsort()], whole.tokens[whole.tokens[:, 0].argsort()])
    again = whole.split(seed=seed)
    assert_same_bits(again[1].tokens, held_out.tokens)


def test_fit_and_held_out_windows_never_share_a_batch(tmp_path: Path) -> None:
    source = open_model(TINY_LLAMA)
    made = Streams(source, windows(5, 16), windows(2, 16), Resources(folder=tmp_path), original_fit=False)
    assert [(batch.tokens.shape[0], batch.held_out) for batch in made.batches] == [(5, False), (2, True)]
    made.close()
    assert all(parameter.device.type == "meta" for parameter in source.skeleton.parameters())


@pytest.mark.parametrize("head", [True, False])
def test_only_what_lies_around_the_blocks_is_in_memory(head: bool) -> None:
    source = open_model(TINY_LLAMA)
    with surroundings(source, head=head, dtype=torch.float32, device="cpu"):
        found = {name for name, p in source.skeleton.named_parameters() if p.device.type != "meta"}
    assert found == {"model.embed_tokens.weight", "model.norm.weight"} | ({"lm_head.weight"} if head else set())
    assert all(parameter.device.type == "meta" for parameter in source.skeleton.parameters())


def test_logits_from_the_last_block_are_the_models() -> None:
    tokens = torch.arange(3, 43).reshape(2, 20)
    model = stock(TINY_LLAMA)
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    last: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    with surroundings(open_model(TINY_LLAMA), head=True, dtype=torch.float32, device="cpu") as bypass:
        logits = bypass.logits(tokens, last[0], torch.tensor([0, 7, 19]))
    torch.testing.assert_close(logits, output.logits[:, [0, 7, 19]], rtol=1e-5, atol=1e-5)


def test_a_model_that_overflows_is_named(tmp_path: Path) -> None:
    source = open_model(TINY_LLAMA)
    made = Streams(source, windows(3, 8), windows(1, 8), Resources(folder=tmp_path), original_fit=True)
    with pytest.raises(NonFiniteError, match="block 1 of the original gives NaN or infinity"):
        made.run_original(1, _Overflow(), {})
    made.close()


class _Overflow(torch.nn.Module):
    """A block that overflows."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden * torch.inf
