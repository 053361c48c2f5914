"""Predicted loss of each choice of bits, and the choice under a budget."""
