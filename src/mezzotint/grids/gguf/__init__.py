"""Block types of GGUF as grids."""
