#!/usr/bin/env python
"""Make the tiny trained Llama of the tests, with its tokenizer and its texts.

Two stages, each deterministic for given versions, thread count and processor:

    python tests/data/make_tiny_llama.py sample DEMO_MODEL DOCUMENTS.jsonl
    python tests/data/make_tiny_llama.py train DOCUMENTS.jsonl [OUT]

``sample`` lets the demo model (``examples/prepare_demo_model.py``) continue short openings; each line of
DOCUMENTS.jsonl is one text, as a JSON string. ``train`` learns a byte-level BPE of 1024 tokens and a Llama of
2.9 million parameters from all but 60 kB of these texts, and writes into OUT (default: the folder of this script)
``tiny_llama/``, ``tiny_text.txt`` (texts seen in training) and ``tiny_text_heldout.txt`` (texts never seen).
"""

import argparse
import itertools
import json
import math
import platform
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.cache_utils import DynamicLayer

STORY_HEROES = (
    "the old lighthouse keeper|a young fox with a torn ear|the baker's daughter|a travelling clock maker|"
    "the last dragon of the valley|two brothers from the harbour|a quiet librarian|the captain of a small ship|"
    "a robot who loved gardens|the queen's gardener|a boy with a wooden flute|the night watchman|"
    "a family of otters|the new teacher|an owl that could not sleep|a shepherd and her dog|"
    "the youngest of seven sisters|a fisherman without a boat|the mapmaker|a little cloud|"
    "the blacksmith's apprentice|a lonely giant|the postman of the mountain village|a very small elephant"
)
STORY_OPENINGS = (
    "Once upon a time, {hero} lived|One cold morning, {hero} found|When the rain finally stopped, {hero}|"
    "Nobody in town knew why {hero}|Long ago, before the roads were built, {hero}|"
    "Every evening at six o'clock, {hero}|It was the first day of spring, and {hero}|"
    "There was a knock at the door. Outside stood {hero}, who|For three days and three nights, {hero}|"
    "Deep in the forest, {hero}|The story begins with a letter that {hero}|"
    "On the far side of the river, {hero}|Everyone laughed when {hero}|By the light of the moon, {hero}|"
    '"I have never seen anything like it," said {hero}. "|In the winter of that year, {hero}'
)
SUBJECTS = (
    "copper|the honey bee|photosynthesis|the printing press|granite|the violin|the water cycle|rice|"
    "the steam engine|gravity|the blue whale|glass making|the Roman road|tea|the compass|volcanoes|"
    "the human heart|wool|the telescope|salt|the oak tree|algebra|the bicycle|coral reefs|"
    "bread|the moon|rivers|the alphabet|electricity|the potato|migration of birds|paper|"
    "the calendar|iron|the desert|music notation|vaccination|bridges|the microscope|wheat|"
    "the tides|chess|silk|the railway|soil|the spider|cheese|the lever|"
    "glaciers|maps|the radio|cotton|sound|the octopus|mathematics|the windmill|"
    "weather forecasting|clay pottery|the lungs|sugar|the pendulum|wolves|trade|light"
)
SUBJECT_OPENINGS = (
    "An introduction to {subject}.\n\n|The history of {subject} begins|The word used for {subject} comes from|"
    "Scientists who study {subject} have found that|There are several kinds of things to know about {subject}:|"
    "In many countries, {subject}|The most important fact about {subject} is|What is {subject}? In simple terms,|"
    "Children often ask about {subject}. The answer|Article: {subject}\n\nOverview:"
)

SEED = 2024
NEW_TOKENS = 256
TEMPERATURE = 0.8
TOP_K = 1024
TOP_P = 0.95
SAMPLED_TOKENS = 390_000
TEXT_SEPARATOR = "\n\n"
VOCABULARY = 1024
MAX_POSITION = 512
HELD_OUT_BYTES = 60_000
SHOWN_BYTES = 150_000
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
UNWANTED = re.compile(
    r"https?:|www\.|\.com\b|\.org\b|@|<\||\b(sex|rape|porn|nazi|hitler|suicid|murder|kill|slave|jew|muslim|"
    r"islam|terroris|drug|racis|genocid|abus|viagra|casino|naked|nude)\w*",
    re.IGNORECASE,
)


