"""The command line: arguments in, tables and JSON out; nothing is decided here."""

from mezzotint.cli import rotate  # noqa: F401  (adds its command)
from mezzotint.cli.app import main

__all__ = ["main"]
