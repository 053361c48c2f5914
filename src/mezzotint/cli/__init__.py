"""The command line: arguments in, tables and JSON out; nothing is decided here."""

from mezzotint.cli.app import main

__all__ = ["main"]
