"""Named tensors of a quantized model, both ways, and the folders that hold them."""
