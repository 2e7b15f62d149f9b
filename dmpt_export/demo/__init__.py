"""The demo: from the documentation inside the running Python to a table that compares the models trained on it."""
