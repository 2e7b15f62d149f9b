"""Which way to store each group of tensors, by measured damage."""
