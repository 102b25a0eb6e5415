"""A block in five launches for the few rows of a decoding step: the linear layers' launches include LayerNorm, bias,
GELU and the residual sum.

A block is fused as a whole or not at all: no submodule is called, so all submodules must be stock and have no hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.ops import Kernels, Stream
from fastgpt2.gpt2.stock import is_stock

if TYPE_CHECKING:
    from fastgpt2.gpt2.cache import KVCache


def serves(block: Any, stream: Stream, kernels: Kernels) -> bool:
    """Whether the function `block` may compute this block, whose attn and mlp are known to be stock."""
    attn, mlp = block.attn, block.mlp
    return (
        stream.residual is None
        and ops.few_rows(stream.x, kernels)
        and all(is_stock(norm, nn.LayerNorm) for norm in (block.ln_1, block.ln_2))
        and all(is_stock(layer, nn.Linear) for layer in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
    )


def block(block: Any, x: Tensor, cache: KVCache, layer: int, kernels: Kernels) -> Tensor:
    """The block with index `layer` in the model: residual stream x (B, T, C) -> (B, T, C), appending to the cache."""
    attn, mlp = block.attn, block.mlp
    qkv = ops.decode_linear(x, attn.c_attn, block.ln_1)
    y = cache.attention(layer, qkv, attn.n_head, attn.scale, kernels)
    x = ops.decode_linear(y, attn.c_proj, residual=x)
    h = ops.decode_linear(x, mlp.c_fc, block.ln_2, gelu=True)
    return ops.decode_linear(h, mlp.c_proj, residual=x)
