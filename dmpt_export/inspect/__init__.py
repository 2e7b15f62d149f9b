"""What a model or a graph is made of."""
