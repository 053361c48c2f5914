"""Calibration: text and data sets to windows of tokens, or windows sampled from the model itself."""
