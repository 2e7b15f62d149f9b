"""Quantization: pure functions on matrices, rules that assign schemes to tensors, and the quantized folder."""
