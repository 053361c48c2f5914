"""Exactly invertible changes of basis before the grid."""
