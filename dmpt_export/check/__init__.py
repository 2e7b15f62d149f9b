"""Check that an exported graph agrees with its checkpoint: stored numbers, float arithmetic, log-probs."""
