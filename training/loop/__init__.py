"""The training run: losses, optimizer, freezing, evaluation, and saved state."""
