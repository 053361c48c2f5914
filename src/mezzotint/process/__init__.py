"""This process and its siblings: ranks, and what they take of memory and time."""
