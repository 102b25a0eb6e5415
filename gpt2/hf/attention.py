"""This package's attention as an attention implementation of transformers: `attn_implementation="fastgpt2"`.

    hf.register()                                                        # kernels="auto", fallback=None
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastgpt2")
    hf.unregister()

An attention function and a mask function are registered: without the latter transformers makes no mask, and results for
padded batches are silently wrong. `reorder_and_upcast_attn` asks for a softmax in float32, which the kernels always
have. As with transformers' "sdpa", the attention weights are not available (`output_attentions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf import visible
from fastgpt2.gpt2.hf.packed_qkv import pack
from fastgpt2.gpt2.ops import Kernels

NAME = "fastgpt2"
FALLBACKS = (None, "sdpa")
HEAD_SIZES = range(16, 129)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Registration:
    """The arguments of `register`."""

    kernels: str | Kernels
    fallback: str | None


_registration = Registration("auto", None)


def register(kernels: str | Kernels = "auto", fallback: str | None = None) -> None:
    """Registers "fastgpt2" for `attn_implementation`. A second call changes the arguments for all models.

    kernels: as for `GPT`; only the field attention of a `Kernels` matters. On a CPU "auto" is PyTorch's attention.
    fallback: with "sdpa", transformers' SDPA computes what the kernel does not support; with None that is a ValueError.
    Raises ValueError for unknown kernels or fallback, ImportError if the installed transformers has no such interface.
    """
    global _registration
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback is {fallback!r}, allowed are None and 'sdpa'")
    attention, masks = _interfaces()
    _registration = Registration(ops.requested_kernels(kernels, cudnn=False), fallback)
    attention.register(NAME, attention_forward)
    masks.register(NAME, mask)


def unregister() -> None:
    """Removes the registration. Models that were loaded with it need `model.set_attn_implementation("sdpa")`."""
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)


def is_registered() -> bool:
    """Whether both functions are registered and are those of this module."""
    attention, masks = (interface._global_mapping for interface in _interfaces())
    return attention.get(NAME) is attention_forward and masks.get(NAME) is mask


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "hf.register needs transformers with AttentionInterface and AttentionMaskInterface, 5.0 or newer"
        ) from error
    return AttentionInterface, AttentionMaskInterface


# ------------------------------------------------------------------------------------- what transformers calls


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Tensor | None:
    """A mask in a form of `visible.py` for Triton's attention, or transformers' boolean mask for PyTorch's.

    Without a fallback, raises ValueError for masks that the kernel does not support (sliding windows, padding between
    tokens).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    def theirs(**changes: Any) -> Tensor | None:
        given = dict(attention_mask=attention_mask, device=device) | more | changes
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **given)

    if ops.kernels_for(_registration.kernels, torch.device(device)).attention == "torch":
        return theirs()
    try:
        if mask_function is causal_mask_function and kv_offset == 0:
            real = attention_mask
            if real is not None and real.size(1) < kv_length:
                real = F.pad(real, (0, kv_length - real.size(1)))
            return visible.encode(batch_size, q_length, kv_length, q_offset, real, device=device)
        seen = theirs(allow_is_causal_skip=False)
        assert seen is not None
        return visible.from_booleans(seen, q_offset)
    except ValueError as error:
        if _registration.fallback is None:
            raise ValueError(_instead(str(error))) from None
        return theirs(allow_is_causal_skip=False)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, H, S, D) -> (B, T, H, D), and None for the weights.

    more: `cu_seq_lens_q` (n + 1,) is used if there is no cache. Without a fallback, raises ValueError for calls that
    the kernel does not support.
    """
    kernels = ops.kernels_for(_registration.kernels, query.device)
    B, H, T, D = query.shape
    scale = D**-0.5 if scaling is None else scaling
    cu_seqlens = more.get("cu_seq_lens_q")
    if cu_seqlens is not None and key.size(2) == T:
        attention_mask = cu_seqlens.to(torch.int32)[None, None, None]
    refused = why_not(module, query, key, value, attention_mask, more) if kernels.attention == "triton" else None
    if refused and _registration.fallback is None:
        raise ValueError(_instead(refused))
    if refused or _is_theirs(module, query, key, value, attention_mask, more, kernels):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        booleans = visible.as_booleans(attention_mask, B, T, key.size(2))
        return sdpa_attention_forward(module, query, key, value, booleans, dropout=dropout, scaling=scaling, **more)
    y = attend(query, key, value, attention_mask, scale, dropout, kernels)
    return y.view(B, T, H, D), None


def why_not(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, more: dict[str, Any]
) -> str | None:
    """The reason for which the kernel does not support a call; None if it does."""
    if getattr(module, "is_cross_attention", False) or not more.get("is_causal", getattr(module, "is_causal", True)):
        return "attention is not causal self-attention (is_cross_attention, is_causal)"
    if k.size(1) != q.size(1):
        return f"key has {k.size(1)} heads, query {q.size(1)}: grouped heads"
    if q.size(3) not in HEAD_SIZES or v.size(3) != q.size(3):
        return f"the head size is {q.size(3)} (value: {v.size(3)}), allowed are 16 to 128, the same for all"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"query, key and value are {q.dtype}, {k.dtype}, {v.dtype}, allowed is one of {DTYPES}"
    if attention_mask is not None and not visible.is_visible(attention_mask):
        return f"attention_mask is a mask {tuple(attention_mask.shape)} of {attention_mask.dtype}, allowed is (B, T)"
    for argument in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if more.get(argument) is not None:
            return f"{argument} is given"
    return None


def _is_theirs(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    more: dict[str, Any],
    kernels: Kernels,
) -> bool:
    """Whether the call is not plain causal attention without a past, and PyTorch is to compute it."""
    if kernels.attention == "triton":
        return False
    if attention_mask is not None and attention_mask.dtype != torch.bool and not visible.is_visible(attention_mask):
        return True  # numbers that are added to the scores
    return k.shape != q.shape or v.shape != q.shape or why_not(module, q, k, v, None, more) is not None


def _instead(what: str) -> str:
    return (
        f"attn_implementation='fastgpt2': {what}. hf.register(fallback='sdpa') computes such calls by PyTorch, "
        "model.set_attn_implementation('sdpa') all of them"
    )


# ---------------------------------------------------------------------------------------------------- computing


def attend(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scale: float, dropout_p: float, kernels: Kernels
) -> Tensor:
    """q (B, H, T, D), k and v (B, H, S, D) -> (B, T, C). The T queries belong to the last filled keys.

    attention_mask: a form of `visible.py`, or booleans (B, 1, T, S) for PyTorch's attention.
    """
    B, H, T, D = q.shape
    alone = attention_mask is None or attention_mask.dtype != torch.int64
    one = T == 1 and k.size(2) > 1 and attention_mask is None
    if kernels.attention == "torch" and (k.size(2) != T or not alone):
        seen = visible.as_booleans(attention_mask, B, T, k.size(2))
        if seen is None and not one:  # the rest of a static cache is not filled yet
            k, v = k[:, :, :T], v[:, :, :T]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None and not one, scale=scale, dropout_p=dropout_p
        )
        return y.transpose(1, 2).reshape(B, T, H * D)
    if alone and not one:
        return ops.causal_attention(
            pack(q, k[:, :, :T], v[:, :, :T]), H, scale, dropout_p, kernels, _documents(attention_mask, B, T, kernels)
        )
    if attention_mask is None:
        attention_mask = visible.ranges(torch.full((1,), k.size(2), device=q.device), None)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if T == 1 and dropout_p == 0 and not differentiable:
        return _attend_one(q, k, v, attention_mask, scale)
    return _attend_behind(q, k, v, attention_mask, scale, dropout_p, kernels)


def _documents(attention_mask: Tensor | None, B: int, T: int, kernels: Kernels) -> Tensor | None:
    """`ops.document_mask` of attention_mask, which is None, in a form of `visible.py`, or already a boolean mask."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask
    return ops.document_mask(attention_mask.flatten(), B, T, kernels)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float) -> Tensor:
    """One token a row over a cache that already has its key and value. The kernel reads the cache without a copy."""
    B, H, _, D = q.shape
    last = (ranges[:, :, :, :1] - 1).expand(B, H, 1, D)
    qkv = pack(q, k.gather(2, last), v.gather(2, last))
    return ops.cached_attention(qkv, k, v, *visible.lengths_and_starts(ranges, B), H, scale)


def _attend_behind(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, dropout_p: float, kernels: Kernels
) -> Tensor:
    """T queries after a past, computed as the last rows of square causal attention whose other queries are zeros."""
    B, H, T, D = q.shape
    S = int(ranges[0, 0, -1, 0])
    q = F.pad(q, (0, 0, S - T, 0))
    documents = None
    if ranges.size(3) == 2:
        start = ranges[:, 0, :1, 1].expand(B, 1)
        place = torch.arange(S, device=q.device)
        documents = visible.documents(torch.where(place < start, 0, start)).flatten()
    qkv = pack(q, k[:, :, :S], v[:, :, :S])
    return ops.causal_attention(qkv, H, scale, dropout_p, kernels, documents)[:, S - T :]
