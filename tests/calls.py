"""Small calls of every public kernel function, one for each thing that can be switched in it: what the guards run.

    for call in CALLS:
        inputs = call.inputs(torch.bfloat16, device)
        results = call.results(inputs)                    # outputs, then the gradient of every floating input

Sizes are odd and cross a tile's end in every dimension, so that masks matter; rows have gaps where `sliced` made them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt2.kernels.attention import causal_attention
from fastgpt2.kernels.decode_attention import decode_attention
from fastgpt2.kernels.decode_linear import decode_linear
from fastgpt2.kernels.embedding import token_position_embedding
from fastgpt2.kernels.gelu import bias_gelu, gelu
from fastgpt2.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt2.kernels.mlp import mlp


class New:
    """Makes the inputs of a call, the same ones every time, in its dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def sliced(self, *shape: int) -> Tensor:
        """Normal numbers in rows with a gap of 5 elements between them."""
        return self(*shape[:-1], shape[-1] + 5)[..., : shape[-1]]

    def below(self, limit: int, *shape: int) -> Tensor:
        """int64 from 0 to limit - 1."""
        return torch.randint(limit, shape, generator=self.generator).to(self.device)

    def values(self, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Call:
    """`function` takes the tensors that `make` gives. `op` is the name of the public function that it calls."""

    op: str
    what: str
    make: Callable[[New], tuple[Tensor, ...]]
    function: Callable
    differentiable: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}-{self.what}"

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors; floating ones require gradients, if the function has any."""
        made = self.make(New(dtype, device))
        return tuple(t.requires_grad_(t.is_floating_point() and self.differentiable) for t in made)

    def results(self, inputs: tuple[Tensor, ...], move: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
        """The outputs, then the gradients that exist; `move` is applied to the upstream gradients."""
        outputs = self.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not self.differentiable:
            return list(outputs)
        generator = torch.Generator().manual_seed(2)
        upstream = [move(torch.randn(o.shape, generator=generator).to(o.device, o.dtype)) for o in outputs]
        floating = [t for t in inputs if t.is_floating_point()]
        gradients = torch.autograd.grad(outputs, floating, upstream, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]


def _calls() -> Iterator[Call]:
    yield from _elementwise()
    yield from _attention()
    yield from _decode_attention()
    yield from _decode_linear()
    yield from _loss()
    yield from _embedding()


def _elementwise() -> Iterator[Call]:
    yield Call("gelu", "sliced", lambda new: (new.sliced(9, 259),), gelu)
    yield Call("gelu", "scalar", lambda new: (new(),), gelu)
    # More rows than one program of the backward takes: two partial sums of the bias gradient.
    yield Call("bias_gelu", "many-rows", lambda new: (new(70, 259), new(259)), bias_gelu)
    yield Call("layer_norm", "sliced", lambda new: (new.sliced(7, 129), new(129), new(129)), layer_norm)
    yield Call("layer_norm", "no-bias", lambda new: (new(3, 2, 33), new(33)), layer_norm)
    yield Call("layer_norm", "many-rows", lambda new: (new(70, 20), new(20), new(20)), layer_norm)
    yield Call("layer_norm", "width-1600", lambda new: (new(5, 1600), new(1600), new(1600)), layer_norm)
    yield Call(
        "add_layer_norm",
        "plain",
        lambda new: (new.sliced(5, 127), new.sliced(5, 127), new(127), new(127)),
        add_layer_norm,
    )
    yield Call(
        "add_layer_norm",
        "bias-dropout-float32",
        lambda new: (
            new(70, 65),
            *(new(*shape, dtype=torch.float32) for shape in ((70, 65), (65,), (65,), (65,))),
            new.values(7),
        ),
        lambda x, r, w, b, x_bias, seed: add_layer_norm(x, r, w, b, x_bias=x_bias, dropout_p=0.3, seed=seed),
    )
    yield Call("mlp", "sliced", lambda new: (new.sliced(9, 24), new(40, 24), new(40), new(24, 40), new(24)), mlp)
    yield Call(
        "mlp",
        "frozen-weights",
        lambda new: (new(3, 5, 24), new(40, 24), new(40), new(24, 40)),
        lambda x, fc_weight, fc_bias, proj_weight: mlp(x, fc_weight.detach(), fc_bias, proj_weight.detach()),
    )


def _attention() -> Iterator[Call]:
    def attention(what: str, B: int, T: int, H: int, D: int, make: Callable | None = None, **options) -> Call:
        def default(new):
            return (new(B, T, 3 * H * D),)

        return Call("causal_attention", what, make or default, functools.partial(causal_attention, n_head=H, **options))

    yield attention("plain", 1, 150, 2, 16)
    yield attention("one-token", 2, 1, 2, 32)
    yield attention("padded-head-strided", 2, 37, 2, 20, lambda new: (new.sliced(2, 37, 120),))
    yield attention("window", 1, 150, 1, 16, window=17)
    yield attention("head-size-128", 1, 70, 1, 128)
    yield Call(
        "causal_attention",
        "documents",
        # Some tokens are before the first and after the last one; one document crosses the end of a row.
        lambda new: (new(2, 75, 96), new.values(3, 40, 41, 80, 147, dtype=torch.int32)),
        lambda qkv, cu_seqlens: causal_attention(qkv, 2, cu_seqlens=cu_seqlens),
    )
    yield Call(
        "causal_attention",
        "dropout-window",
        lambda new: (new(1, 70, 96), new.values(5)),
        lambda qkv, seed: causal_attention(qkv, 2, dropout_p=0.3, seed=seed, window=40),
    )


def _decode_attention() -> Iterator[Call]:
    def decode(what: str, H: int, S: int, D: int, *lengths: int) -> Call:
        def make(new):
            B = len(lengths)
            return new.sliced(B, 1, 3 * H * D), new(2, B, H, S, D), new.values(*lengths, dtype=torch.int32)

        def function(qkv, cache, lengths):
            cache = torch.empty_like(cache).copy_(cache)  # inputs stay as they are: the copy is a result
            return decode_attention(qkv, cache, lengths, H), cache

        return Call("decode_attention", what, make, function, differentiable=False)

    yield decode("one-split", 2, 37, 20, 0, 36)
    yield decode("splits", 1, 131, 16, 130)
    yield decode("full-cache", 1, 70, 128, 70)


def _decode_linear() -> Iterator[Call]:
    def call(what: str, M: int, K: int, N: int) -> Call:
        def make(new):
            return new.sliced(M, K), new.sliced(N, K), new(N), new(K), new(K), new.sliced(M, N)

        def function(x, weight, bias, norm_weight, norm_bias, residual):
            norm = dict(norm_weight=norm_weight, norm_bias=norm_bias)
            return decode_linear(x, weight, bias, **norm, gelu=True, residual=residual)

        return Call("decode_linear", what, make, function, differentiable=False)

    yield call("one-row", 1, 1100, 9)
    yield call("rows", 3, 300, 35)
    yield Call("decode_linear", "plain", lambda new: (new(40, 33), new(17, 33)), decode_linear, differentiable=False)


def _loss() -> Iterator[Call]:
    def loss(what: str, N: int, C: int, V: int, ignored: int = -100, **options) -> Call:
        def make(new):
            targets = new.below(options.get("vocab_size", V), N)
            targets[1::3] = ignored
            return new(N, C), new(V, C), targets

        options = {"ignore_index": ignored} | options
        return Call("linear_cross_entropy", what, make, functools.partial(linear_cross_entropy, **options))

    yield loss("mean", 5, 24, 5003)
    yield loss("sum-smoothed", 5, 24, 67, ignored=3, reduction="sum", label_smoothing=0.1, z_loss=0.01)
    yield loss("none-chunks-padded", 7, 24, 67, reduction="none", vocab_size=61, chunk_bytes=1200)
    yield loss("mean-chunks", 7, 24, 67, chunk_bytes=1200)
    yield Call(
        "linear_cross_entropy",
        "frozen-weight",
        lambda new: (new.sliced(5, 24), new(67, 24), new.below(67, 5)),
        lambda x, weight, targets: linear_cross_entropy(x, weight.detach(), targets),
    )


def _embedding() -> Iterator[Call]:
    op = "token_position_embedding"
    yield Call(
        op, "plain", lambda new: (new.below(11, 3, 15), new.sliced(11, 259), new(20, 259)), token_position_embedding
    )
    yield Call(
        op,
        "one-token-dropout",  # one run of equal tokens, longer than a window of the segment sum
        lambda new: (new.below(1, 3, 25) + 4, new(11, 40), new(25, 40), new.values(3)),
        lambda idx, wte, wpe, seed: token_position_embedding(idx, wte, wpe, dropout_p=0.4, seed=seed),
    )
    yield Call(
        op,
        "positions",
        lambda new: (new.below(200, 15, 3).t(), new(200, 40), new(50, 40), new.below(50, 3, 15)),
        token_position_embedding,
    )


CALLS = tuple(_calls())
