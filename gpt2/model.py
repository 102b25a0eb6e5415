"""GPT-2, module for module and key for key as HuggingFace has it, in terms of `ops`.

    x = wte[idx] + wpe[0..T-1]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))        in every block
    logits = ln_f(x) wte^T

The sum `x + ...` that ends a branch is computed together with the LayerNorm that follows it, so a block receives the
branch before it (x, and the bias of its projection if that is still to add) beside the residual stream.

Shapes: B batch, T sequence, C = H * D channels, H heads, D head size, V vocabulary.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.gpt2 import hardware, ops
from fastgpt2.gpt2.config import LAYER_NORM_EPS, GPTConfig
from fastgpt2.gpt2.ops import Kernels

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from fastgpt2.gpt2.cache import KVCache


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = config.attention_scale(layer)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, h: Tensor, kernels: Kernels, cache: KVCache | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """h (B, T, C) -> (B, T, C), and c_proj's bias if it is still to add. documents: of `ops.document_mask`."""
        qkv = ops.linear(h, self.c_attn.weight, self.c_attn.bias)  # (B, T, 3C)
        if cache is None:
            dropout_p = self.dropout if self.training else 0.0
            y = ops.causal_attention(qkv, self.n_head, self.scale, dropout_p, kernels, documents)
        else:
            y = cache.attention(self.layer, qkv, self.n_head, self.scale, kernels)
        return ops.project(y, self.c_proj.weight, self.c_proj.bias, kernels)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, h: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor | None]:
        """h (B, T, C) -> (B, T, C), and c_proj's bias if it is still to add."""
        return ops.mlp(h, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, kernels)


class LayerNorm(nn.LayerNorm):
    """Parameters of a LayerNorm; computed together with the residual add before it."""

    def forward(self, x, residual=None, x_bias=None, dropout_p=0.0, *, kernels):  # type: ignore[override]
        """s = residual + dropout(x + x_bias) -> (s, LayerNorm(s)), all (B, T, C)."""
        p = dropout_p if self.training else 0.0
        return ops.add_layer_norm(
            x, residual, self.weight, self.bias, self.eps, x_bias=x_bias, dropout_p=p, kernels=kernels
        )


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x_bias: Tensor | None,
        residual: Tensor | None,
        kernels: Kernels,
        cache: KVCache | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The branch before (x, x_bias) and the stream so far -> this block's last branch and the stream before it."""
        if cache is not None and residual is None and ops.few_rows(x, kernels) and self._plain():
            return self._few_rows(x, kernels, cache), None, None
        residual, h = self.ln_1(x, residual, x_bias, self.dropout, kernels=kernels)
        x, x_bias = self.attn(h, kernels, cache, documents)
        residual, h = self.ln_2(x, residual, x_bias, self.dropout, kernels=kernels)
        x, x_bias = self.mlp(h, kernels)
        return x, x_bias, residual

    def _few_rows(self, x: Tensor, kernels: Kernels, cache: KVCache) -> Tensor:
        """The whole stream (B, T, C) through the block in five launches."""
        qkv = ops.decode_linear(x, self.attn.c_attn, self.ln_1)
        y = cache.attention(self.attn.layer, qkv, self.attn.n_head, self.attn.scale, kernels)
        x = ops.decode_linear(y, self.attn.c_proj, residual=x)
        h = ops.decode_linear(x, self.mlp.c_fc, self.ln_2, gelu=True)
        return ops.decode_linear(h, self.mlp.c_proj, residual=x)

    def _plain(self) -> bool:
        """Whether `_few_rows`, which calls no module inside, may: they are ours, and nobody listens to them."""
        ours = (self.ln_1, LayerNorm), (self.attn, CausalSelfAttention), (self.ln_2, LayerNorm), (self.mlp, MLP)
        return all(type(m) is kind and not m._forward_hooks and not m._forward_pre_hooks for m, kind in ours)


