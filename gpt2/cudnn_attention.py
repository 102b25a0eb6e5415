"""Causal attention by cuDNN through PyTorch and never by anything else: the value "cudnn" of the switch attention."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = (torch.bfloat16, torch.float16)
REFUSALS = ("No available kernel", "No viable backend")  # how PyTorch begins to say that a backend does not run


def why_not(device: torch.device) -> str | None:
    """The reason for which cuDNN's attention does not run on a device; None if it may."""
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, the device is '{device}'" + " (ROCm)" * bool(torch.version.hip)
    return None


def cudnn_causal_attention(
    qkv: Tensor, n_head: int, scale: float, dropout_p: float, documents: Tensor | None = None
) -> Tensor:
    """Causal self-attention: packed qkv (B, T, 3*C) in bfloat16 or float16 -> (B, T, C).

    PyTorch is allowed cuDNN and nothing else. Raises RuntimeError on a device other than an NVIDIA GPU and where
    PyTorch says that cuDNN does not run (an old GPU or cuDNN, deterministic algorithms), TypeError for another dtype,
    ValueError for documents and for head sizes that are not multiples of 8 up to 128.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    if (reason := why_not(qkv.device)) is not None:
        raise RuntimeError(f"attention='cudnn': {reason}; use attention='torch'")
    if qkv.dtype not in DTYPES:
        raise TypeError(
            f"attention='cudnn': qkv is {qkv.dtype}, allowed are bfloat16 and float16, as in autocast; "
            "use attention='torch'"
        )
    if documents is not None:
        _refuse("document_starts", "given", "None: cuDNN's attention crosses documents")
    if C // n_head > 128 or C // n_head % 8:
        _refuse("the head size", C // n_head, "a multiple of 8 up to 128")
    q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in qkv.split(C, dim=2))  # (B, H, T, D)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout_p)
    except RuntimeError as error:
        if not str(error).startswith(REFUSALS):
            raise
        raise RuntimeError(
            f"attention='cudnn': PyTorch {torch.__version__} does not run cuDNN's attention here (see its warnings); "
            "use attention='torch'"
        ) from error
    return y.transpose(1, 2).reshape(B, T, C)


def _refuse(argument: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"attention='cudnn': {argument} is {value}, allowed is {allowed}; use attention='torch'")
