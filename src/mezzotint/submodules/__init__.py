"""Submodules: several linears optimised together, each projected back on its grid (LPCD, arXiv 2512.01546)."""
