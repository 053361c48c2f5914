"""How codes are chosen, given target, grid and statistics."""
