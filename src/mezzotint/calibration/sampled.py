"""Calibration windows that the model writes itself. Nothing is downloaded, and the text resembles the training data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mezzotint.calibration.tokenizer import vocabulary_size
from mezzotint.calibration.windows import Windows
from mezzotint.errors import CalibrationError, MezzotintError, NonFiniteError


def sample_windows(
    model: PreTrainedModel,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    start_token: int | None,
    batch_size: int = 32,
    temperature: float = 1.0,
    suppress: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """Windows sampled from the model, in batches with a KV cache, from its whole distribution (no top-k, no top-p).

    A window is the start token and ``seqlen - 1`` tokens drawn after it. Nothing stops at EOS: the model goes on with
    what follows an end in its training, so every window is full of text. Each window has a generator of its own: up
    to rounding inside the model, windows do not depend on the batch size or the device, and no global generator is
    touched.

    Args:
        model: in evaluation mode, on its device.
        samples: windows wanted; 1 or more.
        seqlen: tokens per window; 2 or more, at most the context of the model.
        seed: of everything drawn.
        start_token: first token of each window, as `separator_token` gives it: BOS where the model wants one, else
            what separates documents. None: each window starts with a token drawn uniformly from the vocabulary.
        batch_size: windows sampled at once.
        temperature: divides the logits; 1 is the model's own distribution.
        suppress: tokens never drawn, e.g. EOS, or embedded ids that the tokenizer does not have.
        progress: called as ``progress(done, total)`` after each step, in tokens.

    Raises:
        CalibrationError: a size is out of range.
        NonFiniteError: the model's logits are not finite.
    """
    _check(model, samples=samples, seqlen=seqlen, batch_size=batch_size, temperature=temperature)
    seeds = torch.randint(2**62, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    generators = [torch.Generator().manual_seed(window_seed) for window_seed in seeds]
    rows: list[Tensor] = []
    cached: bool | None = None
    for first in range(0, samples, batch_size):
        batch = generators[first : first + batch_size]

        def report(drawn: int, first: int = first) -> None:
            if progress is not None:
                progress(first * (seqlen - 1) + drawn, samples * (seqlen - 1))

        draw = _Draw(batch, temperature, tuple(suppress), report)
        starts = _starts(start_token, vocabulary_size(model.config), batch).to(model.device)
        cached = _caches(model, starts[:1]) if cached is None else cached
        rows.append(_generate(model, starts, draw, seqlen, cached=cached).cpu())
    return Windows(tokens=torch.cat(rows), mask=None, source="self")


def _starts(token: int | None, vocabulary: int, generators: Sequence[torch.Generator]) -> Int64[Tensor, "rows 1"]:
    """The first token of each row."""
    if token is not None:
        return torch.full((len(generators), 1), token)
    return torch.stack([torch.randint(vocabulary, (1,), generator=generator) for generator in generators])


class _Draw(LogitsProcessor):
    """Draws a token per row and leaves no other possible.

        token = argmax_i (logit_i / temperature - log E_i),   E_i exponential with mean 1

    has the probabilities of the softmax (Gumbel-max). The inverse of the cumulative distribution would need one random
    number a token instead of one per entry of the vocabulary, but a rounding error moves thousands of its boundaries at
    once: in float32, 2 of 8 windows of 64 tokens depended on the batch size, and with this none.

    Args:
        generators: one a row.
        temperature: divides the scores.
        suppress: tokens of probability 0.
        report: told the number of tokens drawn so far.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        temperature: float,
        suppress: tuple[int, ...],
        report: Callable[[int], None],
    ) -> None:
        self.generators = generators
        self.temperature = temperature
        self.suppress = torch.tensor(suppress, dtype=torch.int64)
        self.report = report
        self.drawn = 0

    def __call__(
        self, input_ids: Int64[Tensor, "rows seen"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise NonFiniteError(
                f"logits after {input_ids.shape[1]} sampled tokens are not finite. Load the model in bfloat16 or "
                "float32, or give --calibration FILE."
            )
        # drawn on the CPU whatever the device, so that the device does not change what is drawn
        race = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(race, self.generators, strict=True):
            row.exponential_(generator=generator)
        race = race.log_().to(scores.device)
        race = torch.sub(scores / self.temperature, race, out=race)
        token = race.index_fill_(1, self.suppress.to(scores.device), -torch.inf).argmax(dim=-1, keepdim=True)
        self.drawn += scores.shape[0]
        self.report(self.drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _generate(
    model: PreTrainedModel, starts: Int64[Tensor, "rows 1"], draw: _Draw, seqlen: int, *, cached: bool
) -> Int64[Tensor, "rows seqlen"]:
    """The start tokens and what is drawn after them."""
    with _plain_generation(model):
        return _generated(
            model,
            starts,
            generation_config=GenerationConfig(
                max_new_tokens=seqlen - 1,
                do_sample=False,  # the processor has drawn already; the only token left is also the likeliest
                use_cache=cached,
            ),
            logits_processor=LogitsProcessorList([draw]),
        )


def _caches(model: PreTrainedModel, start: Int64[Tensor, "1 1"]) -> bool:
    """Whether transformers generates with a cache; with some configurations of some types it cannot (RWKV, BLT).

    Without one every token runs through all tokens before it.
    """
    few = GenerationConfig(max_new_tokens=3, do_sample=False, use_cache=True)
    try:
        with _plain_generation(model):
            _generated(model, start, generation_config=few)
    except CalibrationError:
        return False
    return True


def _generated(model: PreTrainedModel, starts: Int64[Tensor, "rows 1"], **options: Any) -> Int64[Tensor, "rows seqlen"]:
    """What transformers generates.

    Raises:
        CalibrationError: it cannot.
    """
    # any attribute of a module may be a tensor, for a type checker
    generate: Callable[..., Tensor] = model.generate  # pyright: ignore[reportAssignmentType]
    try:
        return generate(starts, attention_mask=torch.ones_like(starts), **options)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, MezzotintError):
            raise
        raise CalibrationError(
            f"transformers cannot generate text with {type(model).__name__} in {model.dtype} "
            f"({type(error).__name__}: {error}). Give --calibration FILE."
        ) from error


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's own generation settings aside: they end at EOS, and penalise or exclude tokens.

    `generate` fills every setting that is None, such as "no EOS", from there; no argument can say otherwise.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _check(model: PreTrainedModel, *, samples: int, seqlen: int, batch_size: int, temperature: float) -> None:
    """Refuse sizes out of range."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if samples < 1 or seqlen < 2 or batch_size < 1 or temperature <= 0:
        raise CalibrationError(
            f"cannot sample {samples} windows of {seqlen} tokens in batches of {batch_size} at temperature "
            f"{temperature:g}: at least 1 window of 2 tokens, batches of 1 and a temperature above 0 are needed."
        )
    if context is not None and seqlen > context:
        raise CalibrationError(
            f"cannot sample windows of {seqlen} tokens: the model reads {context}. Set --seqlen {context} or less."
        )
