"""Does an exported graph say what the checkpoint says? Stored numbers, float arithmetic, log-probs."""
