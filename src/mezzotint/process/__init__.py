"""This process and its siblings: ranks, and what they take of memory and time; the machine that they run on."""
