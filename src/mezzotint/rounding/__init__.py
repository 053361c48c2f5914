"""Rounding: choosing codes, given target, grid and statistics."""