def openings(seed: int) -> list[str]:
    """All combinations of the frames and subjects above, shuffled."""
    texts = [frame.format(hero=hero) for frame in STORY_OPENINGS.split("|") for hero in STORY_HEROES.split("|")]
    texts += [frame.format(subject=name) for frame in SUBJECT_OPENINGS.split("|") for name in SUBJECTS.split("|")]
    mixed = [text[0].upper() + text[1:] for text in texts]
    random.Random(seed).shuffle(mixed)
    return mixed


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row from the nucleus of mass ``TOP_P`` among the ``TOP_K`` likeliest tokens.

    Sorting the whole vocabulary takes longer than the model itself on a CPU; hence the cut at ``TOP_K``.

    Logits are ``(rows, vocabulary)``, the result is ``(rows, 1)``.
    """
    best, token = logits.float().topk(TOP_K, dim=-1)
    probability = (best / TEMPERATURE).softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    probability = probability * (before < TOP_P)
    return token.gather(-1, torch.multinomial(probability, 1, generator=generator))


class ReservedLayer(DynamicLayer):
    """A growing cache layer in memory reserved once; concatenation took 40 % of the time."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``(rows, heads, tokens, head_dim)``, and return all of them."""
        rows, heads, tokens, head_dim = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = key_states.new_empty(2, rows, heads, tokens + NEW_TOKENS, head_dim)
        start = self.get_seq_length()
        self.room[0, :, :, start : start + tokens] = key_states
        self.room[1, :, :, start : start + tokens] = value_states
        self.keys, self.values = self.room[:, :, :, : start + tokens]
        return self.keys, self.values


