"""Grids: the values that codes represent. Fit, encode, decode."""
