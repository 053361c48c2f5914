"""The tokenizer of a model folder, the tokens that open and separate texts, and whether its ids fit the model."""

from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from mezzotint.errors import CalibrationError, ModelError

# What separated the documents of a model's first training, where the tuned model's EOS only ends a turn of a chat
# (Qwen, SmolLM, GLM, Phi): `eos_token` of such a tokenizer is "<|im_end|>".
DOCUMENT_SEPARATOR = "<|endoftext|>"


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a model folder; never asks the network.

    Args:
        folder: a folder as transformers saves it.
        trust_remote_code: run Python files of the folder, if its tokenizer needs them.

    Raises:
        ModelError: the folder is missing, or has no tokenizer that can be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"tokenizer folder {path} does not exist. Give the folder of a model.")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # damaged files make the tokenizers library raise `Exception` itself
        names = sorted(file.name for file in path.iterdir() if "token" in file.name or "vocab" in file.name)
        raise ModelError(
            f"{path} has no usable tokenizer: {_first_line(error)} Tokenizer files: {', '.join(names) or 'none'}. "
            "Copy the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) into the folder."
        ) from error


def special_id(
    tokenizer: PreTrainedTokenizerBase, name: Literal["bos_token_id", "eos_token_id", "pad_token_id"]
) -> int | None:
    """The id of a special token, if the tokenizer has it."""
    value = getattr(tokenizer, name)
    return value if isinstance(value, int) else None


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS if the tokenizer puts it before a text by default (the model wants it there), else None.

    Found out by encoding: flags such as ``add_bos_token`` are missing from many tokenizers.
    """
    bos = special_id(tokenizer, "bos_token_id")
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and ids[:1] == [bos] else None


def separator_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before each document: what the model saw between documents when it was trained.

    The first that exists of: BOS if the tokenizer adds it by default; ``<|endoftext|>`` if it is a special token;
    EOS; None.
    """
    begin = begin_token(tokenizer)
    if begin is not None:
        return begin
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.get(DOCUMENT_SEPARATOR, special_id(tokenizer, "eos_token_id"))


def vocabulary_size(config: PreTrainedConfig) -> int:
    """Rows of the token embedding, of the text part where a model has several."""
    return config.get_text_config(decoder=True).vocab_size


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer whose ids do not fit the model.

    What counts is what plain text can become: every token that is not special, and the special ones that open or
    separate texts. Others (``<image_soft_token>`` of Gemma 3 has an id of ``vocab_size``) occur only where a text
    spells them out; `Windows.check_vocabulary` sees those.

    Raises:
        CalibrationError: the largest id is not below the vocabulary size of the model.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {begin_token(tokenizer), separator_token(tokenizer)} - {None}
    ids = {name: index for name, index in tokenizer.get_vocab().items() if index not in special or index in used}
    size = vocabulary_size(config)
    name = max(ids, key=ids.__getitem__)
    if ids[name] >= size:
        raise CalibrationError(
            f"tokenizer and model do not belong together: token {name!r} has id {ids[name]}, and the model embeds "
            f"{size} tokens (ids up to {size - 1}). Use the tokenizer files that came with this model."
        )


def _first_line(error: Exception) -> str:
    """First line of a message, as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
