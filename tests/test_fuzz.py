"""Property tests: every op keeps the 2x rule (numerics.py) at any shape, dtype, layout and set of optional arguments.

pytest tests/test_fuzz.py                                # profile "ci": the same few examples every time
pytest tests/test_fuzz.py --hypothesis-profile=long      # other examples every time, many more of them
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check
from torch import Tensor

from fastgpt2.kernels.attention import causal_attention, causal_attention_reference
from fastgpt2.kernels.embedding import token_position_embedding, token_position_embedding_reference
from fastgpt2.kernels.gelu import bias_gelu, bias_gelu_reference, gelu, gelu_reference
from fastgpt2.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastgpt2.kernels.mlp import mlp, mlp_reference

# exp2 overflows where GELU's tail is 0: numpy warns of it, hardware does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "rows apart", "columns apart", "transposed", "expanded", "misaligned"])
SEEDS = st.integers(0, 2**31 - 1)


def sizes(limit: int, least: int = 0) -> st.SearchStrategy[int]:
    """Sizes from `least` to `limit`: half of them at the edges of tiles, which are powers of two."""
    edges = {least, 1, *(2**k + d for k in range(1, 13) for d in (-1, 0, 1))}
    return st.sampled_from(sorted(n for n in edges if least <= n <= limit)) | st.integers(least, limit)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in other memory: the same numbers (but for "expanded", which repeats those at the first index)."""
    if x.dim() == 0 or layout == "contiguous":
        return x
    if layout == "expanded":
        return x[:1].expand_as(x) if x.shape[0] else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() < 3 else x.mT.contiguous().mT
    gap, step, start = {"rows apart": (3, 1, 0), "columns apart": (0, 2, 0), "misaligned": (1, 1, 1)}[layout]
    C = x.shape[-1]
    wide = x.new_full((*x.shape[:-1], start + step * C + gap), math.nan)
    view = wide[..., start : start + step * C : step]
    return view.copy_(x)


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return laid_out((scale * torch.randn(shape, generator=generator)).to(dtype), layout)


def upstream_of(layout: str, seed: int):
    """What `check` asks its upstream gradients from."""
    return lambda output: numbers(seed, tuple(output.shape), output.dtype, layout).to(output.device)


def plausible(keep: Tensor, p: float) -> Tensor:
    """The dropout mask `keep` that was read off a kernel, if about 1 - p of it is kept (6 standard deviations)."""
    n = keep.numel()
    assert abs(int(keep.sum()) - n * (1 - p)) <= 6 * math.sqrt(n * p * (1 - p)) + 1, f"{int(keep.sum())} of {n} kept"
    return keep


