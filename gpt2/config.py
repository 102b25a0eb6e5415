"""The configuration of a GPT-2: sizes, presets, and the counts that follow from them.

`fastgpt2.gpt2.ops.Kernels` says how the model is computed. The two are kept apart, and only `GPTConfig` is saved in
checkpoints.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

LAYER_NORM_EPS = 1e-5
ACTIVATIONS = ("gelu_tanh", "gelu_erf")


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and settings of one model. The defaults are GPT-2 124M.

    block_size: longest sequence (T), the number of learned positions.
    vocab_size: tokens (V) that exist; logits have this many columns.
    n_layer, n_head, n_embd: blocks, heads per block (H), channels (C = H * D).
    dropout: probability after the embedding, in attention and after each residual projection.
    bias: biases in linear layers and LayerNorms, as GPT-2 has them.
    activation: of the MLP. "gelu_tanh" is GELU by its tanh approximation, as GPT-2 has it. "gelu_erf" is the exact
        GELU, as nanoGPT has it; PyTorch computes it.
    vocab_multiple: the number of rows of the token table is vocab_size rounded up to a multiple of this. The padding
        rows take no part in the loss, in sampling or in exported checkpoints. 128 pads 50257 to 50304, with which
        matrix products are faster.
    scale_attn_weights: divides the scores by sqrt(D).
    scale_attn_by_inverse_layer_idx: divides the scores of layer i by i + 1 as well.
    reorder_and_upcast_attn: computes scores and softmax in float32. Every attention here does so with either value; the
        field exists so that a checkpoint is exported to HuggingFace as it was imported.
    Raises ValueError for a value that is not allowed.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    vocab_multiple: int = 1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    activation: str = "gelu_tanh"

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, allowed are whole numbers of at least 1")
        for name in ("bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are True and False")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, allowed are {', '.join(ACTIVATIONS)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, it must be divisible by n_head ({self.n_head})")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, allowed is 0 <= dropout < 1")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """One of `PRESETS` with some fields replaced: `GPTConfig.preset("gpt2", dropout=0.1)`.

        Raises ValueError for an unknown name, TypeError for an unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown, there are {', '.join(PRESETS)}")
        return dataclasses.replace(cls(**PRESETS[name]), **overrides)

    @property
    def head_size(self) -> int:
        """D, the number of channels of one head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of the token table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def attention_scale(self, layer: int) -> float:
        """The factor on the scores q k^T in layer `layer` (counted from 0)."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def num_params(self, non_embedding: bool = False) -> int:
        """The number of parameters, with the tied head counted once.

        non_embedding: leaves out the position table, as nanoGPT counts.
        """
        C, bias = self.n_embd, int(self.bias)
        norm = C * (1 + bias)
        block = 2 * norm + 12 * C * C + bias * (3 * C + C + 4 * C + C)
        positions = 0 if non_embedding else self.block_size * C
        return self.padded_vocab_size * C + positions + self.n_layer * block + norm

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs per token of one training step (forward and backward) with sequences of T tokens (block_size by
        default): 6 N + 12 L H D T, where N counts the parameters without the position table. Causality is not
        discounted. Source: PaLM (Chowdhery et al. 2022), appendix B, as nanoGPT counts."""
        T = self.block_size if T is None else T
        return 6 * self.num_params(non_embedding=True) + 12 * self.n_layer * self.n_embd * T

    def kv_cache_bytes(self, B: int, T: int, element_bytes: int = 2) -> int:
        """Bytes of the keys and values of B sequences of T tokens in all layers."""
        return 2 * self.n_layer * B * T * self.n_embd * element_bytes


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "baby": dict(block_size=256, vocab_size=85, n_layer=6, n_head=6, n_embd=384),
}
