"""The report of a run: writing and reading it."""
