"""Which tensors are quantized, and how: an ordered list of rules; the first match wins.

A rule is PATTERN=SCHEME[:BLOCK][:asymmetric], or the same with a number of bits for the scheme. The pattern (shell
wildcards; `*` also crosses dots) is matched against the checkpoint's tensor names with and without `.weight`; a tied
head matches its own name and transformer.wte.weight. Layer norms, biases, positions, gates and head gates always stay
float32.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quant.forms.packing import fit_block
from quant.schemes import SCHEMES
from quant.schemes.low_rank import DELTAS
from training.errors import FieldError, InputError

if TYPE_CHECKING:
    from training.model.shape import Shape

FLOAT = "float32"  # the scheme of a rule that leaves tensors unchanged
DYNAMIC = "int8-dynamic"  # the scheme whose kernel rounds activations, which can be balanced for it (quant.smooth)
LINEAR = re.compile(r"(transformer|paths\.\w+)\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
ROWS = re.compile(r"transformer\.wte\.weight|heads\.\d+\.weight")  # also looked up by row
DRAFT = re.compile(r"draft_heads\.\w+\.\d+\.weight")  # a draft head
PROJECTION = re.compile(rf"heads\.\d+\.projection(\.down|\.up)?\.weight|{DRAFT.pattern}")  # before a vocabulary matrix
EMBEDDING, TIED_HEAD = "transformer.wte.weight", "heads.0.weight"
MOST_NAMED = 5  # names in one error line
ASYMMETRIC = "asymmetric"
BITS = {"32": FLOAT, "16": "fp16", "8": "int8", "4": "int4", "3": "int3", "2": "int2"}  # default scheme of a width


@dataclass(frozen=True)
class Rule:
    """Tensors matching `pattern` get `scheme`; block None is the scheme's own default."""

    pattern: str
    scheme: str
    block: int | None = None
    asymmetric: bool = False  # with zero points, if the scheme offers the choice

    def __str__(self) -> str:
        options = [self.scheme, *([str(self.block)] if self.block else []), *([ASYMMETRIC] if self.asymmetric else [])]
        return f"{self.pattern}={':'.join(options)}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_rule(text: str, calibrated: bool = False) -> Rule:
    """'heads.*=int4:64' -> Rule. Raises InputError naming the mistake.

    A number of bits means the scheme of that width; with `calibrated`, its GPTQ variant if there is one.

    >>> parse_rule("heads.*=int4:64")
    Rule(pattern='heads.*', scheme='int4', block=64, asymmetric=False)
    >>> parse_rule("*.c_fc=3:asymmetric", calibrated=True)
    Rule(pattern='*.c_fc', scheme='int3-gptq', block=None, asymmetric=True)
    """
    pattern, _, what = text.partition("=")
    try:
        scheme, block, asymmetric = parse_scheme(what)
    except InputError:
        pattern = ""
    if not pattern:
        raise InputError(f"rule '{text}' is not of the form PATTERN=SCHEME, PATTERN=SCHEME:BLOCK or ...:{ASYMMETRIC}")
    if scheme.isdecimal() and scheme not in BITS:
        raise InputError(f"rule '{text}': no scheme has {scheme} bits, choose one of {', '.join(BITS)}")
    scheme = BITS.get(scheme, scheme)
    if calibrated and what.split(":")[0] in BITS and f"{scheme}-gptq" in SCHEMES:
        scheme = f"{scheme}-gptq"
    if scheme not in (known := [*SCHEMES, *DELTAS, FLOAT]):
        raise InputError(f"rule '{text}': unknown scheme '{scheme}', choose one of {', '.join(known)}")
    try:
        check_options(scheme, block, asymmetric)
    except InputError as error:
        raise error.after(f"rule '{text}': ") from error
    return Rule(pattern, scheme, block, asymmetric)


def parse_scheme(text: str) -> tuple[str, int | None, bool]:
    """Parse SCHEME[:BLOCK][:asymmetric] into (name, block, asymmetric). Raises InputError for any other form.

    >>> parse_scheme("int4:64:asymmetric"), parse_scheme("int8")
    (('int4', 64, True), ('int8', None, False))
    """
    scheme, *options = text.split(":")
    asymmetric = options[-1:] == [ASYMMETRIC]
    numbers = options[:-1] if asymmetric else options
    if not scheme or len(numbers) > 1 or not all(number.isdecimal() for number in numbers):
        raise InputError(f"'{text}' is not of the form SCHEME, SCHEME:BLOCK or ...:{ASYMMETRIC}")
    return scheme, int(numbers[0]) if numbers else None, asymmetric


