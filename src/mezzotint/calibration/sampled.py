"""Calibration windows that the model writes itself: nothing to download, and text of the kind the model knows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mezzotint.calibration.tokenizer import vocabulary_size
from mezzotint.calibration.windows import Windows
from mezzotint.errors import CalibrationError, NonFiniteError


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
    what follows an end in its training, so every window is full of text. Token ``t`` of window ``w`` is the inverse of
    the cumulative distribution at ``uniform[w, t]``, all of which are drawn beforehand: up to rounding inside the
    model, the windows do not depend on the batch size or the device, and no global generator is touched.

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
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(samples, seqlen, generator=generator, dtype=torch.float64)
    if start_token is None:
        starts = (uniform[:, 0] * vocabulary_size(model.config)).to(torch.int64)
    else:
        starts = torch.full((samples,), start_token)

    rows: list[Tensor] = []
    total = samples * (seqlen - 1)
    for first in range(0, samples, batch_size):
        part = slice(first, min(first + batch_size, samples))
        before = first * (seqlen - 1)

        def report(drawn: int, before: int = before) -> None:
            if progress is not None:
                progress(before + drawn, total)

        draw = _Draw(uniform[part, 1:].to(model.device), temperature, tuple(suppress), report)
        rows.append(_generate(model, starts[part].to(model.device), draw).cpu())
    return Windows(tokens=torch.cat(rows), mask=None, source="self")


class _Draw(LogitsProcessor):
    """Leaves one token per row possible: the inverse of its cumulative distribution at the next uniform number.

    Args:
        uniform: in ``[0, 1)``, ``[rows, steps]``; a column a step.
        temperature: divides the scores.
        suppress: tokens of probability 0.
        report: told the number of tokens drawn so far.
    """

    def __init__(
        self,
        uniform: Float64[Tensor, "rows steps"],
        temperature: float,
        suppress: tuple[int, ...],
        report: Callable[[int], None],
    ) -> None:
        self.uniform = uniform
        self.temperature = temperature
        self.suppress = torch.tensor(suppress, dtype=torch.int64, device=uniform.device)
        self.report = report
        self.step = 0

    def __call__(
        self, input_ids: Int64[Tensor, "rows seen"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        logits = scores.double().div_(self.temperature).index_fill_(1, self.suppress, -torch.inf)
        # float64: a sum over 150 000 float32 probabilities loses the rare tokens
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        height = cumulative[:, -1:]
        if not bool(height.isfinite().all()):
            raise NonFiniteError(
                f"logits after {input_ids.shape[1]} sampled tokens are not finite. Load the model in bfloat16 or "
                "float32, or give --calibration FILE."
            )
        wanted = self.uniform[:, self.step : self.step + 1] * height
        # right: the first token whose sum exceeds the number, so never one of probability 0
        token = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=scores.shape[1] - 1)
        self.step += 1
        self.report(self.step * scores.shape[0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _generate(model: PreTrainedModel, starts: Int64[Tensor, " rows"], draw: _Draw) -> Int64[Tensor, "rows seqlen"]:
    """The start tokens and as many drawn tokens as there are uniform numbers."""
    prompt = starts.unsqueeze(1)
    with _plain_generation(model):
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=draw.uniform.shape[1],
                do_sample=False,  # the processor has drawn already; the only token left is also the likeliest
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([draw]),
        )
    return tokens


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
