"""Measure what DMPT gains: models of a few million parameters, trained on the same tokens, from one command."""
