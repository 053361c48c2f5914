"""The user's request, checked without the model."""
