"""What every choice of bits would cost a model, and the choice under a budget."""
