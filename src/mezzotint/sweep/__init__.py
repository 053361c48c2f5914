"""Quantizing a model block by block: collect sums, fold, solve each matrix, pass on."""
