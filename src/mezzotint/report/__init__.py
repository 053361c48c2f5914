"""What is written about a run, and how it is read back."""
