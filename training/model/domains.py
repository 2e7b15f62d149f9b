"""Which paths or heads serve a domain of text: the field `domains` of config.json. Standard library only.

{"code": "left", "prose": [4, 5]}: a domain is served by all leaves under a node, or by heads and the leaves that have
them. Training teaches the gates so (training.loop.terms); what the model computes does not depend on the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from training.errors import FieldError, InputError

Served = str | list[int]  # the name of a node, or head ids
Allocation = Mapping[str, Sequence[int]]  # leaf -> its heads; leaves from left to right
NAME = re.compile(r"[\w.+-]+")


def leaves_under(node: str, leaves: Sequence[str]) -> list[str]:
    """The leaves under a node, itself if it is one; [] for a name that is no node.

    >>> leaves_under("left", ["left_left", "left_right", "right_left", "right_right"])
    ['left_left', 'left_right']
    """
    whole_tree = node == "root" and len(leaves) > 1
    return [leaf for leaf in leaves if whole_tree or leaf == node or leaf.startswith(f"{node}_")]


def leaves_of(served: Served, allocation: Allocation) -> list[str]:
    """The leaves that serve a domain."""
    if isinstance(served, str):
        return leaves_under(served, list(allocation))
    return [leaf for leaf, heads in allocation.items() if set(heads) & set(served)]


def heads_of(served: Served, allocation: Allocation) -> dict[str, list[int]]:
    """leaf -> the places, among its heads, of those that serve a domain; {} for a domain served by whole leaves."""
    if isinstance(served, str):
        return {}
    return {leaf: [i for i, j in enumerate(allocation[leaf]) if j in served] for leaf in leaves_of(served, allocation)}


def served_domains(
    names: Sequence[str], known: Mapping[str, Served] | None, allocation: Allocation
) -> dict[str, Served] | None:
    """The field `domains` of a model that is trained on texts with these names; None: unchanged.

    known: the field now. Raises FieldError when it has some other domains, whose paths must not be given away silently,
    and as even_domains.
    """
    known = known or {}
    missing = [name for name in names if name not in known]
    if not missing:
        return None
    if known and set(known) != set(cluster_names(len(known))):
        raise FieldError(
            "the model was taught the domains {} and not '{}': say with {domain_map} FILE what serves each now",
            ", ".join(known), missing[0],
        )  # fmt: skip
    return even_domains(names, allocation)


def even_domains(names: Sequence[str], allocation: Allocation) -> dict[str, Served]:
    """The default: domains share out the tree from left to right; on a single path, its heads.

    Raises FieldError for a single domain, which everything would serve, and for more domains than paths, or than heads
    of the single path.

    >>> even_domains(["a", "b", "c"], {f"{x}_{y}": [0] for x in ("left", "right") for y in ("left", "right")})
    {'a': 'left_left', 'b': 'left_right', 'c': 'right'}
    >>> even_domains(["a", "b"], {"root": [0, 1, 2]})
    {'a': [0, 2], 'b': [1]}
    """
    if len(names) == 1:
        raise FieldError("one {domain} would be served by everything: name a second one, or give {domain_map} FILE")
    leaves = list(allocation)
    if len(leaves) == 1:
        heads = list(allocation[leaves[0]])
        if len(heads) < 2:
            raise InputError("this model has one path and one head: domains need paths or heads that can serve them")
        _check_enough(names, heads, "heads")
        return {name: heads[i :: len(names)] for i, name in enumerate(names)}
    _check_enough(names, leaves, "paths")
    nodes = ["root"]
    while len(nodes) < len(names):  # fork the node that is nearest the root
        node = min((n for n in nodes if n not in leaves), key=lambda n: 0 if n == "root" else 1 + n.count("_"))
        stem = "" if node == "root" else f"{node}_"
        place = nodes.index(node)
        nodes[place : place + 1] = [f"{stem}left", f"{stem}right"]
    return dict(zip(names, nodes, strict=True))


def cluster_names(count: int) -> tuple[str, ...]:
    """Names of domains that training finds by itself: learned-1, learned-2, ..."""
    return tuple(f"learned-{i + 1}" for i in range(count))


def check_domains(domains: Mapping[str, Served], allocation: Allocation) -> None:
    """Raise InputError naming the first domain that no path or head of the model serves."""
    known = {j for heads in allocation.values() for j in heads}
    for name, served in domains.items():
        check_name(name)
        if isinstance(served, str):
            if not leaves_of(served, allocation):
                paths = ", ".join(nodes_of(allocation))
                raise InputError(f"domain '{name}': there is no path '{served}', choose one of {paths}")
        elif not served or set(served) - known:
            heads = ", ".join(map(str, sorted(known)))
            raise InputError(f"domain '{name}' is served by heads {list(served)}: give at least one of {heads}")


def nodes_of(allocation: Allocation) -> list[str]:
    """The names that leaves_under knows, besides the root of several leaves."""
    stems = {"_".join(leaf.split("_")[: i + 1]) for leaf in allocation for i in range(leaf.count("_") + 1)}
    return sorted(stems, key=lambda name: (name.count("_"), name))


def check_name(name: str) -> None:
    """Raise InputError for a name that a command line could not take back."""
    if not NAME.fullmatch(name):
        raise InputError(f"domain name '{name}': use letters, digits and . + - _")


def is_served(value: object) -> bool:
    """Whether a value read from JSON has the form of Served."""
    return isinstance(value, str) or (isinstance(value, list) and all(type(j) is int and j >= 0 for j in value))


def _check_enough(names: Sequence[str], servers: Sequence[object], what: str) -> None:
    if len(names) > len(servers):
        raise FieldError(
            "{} domains, but only {} {}: let some share one with {domain_map} FILE", len(names), len(servers), what
        )
