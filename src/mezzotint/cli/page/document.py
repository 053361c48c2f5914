"""The HTML page around the sections, and writing it to a file."""

from importlib.resources import files
from pathlib import Path

from mezzotint.cli.page.markup import Markup, tag, text
from mezzotint.errors import ConfigError, WriteError
from mezzotint.storage.files import text_bytes


def document(title: str, subtitle: str, sections: list[Markup], version: str) -> str:
    """A whole page; nothing in it asks for another file."""
    style = files("mezzotint.cli.page").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # else browsers ask for one
        tag("title", text(f"{title} · Mezzotint")),
        tag("style", style),
    )
    brand = tag("p", text("Mezzotint"), class_="brand")
    header = tag("header", brand, tag("h1", text(title)), tag("p", text(subtitle), class_="sub"))
    footer = tag("footer", text(f"Made by Mezzotint {version}. This page is one file and asks for nothing else."))
    body = tag("body", tag("main", header, *filter(None, sections), footer))
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def check_page(path: Path | None) -> None:
    """Refuse before any work what could not be written after it.

    Raises:
        ConfigError: the name is not that of a page, or its folder does not exist.
    """
    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--html is {str(path)!r}; the name must end in .html. Give for example report.html.")
    if not path.parent.is_dir():
        raise ConfigError(f"--html is {str(path)!r}; the folder {str(path.parent)!r} does not exist. Make it first.")


def write_page(path: Path, page: str) -> None:
    """Write a page.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        path.write_bytes(text_bytes(page))
    except OSError as error:
        raise WriteError(f"cannot write {str(path)!r}: {error.strerror}. Give --html another path.") from error
