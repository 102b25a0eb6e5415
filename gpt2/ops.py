"""The only door to the kernels: one function an op, computed by Triton or by PyTorch as `Kernels` says.

The model is written once, in terms of these functions. Here B is the batch, T the sequence, C the channels, V the
vocabulary. "triton" never falls back: what a kernel does not support is an error that names the op and its toggle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2.linear import linear, linear_gelu

try:
    from fastgpt2.kernels.attention import causal_attention as triton_causal_attention
    from fastgpt2.kernels.decode_attention import decode_attention as triton_decode_attention
    from fastgpt2.kernels.decode_linear import MOST_ROWS
    from fastgpt2.kernels.decode_linear import decode_linear as triton_decode_linear
    from fastgpt2.kernels.embedding import token_position_embedding as triton_embedding
    from fastgpt2.kernels.layer_norm import add_layer_norm as triton_add_layer_norm
    from fastgpt2.kernels.layer_norm import layer_norm as triton_layer_norm
    from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy as triton_linear_cross_entropy
    from fastgpt2.kernels.mlp import mlp as triton_mlp
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    TRITON_INSTALLED = False
else:
    TRITON_INSTALLED = True

BACKENDS = ("triton", "torch")
IGNORED_TARGET = -100
# On a CPU, PyTorch's attention takes longer with 16-bit numbers than with float32 where sequences are this short; its
# gradient up to twice as long.
SHORT_ON_CPU = 256


@dataclass(frozen=True)
class Kernels:
    """How each op is computed: "triton" or "torch". It says nothing about the model and goes into no checkpoint.

    attention: causal self-attention on packed q, k, v; one new token's attention over the cache.
    layer_norm: residual add + LayerNorm, with the projection's bias and dropout before it.
    gelu: the MLP's GELU with its bias.
    cross_entropy: the head's matrix product and the loss, without whole logits.
    embedding: token and position embedding.
    """

    attention: str = "torch"
    layer_norm: str = "torch"
    gelu: str = "torch"
    cross_entropy: str = "torch"
    embedding: str = "torch"

    def __post_init__(self):
        for op, backend in dataclasses.asdict(self).items():
            if backend not in BACKENDS:
                raise ValueError(f"Kernels.{op} is {backend!r}, allowed are 'triton' and 'torch'")
        if not TRITON_INSTALLED and "triton" in dataclasses.astuple(self):
            raise ImportError(
                "kernels='triton' needs the package triton, which is not installed: "
                "pip install 'triton>=3.4' (Linux), or use kernels='torch'"
            )

    @classmethod
    def all(cls, backend: str) -> Kernels:
        """Every op on one backend."""
        return cls(**dict.fromkeys(cls.names(), backend))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The ops that can be switched."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def parse(cls, spec: str | Kernels) -> Kernels:
        """ "triton", "torch", "attention,gelu" (those on Triton, the rest on PyTorch) or a Kernels, unchanged.

        Raises ValueError for a name that is none of these, TypeError for another type.
        """
        if isinstance(spec, Kernels):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"kernels is {spec!r}, expected a string or a Kernels")
        if spec.strip() in BACKENDS:
            return cls.all(spec.strip())
        ops = [op.strip() for op in spec.split(",")]
        for op in ops:
            if op not in cls.names():
                raise ValueError(
                    f"kernels names {op!r}, allowed are 'auto' (for a model), 'triton' or 'torch', each alone, "
                    f"or a comma-separated list of {', '.join(cls.names())}"
                )
        return cls(**dict.fromkeys(ops, "triton"))


def kernels_digest() -> str:
    """SHA-256 of the kernels' files: figures and runs that belong together come from the same sources."""
    folder = Path(__file__).parents[1] / "kernels"
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


# Made once, so that torch.compile meets constants in `kernels_for`. Without Triton "auto" is PyTorch everywhere.
ALL_TORCH = Kernels.all("torch")
ALL_TRITON = Kernels.all("triton") if TRITON_INSTALLED else ALL_TORCH


