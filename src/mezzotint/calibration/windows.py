"""Windows of tokens, packed from documents, one document each, or cut from one text.

One rule for BOS: where the model wants it (`begin_token`), every window starts with it. In packed and consecutive
windows it takes the place of the first token, which nothing predicts anyway, so that windows lie at the same places of
a text for every model; before a document that has a window of its own it is put in front.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mezzotint.calibration.tokenizer import begin_token, separator_token, special_id, vocabulary_size
from mezzotint.errors import CalibrationError

CHARACTERS_PER_TOKEN = 4  # of English under a large vocabulary; sets how long a piece is, not how many tokens come out
WINDOWS_PER_PIECE = 4
OVERSAMPLING = 4  # windows to choose from, per window chosen
ENCODED_AT_ONCE = 64

TOKENS_PER_COLUMN = 4  # enough to factorise what is summed
TOKENS_TO_REGRESS = 16  # a correction is a regression on the columns: with fewer tokens it fits their noise
MIN_SAMPLES, MAX_SAMPLES = 16, 512
HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Equally long windows of tokens.

    Attributes:
        tokens: ids, ``[windows, seqlen]``.
        mask: ``[windows, seqlen]``; False is padding, which never enters statistics. None: there is none.
        source: where they come from, for messages and the report.
    """

    tokens: Int64[Tensor, "windows seqlen"]
    mask: Bool[Tensor, "windows seqlen"] | None
    source: str

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens per window."""
        return self.tokens.shape[1]

    def take(self, rows: Int64[Tensor, " rows"]) -> "Windows":
        """The windows of these indices, in this order."""
        mask = None if self.mask is None else self.mask[rows]
        return Windows(tokens=self.tokens[rows], mask=mask, source=self.source)

    def split(self, *, seed: int, every: int = HELD_OUT_EVERY) -> tuple["Windows", "Windows"]:
        """Two disjoint sets, ``(fit, held_out)``; both keep the order of the windows.

        Args:
            seed: of the choice.
            every: one window in so many is held out, at least one; 2 or more.

        Raises:
            CalibrationError: there is a single window.
        """
        if every < 2:
            raise CalibrationError(f"one window in {every} held out leaves none to calibrate on. Use 2 or more.")
        count = len(self)
        if count < 2:
            raise CalibrationError(
                f"{self.source}: {count} window of {self.seqlen} tokens cannot be split, it needs at least 2: one is "
                "held out. Raise --samples, or shorten --seqlen if the text has no more tokens."
            )
        order = _permutation(count, seed)
        held_out = max(1, count // every)
        return self.take(order[held_out:].sort().values), self.take(order[:held_out].sort().values)

    def check_vocabulary(self, config: PreTrainedConfig) -> None:
        """Refuse tokens that the model does not embed.

        Raises:
            CalibrationError: names the largest token and the size of the vocabulary.
        """
        largest, size = int(self.tokens.max()), vocabulary_size(config)
        if largest >= size:
            raise CalibrationError(
                f"{self.source} contains token {largest}, and the model embeds {size} tokens (ids up to {size - 1}). "
                "Use the model's own tokenizer, and take marks of other modalities (images, audio) out of the text."
            )


def auto_samples(widest_input: int, seqlen: int, tokens_per_column: int = TOKENS_PER_COLUMN) -> int:
    """How many windows to calibrate on: so many tokens per column of the widest input in what is left after the split.

    ``ceil(tokens_per_column widest / (7/8 seqlen))``, at least 16 (so that two are held out) and at most 512.

    Args:
        widest_input: columns of the widest matrix that is quantized.
        seqlen: tokens per window.
        tokens_per_column: that are wanted.

    Example:
        >>> auto_samples(1536, 256), auto_samples(1536, 2048), auto_samples(53248, 256)
        (28, 16, 512)
        >>> auto_samples(14336, 2048, TOKENS_TO_REGRESS)
        128
    """
    kept = 1 - 1 / HELD_OUT_EVERY
    wanted = math.ceil(tokens_per_column * widest_input / (kept * seqlen))
    return min(max(wanted, MIN_SAMPLES), MAX_SAMPLES)


def packed_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    source: str = "text",
) -> Windows:
    """Windows cut from documents that are packed end to end.

    Documents are seen as pieces of about four windows, cut at a line end or else before a space. Pieces are drawn by
    seed from everything there is, until they hold four times the tokens wanted (or all are drawn): a large file is
    neither tokenized whole nor read from its head only (about one piece a window wanted in English, one per four
    windows where a character is a token). They go back into their order, are packed with a separator
    (`separator_token`) before each document and each piece that does not continue the one before, and are cut into
    windows without overlap; the last partial window is dropped. ``samples`` windows are drawn by seed; any first part
    of the result is itself a fair sample. The result depends on the arguments only.

    Args:
        documents: texts, in any number and length.
        tokenizer: of the model.
        samples: windows wanted; 1 or more.
        seqlen: tokens per window; 2 or more.
        seed: of both draws.
        source: where the text comes from, for messages.

    Raises:
        CalibrationError: fewer than ``samples`` windows come out.
    """
    _check_sizes(samples, seqlen)
    pieces = list(_pieces(documents, CHARACTERS_PER_TOKEN * WINDOWS_PER_PIECE * seqlen))
    order = _permutation(len(pieces), seed).tolist()
    encoded: dict[int, list[int]] = {}
    total, enough = 0, OVERSAMPLING * samples * seqlen
    texts = (documents[pieces[i][0]][pieces[i][1] : pieces[i][2]] for i in order)
    for index, ids in zip(order, _encode(texts, tokenizer), strict=True):
        if total >= enough:
            break
        encoded[index] = ids
        total += len(ids)

    stream: list[int] = []
    separator = separator_token(tokenizer)
    for index in sorted(encoded):
        continues = index - 1 in encoded and pieces[index - 1][0] == pieces[index][0]
        if not continues:
            _separate(stream, encoded[index], separator)
        stream.extend(encoded[index])

    windows = _cut(stream, tokenizer, seqlen=seqlen, source=source)
    if len(windows) < samples:
        raise CalibrationError(_too_few(source, len(stream), samples, seqlen))
    # another seed than the pieces': with one window a piece the two permutations must not be the same
    return windows.take(_permutation(len(windows), seed + 1)[:samples])


def document_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    source: str = "text",
) -> Windows:
    """One document a window: cut off at ``seqlen`` tokens, or padded on the right.

    Documents are drawn by seed; those without a token are passed over. Padding has mask False and the id of the
    tokenizer's padding token, else of EOS, else 0.

    Args:
        documents: texts.
        tokenizer: of the model.
        samples: windows wanted; 1 or more.
        seqlen: tokens per window; 2 or more.
        seed: of the draw.
        source: where the text comes from, for messages.

    Raises:
        CalibrationError: fewer than ``samples`` documents have text.
    """
    _check_sizes(samples, seqlen)
    begin = begin_token(tokenizer)
    texts = (documents[i] for i in _permutation(len(documents), seed).tolist())
    rows = list(islice((ids for ids in _encode(texts, tokenizer) if ids), samples))
    if len(rows) < samples:
        raise CalibrationError(
            f"{source} has {len(rows)} documents with text, and {samples} windows of one document each are wanted. "
            f"Give more documents, set --samples {len(rows)} or lower, or pack documents end to end."
        )
    known = (special_id(tokenizer, "pad_token_id"), special_id(tokenizer, "eos_token_id"), 0)
    padding = next(index for index in known if index is not None)
    tokens = torch.full((samples, seqlen), padding)
    mask = torch.zeros(samples, seqlen, dtype=torch.bool)
    for row, ids in enumerate(rows):
        opened = ids if begin is None or ids[0] == begin else [begin, *ids]
        length = min(len(opened), seqlen)
        tokens[row, :length] = torch.tensor(opened[:length])
        mask[row, :length] = True
    return Windows(tokens=tokens, mask=None if bool(mask.all()) else mask, source=source)


def consecutive_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    windows: int | None = None,
    source: str = "text",
) -> Windows:
    """Windows for evaluation: the whole text tokenized once, without special tokens, and cut without overlap.

    The last partial window is dropped. Where the model wants a BOS it replaces the first token of each window. The
    first token is never predicted, so ``seqlen - 1`` tokens a window are scored, the same ones with BOS and without.

    Args:
        text: all of it.
        tokenizer: of the model.
        seqlen: tokens per window; 2 or more.
        windows: how many, from the start of the text; None is all.
        source: where the text comes from, for messages.

    Raises:
        CalibrationError: the text has fewer windows than wanted, or not one.
    """
    wanted = 1 if windows is None else windows
    _check_sizes(wanted, seqlen)
    ids = next(_encode([text], tokenizer))
    found = _cut(ids, tokenizer, seqlen=seqlen, source=source)
    if len(found) < wanted:
        raise CalibrationError(_too_few(source, len(ids), wanted, seqlen))
    return found if windows is None else found.take(torch.arange(windows))


def _cut(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, seqlen: int, source: str) -> Windows:
    """All whole windows of a stream of tokens, BOS first where the model wants it."""
    count = len(ids) // seqlen
    tokens = torch.tensor(ids[: count * seqlen], dtype=torch.int64).reshape(count, seqlen)
    begin = begin_token(tokenizer)
    if begin is not None:
        tokens[:, 0] = begin
    return Windows(tokens=tokens, mask=None, source=source)


def _separate(stream: list[int], following: list[int], separator: int | None) -> None:
    """Append the separator, unless a template has written it already; an empty document gets none."""
    written = stream[-1:] == [separator] or following[:1] == [separator]
    if separator is not None and following and not written:
        stream.append(separator)


def _pieces(documents: list[str], limit: int) -> Iterator[tuple[int, int, int]]:
    """``(document, start, end)`` in characters: whole documents, or parts of at most ``limit``.

    A cut lies after a line end or else before a space, in the second half of the piece where there is one: there,
    most tokenizers would have cut too.
    """
    for number, text in enumerate(documents):
        start = 0
        while len(text) - start > limit:
            half, stop = start + limit // 2, start + limit
            line, space = text.rfind("\n", half, stop), text.rfind(" ", half, stop)
            end = line + 1 if line >= 0 else (space if space > start else stop)
            yield number, start, end
            start = end
        yield number, start, len(text)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each text without special tokens; a few texts are taken ahead."""
    source = iter(texts)
    while batch := list(islice(source, ENCODED_AT_ONCE)):
        # verbose: texts longer than the model's context are the normal case here and need no warning
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _permutation(count: int, seed: int) -> Int64[Tensor, " count"]:
    """A permutation that depends on the seed only."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _check_sizes(samples: int, seqlen: int) -> None:
    """Refuse sizes that make no window."""
    if samples < 1 or seqlen < 2:
        raise CalibrationError(
            f"{samples} windows of {seqlen} tokens were asked for; at least 1 window of 2 tokens is needed. Raise "
            f"{'--samples' if samples < 1 else '--seqlen'}."
        )


def _too_few(source: str, tokens: int, samples: int, seqlen: int) -> str:
    """Message for a text that is too short."""
    count = tokens // seqlen
    remedy = f"ask for {count} or fewer windows" if count else f"shorten --seqlen to {tokens} or less"
    return (
        f"{source} has {tokens} tokens, {count} windows of {seqlen}; {samples} windows ({samples * seqlen} tokens) are "
        f"wanted. Give more text, or {remedy}."
    )
