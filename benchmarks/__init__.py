"""Measurements: one configuration and one command each; results are committed as JSON."""
