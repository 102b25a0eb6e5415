"""From q, k and v, as transformers passes them to an attention function, to the packed tensor that the kernels read.

GPT-2's q, k and v are (B, H, T, D) views of one projection (B, T, 3*C) with [q | k | v] in its last dimension. If they
still are, that projection is recovered without a copy. If a cache or an adapter made copies, they are packed again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, H, T, D) -> qkv (B, T, 3*C): the projection of which they are views, or else a copy."""
    qkv = projection(q, k, v)
    if qkv is None:
        qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).flatten(2)  # (B, T, 3, H, D)
    return qkv


def projection(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The contiguous (B, T, 3*C) tensor whose thirds are q, k and v (B, H, T, D); None if there is none.

    It is the tensor that autograd recorded, so that gradients reach it. Always None under torch.compile, where tensors
    have no storages.
    """
    if torch.compiler.is_compiling() or not q.shape == k.shape == v.shape or q.numel() == 0:
        return None
    B, H, T, D = q.shape
    C = H * D
    wanted = (T * 3 * C, D, 3 * C, 1)
    for third in (q, k, v):
        if any(size > 1 and has != want for size, has, want in zip(third.shape, third.stride(), wanted, strict=True)):
            return None
    base, offset = q._base, q.storage_offset()
    if k.storage_offset() != offset + C or v.storage_offset() != offset + 2 * C:
        return None
    if base is not None:
        if not (base is k._base and base is v._base and base.dtype == q.dtype and base.is_contiguous()):
            return None
        whole = base.numel() == B * T * 3 * C and base.storage_offset() == offset
        return base.view(B, T, 3 * C) if whole else None
    storage = q.untyped_storage().data_ptr()
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return None
    if storage != k.untyped_storage().data_ptr() or storage != v.untyped_storage().data_ptr():
        return None
    return q.as_strided((B, T, 3 * C), (T * 3 * C, 3 * C, 1))  # inference mode, which keeps no bases
