"""Decisions before any weight is read: entries, format, memory, time, refusals."""
