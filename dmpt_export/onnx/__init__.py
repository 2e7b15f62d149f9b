"""Checkpoint in, ONNX folder out: graph, weights, manifest, sizes, scales of the KV cache."""
