"""The ONNX graph of a DMPT, built node by node with onnx_ir; mirrors training/model/dmpt.py.

builder.py   nodes, weights and If subgraphs
linear.py    one weight, three uses (linear, project, gather_rows), whatever its storage form
blocks.py    embedding, attention, MLP, segments
rescore.py   rows of heads on candidates
deltas.py    heads stored as a delta to their anchor
heads.py     head gate, full mixture, fast-k
routing.py   gates, one If per node, putting the rows back in order
assemble.py  the whole graph
versions.py  the earliest ONNX Runtime that can run it
"""
