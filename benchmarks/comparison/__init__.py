"""Compare several models, and summarise the results."""
