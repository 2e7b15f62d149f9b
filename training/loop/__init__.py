"""The training run: batches in, losses, optimizer, freezing, evaluation, and what is saved."""
