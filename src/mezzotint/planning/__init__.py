"""Everything that is decided before a weight is read: entries, format, memory, time, refusals."""
