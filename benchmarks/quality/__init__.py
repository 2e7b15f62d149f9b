"""Quality of a model on a text: perplexity, accuracy, divergence, path usage."""
