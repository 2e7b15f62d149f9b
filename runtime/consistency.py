"""Check that the parts of a manifest agree: tree, leaves, heads, graph inputs and outputs, file names."""

from __future__ import annotations

from runtime.graph_io import HEAD_LOG_WEIGHTS, graph_inputs, graph_outputs
from runtime.manifest import ROOT, Manifest, Node
from runtime.schema import unsafe_name

MOST_BLOCKS = 10_000
TARGETS = ("cpu", "cuda", "web")
FLOATS = ("float32", "float16")


def contradictions(manifest: Manifest) -> list[str]:
    """Every contradiction, in words for the user; empty for a valid manifest."""
    problems = tree_faults(manifest)
    problems += [] if problems else graph_faults(manifest)  # they need a valid tree
    return [*problems, *value_faults(manifest), *file_faults(manifest)]


def tree_faults(manifest: Manifest) -> list[str]:
    """Check that the nodes form one tree that covers all blocks, parents first."""
    nodes = manifest.nodes
    if manifest.config.n_layer > MOST_BLOCKS:
        return [f"config.n_layer: {manifest.config.n_layer} is above {MOST_BLOCKS}"]
    if len(nodes) != len(manifest.tree) or not manifest.tree or manifest.tree[0].parent is not None:
        return ["tree: must begin with the root and name every node once"]
    if manifest.tree[0].name != ROOT:
        return [f"tree: the first node must be '{ROOT}'"]
    problems = []
    seen: dict[str, Node] = {}
    for node in manifest.tree:
        parent = None if node.parent is None else seen.get(node.parent)
        start = 0 if parent is None else parent.stop
        if seen and (parent is None or parent.children is None or node.name not in parent.children):
            problems.append(f"tree: '{node.name}' has no parent before it that names it as a child")
        if node.start != start or node.stop <= node.start:
            problems.append(f"tree: '{node.name}' holds blocks {node.start} to {node.stop}, expected from {start} on")
        if node.children is None and node.stop != manifest.config.n_layer:
            problems.append(f"tree: leaf '{node.name}' ends at block {node.stop} of {manifest.config.n_layer}")
        problems += [f"tree: '{child}' is missing" for child in node.children or () if child not in nodes]
        seen[node.name] = node
    leaves = [node.name for node in manifest.tree if node.children is None]
    if sorted(manifest.leaves) != sorted(leaves):
        problems.append(f"leaves: {list(manifest.leaves)} are not the tree's {leaves}")
    return problems


def value_faults(manifest: Manifest) -> list[str]:
    config = manifest.config
    problems = []
    if manifest.target not in TARGETS:
        problems.append(f"target: '{manifest.target}' is not one of {', '.join(TARGETS)}")
    if manifest.activation_dtype not in FLOATS:
        problems.append(f"activation_dtype: '{manifest.activation_dtype}' is not one of {', '.join(FLOATS)}")
    if manifest.cache_dtype not in (manifest.activation_dtype, "int8"):
        problems.append(f"cache_dtype: '{manifest.cache_dtype}' is neither the activations' type nor int8")
    if config.head_dim * config.n_head != config.n_embd:
        problems.append(f"config.head_dim: {config.head_dim} times {config.n_head} heads is not n_embd {config.n_embd}")
    problems += [
        f"head_allocation: '{leaf}' is not a leaf or has no heads"
        for leaf in sorted({*manifest.leaves, *manifest.head_allocation})
        if leaf not in manifest.leaves or not manifest.head_allocation.get(leaf)
    ]
    for name in ("fast_k", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        if value is not None and value > config.vocab_size - (name != "fast_k"):
            problems.append(f"config.{name}: {value} does not fit a vocabulary of {config.vocab_size}")
    problems += [
        f"text: {token} does not fit a vocabulary of {config.vocab_size}"
        for token in {*manifest.prefix, *manifest.ends}
        if token >= config.vocab_size
    ]
    return problems


def graph_faults(manifest: Manifest) -> list[str]:
    """Whether the inputs and outputs are those that the tree requires, with their types and sizes."""
    rows, cache = manifest.activation_dtype, manifest.cache_dtype
    tree, sizes, drafts = manifest.tree, manifest.config, manifest.draft_tokens
    inputs = graph_inputs(tree, sizes, rows, cache, drafts)
    outputs = graph_outputs(tree, sizes, rows, cache, manifest.leaves, manifest.head_allocation, drafts)
    problems = []
    for field_name, specs, wanted in (("inputs", manifest.inputs, inputs), ("outputs", manifest.outputs, outputs)):
        names = {spec.name for spec in wanted}
        optional = {name for name in names if name.startswith(HEAD_LOG_WEIGHTS)}
        missing, unknown = sorted(names - specs.keys() - optional), sorted(specs.keys() - names)
        problems += [f"{field_name}: missing {', '.join(missing)}"] if missing else []
        problems += [f"{field_name}: unknown {', '.join(unknown)}"] if unknown else []
        found = [(specs[spec.name], spec) for spec in wanted if spec.name in specs]
        problems += [
            f"{field_name}: {spec.name} is {own.dtype}, expected {spec.dtype}"
            for own, spec in found
            if own.dtype != spec.dtype
        ]
        problems += [  # buffers are made by these sizes before the graph can object
            f"{field_name}: {spec.name} is {list(own.shape)}, which does not fit config"
            for own, spec in found
            if fixed(own.shape) != fixed(spec.shape)
        ]
    return problems


def fixed(shape: tuple[int | str, ...]) -> list[int | None]:
    """The sizes that are fixed; None for the free dimensions, whatever they are called."""
    return [size if isinstance(size, int) else None for size in shape]


def file_faults(manifest: Manifest) -> list[str]:
    problems = [f"files: {unsafe}" for entry in manifest.files if (unsafe := unsafe_name(entry.name))]
    if manifest.model not in {entry.name for entry in manifest.files}:
        problems.append(f"files: does not list the model '{manifest.model}'")
    return problems