class Transformer(nn.Module):
    """Everything below the head. `recompute`: training keeps the blocks' inputs only and computes the rest twice."""

    recompute = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)

    def forward(
        self, idx: Tensor, kernels: Kernels, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """idx (B, T) -> the normalised stream (B, T, C). documents: as `GPT.forward` has them."""
        if documents is not None:
            documents = ops.document_mask(documents, idx.size(0), idx.size(1), kernels)
        dropout_p = self.dropout if self.training else 0.0
        if cache is not None and cache.continues(idx):
            # One token a row, at positions of their own: as if they were one row of B tokens.
            positions = nn.functional.embedding(cache.lengths, self.wpe.weight)  # (B, C)
            x = ops.embedding(idx.mT, self.wte.weight, positions, dropout_p, kernels).transpose(0, 1)
        else:
            x = ops.embedding(idx, self.wte.weight, self.wpe.weight, dropout_p, kernels)
        x_bias, residual = None, None
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for block in self.h:
            run = functools.partial(checkpoint, block, use_reentrant=False) if recompute else block
            x, x_bias, residual = run(x, x_bias, residual, kernels, cache, documents)
        _, h = self.ln_f(x, residual, x_bias, self.dropout, kernels=kernels)
        return h


class GPT(nn.Module):
    """GPT-2 with a language-model head. `kernels` says how it is computed: see `Kernels` and `kernels` below."""

    def __init__(self, config: GPTConfig, kernels: str | Kernels = "auto"):
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"config is {config!r}, expected a GPTConfig such as GPTConfig.preset('gpt2')")
        self.config = config
        self.kernels = kernels
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie_weights()
        self._initialise()

    def tie_weights(self) -> None:
        """The head's weight is the token table: one parameter under two names."""
        self.lm_head.weight = self.transformer.wte.weight

    def _apply(self, fn, recurse=True):
        """Every move and cast goes through here; from or to the meta device it makes new parameters: tied again."""
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def _initialise(self) -> None:
        """N(0, 0.02) for weights, zero for biases; the projections onto the residual stream N(0, 0.02 / sqrt(2 L))."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    # ---------------------------------------------------------------------------------------------- the switch

    @property
    def kernels(self) -> Kernels:
        """How each op is computed. Assign "auto", "triton", "torch", "attention,gelu" or a Kernels; "auto" is Triton
        where the parameters are on a CUDA or ROCm device and PyTorch elsewhere."""
        return ops.kernels_for(self._kernels, self.lm_head.weight.device)

    @kernels.setter
    def kernels(self, spec: str | Kernels) -> None:
        self._kernels = ops.requested_kernels(spec)

    @contextlib.contextmanager
    def use_kernels(self, spec: str | Kernels | None = None, **toggles: str) -> Iterator[GPT]:
        """Other kernels inside a `with`: `model.use_kernels("torch")`, `model.use_kernels(gelu="torch")`."""
        before = self._kernels
        for op in toggles:
            if op not in Kernels.names():
                raise ValueError(f"use_kernels got {op!r}, there are {', '.join(Kernels.names())}")
        try:
            if spec is not None:
                self.kernels = spec
            if toggles:
                self.kernels = dataclasses.replace(self.kernels, **toggles)
            yield self
        finally:
            self._kernels = before

    # ------------------------------------------------------------------------------------------------ computing

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and mean cross-entropy, nanoGPT's contract.

        idx: (B, T) int64, T at most block_size. targets: (B, T) int64, the token that follows each of idx; negative
        ones (-1 or -100) are ignored. cache: without targets and in eval mode; `KVCache` says what idx then is.
        documents: (n + 1,) int32 rising from 0 to B*T: where documents begin in the flattened idx, and its end. A token
        sees its own document only. `data.document_starts` makes them; without: all of a row. Not with a cache.
        Returns (logits (B, T, V), loss) with targets and (logits (B, 1, V) of the last position, None) without.
        A training step (train mode, gradients on) with kernels.cross_entropy="triton" never makes whole logits:
        there they are None.
        Raises ValueError for a shape, a token or a target out of range (RuntimeError under torch.compile; on a GPU,
        where tokens are checked without waiting for the device, a device-side assertion), TypeError for another dtype.
        """
        self._check("idx", idx)
        if targets is not None:
            self._check("targets", targets, idx.shape)
        if cache is not None:
            cache.make_room(idx, targets, self.training)
        if documents is not None:
            self._check_documents(documents, idx, cache)
        kernels = self.kernels
        x = self.transformer(idx, kernels, cache, documents)
        V = self.config.vocab_size
        if targets is None:
            x = x[:, -1:] if cache is None else cache.last(x)
            few_rows = cache is not None and ops.few_rows(x, kernels)
            logits = ops.decode_linear(x, self.lm_head) if few_rows else ops.linear(x, self.lm_head.weight)
            return logits[..., :V], None
        want_logits = not (self.training and torch.is_grad_enabled())
        return ops.head_loss(x, self.lm_head.weight, targets, V, want_logits, kernels)

    def _check(self, name: str, tokens: Tensor, shape: torch.Size | None = None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} is a {type(tokens).__name__}, expected a tensor (B, T) of int64 tokens")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} is {tokens.dtype}, expected int64 tokens")
        if tokens.dim() != 2 or (shape is not None and tokens.shape != shape):
            wanted = "(B, T)" if shape is None else tuple(shape)
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}, expected {wanted}")
        if tokens.size(1) == 0:
            raise ValueError(f"{name} is empty: its shape is {tuple(tokens.shape)}, a sequence has at least one token")
        if tokens.size(1) > self.config.block_size:
            raise ValueError(f"{name} has {tokens.size(1)} tokens a row, block_size is {self.config.block_size}")
        V = self.config.vocab_size
        right = tokens == tokens.clamp(min=None if name == "targets" else 0, max=V - 1)
        allowed = f"vocab_size is {V}: allowed are 0..{V - 1}"
        out_of_range = f"{name} holds a token out of range, {allowed}"
        if torch.compiler.is_compiling():
            torch._assert_async(right.all(), out_of_range)
            return
        try:
            torch._assert_async(right.all(), out_of_range)  # waits for no GPU
        except RuntimeError:
            raise ValueError(f"{name} holds token {int(tokens[~right][0])}, {allowed}") from None

    def _check_documents(self, documents: Tensor, idx: Tensor, cache: KVCache | None) -> None:
        if cache is not None:
            raise ValueError("documents cannot be used together with a cache: allowed is one of them")
        if documents.dtype != torch.int32 or documents.dim() != 1 or documents.numel() < 2:
            raise ValueError(f"documents is {documents.dtype} {tuple(documents.shape)}, expected int32 (n + 1,)")
        right = (documents[0] == 0) & (documents[-1] == idx.numel()) & (documents.diff() > 0).all()
        if torch.compiler.is_compiling():
            torch._assert_async(right, "documents is expected to rise from 0 to the number of tokens of idx")
            return
        expected = f"expected to rise from 0 to {idx.numel()}, the tokens of idx"
        try:
            torch._assert_async(right, f"documents is {expected}")  # waits for no GPU
        except RuntimeError:
            raise ValueError(f"documents is {documents.tolist()}, {expected}") from None

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        greedy: bool = False,
        **more: Any,
    ) -> Tensor:
        """idx (B, T) and max_new_tokens more: (B, T + max_new_tokens).

        more: min_p, repetition_penalty, prompt_lengths, stop_tokens and others of `fastgpt2.gpt2.generate.generate`.
        """
        from fastgpt2.gpt2.generate import generate

        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, generator, greedy, **more)

    # ------------------------------------------------------------------------------------- weights in and out

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        override_args: Mapping[str, Any] | None = None,
        *,
        kernels: str | Kernels = "auto",
    ) -> GPT:
        """A hub name ("gpt2", "gpt2-medium", ...) or a local folder. See `fastgpt2.gpt2.pretrained.from_pretrained`."""
        from fastgpt2.gpt2.pretrained import from_pretrained

        return from_pretrained(name_or_folder, override_args, kernels=kernels)

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors, which `GPT2LMHeadModel.from_pretrained` reads."""
        from fastgpt2.gpt2.pretrained import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_huggingface(cls, hf_model: GPT2LMHeadModel, *, kernels: str | Kernels = "auto") -> GPT:
        """Our copy of a live `GPT2LMHeadModel`, on its device and in its dtype."""
        from fastgpt2.gpt2.huggingface import from_huggingface

        return from_huggingface(hf_model, kernels=kernels)

    def to_huggingface(self) -> GPT2LMHeadModel:
        """A `GPT2LMHeadModel` with copies of these weights, on this device and in this dtype."""
        from fastgpt2.gpt2.huggingface import to_huggingface

        return to_huggingface(self)

    # ------------------------------------------------------------------------------------- nanoGPT's companions

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, the tied head counted once; without the position table by default."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first `block_size` positions. Call it before the optimizer is built."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size is {block_size}, allowed are 1..{self.config.block_size}")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.num_embeddings = block_size
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: Iterable[float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW that decays only tensors of two and more dimensions. See `fastgpt2.gpt2.optim.adamw`."""
        from fastgpt2.gpt2.optim import adamw

        return adamw(self, weight_decay, learning_rate, betas, device_type)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation: achieved FLOPs of `fwdbwd_per_iter` sequences in `dt` seconds over this GPU's bf16
        peak, by `GPTConfig.flops_per_token`. NaN where the peak is unknown."""
        flops = self.config.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        peak = hardware.peak_flops(self.lm_head.weight.device)
        return math.nan if peak is None else flops / dt / peak
