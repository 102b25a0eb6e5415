"""GPT-2, module for module and key for key as HuggingFace has it, in terms of `ops`.

    x = wte[idx] + wpe[0..T-1]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))        in every block
    logits = ln_f(x) wte^T

Every module is one of PyTorch's or of this file, and calling it does what its class says: hooks, adapters and
replacements work. Where modules are stock (see `is_stock`), what lies between two matrix products is fused: the sum
that ends a branch is computed together with the LayerNorm that follows it, also across the border of two blocks.

Shapes: B batch, T sequence, C = H * D channels, H heads, D head size, V vocabulary.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.gpt2 import fused_decode, hardware, inputs, ops
from fastgpt2.gpt2.config import LAYER_NORM_EPS, GPTConfig
from fastgpt2.gpt2.ops import Kernels, Stream
from fastgpt2.gpt2.stock import called, is_stock, stock
from fastgpt2.gpt2.tying import same_values, share_again, shared_parameters

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from fastgpt2.gpt2.cache import KVCache


class Context(NamedTuple):
    """How one call of the model is computed; every block gets the same but for `layer`, its place in the model.

    documents: of `ops.document_mask`.
    """

    kernels: Kernels
    cache: KVCache | None = None
    documents: Tensor | None = None
    layer: int = 0


@stock
class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = config.attention_scale(layer)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """h (B, T, C) -> (B, T, C)."""
        return ops.linear(self.attend(h, context), self.c_proj)

    def attend(self, h: Tensor, context: Context) -> Tensor:
        """What the heads give, before the projection: h (B, T, C) -> (B, T, C)."""
        qkv = ops.linear(h, self.c_attn)  # (B, T, 3C)
        if context.cache is not None:
            return context.cache.attention(context.layer, qkv, self.n_head, self.scale, context.kernels)
        dropout_p = self.dropout if self.training else 0.0
        return ops.causal_attention(qkv, self.n_head, self.scale, dropout_p, context.kernels, context.documents)


@stock
class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """h (B, T, C) -> (B, T, C)."""
        y, bias = ops.mlp(h, self.c_fc, self.c_proj, context.kernels)
        return y if bias is None else y + bias


@stock
class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C): both branches added to it."""
        return ops.total(self.extend(Stream(x), context))

    def extend(self, stream: Stream, context: Context) -> Stream:
        """As `forward`, but the sum before this block is computed here, in its first LayerNorm's kernel, and the last
        branch is left to add to whoever comes next."""
        kernels = context.kernels
        if context.cache is not None and is_stock(self.attn, CausalSelfAttention) and is_stock(self.mlp, MLP):
            if fused_decode.serves(self, stream, kernels):
                return Stream(fused_decode.block(self, stream.x, context.cache, context.layer, kernels))
        x, h = ops.add_layer_norm(stream, self.ln_1, kernels)
        stream = Stream(*self._attn(h, context), x, self.dropout if self.attn.training else 0.0)
        x, h = ops.add_layer_norm(stream, self.ln_2, kernels)
        return Stream(*self._mlp(h, context), x, self.dropout if self.mlp.training else 0.0)

    def _attn(self, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """(attn(h), None), or without c_proj's bias, and the bias."""
        attn = self.attn  # asked for once: nn.Module looks a submodule up in Python
        if is_stock(attn, CausalSelfAttention):
            return ops.project(attn.attend(h, context), attn.c_proj, context.kernels)
        return called(attn, h, context), None

    def _mlp(self, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """(mlp(h), None), or without c_proj's bias, and the bias."""
        mlp = self.mlp
        if is_stock(mlp, MLP):
            return ops.mlp(h, mlp.c_fc, mlp.c_proj, context.kernels)
        return called(mlp, h, context), None


class Transformer(nn.Module):
    """Everything below the head. `recompute`: training keeps the blocks' inputs only and computes the rest twice."""

    recompute = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)

    def forward(self, idx: Tensor, context: Context) -> Tensor:
        """idx (B, T) -> the normalised stream (B, T, C). context.documents: as `GPT.forward` has them."""
        kernels, cache = context.kernels, context.cache
        if context.documents is not None:
            mask = ops.document_mask(context.documents, idx.size(0), idx.size(1), kernels)
            context = context._replace(documents=mask)
        dropout_p = self.dropout if self.training else 0.0
        positions = None
        if cache is not None and cache.continues(idx):  # one token a row, each at a position of its own
            positions = cache.lengths[:, None].long()
        stream = Stream(ops.embedding(idx, self.wte, self.wpe, positions, dropout_p, kernels))
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            context = context._replace(layer=layer)
            if recompute:  # a capture may not ask for random numbers' state: `StepGraphs` sees that none are drawn
                kept = not hardware.is_capturing()
                x = ops.total(stream)
                stream = Stream(checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=kept))
            elif is_stock(block, Block):
                stream = block.extend(stream, context)
            else:
                stream = Stream(called(block, ops.total(stream), context))
        return ops.add_layer_norm(stream, self.ln_f, kernels)[1]


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
        """Every move and cast goes through here. Where it makes new parameters, as from or to the meta device, those
        that were one under several names are so again; a head that somebody replaced stays apart."""
        shared = shared_parameters(self)
        super()._apply(fn, recurse)
        share_again(shared)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As PyTorch's. A head that is tied to the token table stays tied, also with assign=True.

        Raises ValueError where they are tied and `state_dict` has different values for them.
        """
        shared = shared_parameters(self)
        tied = any((self.lm_head, "weight") in names for _, names in shared)
        head, table = (state_dict.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
        if tied and not same_values(head, table):
            raise ValueError(
                "state_dict has an lm_head.weight that differs from transformer.wte.weight, and this model ties them: "
                "give lm_head a weight of its own first, model.lm_head.weight = nn.Parameter(...)"
            )
        result = super().load_state_dict(state_dict, strict, assign)
        share_again(shared)
        return result

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter that holds floating-point numbers: what is computed in outside of autocast."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

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
        """How each op is computed. Assign "auto", "triton", "torch", "attention,mlp" or a Kernels; "auto" is Triton
        where the parameters are on a CUDA or ROCm device and PyTorch elsewhere."""
        return ops.kernels_for(self._kernels, self.device)

    @kernels.setter
    def kernels(self, spec: str | Kernels) -> None:
        self._kernels = ops.requested_kernels(spec)

    @contextlib.contextmanager
    def use_kernels(self, spec: str | Kernels | None = None, **toggles: str) -> Iterator[GPT]:
        """Other kernels inside a `with`: `model.use_kernels("torch")`, `model.use_kernels(mlp="torch")`."""
        before = self._kernels
        toggles = ops.current_names(toggles)
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
        inputs.check_tokens("idx", idx, self.config)
        if targets is not None:
            inputs.check_tokens("targets", targets, self.config, idx.shape)
        if cache is not None:
            cache.make_room(idx, targets, self.training)
        if documents is not None:
            inputs.check_documents(documents, idx, cache)
        kernels = ops.kernels_for(self._kernels, idx.device)
        x = self.transformer(idx, Context(kernels, cache, documents))
        V = self.config.vocab_size
        if targets is None:
            x = x[:, -1:] if cache is None else cache.last(x)
            few_rows = cache is not None and ops.few_rows(x, kernels)
            return ops.without_padding(ops.head(x, self.lm_head, few_rows), V, self.config.padded_vocab_size), None
        want_logits = not (self.training and torch.is_grad_enabled())
        return ops.head_loss(x, self.lm_head, targets, V, self.config.padded_vocab_size, want_logits, kernels)

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

        more: min_p, repetition_penalty, prompt_lengths, stop_tokens and others of `fastgpt2.gpt2.generation.generate`.
        """
        from fastgpt2.gpt2.generation.generate import generate

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
        """A hub name ("gpt2", "gpt2-medium", ...) or a local folder. See `fastgpt2.gpt2.weights.pretrained`."""
        from fastgpt2.gpt2.weights.pretrained import from_pretrained

        return from_pretrained(name_or_folder, override_args, kernels=kernels)

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors, which `GPT2LMHeadModel.from_pretrained` reads."""
        from fastgpt2.gpt2.weights.pretrained import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_huggingface(cls, hf_model: GPT2LMHeadModel, *, kernels: str | Kernels = "auto") -> GPT:
        """Our copy of a live `GPT2LMHeadModel`, on its device and in its dtype."""
        from fastgpt2.gpt2.weights.huggingface import from_huggingface

        return from_huggingface(hf_model, kernels=kernels)

    def to_huggingface(self) -> GPT2LMHeadModel:
        """A `GPT2LMHeadModel` with copies of these weights, on this device and in this dtype."""
        from fastgpt2.gpt2.weights.huggingface import to_huggingface

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
        wpe = self.transformer.wpe
        if not is_stock(wpe, nn.Embedding):
            kind = type(wpe).__name__
            raise TypeError(f"crop_block_size: transformer.wpe is a {kind}, or somebody listens to it: crop it before")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        wpe.num_embeddings = block_size
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone(), wpe.weight.requires_grad)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: Iterable[float], device_type: str, **more: Any
    ) -> torch.optim.AdamW:
        """AdamW that decays matrices alone; more: optimizer, max_norm. See `fastgpt2.gpt2.training.optim.adamw`."""
        from fastgpt2.gpt2.training.optim import adamw

        return adamw(self, weight_decay, learning_rate, betas, device_type, **more)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float) -> float:
        """Model FLOPs utilisation: achieved FLOPs of `fwdbwd_per_iter` sequences in `dt` seconds over this GPU's bf16
        peak, by `GPTConfig.flops_per_token`. NaN where the peak is unknown."""
        flops = self.config.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        peak = hardware.peak_flops(self.device)
        return math.nan if peak is None else flops / dt / peak


def unwrap(model: nn.Module) -> GPT:
    """The GPT inside the wrappers of torch.compile, DistributedDataParallel and peft.

    Raises TypeError where there is none.
    """
    inner: Any = model
    while not isinstance(inner, GPT):
        base = getattr(inner, "get_base_model", None)
        wrapped = base() if base else getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if wrapped is None:
            raise TypeError(f"expected a GPT, compiled or in DistributedDataParallel or neither, not {type(model)}")
        inner = wrapped
    return inner
