"""Other quantizers on the same model, calibration windows and evaluation, each in an environment of its own."""
