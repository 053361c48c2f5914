"""The command line: arguments in, tables, pages and JSON out; nothing is decided here."""

from mezzotint.cli import cache, convert, doctor, measure, rotate  # noqa: F401  (they add their commands)
from mezzotint.cli.app import main

__all__ = ["main"]
