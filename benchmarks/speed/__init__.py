"""Speed of models: one process per model, timed in turns."""
