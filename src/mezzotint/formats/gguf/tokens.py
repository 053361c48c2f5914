"""The tokenizer of a model folder as GGUF metadata: byte-level BPE and SentencePiece kinds, from tokenizer.json.

llama.cpp knows byte-level tokenizers by how they split text before merging (``tokenizer.ggml.pre``); the patterns here
are the ones that the tokenizer.json files of these models hold. Of SentencePiece kinds it merges the pair whose result
has the highest score: the rank of the merge, negated, orders them as tokenizer.json does.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from mezzotint.errors import FormatError

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# llama.cpp's name by the pattern that splits text
_SPLITS: Mapping[str, str] = {
    rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_WORDS}|\p{{N}}|{_SLASHED}": "tekken",
}
_UNREACHED = -1e6  # score of a token that no merge makes


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json.

    Raises:
        FormatError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError(
            f"{str(folder)!r} has no tokenizer.json, which GGUF metadata is made from. "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def tokenizer_kind(tokenizer: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's names of the tokenizer's model and of how it splits text.

    Raises:
        FormatError: it is of a kind that llama.cpp does not have, or that is not known here.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise FormatError(f"the tokenizer is of kind {model.get('type')!r}; GGUF files are written with BPE only.")
    if model.get("byte_fallback"):
        return "llama", "default"
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt2", "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "gpt2", "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in _SPLITS:
            return "gpt2", _SPLITS[pattern]
    raise FormatError(
        f"the tokenizer splits text by {', '.join(kinds) or 'nothing'} in a way that has no known name in llama.cpp; "
        f"known are {', '.join(('gpt-2', 'smollm', *_SPLITS.values()))}. Use another format."
    )


def describe_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Add tokens, merges or scores, special tokens and the chat template.

    Args:
        writer: takes the metadata.
        folder: of the model.
        vocabulary: rows of the embedding; ids without a token are filled up.

    Raises:
        FormatError: there is no tokenizer that llama.cpp has, or more tokens than rows.
    """
    tokenizer = read_tokenizer(folder)
    kind, split = tokenizer_kind(tokenizer)
    tokens, types = _tokens(tokenizer, vocabulary, bytes_named=kind == "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    if kind == "llama":
        writer.add_token_scores(_scores(tokenizer["model"], tokens))
        writer.add_add_space_prefix(_prefixed(tokenizer))
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=vocabulary)
    if kind == "gpt2" and "bos" not in special.add_special_token:
        special.add_special_token["bos"] = False
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int, *, bytes_named: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    added = {item["id"]: item for item in tokenizer["added_tokens"]}
    names = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    names |= {number: item["content"] for number, item in added.items()}
    highest = max(names)
    if highest >= vocabulary:
        raise FormatError(f"the tokenizer has a token of id {highest}; the embedding has {vocabulary} rows.")
    unknown = tokenizer["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocabulary):
        text = names.get(number, f"[PAD{number}]")
        if number not in names:
            kind = TokenType.UNUSED
        elif text == unknown and bytes_named:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            text = text if added[number]["special"] else text.replace("\u2581", " ")
        elif bytes_named and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    rank: dict[str, int] = {}
    for number, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(first + second, number)
    return [-float(rank[token]) if token in rank else _UNREACHED for token in tokens]


def _prefixed(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    steps = _steps(tokenizer.get("normalizer"), "normalizers") + _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _steps(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]
