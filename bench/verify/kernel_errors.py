"""One case of the registry beside eager PyTorch and HuggingFace, against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.bench.cases.registry import HEAD_SIZE, Case, operations
from fastgpt2.bench.verify.error_rule import Row, compare, mean_size, token_losses
from fastgpt2.gpt2.config import LAYER_NORM_EPS


def verify_case(case: Case, device: torch.device, with_hf: bool) -> Iterator[Row]:
    """Outputs and the gradient of every floating input."""
    torch.manual_seed(0)
    inputs = case.inputs(device)

    def run(function: Callable, wide: bool = False) -> list[Tensor]:
        own = tuple(_copy(t, wide) for t in inputs)  # decoding writes into its cache
        outputs = case.forward(own, function)
        generator = torch.Generator().manual_seed(1)
        upstream = (torch.randn(o.shape, generator=generator).to(o.device, case.dtype).to(o.dtype) for o in outputs)
        return [*(o.detach() for o in outputs), *case.backward(own, outputs, tuple(upstream))]

    truth, eager, ours = run(case.reference, wide=True), run(case.eager), run(case.ours)
    hf = run(HUGGINGFACE[case.op]) if with_hf else [None] * len(truth)
    arguments = inspect.signature(operations()[case.op]).parameters
    gradients = [f"d {name}" for name, t in zip(arguments, inputs, strict=False) if t.requires_grad]
    outputs = len(truth) - len(gradients)
    names = [f"output {i}" if outputs > 1 else "output" for i in range(outputs)] + gradients
    expected = 0.0
    if case.op == "linear_cross_entropy":  # a mean of losses, in which errors cancel by luck
        exact, rounded = (_losses(*(_copy(t, wide) for t in inputs)) for wide in (True, False))
        expected = mean_size(rounded - exact) / mean_size(exact)
    for name, a, e, h, t in zip(names, ours, eager, hf, truth, strict=True):
        allowed = expected if name == "output" else 0.0
        yield compare(case.op, case.toggle, name, a, e, h, t, expected=allowed)


def _copy(t: Tensor, wide: bool) -> Tensor:
    t = t.detach().clone().requires_grad_(t.requires_grad)
    return t.detach().double().requires_grad_(t.requires_grad) if wide and t.is_floating_point() else t


def _losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_losses(F.linear(x, weight)[None], targets[None]).detach()


# ---------------------------------------------------------------------------------------------------- HuggingFace


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, LAYER_NORM_EPS)


def _gelu(x: Tensor) -> Tensor:
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_new"](x)


def _attention(qkv: Tensor) -> Tensor:
    """HuggingFace's attention module without its two projections."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    C = qkv.size(-1) // 3
    config = GPT2Config(n_embd=C, n_head=C // HEAD_SIZE, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    module = GPT2Attention(config, layer_idx=0)
    module.c_attn = module.c_proj = nn.Identity()
    return module(qkv)[0]


def _decode_attention(qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """The last token of each row, from a pass over all of them; queries of the others do not matter."""
    rows = []
    for row, (new, length) in enumerate(zip(qkv, lengths.tolist(), strict=True)):
        k, v = cache[:, row, :, :length].transpose(1, 2).flatten(2)  # (length, C) each
        before = torch.cat((torch.zeros_like(k), k, v), 1)
        rows.append(_attention(torch.cat((before, new))[None])[:, -1:])
    return torch.cat(rows)


def _decode_linear(x: Tensor, weight: Tensor, bias: Tensor, *around: Tensor) -> Tensor:
    """HuggingFace's c_fc with the LayerNorm and GELU around it, or its c_proj and the sum after."""
    if len(around) == 1:
        return around[0] + F.linear(x, weight, bias)
    norm_weight, norm_bias = around
    return _gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, LAYER_NORM_EPS), weight, bias))


def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def _embedding(idx: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    positions = torch.arange(idx.size(1), device=idx.device)
    return F.embedding(idx, token_weight) + F.embedding(positions, position_weight)


# Registered op -> how HuggingFace computes it from the case's inputs.
HUGGINGFACE: dict[str, Callable] = {
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS),
    "add_layer_norm": _add_layer_norm,
    "gelu": _gelu,
    "bias_gelu": lambda x, bias: _gelu(x + bias),
    "mlp": lambda x, w, b, v, c: F.linear(_gelu(F.linear(x, w, b)), v, c),
    "causal_attention": _attention,
    "decode_attention": _decode_attention,
    "decode_linear": _decode_linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "token_position_embedding": _embedding,
}
