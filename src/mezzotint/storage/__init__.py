"""Files that survive: the output folder, shards, the work folder, tensors kept outside memory."""