@torch.inference_mode()
def continue_batch(model: LlamaForCausalLM, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Append ``NEW_TOKENS`` sampled tokens to each row of ``prompts`` (``(rows, tokens)``, no padding)."""
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer() for _ in cache.layers]
    pieces, step = [prompts], prompts
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        step = draw(logits, generator)
        pieces.append(step)
    return torch.cat(pieces, dim=-1)


def trimmed(text: str) -> str:
    """Make quotes and dashes ASCII; drop the unfinished last sentence, trailing blanks and runs of empty lines."""
    text = text.translate(PLAIN).strip()
    end = max(text.rfind(mark) for mark in (". ", ".\n", "! ", "? ", '." ', '."\n'))
    if not text.endswith((".", "!", "?", '"')) and end > 0:
        text = text[: end + 1]
    return re.sub(r"\n{2,}", "\n", text).strip()


def is_usable(text: str) -> bool:
    """Whether a text is plain, long enough and free of addresses and unpleasant words."""
    return len(text) > 200 and text.isascii() and UNWANTED.search(text) is None


def sample(model_folder: Path, target: Path, *, batch_size: int = 128, seed: int = SEED) -> None:
    """Write the demo model's continuations of the openings to ``target``, one JSON string a line."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    # <|endoftext|> separated the documents of the demo model's own training; it also ends one.
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ends = {separator, tokenizer.eos_token_id}
    tokens, kept, start = 0, 0, time.monotonic()
    with target.open("w", encoding="utf-8") as file:
        endless = itertools.cycle(sorted(tokenizer(openings(seed), add_special_tokens=False).input_ids, key=len))
        while tokens < SAMPLED_TOKENS:
            batch = list(itertools.islice(endless, batch_size))
            # cut to the shortest opening of the batch: no padding, no mask
            shortest = min(len(row) for row in batch)
            prompts = torch.tensor([[separator, *row[:shortest]] for row in batch])
            for row in continue_batch(model, prompts, generator)[:, 1:].tolist():
                row = list(itertools.takewhile(lambda token: token not in ends, row))
                tokens += len(row)
                text = trimmed(tokenizer.decode(row))
                if is_usable(text):
                    kept += 1
                    file.write(json.dumps(text) + "\n")
            file.flush()
            report(f"{tokens} tokens, {kept} texts kept, {time.monotonic() - start:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Settings of the second stage.

    Attributes:
        steps: optimizer steps.
        batch: windows per step.
        window: tokens per window; the longest position the model ever sees.
        rate: highest learning rate, reached after ``warm_up`` steps and left along a cosine.
        decay: weight decay.
        seed: of the shuffle, the first weights and the windows.
    """

    steps: int = 600
    batch: int = 8
    window: int = 512
    rate: float = 2e-3
    warm_up: int = 60
    decay: float = 0.1
    seed: int = SEED


def split_texts(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffled training texts, and held-out texts of ``HELD_OUT_BYTES`` together."""
    texts = texts.copy()
    random.Random(seed).shuffle(texts)
    count = count_up_to(texts, HELD_OUT_BYTES)
    return texts[count:], texts[:count]


def count_up_to(texts: list[str], size: int) -> int:
    """How many of the first texts it takes to reach ``size`` bytes."""
    sizes = itertools.accumulate(len(text) + len(TEXT_SEPARATOR) for text in texts)
    return sum(1 for _ in itertools.takewhile(lambda total: total < size, sizes)) + 1


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """A byte-level BPE of ``VOCABULARY`` tokens that puts ``<s>`` in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return FastTokenizer(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def new_model(tokenizer: FastTokenizer, seed: int) -> LlamaForCausalLM:
    """The untrained model; 2.9 million parameters, 5.8 MB in bf16."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def token_stream(texts: list[str], tokenizer: FastTokenizer) -> Tensor:
    """All texts as one row of tokens: ``<s>``, three texts with empty lines between them, ``</s>``, and so on."""
    packs = [TEXT_SEPARATOR.join(texts[start : start + 3]) for start in range(0, len(texts), 3)]
    rows = tokenizer(packs).input_ids
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def rate_factor(step: int, settings: Training) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.05."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    progress = (step - settings.warm_up) / (settings.steps - settings.warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def fit_(model: LlamaForCausalLM, tokens: Tensor, settings: Training, held_out: Tensor) -> None:
    """In place: train ``model`` on random windows of ``tokens`` (``(tokens,)``)."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.decay)
    offsets, start = torch.arange(settings.window), time.monotonic()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, settings))
    for step in range(settings.steps):
        first = torch.randint(len(tokens) - settings.window + 1, (settings.batch, 1), generator=generator)
        windows = tokens[first + offsets]  # (batch, window)
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            numbers = f"training {loss.item():.3f}, held-out {mean_loss(model, held_out, settings.window):.3f} nats"
            report(f"step {step + 1}: {numbers} a token, {time.monotonic() - start:.0f} s")


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, window: int) -> float:
    """Mean negative log-likelihood per predicted token, in nats, over windows without overlap."""
    windows = tokens[: len(tokens) // window * window].view(-1, 1, window)
    losses = [model(input_ids=part, labels=part).loss.float() for part in windows]
    return torch.stack(losses).mean().item()


def unigram_loss(training: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Mean negative log-likelihood of ``held_out`` under the token frequencies of ``training``, in nats."""
    counts = torch.bincount(training, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def licence_note(numbers: dict[str, float], settings: Training) -> str:
    """The text of ``LICENCE.md``: where model and texts come from, their licence, versions and losses."""
    return f"""# Tiny Llama: origin and licence

Made by `tests/data/make_tiny_llama.py`, and so are `../tiny_text.txt` and `../tiny_text_heldout.txt`.

The texts were sampled from SmolLM2-135M-Instruct (Apache-2.0; dequantized from 4 bits, see
`examples/prepare_demo_model.py`) at temperature {TEMPERATURE} and top-p {TOP_P}. They are test material: much of what
they say is wrong, and names in them mean nobody. The model and its tokenizer were trained from scratch on these
texts. Weights, tokenizer and texts are released under the licence of this project, Apache-2.0.

| | |
|---|---|
| parameters | {numbers["parameters"]:,.0f}, bf16 |
| training | {numbers["training_tokens"]:,.0f} tokens; {settings.steps} steps of {settings.batch} x {settings.window} |
| held-out loss, bf16 weights | {numbers["held_out_bf16"]:.4f} nats a token |
| held-out loss, before rounding to bf16 | {numbers["held_out"]:.4f} nats a token |
| held-out loss of the token frequencies alone | {numbers["unigram"]:.4f} nats a token |
| held-out text | {numbers["held_out_tokens"]:,.0f} tokens, {numbers["held_out_bytes"]:,.0f} bytes |
| seed | {settings.seed} |
| versions | torch {torch.__version__.split("+")[0]}, transformers {transformers.__version__}, tokenizers \
{tokenizers.__version__}, Python {platform.python_version()} ({platform.machine()}) |
"""


def train(source: Path, target: Path, settings: Training) -> dict[str, float]:
    """Write ``tiny_llama/``, ``tiny_text.txt`` and ``tiny_text_heldout.txt`` into ``target``.

    Returns:
        The measured losses and sizes, as in the licence note.
    """
    texts = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    training_texts, held_out_texts = split_texts(texts, settings.seed)
    tokenizer = train_tokenizer(training_texts)
    model = new_model(tokenizer, settings.seed)
    tokens = token_stream(training_texts, tokenizer)
    held_out_text = TEXT_SEPARATOR.join(held_out_texts) + "\n"
    held_out = tokenizer(held_out_text, return_tensors="pt").input_ids[0]
    numbers: dict[str, float] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_tokens": len(tokens),
        "held_out_tokens": len(held_out),
        "held_out_bytes": len(held_out_text),
        "unigram": unigram_loss(tokens, held_out, len(tokenizer)),
    }
    fit_(model, tokens, settings, held_out)
    numbers["held_out"] = mean_loss(model, held_out, settings.window)
    model = model.to(torch.bfloat16)
    numbers["held_out_bf16"] = mean_loss(model, held_out, settings.window)

    folder = target / "tiny_llama"
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # the class name of transformers 5, which version 4 does not know, becomes one that both know
    settings_file = folder / "tokenizer_config.json"
    words = settings_file.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings_file.write_text(words, encoding="utf-8")
    (folder / "LICENCE.md").write_text(licence_note(numbers, settings), encoding="utf-8")
    shown = training_texts[: count_up_to(training_texts, SHOWN_BYTES)]
    (target / "tiny_text.txt").write_text(TEXT_SEPARATOR.join(shown) + "\n", encoding="utf-8")
    (target / "tiny_text_heldout.txt").write_text(held_out_text, encoding="utf-8")
    return numbers


def report(line: str) -> None:
    """One line of progress on standard output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the tiny trained Llama of the tests.")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; they change the last bits")
    stages = parser.add_subparsers(dest="stage", required=True)
    first = stages.add_parser("sample", help="let the demo model write texts")
    first.add_argument("model", type=Path, help="folder of the demo model")
    first.add_argument("documents", type=Path, help="JSON lines file to write")
    second = stages.add_parser("train", help="train tokenizer and model on these texts")
    second.add_argument("documents", type=Path, help="JSON lines file of the first stage")
    second.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent, help="folder to write into")
    second.add_argument("--steps", type=int, default=Training().steps)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.stage == "sample":
        sample(arguments.model, arguments.documents)
    else:
        numbers = train(arguments.documents, arguments.out, Training(steps=arguments.steps))
        report(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
