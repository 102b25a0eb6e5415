"""A block for the few rows of a decoding step: five launches, where LayerNorm, bias, GELU and residual sum go into the
launch of the linear layer beside them.

All of a block or nothing: it computes without calling a module inside, so all of them must be stock.
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
    """Whether `block`, whose attn and mlp are stock, may be computed by the function below."""
    attn, mlp = block.attn, block.mlp
    return (
        stream.residual is None
        and ops.few_rows(stream.x, kernels)
        and all(is_stock(norm, nn.LayerNorm) for norm in (block.ln_1, block.ln_2))
        and all(is_stock(layer, nn.Linear) for layer in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
    )


def block(block: Any, x: Tensor, cache: KVCache, layer: int, kernels: Kernels) -> Tensor:
    """The whole stream x (B, T, C) through the block, which stands at `layer` in the model."""
    attn, mlp = block.attn, block.mlp
    qkv = ops.decode_linear(x, attn.c_attn, block.ln_1)
    y = cache.attention(layer, qkv, attn.n_head, attn.scale, kernels)
    x = ops.decode_linear(y, attn.c_proj, residual=x)
    h = ops.decode_linear(x, mlp.c_fc, block.ln_2, gelu=True)
    return ops.decode_linear(h, mlp.c_proj, residual=x)
