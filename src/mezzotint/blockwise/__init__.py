"""Running a model block by block in bounded memory, forward and back."""
