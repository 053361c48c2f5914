"""What the user asks for, checked without the model."""
