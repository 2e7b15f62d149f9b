"""Which parameters are frozen at a step: freeze flags, head 0, and the freeze schedule. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.errors import InputError
from training.loop.options import TrainOptions
from training.model.shape import ROOT, Shape

if TYPE_CHECKING:
    from training.model.generation import DMPTForCausalLM

HEADS = "lm_headers"  # the schedule's name of the vocabulary heads: a bool, or {head index: bool}


def schedule_groups(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Group of a freeze schedule -> its parameter name prefixes.

    A node's groups are its name (`left_right`), its initials (`LR`), `<node>_intermediate` (the same blocks) and
    `<node>_path` (its blocks and all below). Gates are `gate` or `gate1` (the root's), `gate2_left`, ...
    """
    groups: dict[str, tuple[str, ...]] = {"shared": ("transformer.",), "head_gates": ("head_gates.",)}
    groups |= {"draft_heads": ("draft_heads.",)} if shape.next_tokens else {}
    for node in shape.tree.values():
        turns = [] if node.name == ROOT else node.name.split("_")
        if turns:
            own = f"paths.{node.name}."
            groups |= dict.fromkeys(
                (node.name, f"{node.name}_intermediate", "".join(t[0].upper() for t in turns)), (own,)
            )
            groups[f"{node.name}_path"] = (own, f"paths.{node.name}_")
        if node.children:
            gate = (f"gates.{node.name}.",)
            groups |= {f"gate{len(turns) + 1}_{node.name}": gate} if turns else {"gate": gate, "gate1": gate}
    return groups


def expanded(schedule: dict[int, dict[str, Any]], shape: Shape) -> dict[int, dict[tuple[str, ...], bool]]:
    """The entries of a schedule as {parameter name prefixes: frozen}. Raises InputError for unknown groups."""
    groups = schedule_groups(shape)
    out: dict[int, dict[tuple[str, ...], bool]] = {}
    for step, entry in schedule.items():
        out[step] = {}
        for group, value in entry.items():
            where = f"freeze schedule, step {step}: group '{group}'"
            if group == HEADS:
                heads = _heads(value, shape.n_vocab_heads, where)
                out[step] |= {(shape.head_prefix(j),): frozen for j, frozen in heads.items()}
            elif group in groups and isinstance(value, bool):
                out[step][groups[group]] = value
            elif group in groups:
                raise InputError(f"{where} must be true (frozen) or false, not {value!r}")
            else:
                raise InputError(f"{where} is unknown: choose from {', '.join([*sorted(groups), HEADS])}")
    return out


def _heads(value: Any, n: int, where: str) -> dict[int, bool]:
    """Which of n heads are frozen."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    elif isinstance(value, bool):
        value = dict.fromkeys(range(n), value)
    try:
        heads = {int(j): frozen for j, frozen in value.items()}
    except (AttributeError, TypeError, ValueError):
        heads = {-1: None}
    if any(not 0 <= j < n or not isinstance(frozen, bool) for j, frozen in heads.items()):
        raise InputError(f"{where} must be a bool, or bools by head index from 0 to {n - 1}, not {value!r}")
    return heads


class Freezer:
    """Freezes parameters as the options say, step by step. A pure function of the step, so resuming is exact."""

    def __init__(
        self, model: DMPTForCausalLM, options: TrainOptions, schedule: dict[int, dict[str, Any]], epoch_steps: int
    ) -> None:
        """epoch_steps: optimizer steps of one pass over the data. Raises InputError for unknown schedule groups."""
        self.model, self.options = model, options
        self.schedule = expanded(schedule, model.config)
        self.head_only_steps = options.head_only_epochs * epoch_steps
        self.current: frozenset[str] | None = None

    def frozen(self, step: int) -> frozenset[str]:
        """Names of the parameters that step `step` (from 0) leaves bitwise unchanged."""
        names = [name for name, _ in self.model.named_parameters()]
        still: set[str] = set()
        for start, entry in self.schedule.items():
            for prefixes, frozen in entry.items() if start <= step else ():
                members = {name for name in names if name.startswith(prefixes)}
                still = still | members if frozen else still - members
        options = self.options
        prefixes = ()
        if options.head_only_phase or step < self.head_only_steps:
            prefixes = ("transformer.", "paths.", "gates.")
        if options.freeze_all_transformer:
            prefixes += ("transformer.", "paths.")
        if options.freeze_split_gates:
            prefixes += ("gates.",)
        still |= {name for name in names if name.startswith(prefixes)}
        # Head 0 is the anchor of the other heads; a single head anchors nothing.
        if step < options.freeze_head0_steps and len(self.model.heads) > 1:
            still.add(self.model.config.head_name(0))
        return frozenset(still)

    def apply(self, step: int) -> None:
        """Prepare the model for a step: what is trained, and dropout only there. Raises InputError if all is frozen."""
        still = self.frozen(step)
        if still == self.current:
            return
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in still)
            if name in still:
                parameter.grad = None  # no gradient: the optimizer skips it, also weight decay and moments
        if not any(p.requires_grad for p in self.model.parameters()):
            raise InputError(f"everything is frozen at step {step}: check the freeze options and the schedule")
        self.current = still
        self.training_mode()

    def training_mode(self) -> None:
        """Training mode for trained modules; frozen ones stay in eval mode, without dropout."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):
                module.eval()
        trunk = self.model.transformer
        trunk.drop.train(trunk.wte.weight.requires_grad or trunk.wpe.weight.requires_grad)
