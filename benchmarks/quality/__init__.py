"""How well a model predicts a text: perplexity, accuracy, divergence, use of paths."""