def requested_kernels(spec: str | Kernels) -> str | Kernels:
    """Checks a user's `kernels=` argument: "auto", which the device decides later, or a Kernels.

    The environment variable FASTGPT2_KERNELS, read here, sets what "auto" means.
    """
    if spec != "auto":
        return Kernels.parse(spec)
    spec = os.environ.get("FASTGPT2_KERNELS") or "auto"
    try:
        return "auto" if spec.strip() == "auto" else Kernels.parse(spec)
    except ValueError as error:
        raise ValueError(f"the environment variable FASTGPT2_KERNELS is {spec!r}: {error}") from None


def kernels_for(spec: str | Kernels, device: torch.device) -> Kernels:
    """What `requested_kernels` returned, settled for a device: "auto" is Triton on CUDA and ROCm, PyTorch elsewhere."""
    if isinstance(spec, Kernels):
        return spec
    return ALL_TRITON if device.type == "cuda" else ALL_TORCH


# ----------------------------------------------------------------------------------------------------------- ops


def embedding(idx: Tensor, token_weight: Tensor, position_weight: Tensor, dropout_p: float, kernels: Kernels) -> Tensor:
    """Token plus position embedding: idx (B, T) -> (B, T, C), column t at position t."""
    if kernels.embedding == "triton":
        return triton_embedding(idx, token_weight, position_weight, dropout_p=dropout_p)
    x = F.embedding(idx, token_weight) + position_weight[: idx.size(1)]
    return F.dropout(x, dropout_p) if dropout_p else x


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """Ends one branch and normalises for the next: s = residual + dropout(x + x_bias) -> (s, LayerNorm(s)).

    x, residual (B, T, C). Without a residual, x begins the stream: (x, LayerNorm(x)).
    x_bias: what `project` or `mlp` left to add.
    """
    if kernels.layer_norm == "triton":
        if residual is None:
            return x, triton_layer_norm(x, weight, bias, eps)
        return triton_add_layer_norm(x, residual, weight, bias, eps, x_bias=x_bias, dropout_p=dropout_p)
    if x_bias is not None:
        x = x + x_bias
    if residual is not None:
        x = residual + (F.dropout(x, dropout_p) if dropout_p else x)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def document_mask(starts: Tensor, B: int, T: int, kernels: Kernels) -> Tensor:
    """What `causal_attention` takes as `documents`, made once for all layers.

    starts (n_documents + 1,) int32: where each document begins in the B*T flattened tokens, and B*T.
    Returns them for the kernel, and who sees whom, (B, 1, T, T), for PyTorch.
    """
    if kernels.attention == "triton":
        return starts
    tokens = torch.arange(B * T, device=starts.device, dtype=starts.dtype)
    document = torch.searchsorted(starts, tokens, right=True).view(B, 1, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=starts.device).tril()
    return (document[..., :, None] == document[..., None, :]) & causal


def causal_attention(
    qkv: Tensor, n_head: int, scale: float, dropout_p: float, kernels: Kernels, documents: Tensor | None = None
) -> Tensor:
    """Causal self-attention, inside each document where there are `documents`: packed qkv (B, T, 3*C) -> (B, T, C)."""
    if kernels.attention == "triton":
        return triton_causal_attention(qkv, n_head, scale=scale, dropout_p=dropout_p, cu_seqlens=documents)
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    dtype = qkv.dtype
    short = qkv.device.type == "cpu" and dtype.itemsize == 2 and T <= SHORT_ON_CPU and qkv.requires_grad
    with torch.autocast("cpu", enabled=False) if short else contextlib.nullcontext():
        qkv = qkv.float() if short else qkv
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in qkv.split(C, dim=2))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=documents, is_causal=documents is None, scale=scale, dropout_p=dropout_p
        )
    return y.transpose(1, 2).reshape(B, T, C).to(dtype)


