"""transformers' GPT2Block in terms of `ops`: LayerNorm with the residual sum before it, attention, MLP.

As everywhere in this package, a module that has hooks or is not exactly a class of transformers or PyTorch is called,
and the rest of its block stays fused. Conv1D keeps its weight (in, out); the kernels and PyTorch read its transpose by
strides, and compute its gradient in that layout, so that autograd keeps it without a copy.
The kernel `decode_linear` is not used: its programs read whole rows of (out, in), and Conv1D's layout would cost a copy
of every weight for each token. So the linear layers of a new token are PyTorch's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf.attention import attend
from fastgpt2.gpt2.hf.stand_in import StandIn, Theirs
from fastgpt2.gpt2.ops import Kernels, Stream
from fastgpt2.gpt2.stock import PLAIN, LinearWeights, is_stock


class Context(NamedTuple):
    """How one call of the model is computed; the same in every block.

    alone: whether rows have no past. documents: what `ops.document_mask` returned, for rows without a past. seen: a
    form of `visible.py`, for tokens after those in the cache. lengths, starts: what `visible.lengths_and_starts`
    returned, where the decoding kernel can compute one token a row.
    """

    kernels: Kernels
    cache: Any = None
    alone: bool = True
    documents: Tensor | None = None
    seen: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None


def weights(layer: Any, theirs: Theirs) -> Any:
    """A stock Conv1D in the form in which `ops` takes linear layers, without a copy. Any other layer is returned itself
    and will be called."""
    if is_stock(layer, theirs.Conv1D) and all(type(p) in PLAIN for p in layer._parameters.values()):
        return LinearWeights(layer.weight.t(), layer.bias)
    return layer


class Block(StandIn):
    ln_1: Any
    ln_2: Any
    attn: Any
    mlp: Any
    _gradient_checkpointing_func: Any

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes what GPT2Block's forward does, calling the attention module."""
        call = dict(zip(self.names, args, strict=False)) | kwargs
        kernels = ops.kernels_for(self._fastgpt2.kernels, call["hidden_states"].device)
        if call.get("encoder_hidden_states") is not None:
            return super().forward(*args, **kwargs)
        call = {name: value for name, value in call.items() if not name.startswith("encoder_")}
        x, h = ops.add_layer_norm(Stream(call.pop("hidden_states")), self.ln_1, kernels)
        stream = Stream(self.attn(h, **call)[0], None, x)
        return ops.total(self.add_mlp(stream, kernels))

    def extend(self, stream: Stream, context: Context) -> Stream:
        """Both branches in terms of `ops`; `attn` must be stock. As in `gpt2/model.py`, the sum of the previous block
        is computed here and the last sum is left to the next LayerNorm."""
        x, h = ops.add_layer_norm(stream, self.ln_1, context.kernels)
        y, bias = ops.project(self.attend(h, context), weights(self.attn.c_proj, self.theirs), context.kernels)
        return self.add_mlp(branch(y, bias, x, self.attn.resid_dropout), context.kernels)

    def whole(self, x: Tensor, context: Context) -> Tensor:
        """As `extend`, x (B, T, C) -> (B, T, C). Activation checkpointing saves x and calls this again."""
        return ops.total(self.extend(Stream(x), context))

    def checkpointed(self, stream: Stream, context: Context) -> Stream:
        """As `extend`, through the function that `gradient_checkpointing_enable` set."""
        again = functools.partial(self.whole, context=context)
        return Stream(self._gradient_checkpointing_func(again, ops.total(stream)))

    def attend(self, h: Tensor, context: Context) -> Tensor:
        """The heads' outputs before the projection: h (B, T, C) -> (B, T, C)."""
        attn, kernels = self.attn, context.kernels
        qkv, bias = ops.packed_qkv(h, weights(attn.c_attn, self.theirs), kernels, context.cache)  # (B, T, 3C)
        H, D = attn.num_heads, attn.head_dim
        dropout_p = attn.attn_dropout.p if attn.training else 0.0
        if context.cache is not None:
            q, k, v = (t.unflatten(2, (H, D)).transpose(1, 2) for t in qkv.split(H * D, dim=2))  # (B, H, T, D)
            keys, values = context.cache.update(k, v, attn.layer_idx)
            if context.lengths is not None and dropout_p == 0:
                return ops.cached_attention(qkv, keys, values, context.lengths, context.starts, H, attn.scaling)
            if not context.alone:
                return attend(q, keys, values, context.seen, attn.scaling, dropout_p, kernels)
        return ops.causal_attention(qkv, H, attn.scaling, dropout_p, kernels, context.documents, bias)

    def add_mlp(self, stream: Stream, kernels: Kernels) -> Stream:
        """Adds the MLP branch to the stream."""
        x, h = ops.add_layer_norm(stream, self.ln_2, kernels)
        mlp, theirs = self.mlp, self.theirs
        if not is_stock(mlp, theirs.MLP):
            return Stream(mlp(h), None, x)
        c_fc, c_proj = weights(mlp.c_fc, theirs), weights(mlp.c_proj, theirs)
        if is_stock(mlp.act, theirs.Gelu):
            y, bias = ops.mlp(h, c_fc, c_proj, kernels)
        else:
            y, bias = ops.project(mlp.act(ops.linear(h, c_fc)), c_proj, kernels)
        return branch(y, bias, x, mlp.dropout)


def branch(y: Tensor, bias: Tensor | None, residual: Tensor, dropout: nn.Module) -> Stream:
    """residual + dropout(y + bias) as a stream whose sum is still to be computed."""
    if is_stock(dropout, nn.Dropout):
        return Stream(y, bias, residual, dropout.p if dropout.training else 0.0)
    return Stream(dropout(y if bias is None else y + bias), None, residual)
