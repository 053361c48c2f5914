import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from mezzotint.calibration import (
    Windows,
    auto_samples,
    begin_token,
    consecutive_windows,
    document_windows,
    packed_windows,
    separator_token,
)
from mezzotint.calibration import windows as module
from mezzotint.errors import CalibrationError

BOTH = pytest.mark.parametrize("fixture", ["chat_tokenizer", "llama_tokenizer"])
ALL = pytest.mark.parametrize("fixture", ["chat_tokenizer", "llama_tokenizer", "plain_tokenizer", "bare_tokenizer"])


def make_windows(count, seqlen=4, mask=None):
    return Windows(tokens=torch.arange(count * seqlen).reshape(count, seqlen), mask=mask, source="test")


def prose(words, seed=0):
    """Words and lines, all different, so that a place in the text can be told from what is read there."""
    rng = random.Random(seed)
    return "".join(f"w{i:05d}{rng.choice([' ', ' ', ' ', chr(10)])}" for i in range(words))


def rows_of(windows):
    return [tuple(row) for row in windows.tokens.tolist()]


@given(count=st.integers(2, 70), every=st.integers(2, 10), seed=st.integers(0, 99))
def test_split_is_a_partition_in_order(count, every, seed):
    windows = make_windows(count)
    fit, held_out = windows.split(every=every, seed=seed)
    assert len(held_out) == max(1, count // every)
    first = [part.tokens[:, 0].tolist() for part in (fit, held_out)]
    assert first[0] == sorted(first[0])
    assert first[1] == sorted(first[1])
    assert sorted(first[0] + first[1]) == windows.tokens[:, 0].tolist()
    again = windows.split(every=every, seed=seed)
    torch.testing.assert_close((again[0].tokens, again[1].tokens), (fit.tokens, held_out.tokens), rtol=0, atol=0)


def test_split_depends_on_the_seed_and_carries_the_mask():
    mask = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    windows = make_windows(64, mask=mask)
    choices = {tuple(windows.split(seed=seed)[1].tokens[:, 0].tolist()) for seed in range(5)}
    assert len(choices) == 5
    for part in windows.split(seed=0):
        assert part.mask is not None
        torch.testing.assert_close(part.mask, mask[part.tokens[:, 0] // 4], rtol=0, atol=0)


def test_split_needs_two_windows():
    with pytest.raises(CalibrationError, match="1 window of 4 tokens cannot be split, it needs at least 2"):
        make_windows(1).split(seed=0)
    with pytest.raises(CalibrationError, match="Use 2 or more"):
        make_windows(9).split(seed=0, every=1)


def test_tokens_must_be_embedded():
    windows = make_windows(2)
    windows.check_vocabulary(LlamaConfig(vocab_size=8))
    with pytest.raises(CalibrationError, match="contains token 7, and the model embeds 7 tokens"):
        windows.check_vocabulary(LlamaConfig(vocab_size=7))


@given(widest=st.integers(1, 10**5), seqlen=st.sampled_from([128, 256, 512, 2048]), tokens=st.sampled_from([4, 16]))
def test_auto_samples_gives_so_many_tokens_a_column(widest, seqlen, tokens):
    samples = auto_samples(widest, seqlen, tokens)
    assert 16 <= samples <= 512
    kept = samples * 7 / 8 * seqlen
    assert samples == 512 or kept >= tokens * widest
    assert samples == 16 or (samples - 1) * 7 / 8 * seqlen < tokens * widest


def expected_stream(documents, tokenizer):
    """Everything packed end to end, written out: byte tokens make it independent of how texts are cut."""
    separator = separator_token(tokenizer)
    stream = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False).input_ids
        stream += ([] if separator is None or not ids else [separator]) + ids
    return stream


def expected_rows(documents, tokenizer, seqlen):
    stream, begin = expected_stream(documents, tokenizer), begin_token(tokenizer)
    starts = range(0, len(stream) - seqlen + 1, seqlen)
    return [tuple(([] if begin is None else [begin]) + stream[s + (begin is not None) : s + seqlen]) for s in starts]


@ALL
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), seqlen=st.integers(2, 17))
def test_small_files_are_packed_whole(fixture, lengths, seqlen, request):
    tokenizer = request.getfixturevalue(fixture)
    documents = [prose(length, seed) for seed, length in enumerate(lengths)]
    rows = expected_rows(documents, tokenizer, seqlen)
    if not rows:
        return
    # all of the windows are wanted, so all of the pieces are drawn
    windows = packed_windows(documents, tokenizer, samples=len(rows), seqlen=seqlen, seed=1)
    assert windows.mask is None
    assert sorted(rows_of(windows)) == sorted(rows)
    with pytest.raises(CalibrationError, match="are wanted"):
        packed_windows(documents, tokenizer, samples=len(rows) + 1, seqlen=seqlen, seed=1)


