"""Crash-safe files: the output folder, shards, the work folder, tensors on disk."""
