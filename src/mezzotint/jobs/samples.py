"""Text that several models generate after the same prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from mezzotint.blockwise.source import open_source
from mezzotint.blockwise.whole import dense_model
from mezzotint.calibration import load_tokenizer

TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a model wrote: the likeliest token each time, without the prompt."""

    model: str
    text: str


def write_samples(
    models: Sequence[Path], prompt: str, *, tokens: int = TOKENS, device: str = "cpu"
) -> tuple[Sample, ...]:
    """Let models go on from a prompt, greedily; one is in memory at a time.

    Args:
        models: folders of any format.
        prompt: text; taken as it is, without a chat template.
        tokens: how many to write at most.
        device: ``cpu`` or ``cuda``.
    """
    return tuple(_written(folder, prompt, tokens, device) for folder in models)


def _written(folder: Path, prompt: str, tokens: int, device: str) -> Sample:
    source = open_source(folder)
    tokenizer = load_tokenizer(source.folder)
    model = dense_model(source, device=device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding
    )
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=greedy)  # type: ignore[operator]
    # decoded with the prompt: some tokenizers drop the space in front of what they decode
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (inputs["input_ids"][0], output[0])
    )
    return Sample(model=folder.absolute().name, text=whole.removeprefix(before))
