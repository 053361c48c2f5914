"""GGUF files: their layout, names of models and tokenizers, importance matrices."""
