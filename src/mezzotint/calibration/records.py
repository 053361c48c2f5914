"""Texts out of records (lines of JSON, rows of Parquet): which field, and how a chat becomes text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mezzotint.errors import CalibrationError

CHAT_FIELD = "messages"
TEXT_FIELDS = ("text", "content")


def choose_field(
    fields: Iterable[str], wanted: str | None, tokenizer: PreTrainedTokenizerBase | None, source: str
) -> str:
    """The field that holds the text.

    Args:
        fields: those of the first record.
        wanted: by name; None takes the first that exists of ``messages`` (only if the tokenizer has a chat template),
            ``text`` and ``content``.
        tokenizer: whose template would be used.
        source: for messages.

    Raises:
        CalibrationError: there is no such field; lists those that exist.
    """
    names = sorted(fields)
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    candidates = (wanted,) if wanted is not None else ((CHAT_FIELD,) if has_template else ()) + TEXT_FIELDS
    for name in candidates:
        if name in names:
            return name
    untold = f" ({CHAT_FIELD!r} needs a tokenizer with a chat template)" if not has_template else ""
    reason = f"no field {wanted!r}" if wanted is not None else f"none of the fields {', '.join(candidates)}{untold}"
    raise CalibrationError(f"{source} has {reason}. Name one of its fields: {', '.join(names) or 'there are none'}.")


def record_texts(
    records: Iterable[tuple[str, Mapping[str, object]]],
    *,
    field: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
) -> Iterator[str]:
    """The text of each record; the first record decides on the field.

    Args:
        records: with the place of each, for messages.
        field: as for `choose_field`.
        tokenizer: renders chats.
        source: for messages.

    Raises:
        CalibrationError: a record lacks the field, or it holds neither a text nor a chat.
    """
    for where, record in records:
        if field is None or field not in record:
            field = choose_field(record, field, tokenizer, where)
        value = record[field]
        if isinstance(value, str):
            yield value
        elif _is_chat(value):
            yield _render(value, tokenizer, where)
        else:
            raise CalibrationError(
                f"{where}: field {field!r} of {source} is a {type(value).__name__}, and a text or a list of messages "
                "with 'role' and 'content' is needed. Name another field, or repair the record."
            )


def _is_chat(value: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of messages."""
    return isinstance(value, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in value) and bool(value)


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """The text of a chat, as the model's own template writes it."""
    if tokenizer is None or tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: a chat needs a tokenizer with a chat template, and this one has none. Use the tokenizer of the "
            "instruction-tuned model, or a field that holds plain text."
        )
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{where}: the tokenizer's chat template rejects this chat: {error}. Remove or repair the record."
        ) from error
    assert isinstance(text, str)  # tokenize=False
    return text
