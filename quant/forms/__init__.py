"""Storage forms: the ways to keep a matrix, one file each.

A form says which arrays are stored (parts), what they stand for in float (rows), which graph operators read them
(product, logits, gather), and how a graph's initializers are compared with the checkpoint (graph_part).
"""