def check_options(scheme: str, block: int | None, asymmetric: bool) -> None:
    """Raise InputError for a block or zero points that `scheme` (a registered one, or FLOAT) does not support."""
    how = SCHEMES.get(scheme)
    if block is not None and scheme not in DELTAS and (how is None or not how.blocks):
        raise InputError(f"{scheme} has no blocks, leave out ':{block}'")
    if asymmetric and (how is None or not how.zero_points):
        raise InputError(f"{scheme} has no choice of zero points, leave out '{ASYMMETRIC}'")
    if block is not None:
        fit_block(block, block)
        low, high = how.block_range if how else (block, block)
        if not low <= block <= high:
            raise InputError(f"{scheme} has a fast kernel for blocks from {low} to {high} only, not {block}")


def default_rules(
    scheme: str, block: int | None = None, asymmetric: bool = False, vocabulary: str | None = None
) -> list[Rule]:
    """The rules for one scheme on the whole model: all block layers, projections, the embedding and the heads.

    vocabulary: the scheme of the last two; None: the same, or int8 beside a scheme whose rows cannot be looked up or
    that gains nothing there (int8-dynamic, on a processor).
    """
    if scheme in DELTAS:
        raise InputError(f"{scheme} is for heads: give a scheme for the rest and a rule 'heads.*={scheme}'")
    if scheme not in SCHEMES:
        raise InputError(f"unknown scheme '{scheme}': choose one of {', '.join(SCHEMES)}")
    how = SCHEMES[scheme]
    rows = vocabulary or how.vocabulary or scheme
    if rows not in SCHEMES or not SCHEMES[rows].rows:
        raise FieldError("{vocab_scheme} {} cannot look up rows: choose one of {}", rows, ", ".join(row_schemes()))
    check_options(scheme if how.blocks else rows, block, False)
    check_options(scheme, None, asymmetric)
    layers = ("*.h.*.attn.c_attn", "*.h.*.attn.c_proj", "*.h.*.mlp.c_fc", "*.h.*.mlp.c_proj")
    before_heads = ("heads.*.projection*", "draft_heads.*")
    rules = [
        Rule(f"{layer}.weight", scheme, block if how.blocks else None, asymmetric) for layer in (*layers, *before_heads)
    ]
    block = block if SCHEMES[rows].blocks else None
    asymmetric = asymmetric and SCHEMES[rows].zero_points
    return [*rules, Rule("heads.*.weight", rows, block, asymmetric), Rule(EMBEDDING, rows, block, asymmetric)]


def row_schemes() -> list[str]:
    """Schemes for the embedding and the heads."""
    return [name for name, scheme in SCHEMES.items() if scheme.rows]


def check_text(chosen: Mapping[str, Rule], calibrated: bool, smooth: float | None) -> None:
    """Raise FieldError when a chosen scheme lacks its calibration text, or smoothing has nothing to apply to.

    chosen: see assign(). smooth: how strongly activations are balanced against weights (quant.smooth), or None.
    """
    needing = [name for name, rule in chosen.items() if rule.scheme in SCHEMES and SCHEMES[rule.scheme].calibrated]
    if needing and not calibrated:
        scheme = chosen[needing[0]].scheme
        raise FieldError("{} (for {}) needs calibration text: give some with {calib}", scheme, needing[0])
    if smooth is not None and all(rule.scheme != DYNAMIC for rule in chosen.values()):
        raise FieldError("smoothing is for {}, which no tensor gets: leave {smooth} out", DYNAMIC)
    if smooth is not None and not calibrated:
        raise FieldError("smoothing needs calibration text: give some with {calib}")


def is_quantizable(name: str) -> bool:
    return bool(LINEAR.fullmatch(name) or ROWS.fullmatch(name) or PROJECTION.fullmatch(name))


def is_transposed(name: str) -> bool:
    """Whether the checkpoint holds the matrix as [in, out]."""
    return LINEAR.fullmatch(name) is not None


def anchors_of(config: Shape) -> dict[str, set[str]]:
    """Anchors of each head that is not one, by tensor name: several if leaves with different anchors share the head.

    Projected heads have no matrix that could be a delta.
    """
    own = {leaf: config.head_name(config.matrix_of(leaf, heads[0])) for leaf, heads in config.head_allocation.items()}
    anchors = set(own.values())
    out: dict[str, set[str]] = {}
    for leaf, heads in config.head_allocation.items():
        others = [config.head_name(j) for j in heads[1:] if j not in config.projected_heads]
        for name in others:
            if name not in anchors and name != EMBEDDING:
                out.setdefault(name, set()).add(own[leaf])
    return out


