"""Which tensors are quantized: the defaults, overriding them, and mistaken rules."""

from __future__ import annotations

import pytest

from quant.rules import FLOAT, Rule, assign, default_rules, is_transposed, parse_rule, still_needed
from quant.schemes import SCHEMES
from training.checkpoints.checkpoint import expected_shapes
from training.errors import InputError
from training.model.config import DMPTConfig

SIZES = {"vocab_size": 40, "n_positions": 8, "n_embd": 16, "n_layer": 4, "n_head": 2, "gate_hidden": 8}
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def plan(
    scheme: str,
    *texts: str,
    block: int | None = None,
    tied: bool = False,
    asymmetric: bool = False,
    vocabulary: str | None = None,
) -> dict[str, str]:
    """Tensor -> 'scheme[:block]' for a dual model with 4 heads."""
    config = DMPTConfig(
        **SIZES, splits=[2], head_allocation={"left": [0, 1], "right": [2, 3]}, tie_word_embeddings=tied
    )
    rules = [parse_rule(text) for text in texts]
    chosen = assign(expected_shapes(config), rules, default_rules(scheme, block, asymmetric, vocabulary), tied)
    return {name: str(rule).partition("=")[2] for name, rule in chosen.items()}


def blocks() -> list[str]:
    """Names of the linear layers of a dual model split at 2."""
    stems = [f"transformer.h.{i}" for i in (0, 1)] + [f"paths.{p}.h.{i}" for p in ("left", "right") for i in (2, 3)]
    return [f"{stem}.{layer}.weight" for stem in stems for layer in LAYERS]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_defaults_take_all_linears_heads_and_the_embedding_and_nothing_else(scheme: str) -> None:
    chosen = plan(scheme)
    rows = {"transformer.wte.weight", *(f"heads.{j}.weight" for j in range(4))}
    assert set(chosen) == {*blocks(), *rows}
    assert {chosen[name] for name in blocks()} == {scheme}
    assert {chosen[name] for name in rows} == {"int8" if scheme in ("nf4", "fp4", "int8-dynamic") else scheme}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_vocabulary_can_have_a_scheme_of_its_own(scheme: str, tied: bool) -> None:
    for vocabulary in SCHEMES:
        if SCHEMES[vocabulary].rows:
            chosen = plan(scheme, tied=tied, vocabulary=vocabulary)
            rows = {"transformer.wte.weight", *(f"heads.{j}.weight" for j in range(tied, 4))}
            assert {chosen[name] for name in rows} == {vocabulary}
            assert {chosen[name] for name in chosen.keys() - rows} == {scheme}
        else:
            with pytest.raises(InputError, match="cannot look up rows: choose one of int8, int8-dynamic, int4"):
                plan(scheme, tied=tied, vocabulary=vocabulary)


def test_zero_points_and_blocks_reach_a_vocabulary_that_has_them() -> None:
    assert plan("int4", asymmetric=True, vocabulary="int8")["heads.1.weight"] == "int8:asymmetric"
    assert plan("int4", asymmetric=True, vocabulary="fp16")["heads.1.weight"] == "fp16"
    assert plan("int4", block=64, vocabulary="int8")["heads.1.weight"] == "int8:64"
    with pytest.raises(InputError, match="int8-dynamic has no blocks"):
        plan("int8-dynamic", block=64, vocabulary="int8-dynamic")


def test_only_block_weights_are_transposed() -> None:
    assert all(is_transposed(name) for name in blocks())
    assert not any(is_transposed(name) for name in plan("int8") if name not in blocks())


def test_a_tied_head_is_one_tensor() -> None:
    assert "heads.0.weight" not in plan("int8", tied=True)
    for pattern in ("transformer.wte.weight", "transformer.wte", "heads.0", "heads.0.weight", "heads.?"):
        assert plan("int8", f"{pattern}=int4:16", tied=True)["transformer.wte.weight"] == "int4:16"
    assert plan("int8", "heads.0=int4", tied=False)["transformer.wte.weight"] == "int8"


def test_the_first_rule_that_matches_wins() -> None:
    chosen = plan("int8", "paths.left.*.c_fc=int4:64", "paths.*.mlp.*=int4", "*.h.0.*=float32")
    assert chosen["paths.left.h.2.mlp.c_fc.weight"] == "int4:64"
    assert chosen["paths.right.h.2.mlp.c_fc.weight"] == "int4"
    assert chosen["paths.left.h.2.attn.c_attn.weight"] == "int8"
    assert not [name for name in chosen if name.endswith(".bias")]  # swept over by paths.*.mlp.*, yet vectors
    assert "transformer.h.0.mlp.c_fc.weight" not in chosen
    assert "transformer.h.1.mlp.c_fc.weight" in chosen


def test_block_reaches_every_default_that_has_blocks() -> None:
    assert set(plan("int4", block=64).values()) == {"int4:64"}
    assert set(plan("int8-dynamic", block=64).values()) == {"int8-dynamic", "int8:64"}


