"""Weights to quantized weights: pure functions, rules that assign them, and the folder they are kept in."""
