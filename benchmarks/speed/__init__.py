"""How fast a model runs: one process per model, timed in turns."""
