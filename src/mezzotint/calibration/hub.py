"""Data sets of the Hugging Face hub by their short names; needs the extra ``data`` and, the first time, the network."""

from dataclasses import dataclass
from typing import Any

from mezzotint.errors import CalibrationError, unknown

SPLITS = ("train", "validation", "test")
EVALUATED = {"c4": "validation"}  # the split that papers measure perplexity on, where it is not `test`


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """A data set and how it becomes text, the way the papers on quantization read it.

    Attributes:
        repository: name on the hub.
        splits: those it has, with the file to read instead of all files where one is enough.
        config: name of the configuration.
        revision: branch; None is the main one.
        column: that holds the text.
        joiner: between rows, where they become one text.
        documents: each row is a document of its own (false: rows are lines of one text).
        limit: rows that are read, from the first on.
        limit_as_text: the same when they become one text.
    """

    repository: str
    splits: dict[str, str | None]
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    joiner: str = "\n\n"
    documents: bool = False
    limit: int | None = None
    limit_as_text: int | None = None


HUB_TEXTS: dict[str, HubText] = {
    "wikitext2": HubText(
        repository="Salesforce/wikitext", config="wikitext-2-raw-v1", splits=dict.fromkeys(SPLITS, None)
    ),
    "ptb": HubText(
        repository="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        # the main branch is a Python script, which the library no longer runs
        revision="refs/convert/parquet",
        splits=dict.fromkeys(SPLITS, None),
        column="sentence",
        joiner=" ",
    ),
    # rows of C4 are in random order, so the first of one file are a fair sample of 800 GB
    "c4": HubText(
        repository="allenai/c4",
        splits={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        joiner=" ",
        documents=True,
        limit=20_000,
        limit_as_text=1100,
    ),
}


def hub_documents(name: str, split: str) -> list[str]:
    """The documents of a data set.

    Raises:
        CalibrationError: name or split is unknown, the library is missing, or the hub cannot be reached.
    """
    spec = HUB_TEXTS[name]
    rows = _rows(name, spec, split, spec.limit)
    return rows if spec.documents else [spec.joiner.join(rows)]


def hub_text(name: str, split: str) -> str:
    """The data set as one text, for perplexity.

    Raises:
        CalibrationError: as for `hub_documents`.
    """
    spec = HUB_TEXTS[name]
    return spec.joiner.join(_rows(name, spec, split, spec.limit_as_text))


def _rows(name: str, spec: HubText, split: str, limit: int | None) -> list[str]:
    """The text column, or its first rows."""
    if split not in spec.splits:
        raise CalibrationError(unknown(f"split of {name}", split, spec.splits))
    file = spec.splits[split]
    try:
        # an extra: not there unless the user asked for it
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CalibrationError(
            f"{name} is read from the hub with the library 'datasets', which is not installed. Run: pip install "
            "'mezzotint[data]', or give a local .txt, .jsonl or .parquet file."
        ) from error
    arguments: dict[str, Any] = {"name": spec.config, "revision": spec.revision, "split": split}
    if file is not None:
        arguments["data_files"] = {split: file}
    try:
        table = datasets.load_dataset(spec.repository, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"{name} ({spec.repository}, {split}) could not be read from the hub and is not in its cache: {error}. "
            "Connect to the network once, or give a local .txt, .jsonl or .parquet file."
        ) from error
    return list(table[spec.column][:limit])
