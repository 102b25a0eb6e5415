"""Every op behind a toggle, with inputs, and how it does beside eager PyTorch and HuggingFace in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.comparison import Row, compare, mean_size, token_losses
from fastgpt2.gpt2.config import LAYER_NORM_EPS
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels


@dataclass
class Op:
    """An op of `ops` with inputs: `call(kernels, *tensors)`, and how HuggingFace computes the same."""

    name: str
    toggle: str
    inputs: dict[str, Tensor]
    call: Callable[..., Tensor | tuple]
    huggingface: Callable[..., Tensor | tuple]
    given: dict[str, Tensor] = field(default_factory=dict)  # integer inputs
    terms: Callable[..., Tensor] | None = None  # of the same inputs: what the output is the mean of
    gradients: bool = True  # whether it has any


def op_cases(B: int, T: int, C: int, H: int, V: int, device: torch.device) -> list[Op]:
    """Every op behind a toggle at one size, in float64; inputs have the scale they have in GPT-2."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(V, shape, generator=generator).to(device)

    norm = dict(weight=random(C, std=0.2, mean=1.0), bias=random(C, std=0.2))
    x, residual = random(B, T, C), random(B, T, C, std=3.0)
    targets = tokens(B, T)
    targets[:, -1] = -1
    return [
        Op(
            "attention",
            "attention",
            dict(qkv=random(B, T, 3 * C)),
            lambda k, qkv: ops.causal_attention(qkv, H, (C // H) ** -0.5, 0.0, k),
            lambda qkv: _hf_attention(qkv, H),
        ),
        Op(
            "decode attention",
            "attention",
            dict(qkv=random(B, 1, 3 * C), cache=random(2, B, H, T, C // H)),
            lambda k, qkv, cache, n: ops.decode_attention(qkv, cache.clone(), n, H, (C // H) ** -0.5, k),
            lambda qkv, cache, n: _hf_decode_attention(qkv, cache, n, H),
            dict(lengths=torch.arange(T - B, T, dtype=torch.int32, device=device)),
            gradients=False,
        ),
        Op(
            "LayerNorm",
            "layer_norm",
            dict(x=x, **norm),
            lambda k, x, w, b: ops.add_layer_norm(x, None, w, b, LAYER_NORM_EPS, kernels=k)[1],
            lambda x, w, b: F.layer_norm(x, w.shape, w, b, LAYER_NORM_EPS),
        ),
        Op(
            "add + LayerNorm",
            "layer_norm",
            dict(x=x, residual=residual, **norm, x_bias=random(C)),
            lambda k, x, r, w, b, xb: ops.add_layer_norm(x, r, w, b, LAYER_NORM_EPS, x_bias=xb, kernels=k),
            lambda x, r, w, b, xb: (s := x + xb + r, F.layer_norm(s, w.shape, w, b, LAYER_NORM_EPS)),
        ),
        Op(
            "MLP with GELU",
            "gelu",
            dict(
                x=x,
                fc_weight=random(4 * C, C, std=C**-0.5),
                fc_bias=random(4 * C, std=0.5),
                proj_weight=random(C, 4 * C, std=(4 * C) ** -0.5),
                proj_bias=random(C, std=0.5),
            ),
            lambda k, x, w1, b1, w2, b2: ops.mlp(x, w1, b1, w2, b2, k)[0],
            lambda x, w1, b1, w2, b2: F.linear(_hf_gelu(F.linear(x, w1, b1)), w2, b2),
        ),
        Op(
            "head + cross-entropy",
            "cross_entropy",
            dict(x=x, weight=random(V, C, std=C**-0.5)),
            lambda k, x, w, targets: ops.head_loss(x, w, targets, V, False, k)[1],
            lambda x, w, targets: F.cross_entropy(
                F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1),
                targets.flatten(),
                ignore_index=-1,
            ),
            dict(targets=targets),
            lambda x, w, targets: token_losses(F.linear(x, w), targets),
        ),
        Op(
            "embedding",
            "embedding",
            dict(token_weight=random(V, C), position_weight=random(T + 1, C)),
            lambda k, wte, wpe, idx: ops.embedding(idx, wte, wpe, 0.0, k),
            lambda wte, wpe, idx: F.embedding(idx, wte) + F.embedding(torch.arange(idx.size(1), device=device), wpe),
            dict(idx=tokens(B, T)),
        ),
    ]


def _hf_gelu(x: Tensor) -> Tensor:
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_new"](x)


def _hf_attention(qkv: Tensor, H: int) -> Tensor:
    """HuggingFace's attention module without its two projections."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=qkv.size(-1) // 3, n_head=H, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    module = GPT2Attention(config, layer_idx=0)
    module.c_attn = module.c_proj = nn.Identity()
    return module(qkv)[0]


def _hf_decode_attention(qkv: Tensor, cache: Tensor, lengths: Tensor, H: int) -> Tensor:
    """The last token of each row, from a pass over all of them; queries of the others do not matter."""
    rows = []
    for row, (new, length) in enumerate(zip(qkv, lengths.tolist(), strict=True)):
        k, v = cache[:, row, :, :length].transpose(1, 2).flatten(2)  # (length, C) each
        before = torch.cat((torch.zeros_like(k), k, v), 1)
        rows.append(_hf_attention(torch.cat((before, new))[None], H)[:, -1:])
    return torch.cat(rows)


def verify_op(op: Op, dtype: torch.dtype, with_hf: bool) -> Iterator[Row]:
    """Outputs and the gradient of every floating input, for one op in one dtype."""
    triton = Kernels.parse(op.toggle)
    inputs = {name: t.to(dtype) for name, t in op.inputs.items()}

    def run(function: Callable, as_dtype: torch.dtype) -> list[Tensor]:
        own = [t.detach().to(as_dtype).requires_grad_(op.gradients) for t in inputs.values()]
        out = function(*own, *op.given.values())
        outputs = list(out) if isinstance(out, tuple) else [out]
        if not op.gradients:
            return outputs
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
        grads = torch.autograd.grad(
            outputs, own, [g.to(o.device, o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        )
        return [*(o.detach() for o in outputs), *grads]

    truth = run(lambda *a: op.call(ALL_TORCH, *a), torch.float64)
    eager = run(lambda *a: op.call(ALL_TORCH, *a), dtype)
    ours = run(lambda *a: op.call(triton, *a), dtype)
    hf = run(op.huggingface, dtype) if with_hf else [None] * len(truth)
    gradients = [f"d {name}" for name in inputs if op.gradients]
    outputs = len(truth) - len(gradients)
    names = [f"output {i}" if outputs > 1 else "output" for i in range(outputs)] + gradients
    expected = 0.0
    if op.terms is not None:
        exact = op.terms(*(t.double() for t in inputs.values()), *op.given.values())
        expected = mean_size(op.terms(*inputs.values(), *op.given.values()) - exact) / mean_size(exact)
    for name, a, e, h, t in zip(names, ours, eager, hf, truth, strict=True):
        yield compare(op.name, op.toggle, name, a, e, h, t, expected=expected if name == "output" else 0.0)