@BOTH
def test_large_files_are_read_all_over(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    text, seqlen, samples, seeds = prose(60_000), 64, 32, 40
    counts = [0, 0, 0, 0]
    for seed in range(seeds):
        windows = packed_windows([text], tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        assert len(set(rows_of(windows))) == samples
        # a window over the joint of two pieces is not in the text; the ends may hold a BOS or half a word
        places = [text.find(tokenizer.decode(row[1:])) for row in windows.tokens.tolist()]
        for place in places:
            if place >= 0:
                counts[4 * place // len(text)] += 1
    # a joint for each of 8 pieces of 16 windows
    assert sum(counts) >= 0.9 * samples * seeds
    # Windows come in pieces: a token is a character here, so 8 pieces a seed. A quarter's share of 320 pieces has a
    # standard deviation of sqrt(1/4 3/4 / 320) = 0.024; unequal numbers of windows a piece make that 0.026. Four of it:
    assert all(abs(count / sum(counts) - 1 / 4) < 0.105 for count in counts)


def test_only_what_is_needed_is_tokenized(chat_tokenizer, monkeypatch):
    text, seen = prose(60_000), []
    original = module._encode

    def encode(texts, tokenizer):
        def watched():
            for piece in texts:
                seen.append(piece)
                yield piece

        return original(watched(), tokenizer)

    monkeypatch.setattr(module, "_encode", encode)
    packed_windows([text], chat_tokenizer, samples=4, seqlen=64, seed=0)
    ahead = module.ENCODED_AT_ONCE * module.CHARACTERS_PER_TOKEN * module.WINDOWS_PER_PIECE * 64
    assert sum(map(len, seen)) <= module.OVERSAMPLING * 4 * 64 + 2 * ahead
    assert sum(map(len, seen)) < len(text) / 2


@pytest.mark.parametrize("ahead", [1, 7])
def test_how_many_texts_are_tokenized_at_once_changes_nothing(ahead, chat_tokenizer, monkeypatch):
    documents = [prose(n, n) for n in range(1, 400)]
    settings_ = {"samples": 12, "seqlen": 32, "seed": 3}
    windows = packed_windows(documents, chat_tokenizer, **settings_)
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", ahead)
    again = packed_windows(documents, chat_tokenizer, **settings_)
    torch.testing.assert_close(again.tokens, windows.tokens, rtol=0, atol=0)
    other = packed_windows(documents, chat_tokenizer, **{**settings_, "seed": 4})
    assert rows_of(other) != rows_of(windows)


@given(st.lists(st.text("ab \n", max_size=80), max_size=5), st.integers(2, 20))
def test_pieces_cover_the_documents(documents, limit):
    pieces = list(module._pieces(documents, limit))
    assert all(0 <= end - start <= limit for _, start, end in pieces)
    for number, document in enumerate(documents):
        assert "".join(document[start:end] for n, start, end in pieces if n == number) == document


def test_pieces_are_cut_at_lines_or_else_before_spaces():
    def cut(text, limit):
        return [text[start:end] for _, start, end in module._pieces([text], limit)]

    assert cut("aaa aaa\nbbb", 9) == ["aaa aaa\n", "bbb"]
    assert cut("aaaa aaaa bbb", 11) == ["aaaa aaaa", " bbb"]
    assert cut("aaaaaaaa", 3) == ["aaa", "aaa", "aa"]


def test_a_separator_that_the_text_brings_is_not_doubled(chat_tokenizer, llama_tokenizer):
    for tokenizer, documents in (
        (chat_tokenizer, ["one<|endoftext|>", "two", "<|endoftext|>three"]),
        (llama_tokenizer, ["<s>one", "two", "<s>three"]),
    ):
        windows = packed_windows(documents, tokenizer, samples=1, seqlen=13, seed=0)
        separator = separator_token(tokenizer)
        assert windows.tokens[0].tolist().count(separator) == 3


@BOTH
def test_documents_one_a_window(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    begin = begin_token(tokenizer)
    documents = ["", "short", "x" * 30, "</s>"]
    windows = document_windows(documents, tokenizer, samples=3, seqlen=10, seed=0)
    assert windows.mask is not None
    bodies = []
    for row, mask in zip(windows.tokens, windows.mask, strict=True):
        kept = row[mask].tolist()
        assert mask.tolist() == [True] * len(kept) + [False] * (10 - len(kept))
        assert set(row[~mask].tolist()) <= {tokenizer.eos_token_id}
        assert begin is None or kept[0] == begin
        bodies.append(tokenizer.decode(kept if begin is None else kept[1:]))
    room = 10 if begin is None else 9
    assert sorted(bodies) == sorted(["short", "x" * room, "</s>"])
    with pytest.raises(CalibrationError, match=r"3 documents with text, and 4 windows.*--samples 3"):
        document_windows(documents, tokenizer, samples=4, seqlen=10, seed=0)
    full = document_windows(["x" * 30], tokenizer, samples=1, seqlen=10, seed=0)
    assert full.mask is None


@BOTH
def test_consecutive_windows_cut_the_text_where_it_is(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    text, begin = prose(20), begin_token(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    windows = consecutive_windows(text, tokenizer, seqlen=16, windows=5)
    assert windows.tokens.shape == (5, 16)
    for number, row in enumerate(windows.tokens.tolist()):
        assert row[1:] == ids[number * 16 + 1 : number * 16 + 16]
        assert row[0] == (ids[number * 16] if begin is None else begin)
    assert len(consecutive_windows(text, tokenizer, seqlen=16)) == len(ids) // 16
    # the last partial window is dropped, a whole one is not
    assert len(consecutive_windows(text[:32], tokenizer, seqlen=16)) == 2
    assert len(consecutive_windows(text[:31], tokenizer, seqlen=16)) == 1


def test_too_little_text(chat_tokenizer):
    with pytest.raises(CalibrationError, match=r"wiki\.txt has 40 tokens, 2 windows of 16; 3 windows \(48 tokens\)"):
        consecutive_windows("x" * 40, chat_tokenizer, seqlen=16, windows=3, source="wiki.txt")
    with pytest.raises(CalibrationError, match="shorten --seqlen to 11 or less"):
        packed_windows(["x" * 10], chat_tokenizer, samples=1, seqlen=16, seed=0)
    with pytest.raises(CalibrationError, match="Raise --samples"):
        packed_windows(["x"], chat_tokenizer, samples=0, seqlen=16, seed=0)
    with pytest.raises(CalibrationError, match="Raise --seqlen"):
        consecutive_windows("x", chat_tokenizer, seqlen=1)


def test_pieces_and_windows_are_drawn_by_two_permutations(chat_tokenizer, monkeypatch):
    seeds, permutation = [], module._permutation
    monkeypatch.setattr(module, "_permutation", lambda count, seed: seeds.append(seed) or permutation(count, seed))
    packed_windows([prose(4000)], chat_tokenizer, samples=4, seqlen=64, seed=3)
    assert len(seeds) == len({*seeds}) == 2