def decode_attention(
    qkv: Tensor, cache: Tensor, lengths: Tensor, n_head: int, scale: float, kernels: Kernels, full: bool = False
) -> Tensor:
    """Attention of one new token a row over the tokens before it, among which its key and value are written.

    qkv (B, 1, 3*C), cache (2, B, H, S, D) of keys and values, lengths (B,) int32: tokens in the cache before this one,
    below S. full: they are S - 1 in every row. Returns (B, 1, C); `lengths` stays as it is. Waits for no device.
    """
    if kernels.attention == "triton":
        return triton_decode_attention(qkv, cache, lengths, n_head, scale=scale)
    B, C = qkv.size(0), qkv.size(2) // 3
    q, kv = qkv.view(B, 3, n_head, 1, C // n_head).split((1, 2), dim=1)
    if full:  # no mask, and no indices
        cache[:, :, :, -1:] = kv.transpose(0, 1)
        keys, values = cache.unbind()
        return F.scaled_dot_product_attention(q[:, 0], keys, values, scale=scale).view(B, 1, C)
    rows = torch.arange(B, device=qkv.device)
    cache[:, rows, :, lengths.long()] = kv.squeeze(3)  # indexed dimensions come first: (B, 2, H, D)
    keys, values = cache.unbind()
    # SDPA's is_causal aligns the query with the first key; the mask aligns it with the row's own last one.
    seen = torch.arange(cache.size(3), device=qkv.device) <= lengths[:, None]
    y = F.scaled_dot_product_attention(q[:, 0], keys, values, attn_mask=seen[:, None, None], scale=scale)
    return y.view(B, 1, C)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """The projection that ends a branch: (x W^T, the bias still to add), or (x W^T + bias, None).

    The kernel of `add_layer_norm` adds a bias for free and makes its gradient beside those of LayerNorm, where a
    linear layer's backward would read the gradient once more.
    """
    if kernels.layer_norm == "triton":
        return linear(x, weight), bias
    return linear(x, weight, bias), None


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kernels: Kernels,
) -> tuple[Tensor, Tensor | None]:
    """c_proj(gelu(c_fc(x))): (B, T, C) -> (B, T, C), and as in `project` the bias that is still to add."""
    if kernels.gelu == "triton":
        if kernels.layer_norm == "triton":
            return triton_mlp(x, fc_weight, fc_bias, proj_weight), proj_bias
        return triton_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias), None
    return project(linear_gelu(x, fc_weight, fc_bias), proj_weight, proj_bias, kernels)


def few_rows(x: Tensor, kernels: Kernels) -> bool:
    """Whether `decode_linear` computes on x (B, T, C): where LayerNorm and GELU are Triton's, no gradients are
    recorded, and rows are so few that launches cost more than their work."""
    return (
        kernels.layer_norm == kernels.gelu == "triton"
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
    """residual + gelu(layer(norm(x))) in one launch, where `few_rows` says so. The parameters are
    read early: in a model they were there before the embedding, an ordinary launch, began."""
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


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, want_logits: bool, kernels: Kernels
) -> tuple[Tensor | None, Tensor]:
    """Mean cross-entropy of the head: x (B, T, C), weight (rows >= V, C), targets (B, T) -> (logits (B, T, V), loss).

    Negative targets are ignored. The kernel never makes whole logits, so there they are None unless wanted.
    """
    if kernels.cross_entropy == "triton":
        logits = linear(x, weight)[..., :vocab_size] if want_logits else None
        return logits, triton_linear_cross_entropy(x, weight, targets, vocab_size=vocab_size)
    logits = linear(x, weight)[..., :vocab_size]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets.masked_fill(targets < 0, IGNORED_TARGET)
    # A mean over no targets would be NaN: sum, then divide by at least one.
    total = F.cross_entropy(exact.flatten(0, -2), kept.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    return logits, total / (kept >= 0).sum().clamp(min=1)