@st.composite
def shapes(draw, columns: int, rows: int = 70, least_columns: int = 1) -> tuple[int, ...]:
    """(..., C) with 0 to 2 leading dimensions of `rows` rows at most; some are 0."""
    C = draw(sizes(columns, least_columns))
    leading = draw(st.integers(0, 2))
    if leading == 2:
        return draw(sizes(5)), draw(sizes(rows // 5)), C
    return (draw(sizes(rows)), C) if leading else (C,)


# ------------------------------------------------------------------------------------------------------------ GELU


@given(shapes(1030), DTYPES, LAYOUTS, LAYOUTS, st.booleans(), st.sampled_from([1e-3, 1.0, 30.0]), SEEDS)
def test_gelu(device, shape, dtype, layout, upstream_layout, has_bias, scale, seed):
    x = numbers(seed, shape, dtype, layout, scale).to(device)
    upstream = upstream_of(upstream_layout, seed)
    if not has_bias:
        check(gelu, gelu_reference, x, names=("x",), upstream=upstream)
        return
    bias = numbers(seed + 1, shape[-1:], torch.float32 if seed % 2 else dtype).to(device)
    eager = lambda x, bias: bias_gelu_reference(x, bias.to(x.dtype))  # noqa: E731
    check(bias_gelu, bias_gelu_reference, x, bias, names=("x", "bias"), eager=eager, upstream=upstream)


@given(shapes(40, rows=40), sizes(300, 1), sizes(40, 1), DTYPES, LAYOUTS, LAYOUTS, st.integers(0, 2), SEEDS)
def test_mlp(device, shape, width, out, dtype, layout, upstream_layout, biases, seed):
    inputs = dict(
        x=numbers(seed, shape, dtype, layout),
        fc_weight=numbers(seed + 1, (width, shape[-1]), dtype, layout, scale=shape[-1] ** -0.5),
        fc_bias=numbers(seed + 2, (width,), dtype),
        proj_weight=numbers(seed + 3, (out, width), dtype, scale=width**-0.5),
        proj_bias=numbers(seed + 4, (out,), dtype),
    )
    for absent in ("fc_bias", "proj_bias")[biases:]:
        del inputs[absent]

    def call(function):
        return lambda *tensors: function(**{"fc_bias": None, **dict(zip(inputs, tensors, strict=True))})

    tensors = [t.to(device) for t in inputs.values()]
    check(
        call(mlp),
        call(mlp_reference),
        *tensors,
        names=tuple(inputs),
        upstream=upstream_of(upstream_layout, seed),
        roundings=3,  # dx: the two products and the kernel between them
    )


# ------------------------------------------------------------------------------------------------------- LayerNorm

# Two columns are left out: there the gradient is the rounding error of a difference, ours as PyTorch's.
WIDTHS = shapes(1030, least_columns=3)


@given(WIDTHS, DTYPES, LAYOUTS, LAYOUTS, st.booleans(), st.sampled_from([1e-5, 0.1]), st.booleans(), SEEDS)
def test_layer_norm(device, shape, dtype, layout, upstream_layout, has_bias, eps, fp32_weights, seed):
    x = numbers(seed, shape, dtype, layout).to(device)
    parameter = torch.float32 if fp32_weights else dtype
    columns = [numbers(seed + 1 + i, shape[-1:], parameter).to(device) for i in range(1 + has_bias)]
    check(
        lambda x, *columns: layer_norm(x, *columns, eps=eps),
        lambda x, *columns: layer_norm_reference(x, *columns, eps=eps),
        x,
        *columns,
        eager=lambda x, *columns: layer_norm_reference(x, *(c.to(x.dtype) for c in columns), eps=eps),
        names=("x", "weight", "bias")[: 2 + has_bias],
        upstream=upstream_of(upstream_layout, seed),
    )


@given(
    *(WIDTHS, DTYPES, LAYOUTS, LAYOUTS, LAYOUTS, st.booleans(), st.booleans()),
    *(st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([None, 0, 1]), SEEDS),
)
def test_add_layer_norm(
    device, shape, dtype, layout, residual_layout, upstream_layout, has_x_bias, fp32, dropout_p, unused, seed
):
    x = numbers(seed, shape, dtype, layout).to(device)
    wide = torch.float32 if fp32 else dtype  # residual stream and parameters
    residual = numbers(seed + 1, shape, wide, residual_layout).to(device)
    columns = [numbers(seed + 2 + i, shape[-1:], wide).to(device) for i in range(2 + has_x_bias)]
    options = dict(dropout_p=dropout_p, seed=torch.tensor([seed], device=device)) if dropout_p else {}
    keep = None
    if dropout_p:
        ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
        keep = plausible(add_layer_norm(ones, zeros, ones.new_ones(shape[-1]), **options)[0] != 0, dropout_p)

    def ours(x, residual, weight, bias, *x_bias):
        return add_layer_norm(x, residual, weight, bias, x_bias=x_bias[0] if x_bias else None, **options)

    def reference(x, residual, weight, bias, *x_bias):
        x_bias = x_bias[0].to(x.dtype) if x_bias else None
        return add_layer_norm_reference(x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p, keep=keep)

    outputs = iter(range(2))
    gradient = upstream_of(upstream_layout, seed)
    check(
        ours,
        reference,
        *(x, residual, *columns),
        names=("x", "residual", "weight", "bias", "x_bias")[: 4 + has_x_bias],
        upstream=lambda output: None if next(outputs) == unused else gradient(output),
    )


# ------------------------------------------------------------------------------------------------------- attention


def attention_keep(B: int, T: int, H: int, device: torch.device, **options) -> Tensor:
    """The dropout factors (B, H, T, T): uniform weights over one-hot values show which weights were dropped."""
    D = 32
    C = H * D
    keep = torch.zeros(B, H, T, T, device=device)
    for first in range(0, T, D):
        qkv = torch.zeros(B, T, 3 * C, device=device)
        j = torch.arange(first, min(first + D, T), device=device)
        for h in range(H):
            qkv[:, j, 2 * C + h * D + j - first] = 1
        out = causal_attention(qkv, H, **options).view(B, T, H, D).transpose(1, 2)
        keep[..., j] = out[..., : len(j)] * torch.arange(1, T + 1, device=device)[:, None]
    return keep


@st.composite
def documents(draw, tokens: int) -> list[int] | None:
    """Rising offsets; some documents are empty, some tokens are in none."""
    if draw(st.booleans()):
        return None
    return sorted(draw(st.lists(st.integers(0, tokens), min_size=2, max_size=6)))


@given(st.data())
def test_attention(device, data):
    B, H = data.draw(sizes(2), "B"), data.draw(st.integers(1, 2), "H")
    T, D = data.draw(sizes(70), "T"), data.draw(st.sampled_from([16, 17, 20, 32, 48, 64, 80, 128]), "D")
    dtype, layout, upstream_layout = data.draw(DTYPES), data.draw(LAYOUTS), data.draw(LAYOUTS)
    seed = data.draw(SEEDS)
    cu_seqlens = data.draw(documents(B * T), "documents")
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    options = dict(
        window=data.draw(st.none() | sizes(T + 3, 1), "window"),
        scale=data.draw(st.sampled_from([None, 0.5]), "scale"),
        cu_seqlens=cu_seqlens,
    )
    dropout_p, keep, dropout = data.draw(st.sampled_from([0.0, 0.0, 0.2, 0.7]), "dropout_p"), None, {}
    if dropout_p:
        dropout = dict(dropout_p=dropout_p, seed=torch.tensor(seed, device=device))
        keep = attention_keep(B, T, H, device, **dropout)
        seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        plausible(keep[..., seen] != 0, dropout_p)
        keep = torch.where(keep == 0, 0.0, 1 / (1 - dropout_p))
    check(
        lambda qkv: causal_attention(qkv, H, **options, **dropout),
        lambda qkv: causal_attention_reference(qkv, H, **options, keep=None if keep is None else keep.to(qkv.dtype)),
        numbers(seed, (B, T, 3 * H * D), dtype, layout).to(device),
        names=("qkv",),
        upstream=upstream_of(upstream_layout, seed),
    )


# ------------------------------------------------------------------------------------------------- head and loss


def eager_loss(x, weight, targets, *, ignore_index, reduction, label_smoothing, z_loss, vocab_size):
    """What a PyTorch user writes: the product in the inputs' dtype, the loss in float32."""
    logits = F.linear(x, weight[:vocab_size])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counts = (targets >= 0) & (targets != ignore_index)
    losses = F.cross_entropy(
        logits, torch.where(counts, targets, -1), ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    losses = losses + torch.where(counts, z_loss * torch.logsumexp(logits, -1) ** 2, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()


@given(st.data())
def test_linear_cross_entropy(device, data):
    N, C, V = data.draw(sizes(40), "N"), data.draw(sizes(70, 1), "C"), data.draw(sizes(4200, 1), "V")
    dtype, layout, weight_layout = data.draw(DTYPES), data.draw(LAYOUTS), data.draw(LAYOUTS)
    seed = data.draw(SEEDS)
    vocab_size = data.draw(st.none() | sizes(V, 1), "vocab_size")
    options = dict(
        ignore_index=data.draw(st.sampled_from([-100, -1, 0]), "ignore_index"),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"]), "reduction"),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1]), "label_smoothing"),
        z_loss=data.draw(st.sampled_from([0.0, 1e-2]), "z_loss"),
        vocab_size=vocab_size,
    )
    chunk_bytes = data.draw(st.sampled_from([1, 2**15, 2**29]), "chunk_bytes")
    targets = torch.randint(-1, vocab_size or V, (N,), generator=torch.Generator().manual_seed(seed))
    if data.draw(st.booleans(), "some ignored"):
        targets[:: data.draw(st.integers(1, 3), "every")] = options["ignore_index"]
    check(
        functools.partial(linear_cross_entropy, **options, chunk_bytes=chunk_bytes),
        functools.partial(linear_cross_entropy_reference, **options),
        numbers(seed + 1, (N, C), dtype, layout).to(device),
        numbers(seed + 2, (V, C), dtype, weight_layout, scale=C**-0.5).to(device),
        targets.to(device),
        eager=functools.partial(eager_loss, **options),
        names=("x", "weight", "targets"),
    )


# ------------------------------------------------------------------------------------------------------- embedding


@given(st.data())
def test_embedding(device, data):
    B, T, C = data.draw(sizes(4), "B"), data.draw(sizes(40), "T"), data.draw(sizes(300, 1), "C")
    V, P = data.draw(sizes(300, 1), "V"), T + data.draw(st.integers(0, 3), "P - T")
    dtype, layout, weight_layout = data.draw(DTYPES), data.draw(LAYOUTS), data.draw(LAYOUTS)
    seed = data.draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    few = data.draw(st.sampled_from([1, 2, V]), "different tokens")
    idx = torch.randint(min(few, V), (T, B), generator=generator).t().to(device)
    positions = None
    if P and data.draw(st.booleans(), "positions given"):
        shape = data.draw(st.sampled_from([(B, T), (T,)]), "positions")
        positions = torch.randint(P, shape, generator=generator).to(device)
    dropout_p, keep, options = data.draw(st.sampled_from([0.0, 0.0, 0.3]), "dropout_p"), None, {}
    if dropout_p:
        options = dict(dropout_p=dropout_p, seed=torch.tensor([seed], device=device))
        ones = torch.ones(max(V, P), C, device=device)
        keep = plausible(token_position_embedding(idx, ones[:V], ones[:P], positions, **options) != 0, dropout_p)
    check(
        lambda idx, wte, wpe: token_position_embedding(idx, wte, wpe, positions, **options),
        lambda idx, wte, wpe: token_position_embedding_reference(
            idx, wte, wpe, positions, dropout_p=dropout_p, keep=keep
        ),
        idx,
        numbers(seed, (V, C), dtype, weight_layout).to(device),
        numbers(seed + 1, (P, C), dtype).to(device),
        names=("idx", "token_weight", "position_weight"),
        upstream=upstream_of(layout, seed),
    )


# ------------------------------------------------------------------------------------------------- the fuzzing itself


def test_layouts_differ_and_hold_the_same_numbers():
    x = torch.randn(3, 4, 6)
    strides = set()
    for layout in ("contiguous", "rows apart", "columns apart", "transposed", "misaligned"):
        y = laid_out(x, layout)
        assert torch.equal(x, y)
        strides.add((y.stride(), y.storage_offset()))
    assert len(strides) == 5
    assert laid_out(x, "expanded").stride()[0] == 0


def test_profiles():
    assert settings.get_profile("ci").derandomize and settings.get_profile("ci").max_examples <= 50
    assert not settings.get_profile("long").derandomize and settings.get_profile("long").max_examples >= 500


def test_an_implausible_mask_is_seen():
    with pytest.raises(AssertionError, match="kept"):
        plausible(torch.ones(1000), 0.2)
