"""Choose how to store each group of tensors by measured damage."""
