"""Storage forms: the ways to store a matrix, one file each.

A form defines which arrays are stored (parts), their values in float (rows), the graph operators that read them
(product, logits, gather), and how a graph's initializers are compared with the checkpoint (graph_part).
"""
