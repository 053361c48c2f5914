"""Mathematics on tensors: no modules, files, devices, logs or environment."""