def test_float_can_be_claimed_before_a_wide_rule() -> None:
    with pytest.raises(InputError, match=r"transformer\.wpe\.weight, which always stays float32"):
        plan("int8", "transformer.*=int4")
    assert plan("int8", f"transformer.wpe={FLOAT}", "transformer.*=int4")["transformer.h.1.mlp.c_fc.weight"] == "int4"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("transformer.h.0.ln_1.weight=int4", "always stays float32"),
        ("*.bias=int8", "always stays float32"),
        ("gates.*=int8", r"gates\.root\.0\.weight"),
        ("head_gates.left.0=int8", "always stays float32"),
        ("transformer.h.9.*=int4", "matches no tensor: "),
        ("transformer.h.1.mlp.c_fk=int4", r"did you mean transformer\.h\.1\.mlp\.c_fc"),
        ("zzz=int4", r"names look like transformer\."),
        ("heads.1=nf4", r"heads\.1\.weight, whose rows are looked up .* use int8 or int8-dynamic or int4"),
        ("heads.1=int5", "unknown scheme 'int5', choose one of int8"),
        ("heads.1=5", "no scheme has 5 bits, choose one of 32, 16, 8, 4, 3, 2"),
        ("heads.1=int2:256", "blocks from 32 to 128 only, not 256"),
        ("heads.1=int2:16", "blocks from 32 to 128 only, not 16"),
        ("*.c_fc=int8-dynamic:asymmetric", "int8-dynamic has no choice of zero points"),
        ("heads.1=int4-hqq:asymmetric", "int4-hqq has no choice of zero points"),
        ("heads.1=float32:asymmetric", "float32 has no choice of zero points"),
        ("heads.1=int4:asymmetric:64", "PATTERN=SCHEME"),
        ("heads.1=int4:64:symmetric", "PATTERN=SCHEME"),
        ("heads.1=int4:48", "power of two"),
        ("*.c_fc=int8-dynamic:64", "has no blocks"),
        ("heads.1=float32:64", "has no blocks"),
        ("heads.1", "PATTERN=SCHEME"),
        ("=int4", "PATTERN=SCHEME"),
        ("heads.1=int4:", "PATTERN=SCHEME"),
        ("heads.1=int4:x", "PATTERN=SCHEME"),
        ("heads.1=int4:-32", "PATTERN=SCHEME"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        plan("int8", rule)
    assert "\n" not in str(raised.value)


def test_a_rule_that_earlier_ones_leave_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"heads\.1=int8' has no effect"):
        plan("int8", "heads.*=int4", "heads.1=int8")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="choose one of int8, int8-dynamic, int4"):
        default_rules("int5")


def test_rules_read_back_as_written() -> None:
    for text in (
        "heads.*=int4:64",
        "*.c_fc=int8",
        "transformer.wte=float32",
        "*=int4:asymmetric",
        "*=int2:64:asymmetric",
    ):
        assert str(parse_rule(text)) == text
    assert Rule("a", "int4", 32).as_dict() == {"pattern": "a", "scheme": "int4", "block": 32, "asymmetric": False}


def test_rules_of_a_plan_give_way_to_the_users() -> None:
    shapes = {
        "heads.1.projection.weight": (4, 4),
        "heads.2.projection.weight": (4, 4),
        "transformer.wte.weight": (9, 4),
    }
    plan = [parse_rule(f"{pattern}=int4") for pattern in ("heads.*.projection*", "transformer.wte", "paths.left.*")]

    def left(*own: str) -> list[str]:
        return [rule.pattern for rule in still_needed(plan, [parse_rule(rule) for rule in own], shapes, tied=True)]

    assert left() == [rule.pattern for rule in plan]
    assert left("heads.*.projection*=int8") == ["transformer.wte", "paths.left.*"]
    assert left("heads.1.projection=int8") == [rule.pattern for rule in plan]  # one of two tensors is still its
    assert left("heads.0=int8") == ["heads.*.projection*", "paths.left.*"]  # tied; a plan of another model still errs


def test_bits_stand_for_schemes() -> None:
    plain = {"32": FLOAT, "8": "int8", "4": "int4", "3": "int3", "2": "int2"}
    for bits, scheme in plain.items():
        assert parse_rule(f"heads.*={bits}").scheme == scheme
        calibrated = parse_rule(f"heads.*={bits}", calibrated=True).scheme
        assert calibrated == (scheme if bits in ("32", "8") else f"{scheme}-gptq")
    assert parse_rule("heads.*=int4", calibrated=True).scheme == "int4"  # named, not counted
    assert str(parse_rule("heads.*=2:64:asymmetric", calibrated=True)) == "heads.*=int2-gptq:64:asymmetric"
    assert plan("int8", "heads.1=2", "heads.*=4:16")["heads.1.weight"] == "int2"


def test_zero_points_reach_every_default() -> None:
    assert {rule.asymmetric for rule in default_rules("int4", asymmetric=True)} == {True}
    with pytest.raises(InputError, match="int8-dynamic has no choice of zero points"):
        default_rules("int8-dynamic", asymmetric=True)
    with pytest.raises(InputError, match="blocks from 32 to 128"):
        default_rules("int2", 256)
