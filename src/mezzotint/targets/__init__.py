"""The matrix to approximate."""
