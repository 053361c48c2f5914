"""Which values codes can stand for: fit, encode, decode."""
