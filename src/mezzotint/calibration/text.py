"""Reads calibration and evaluation text: local files by their suffix, data sets of the hub by name.

==================================  ==================================================================================
``.txt .text .raw .tokens .md``     UTF-8. Documents start at lines ``<doc ...>``, if there are any; these lines and
                                    ``</doc>`` are dropped. Without them the file is one document, or one a line on
                                    demand.
``.jsonl``                          an object a line: a field by name, or else ``messages`` (rendered by the
                                    tokenizer's chat template, if it has one), ``text`` or ``content``.
``.parquet``                        columns, in the same way. Needs pyarrow (extra ``data``).
``wikitext2``, ``ptb``, ``c4``      data sets of the hub. Needs datasets (extra ``data``).
==================================  ==================================================================================
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mezzotint.calibration.hub import HUB_TEXTS, hub_documents, hub_text
from mezzotint.calibration.records import choose_field, record_texts
from mezzotint.errors import CalibrationError, unknown

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".tokens", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
DOCUMENT_START = re.compile(r"^<doc(?:\s[^>]*)?>[ \t]*\n?", re.MULTILINE)
DOCUMENT_END = re.compile(r"^</doc>[ \t]*\n?", re.MULTILINE)
DOCUMENT_JOINER = "\n\n"


def read_documents(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    lines: bool = False,
    field: str | None = None,
    split: str = "train",
) -> list[str]:
    """The documents of a file or data set, without empty ones.

    Args:
        source: a file, or the name of a data set.
        tokenizer: renders chats.
        lines: of text files: each line is a document.
        field: of records: where the text is.
        split: of data sets: train, validation or test.

    Raises:
        CalibrationError: nothing can be read; says what, where and what to do.
    """
    if _is_name(source):
        documents = hub_documents(str(source), split)
    else:
        documents = _file_documents(_existing(source), tokenizer, lines=lines, field=field)
    return _without_empty(documents, str(source))


def read_text(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    field: str | None = None,
    split: str = "test",
) -> str:
    """A file or data set as one text, for perplexity.

    A text file without ``<doc ...>`` lines is taken as it is. Documents are joined by an empty line, rows of data sets
    as the papers join them (``wikitext2`` by an empty line; ``ptb`` and the first 1100 rows of ``c4`` by a space).

    Args:
        source: a file, or the name of a data set.
        tokenizer: renders chats.
        field: of records: where the text is.
        split: of data sets; ``c4`` has no ``test``, and its ``validation`` is what papers use.

    Raises:
        CalibrationError: as for `read_documents`.
    """
    if _is_name(source):
        documents = [hub_text(str(source), split)]
    else:
        documents = _file_documents(_existing(source), tokenizer, lines=False, field=field)
    return DOCUMENT_JOINER.join(_without_empty(documents, str(source)))


def _is_name(source: str | Path) -> bool:
    """Whether a source is the name of a data set; a file of that name is given as ``./name.txt``."""
    return isinstance(source, str) and source in HUB_TEXTS


def _existing(source: str | Path) -> Path:
    """The file of that path, of a kind that can be read.

    Raises:
        CalibrationError: it is missing, a directory, or of another kind.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        inside = f"one of its files ({', '.join(files[:5])})" if files else f"a file ({', '.join(SUFFIXES)})"
        raise CalibrationError(f"calibration text {path} is a directory. Give {inside}.")
    if not path.exists():
        if path.suffix == "" and path.parent == Path():
            raise CalibrationError(f"{unknown('calibration text', str(source), HUB_TEXTS)} Or give a file.")
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"Did you mean {str(path.parent / close[0])!r}?" if close else "Check the path."
        raise CalibrationError(f"calibration text {path} does not exist. {hint}")
    if path.suffix.lower() not in SUFFIXES:
        what = unknown("kind of calibration text", path.suffix or path.name, SUFFIXES)
        raise CalibrationError(f"{path}: {what} Rename or convert the file.")
    return path


def _file_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, *, lines: bool, field: str | None
) -> list[str]:
    """The documents of a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return list(record_texts(_json_records(path), field=field, tokenizer=tokenizer, source=str(path)))
    if suffix == ".parquet":
        return _parquet_documents(path, tokenizer, field)
    text = _decode(path)
    return text.split("\n") if lines else split_documents(text)


def split_documents(text: str) -> list[str]:
    r"""The documents of a text whose documents start at ``<doc ...>`` lines, or the text itself.

    Example:
        >>> split_documents('<doc id="1">\nOne.\n</doc>\n<doc id="2">\nTwo.\n')
        ['One.\n', 'Two.\n']
    """
    parts = DOCUMENT_START.split(text)
    if len(parts) == 1:
        return parts
    return [DOCUMENT_END.sub("", part) for part in parts if part.strip()]


def _without_empty(documents: list[str], source: str) -> list[str]:
    """The documents that have text.

    Raises:
        CalibrationError: there are none.
    """
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise CalibrationError(f"{source} has no text ({len(documents)} documents, all empty). Give a file with text.")
    return kept


def _decode(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark, line ends as a single line feed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of {len(data)}. Convert it: "
            f"iconv -f ENCODING -t UTF-8 {path}."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_records(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Place and object of each line."""
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{where} is not JSON: {error.msg} at column {error.colno}. A .jsonl file holds one object per line."
            ) from error
        if not isinstance(record, dict):
            raise CalibrationError(f"{where} is a {type(record).__name__}. A .jsonl file holds one object per line.")
        yield where, record


def _parquet_documents(path: Path, tokenizer: PreTrainedTokenizerBase | None, field: str | None) -> list[str]:
    """The texts of one column; the other columns are not read."""
    try:
        # an extra: not there unless the user asked for it
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CalibrationError(
            f"{path} is read with the library 'pyarrow', which is not installed. Run: pip install 'mezzotint[data]', "
            "or convert the file to .jsonl."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            column = choose_field(file.schema_arrow.names, field, tokenizer, str(path))
            rows = file.read(columns=[column]).to_pylist()
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {error}. Write the file again.") from error
    records = ((f"{path}, row {number}", row) for number, row in enumerate(rows))
    return list(record_texts(records, field=column, tokenizer=tokenizer, source=str(path)))
