"""One function for each op of the model, computed by Triton or by PyTorch as `Kernels` says.

Only this module of gpt2/ imports kernels/, and the model is written once in terms of these functions. B is the batch, T
the sequence, C the channels, V the vocabulary. "triton" never falls back to PyTorch: what a kernel does not support is
an error that names the op and its switch.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2.cudnn_attention import cudnn_causal_attention
from fastgpt2.gpt2.cudnn_attention import why_not as why_not_cudnn  # noqa: F401
from fastgpt2.gpt2.linear import linear as weight_product
from fastgpt2.gpt2.linear import linear_gelu
from fastgpt2.gpt2.shadow import as_read, copy_as_read
from fastgpt2.gpt2.stock import is_stock, weight_and_bias
from fastgpt2.gpt2.switches import ALL_TORCH as ALL_TORCH
from fastgpt2.gpt2.switches import ALL_TRITON as ALL_TRITON
from fastgpt2.gpt2.switches import TRITON_INSTALLED as TRITON_INSTALLED
from fastgpt2.gpt2.switches import Kernels as Kernels
from fastgpt2.gpt2.switches import current_names as current_names
from fastgpt2.gpt2.switches import kernels_digest as kernels_digest
from fastgpt2.gpt2.switches import kernels_for as kernels_for
from fastgpt2.gpt2.switches import launched_by_graph as launched_by_graph
from fastgpt2.gpt2.switches import requested_kernels as requested_kernels

if TRITON_INSTALLED:
    from fastgpt2.kernels._linear import autocast_linear, gains
    from fastgpt2.kernels.adamw import Member as TritonAdamWMember  # noqa: F401
    from fastgpt2.kernels.adamw import Settings as TritonAdamWSettings  # noqa: F401
    from fastgpt2.kernels.adamw import Update as TritonAdamWUpdate  # noqa: F401
    from fastgpt2.kernels.adamw import check_device as check_adamw_device  # noqa: F401
    from fastgpt2.kernels.attention import causal_attention as triton_causal_attention
    from fastgpt2.kernels.decode_attention import decode_attention as triton_decode_attention
    from fastgpt2.kernels.decode_linear import MOST_ROWS
    from fastgpt2.kernels.decode_linear import decode_linear as triton_decode_linear
    from fastgpt2.kernels.embedding import token_position_embedding as triton_embedding
    from fastgpt2.kernels.gelu import bias_gelu as triton_bias_gelu
    from fastgpt2.kernels.gelu import gelu as triton_gelu
    from fastgpt2.kernels.layer_norm import add_layer_norm as triton_add_layer_norm
    from fastgpt2.kernels.layer_norm import layer_norm as triton_layer_norm
    from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy as triton_linear_cross_entropy
    from fastgpt2.kernels.mlp import fused_mlp as triton_fused_mlp
    from fastgpt2.kernels.mlp import is_fused
    from fastgpt2.kernels.mlp import mlp as triton_mlp

IGNORED_TARGET = -100
# On a CPU and up to this length, PyTorch's attention is slower in 16 bits than in float32; its gradient takes up to
# twice as long.
SHORT_ON_CPU = 256


# ----------------------------------------------------------------------------------------------------------- ops


class Stream(NamedTuple):
    """The residual stream as a sum that is still to be computed: residual + dropout(x + x_bias).

    x, residual (B, T, C), x_bias (C,). Without a residual the stream is x itself.
    """

    x: Tensor
    x_bias: Tensor | None = None
    residual: Tensor | None = None
    dropout_p: float = 0.0


def linear(x: Tensor, layer: nn.Module, switch: str = "torch") -> Tensor:
    """The linear layer of x (..., K): (..., N).

    switch: the value of the switch of the region that the layer is in. Unless it is "torch", the product of an x in
    autocast's 16 bits writes gradients of float32 parameters in float32, where PyTorch's writes 16 bits and converts.
    """
    if not is_stock(layer, nn.Linear):
        return layer(x)
    return _linear(x, *weight_and_bias(layer), switch)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, switch: str) -> Tensor:
    if switch != "torch" and x.dtype != weight.dtype and gains(x, weight):
        bias_copy = None if bias is None else copy_as_read(bias)
        return autocast_linear(x, weight, bias, copy_as_read(weight), bias_copy)
    return weight_product(x, as_read(weight), None if bias is None else as_read(bias))


def packed_qkv(h: Tensor, c_attn: nn.Module, kernels: Kernels, cache: object) -> tuple[Tensor, Tensor | None]:
    """The linear layer of h (B, T, C): packed qkv (B, T, 3*C), and its bias if `causal_attention`, which follows where
    there is no cache, is to compute the bias's gradient: it can without reading the gradient of qkv again."""
    if kernels.attention == "triton" and cache is None and is_stock(c_attn, nn.Linear):
        weight, bias = weight_and_bias(c_attn)
        if bias is not None and bias.requires_grad:
            copy = copy_as_read(bias)
            return _linear(h, weight, bias.detach() if copy is None else copy, kernels.attention), bias
    return linear(h, c_attn, kernels.attention), None


