"""Check that the parts of a manifest agree: tree, leaves, heads, graph inputs and outputs, file names."""

from __future__ import annotations

from runtime.manifest import HEAD_LOG_WEIGHTS, ROOT, Manifest, Node
from runtime.schema import unsafe_name

MOST_BLOCKS = 10_000
TARGETS = ("cpu", "cuda")
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
    """Check that the inputs and outputs, with their types, are those that the tree needs."""
    problems, optional = [], {f"{HEAD_LOG_WEIGHTS}.{leaf}" for leaf in manifest.head_allocation}
    for field_name, specs, wanted in (
        ("inputs", manifest.inputs, expected_inputs(manifest)),
        ("outputs", manifest.outputs, expected_outputs(manifest)),
    ):
        missing = sorted(wanted.keys() - specs.keys() - optional)
        unknown = sorted(specs.keys() - wanted.keys())
        problems += [f"{field_name}: missing {', '.join(missing)}"] if missing else []
        problems += [f"{field_name}: unknown {', '.join(unknown)}"] if unknown else []
        problems += [
            f"{field_name}: {name} is {specs[name].dtype}, expected {dtype}"
            for name, dtype in wanted.items()
            if name in specs and specs[name].dtype != dtype
        ]
        problems += [
            f"{field_name}: {name} is {list(spec.shape)}, which does not fit config"
            for name, spec in specs.items()
            if not fits_config(name, spec.shape, manifest)
        ]
    return problems


def fits_config(name: str, shape: tuple[int | str, ...], manifest: Manifest) -> bool:
    """Whether a tensor has the sizes of `config`: buffers are allocated by them before the graph can fail."""
    config = manifest.config
    kind = name.partition(".")[0]
    if kind in ("past", "present"):
        return len(shape) == 4 and (shape[1], shape[3]) == (config.n_head, config.head_dim)
    if kind == HEAD_LOG_WEIGHTS:
        return len(shape) == 2 and shape[1] == len(manifest.head_allocation.get(name.partition(".")[2], ()))
    width = {"log_probs": config.vocab_size, "pending": config.n_embd, "rows": config.n_embd}.get(kind)
    return width is None or (len(shape) == 3 and shape[2] == width)


def expected_inputs(manifest: Manifest) -> dict[str, str]:
    """name -> dtype of every graph input."""
    rows = manifest.activation_dtype
    return {
        "input_ids": "int64",
        "position_ids": "int64",
        "seqlens_k": "int32",
        "total_length": "int32",
        "last": "int64",
        **({"every_node": "bool"} if len(manifest.tree) > 1 else {}),
        **{f"pending.{node.name}": rows for node in manifest.tree if node.parent is not None},
        **{f"past.{cache}": manifest.cache_dtype for node in manifest.tree for cache in node.caches},
    }


def expected_outputs(manifest: Manifest) -> dict[str, str]:
    """name -> dtype of every graph output; exports made before HEAD_LOG_WEIGHTS existed lack those."""
    rows = manifest.activation_dtype
    return {
        "log_probs": "float32",
        "routes": "int64",
        **{f"rows.{node.name}": rows for node in manifest.tree if node.children is not None},
        **{f"present.{cache}": manifest.cache_dtype for node in manifest.tree for cache in node.caches},
        **{
            f"{HEAD_LOG_WEIGHTS}.{leaf}": "float32"
            for leaf in manifest.leaves
            if len(manifest.head_allocation.get(leaf, ())) > 1
        },
    }


def file_faults(manifest: Manifest) -> list[str]:
    problems = [f"files: {unsafe}" for entry in manifest.files if (unsafe := unsafe_name(entry.name))]
    if manifest.model not in {entry.name for entry in manifest.files}:
        problems.append(f"files: does not list the model '{manifest.model}'")
    return problems