def assign(
    shapes: Mapping[str, Sequence[int]],
    rules: Iterable[Rule],
    defaults: Iterable[Rule],
    tied: bool,
    anchors: Mapping[str, set[str]] | None = None,
) -> dict[str, Rule]:
    """The rule of every tensor to be quantized, by name, in the order of `shapes`.

    `rules` are the user's and come first; each must match something and must not match a matrix that stays float32,
    else InputError. Wildcards may also match vectors (biases, norms), which are never quantized. `anchors` (see
    anchors_of) tells which heads can be deltas; a rule for deltas leaves anchors to the rules after it.
    """
    taken: dict[str, Rule] = {}
    for rule in rules:
        matched = [name for name in shapes if _matches(rule.pattern, name, tied)]
        won = [name for name in matched if name not in taken]
        if won and rule.scheme in DELTAS:
            won = _heads_besides_anchors(rule, won, anchors or {})
        _check_rule(rule, shapes, matched, won)
        taken |= dict.fromkeys(won, rule)
    for rule in defaults:
        matched = [name for name in shapes if _matches(rule.pattern, name, tied)]
        taken |= dict.fromkeys([name for name in matched if name not in taken], rule)
    chosen = {name: taken[name] for name in shapes if name in taken and is_quantizable(name)}
    return {name: rule for name, rule in chosen.items() if rule.scheme != FLOAT}


def still_needed(
    rules: Iterable[Rule], first: Sequence[Rule], shapes: Mapping[str, Sequence[int]], tied: bool
) -> list[Rule]:
    """The rules, except those whose tensors all get one of `first`: rules of a plan beside the user's own."""
    taken = {name for name in shapes if any(_matches(rule.pattern, name, tied) for rule in first)}
    matched = {rule: {name for name in shapes if _matches(rule.pattern, name, tied)} for rule in rules}
    return [rule for rule, names in matched.items() if not names or names - taken]


def _heads_besides_anchors(rule: Rule, won: list[str], anchors: Mapping[str, set[str]]) -> list[str]:
    """The heads that a rule for deltas applies to. Raises InputError if it matches none, or other tensors."""
    deltas = [name for name in won if name in anchors]
    other = [name for name in won if name not in anchors and not ROWS.fullmatch(name)]
    if other or not deltas:
        raise InputError(
            f"rule '{rule}' matches {_listed(other or won)}: only a head can be a delta, and only one that is neither "
            "an anchor nor the embedding"
        )
    for name in deltas:
        if len(anchors[name]) > 1:
            several = ", ".join(sorted(anchors[name]))
            raise InputError(
                f"rule '{rule}': {name} is shared by leaves with different anchors ({several}), so it cannot be a "
                "delta to one of them: give it another scheme in an earlier rule"
            )
    return deltas


def _matches(pattern: str, name: str, tied: bool) -> bool:
    names = [name, TIED_HEAD] if tied and name == EMBEDDING else [name]
    return any(fnmatchcase(n, pattern) or fnmatchcase(n.removesuffix(".weight"), pattern) for n in names)


def _check_rule(rule: Rule, shapes: Mapping[str, Sequence[int]], matched: list[str], won: list[str]) -> None:
    """Raise InputError when the rule cannot be applied."""
    if not matched:
        raise InputError(f"rule '{rule}' matches no tensor{_near(rule.pattern, shapes)}")
    if not won:
        raise InputError(f"rule '{rule}' has no effect, earlier rules match all its tensors: put it first or drop it")
    if rule.scheme == FLOAT:
        return
    stay = [name for name in won if not is_quantizable(name)]
    matrices = [name for name in stay if len(shapes[name]) > 1]
    if matrices or len(stay) == len(won):
        raise InputError(
            f"rule '{rule}' matches {_listed(matrices or stay)}, which always stays float32: narrow the pattern, "
            f"or put a rule PATTERN={FLOAT} for it first"
        )
    rows = [name for name in won if ROWS.fullmatch(name)]
    if rows and rule.scheme in SCHEMES and not SCHEMES[rule.scheme].rows:
        raise InputError(
            f"rule '{rule}' matches {_listed(rows)}, whose rows are looked up one by one, which {rule.scheme} "
            f"cannot do: use {' or '.join(row_schemes())} for it"
        )


def _near(pattern: str, shapes: Mapping[str, Sequence[int]]) -> str:
    names = [name for name in shapes if is_quantizable(name)]
    near = difflib.get_close_matches(pattern, [*names, *(name.removesuffix(".weight") for name in names)], 3, 0.5)
    return f": did you mean {' or '.join(near)}?" if near else f": names look like {', '.join(names[:3])}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