def embedding(
    idx: Tensor,
    wte: nn.Module,
    wpe: nn.Module,
    positions: Tensor | None,
    dropout_p: float,
    kernels: Kernels,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Token plus position embedding with dropout: idx (B, T) int64 -> (B, T, C) in `dtype`, by default the tables'.

    positions: (B, T) int64; by default column t has position t.
    """
    if kernels.embedding == "triton" and is_stock(wte, nn.Embedding) and is_stock(wpe, nn.Embedding):
        return triton_embedding(idx, wte.weight, wpe.weight, positions, dropout_p=dropout_p, dtype=dtype)
    if positions is None and is_stock(wpe, nn.Embedding):
        x = wte(idx) + wpe.weight[: idx.size(1)]
    else:  # wpe is called with one position per token, so that its hooks see the batch dimension
        positions = torch.arange(idx.size(1), device=idx.device) if positions is None else positions
        x = wte(idx) + wpe(positions.expand(idx.shape))
    x = F.dropout(x, dropout_p) if dropout_p else x
    return x if dtype is None else x.to(dtype)


def total(stream: Stream) -> Tensor:
    """Computes the sum of the stream: (B, T, C), in the dtype of residual + x, whatever the bias has."""
    x, x_bias, residual, dropout_p = stream
    branch = x if x_bias is None else x + x_bias
    if residual is None:
        return branch
    added = residual + (F.dropout(branch, dropout_p) if dropout_p else branch)
    return added if x_bias is None else added.to(torch.promote_types(x.dtype, residual.dtype))


def add_layer_norm(stream: Stream, norm: nn.Module, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Computes the sum of the stream and its LayerNorm: (x, norm(x)), both (B, T, C)."""
    if kernels.layer_norm == "triton" and is_stock(norm, nn.LayerNorm):
        x, x_bias, residual, dropout_p = stream
        weight, bias = weight_and_bias(norm)
        if residual is None:
            return x, triton_layer_norm(x, weight, bias, norm.eps)
        return triton_add_layer_norm(x, residual, weight, bias, norm.eps, x_bias=x_bias, dropout_p=dropout_p)
    x = total(stream)
    return x, norm(x)


def document_mask(starts: Tensor, B: int, T: int, kernels: Kernels) -> Tensor:
    """The argument `mask` of `causal_attention`, computed once for all layers.

    starts (n_documents + 1,) int32: the place of each document's first token in the B*T flattened tokens, then B*T.
    Returns `starts` itself for the Triton kernel (and for cuDNN, which refuses it), and for PyTorch the boolean mask
    (B, 1, T, T) that is True where a query may attend to a key.
    """
    if kernels.attention != "torch":
        return starts
    tokens = torch.arange(B * T, device=starts.device, dtype=starts.dtype)
    document = torch.searchsorted(starts, tokens, right=True).view(B, 1, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=starts.device).tril()
    return (document[..., :, None] == document[..., None, :]) & causal


def causal_attention(
    qkv: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    kernels: Kernels,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal self-attention: packed qkv (B, T, 3*C) -> (B, T, C).

    mask: what `document_mask` returned for the same `kernels`; attention then stays inside each document.
    bias: what `packed_qkv` returned with qkv.
    """
    if kernels.attention == "triton":
        return triton_causal_attention(qkv, n_head, scale=scale, dropout_p=dropout_p, cu_seqlens=mask, bias=bias)
    if kernels.attention == "cudnn":
        return cudnn_causal_attention(qkv, n_head, scale, dropout_p, mask)
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    dtype = qkv.dtype
    short = qkv.device.type == "cpu" and dtype.itemsize == 2 and T <= SHORT_ON_CPU and qkv.requires_grad
    with torch.autocast("cpu", enabled=False) if short else contextlib.nullcontext():
        qkv = qkv.float() if short else qkv
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in qkv.split(C, dim=2))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout_p
        )
    return y.transpose(1, 2).reshape(B, T, C).to(dtype)


def decode_attention(
    qkv: Tensor, cache: Tensor, lengths: Tensor, n_head: int, scale: float, kernels: Kernels, full: bool = False
) -> Tensor:
    """Attention of one new token a row over the cached tokens and itself. Its key and value are written to the cache.

    qkv (B, 1, 3*C); cache (2, B, H, S, D), keys and values; lengths (B,) int32, the number of cached tokens before this
    one, below S. full: every row has S - 1 of them. Returns (B, 1, C). Leaves `lengths` unchanged and does not wait for
    the device. With attention="cudnn" PyTorch chooses the backend: one query over a cache is not cuDNN's case.
    """
    if kernels.attention == "triton":
        return triton_decode_attention(qkv, cache, lengths, n_head, scale=scale)
    B, C = qkv.size(0), qkv.size(2) // 3
    q, kv = qkv.view(B, 3, n_head, 1, C // n_head).split((1, 2), dim=1)
    if full:  # needs neither a mask nor indexed writes
        cache[:, :, :, -1:] = kv.transpose(0, 1)
        keys, values = cache.unbind()
        return F.scaled_dot_product_attention(q[:, 0], keys, values, scale=scale).view(B, 1, C)
    rows = torch.arange(B, device=qkv.device)
    cache[:, rows, :, lengths.long()] = kv.squeeze(3)  # indexed dimensions come first: (B, 2, H, D)
    keys, values = cache.unbind()
    # SDPA's is_causal aligns the query with the first key; this mask aligns it with the row's last key.
    seen = torch.arange(cache.size(3), device=qkv.device) <= lengths[:, None]
    y = F.scaled_dot_product_attention(q[:, 0], keys, values, attn_mask=seen[:, None, None], scale=scale)
    return y.view(B, 1, C)


def cached_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, starts: Tensor | None, n_head: int, scale: float
) -> Tensor:
    """As `decode_attention`, by Triton, over keys and values (B, H, S, D) in two tensors, as another library's cache
    has them: read where they are, without a copy where their strides are equal.

    lengths, starts (B,) int32: tokens before the new one, and the position where each row's tokens begin; None: 0.
    """
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = torch.stack((keys, values))
    return triton_decode_attention(qkv, (keys, values), lengths, n_head, scale=scale, starts=starts)


def project(y: Tensor, c_proj: nn.Module, kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """The projection that ends a branch: y (..., K) -> (y W^T, the bias still to be added) or (c_proj(y), None).

    The kernel of `add_layer_norm` adds the bias without extra traffic and computes its gradient together with
    LayerNorm's; the linear layer's own backward would read the gradient a second time.
    """
    if kernels.layer_norm == "triton" and is_stock(c_proj, nn.Linear):
        weight, bias = weight_and_bias(c_proj)
        return _linear(y, weight, None, kernels.layer_norm), bias
    return linear(y, c_proj), None


def mlp(
    h: Tensor, c_fc: nn.Module, c_proj: nn.Module, kernels: Kernels, activation: str = "gelu_tanh"
) -> tuple[Tensor, Tensor | None]:
    """c_proj(gelu(c_fc(h))): (B, T, C) -> (B, T, C), and, as in `project`, the bias that is still to be added."""
    if activation == "gelu_erf":  # no kernel has it
        return project(F.gelu(linear(h, c_fc)), c_proj, kernels)
    if is_stock(c_fc, nn.Linear):
        weight, bias = weight_and_bias(c_fc)
        if kernels.mlp == "torch":
            act = linear_gelu(h, as_read(weight), as_read(bias))
        elif is_stock(c_proj, nn.Linear):
            function = triton_fused_mlp if kernels.mlp == "fused" else triton_mlp
            proj_weight, proj_bias = weight_and_bias(c_proj)
            copies = dict(fc_copy=copy_as_read(weight), proj_copy=copy_as_read(proj_weight))
            bias_here, bias_left = (None, proj_bias) if kernels.layer_norm == "triton" else (proj_bias, None)
            bias_here = None if bias_here is None else as_read(bias_here)
            return function(h, weight, bias, proj_weight, bias_here, **copies), bias_left
        else:
            pre = _linear(h, weight, None, kernels.mlp)
            act = triton_gelu(pre) if bias is None else triton_bias_gelu(pre, bias)
    else:
        pre = c_fc(h)
        act = F.gelu(pre, approximate="tanh") if kernels.mlp == "torch" else triton_gelu(pre)
    return project(act, c_proj, kernels)


def mlp_in_products(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> str:
    """The passes of a training step, "forward", "backward" or both, in which the MLP's products compute GELU: both for
    mlp="fused", and for "triton" those in which the tuning table has that as faster on this device. "" for none."""
    if kernels.mlp == "torch":
        return ""
    bits = torch.finfo(dtype).bits
    passes = {"fwd": "forward", "bwd": "backward"}
    return " and ".join(passes[p] for p in passes if kernels.mlp == "fused" or is_fused(p, bits, device))


def few_rows(x: Tensor, kernels: Kernels) -> bool:
    """Whether `decode_linear` may compute linear layers of x (B, T, C): neither of the switches layer_norm and mlp is
    "torch", gradients and autocast are off, and there are so few rows that launches cost more than their work."""
    return (
        kernels.layer_norm == "triton"
        and kernels.mlp != "torch"
        and x.size(0) * x.size(1) <= MOST_ROWS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )


def decode_linear(
    x: Tensor,
    layer: nn.Linear,
    norm: nn.LayerNorm | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(layer(norm(x))) in one launch: (..., K) -> (..., N). Requires `few_rows` and stock modules.

    overlap=True lets the kernel read parameters before the previous kernel has ended. That is safe in a model, because
    the parameters were written before the embedding, an ordinary launch, began.
    """
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return triton_decode_linear(
        *(x, layer.weight, layer.bias),
        norm_weight=weight,
        norm_bias=bias,
        eps=eps,
        gelu=gelu,
        residual=residual,
        overlap=True,
    )


def head(x: Tensor, lm_head: nn.Module, few: bool) -> Tensor:
    """Logits of x (B, T, C), one column for each row of the head's weight. few: what `few_rows` returned."""
    return decode_linear(x, lm_head) if few and is_stock(lm_head, nn.Linear) else linear(x, lm_head)


def head_loss(
    x: Tensor,
    lm_head: nn.Module,
    targets: Tensor,
    vocab_size: int,
    padded_vocab_size: int,
    want_logits: bool,
    kernels: Kernels,
) -> tuple[Tensor | None, Tensor]:
    """Mean cross-entropy of the head: x (B, T, C), targets (B, T) int64 -> (logits (B, T, V), loss).

    Negative targets are ignored. The Triton kernel never computes all logits at once, so with it they are None unless
    want_logits.
    """
    if kernels.cross_entropy == "triton" and is_stock(lm_head, nn.Linear):
        if lm_head.bias is None and lm_head.weight.size(0) == padded_vocab_size:
            logits = without_padding(linear(x, lm_head), vocab_size, padded_vocab_size) if want_logits else None
            weight, copy = lm_head.weight, copy_as_read(lm_head.weight)
            return logits, triton_linear_cross_entropy(x, weight, targets, vocab_size=vocab_size, weight_copy=copy)
    logits = without_padding(linear(x, lm_head), vocab_size, padded_vocab_size)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets.masked_fill(targets < 0, IGNORED_TARGET)
    # The mean over no targets would be NaN, so the sum is divided by at least 1.
    total = F.cross_entropy(exact.flatten(0, -2), kept.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    return logits, total / (kept >= 0).sum().clamp(min=1)


def loss_without_logits(x: Tensor, lm_head: nn.Linear, targets: Tensor, ignore_index: int) -> Tensor:
    """The sum of Triton's cross-entropies of a stock head without bias: x (B, T, C), targets (B, T) -> float32 scalar.

    Targets that are negative or ignore_index are ignored.
    """
    return triton_linear_cross_entropy(x, lm_head.weight, targets, reduction="sum", ignore_index=ignore_index)


def without_padding(logits: Tensor, vocab_size: int, padded_vocab_size: int) -> Tensor:
    """Logits (..., padded_vocab_size) -> (..., vocab_size). The logits of a head of another width stay unchanged."""
    return logits[..., :vocab_size] if logits.size(-1) == padded_vocab_size else logits
