"""The DMPT configuration that transformers loads and saves; training.model.shape describes its fields."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from training.model.domains import Served
from training.model.shape import Shape, even_allocation


class DMPTConfig(Shape, PretrainedConfig):
    """GPT-2's configuration plus splits, head allocation and gates.

    ``splits=[]`` with one tied head is plain GPT-2; it goes through the same trainer, quantizer,
    exporter and runtime. Raises InputError when the fields contradict each other.
    """

    model_type = "dmpt"
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = Shape.vocab_size,
        n_positions: int = Shape.n_positions,
        n_embd: int = Shape.n_embd,
        n_layer: int = Shape.n_layer,
        n_head: int = Shape.n_head,
        n_inner: int | None = None,
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        splits: list[int] | tuple[int, ...] = (),
        head_allocation: dict[str, list[int]] | None = None,
        gate_hidden: int = Shape.gate_hidden,
        gate_temp: float = Shape.gate_temp,
        head_gate_temp: float = Shape.head_gate_temp,
        head_topk: int | None = None,
        fast_k: int | None = None,
        head_kind: str = Shape.head_kind,
        head_rank: int | None = None,
        shared_anchor: bool = False,
        next_tokens: int = 0,
        domains: dict[str, Served] | None = None,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = Shape.bos_token_id,
        eos_token_id: int | None = Shape.eos_token_id,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.activation_function = kwargs.pop("activation_function", Shape.activation_function)
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.splits = list(splits)
        self.head_allocation = (
            even_allocation(self.leaves, len(self.leaves)) if head_allocation is None else head_allocation
        )
        self.gate_hidden = gate_hidden
        self.gate_temp = gate_temp
        self.head_gate_temp = head_gate_temp
        self.head_topk = head_topk
        self.fast_k = fast_k
        self.head_kind = head_kind
        self.head_rank = head_rank
        self.shared_anchor = shared_anchor
        self.next_tokens = next_tokens
        self.domains = domains
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
        )
        self.check()
