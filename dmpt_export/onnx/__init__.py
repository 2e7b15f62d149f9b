"""Export a checkpoint to an ONNX folder: graph, weights, manifest, sizes, scales of the KV cache."""
