"""GPT-2 in terms of `ops`. Modules, parameters and state-dict keys have HuggingFace's names.

    x = wte[idx] + wpe[0..T-1]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))        in every block
    logits = ln_f(x) wte^T

Every module is a class of PyTorch or of this file and can be called, hooked, adapted or replaced as usual. Between
stock modules (see `is_stock`), the operations between two matrix products are fused: the residual sum that ends a
branch is computed in the same kernel as the LayerNorm that follows it, even if that LayerNorm is in the next block.

Shapes: B batch, T sequence, C = H * D channels, H heads, D head size, V vocabulary.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.gpt2 import fused_decode, hardware, inputs, ops
from fastgpt2.gpt2.config import LAYER_NORM_EPS, GPTConfig
from fastgpt2.gpt2.context import Context
from fastgpt2.gpt2.ops import Kernels, Stream
from fastgpt2.gpt2.residual import checked, stream_dtype
from fastgpt2.gpt2.stock import called, is_stock, stock
from fastgpt2.gpt2.tying import same_values, share_again, shared_parameters

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from fastgpt2.gpt2.cache import KVCache


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
        """The heads' outputs before the projection c_proj: h (B, T, C) -> (B, T, C)."""
        qkv, bias = ops.packed_qkv(h, self.c_attn, context.kernels, context.cache)  # (B, T, 3C)
        if context.cache is not None:
            return context.cache.attention(context.layer, qkv, self.n_head, self.scale, context.kernels)
        dropout_p = self.dropout if self.training else 0.0
        return ops.causal_attention(qkv, self.n_head, self.scale, dropout_p, context.kernels, context.mask, bias)


@stock
class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """h (B, T, C) -> (B, T, C)."""
        y, bias = ops.mlp(h, self.c_fc, self.c_proj, context.kernels, self.activation)
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
        """x (B, T, C) -> x with both branches added, (B, T, C)."""
        return ops.total(self.extend(Stream(x), context))

    def extend(self, stream: Stream, context: Context) -> Stream:
        """As `forward`, but with deferred sums: this block's first LayerNorm also computes the sum that the previous
        block left open, and the sum of this block's MLP branch is left open for the next LayerNorm."""
        kernels, attn, mlp = context.kernels, self.attn, self.mlp  # read once: nn.Module.__getattr__ is slow
        if context.cache is not None and is_stock(attn, CausalSelfAttention) and is_stock(mlp, MLP):
            if fused_decode.serves(self, stream, kernels):
                return Stream(fused_decode.block(self, stream.x, context.cache, context.layer, kernels))
        x, h = ops.add_layer_norm(stream, self.ln_1, kernels)
        stream = context.sum(*_attn_branch(attn, h, context), x, self.dropout if attn.training else 0.0)
        x, h = ops.add_layer_norm(stream, self.ln_2, kernels)
        return context.sum(*_mlp_branch(mlp, h, context), x, self.dropout if mlp.training else 0.0)


def _attn_branch(attn: nn.Module, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """attn(h) (B, T, C) as a pair: either (attn(h), None), or attn(h) before c_proj's bias and that bias."""
    if is_stock(attn, CausalSelfAttention):
        return ops.project(attn.attend(h, context), attn.c_proj, context.kernels)
    return called(attn, h, context), None


def _mlp_branch(mlp: nn.Module, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """mlp(h) (B, T, C) as a pair: either (mlp(h), None), or mlp(h) before c_proj's bias and that bias."""
    if is_stock(mlp, MLP):
        return ops.mlp(h, mlp.c_fc, mlp.c_proj, context.kernels, mlp.activation)
    return called(mlp, h, context), None


class Transformer(nn.Module):
    """Everything below the head. recompute: training keeps only blocks' inputs. residual: see `GPT.residual`."""

    recompute, residual = False, "float32"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, bias=config.bias)

    def forward(self, idx: Tensor, context: Context) -> Tensor:
        """idx (B, T) int64 -> the normalised residual stream (B, T, C)."""
        kernels, cache = context.kernels, context.cache
        dropout_p = self.dropout if self.training else 0.0
        positions = None
        if cache is not None and cache.continues(idx):  # one token a row; rows may be at different positions
            positions = cache.lengths[:, None].long()
        context = context._replace(dtype=stream_dtype(self.residual, idx.device))
        stream = Stream(ops.embedding(idx, self.wte, self.wpe, positions, dropout_p, kernels, context.dtype))
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.h):
            context = context._replace(layer=layer)
            if recompute:
                preserve = not hardware.is_capturing()  # a capture cannot read the state; `StepGraphs` refuses dropout
                x = ops.total(stream)
                stream = Stream(checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=preserve))
            elif is_stock(block, Block):
                stream = block.extend(stream, context)
            else:
                stream = context.sum(called(block, ops.total(stream), context))
        return ops.add_layer_norm(stream, self.ln_f, kernels)[1]


class GPT(nn.Module):
    """GPT-2 with a language-model head. kernels: which ops Triton computes, see the property `kernels`."""

    origin: Any = None  # settings and files that it was read with: see `fastgpt2.gpt2.weights.origin`

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
        """Makes the head's weight and the token table one parameter under two names."""
        self.lm_head.weight = self.transformer.wte.weight

    def _apply(self, fn, recurse=True):
        """PyTorch moves and casts modules through this method. Where it creates new parameters, for example on the meta
        device, shared parameters are shared again afterwards. A head with a weight of its own is not tied."""
        shared = shared_parameters(self)
        super()._apply(fn, recurse)
        share_again(shared)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As `nn.Module.load_state_dict`, but a head that is tied to the token table stays tied with assign=True too.
        Raises ValueError if they are tied and `state_dict` has different values for them."""
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
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, in which the model computes outside autocast."""
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
        """How each op is computed. Assign "auto", "triton", "torch", a list such as "attention,mlp", or a `Kernels`.
        "auto" means Triton on a CUDA or ROCm device and PyTorch elsewhere. An unknown name raises ValueError."""
        return ops.kernels_for(self._kernels, self.device, self.config.activation)

    @kernels.setter
    def kernels(self, spec: str | Kernels) -> None:
        self._kernels = ops.requested_kernels(spec, self.config.activation)

    @contextlib.contextmanager
    def use_kernels(self, spec: str | Kernels | None = None, **toggles: str) -> Iterator[GPT]:
        """Uses other kernels inside a `with`: `model.use_kernels("torch")`, `model.use_kernels(mlp="torch")`.
        Raises ValueError for an unknown switch or value."""
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

    @property
    def residual(self) -> str:
        """The residual stream's dtype under autocast, "float32" or "bfloat16": see `fastgpt2.gpt2.residual`."""
        return self.transformer.residual

    @residual.setter
    def residual(self, dtype: str) -> None:
        self.transformer.residual = checked(dtype)

    # ------------------------------------------------------------------------------------------------ computing

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        *,
        documents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and mean cross-entropy, nanoGPT's contract.

        idx: (B, T) int64, T at most block_size.
        targets: (B, T) int64, the token that follows each token of idx. Negative targets (-1 or -100) are ignored.
        cache: for generation, without targets and in eval mode. `KVCache` explains what idx then holds.
        document_starts: (n + 1,) int32, rising: the place of each document's first token in the flattened idx, then
            B*T; `data.document_starts` computes it. Tokens then attend to their own document only. Not with a cache.
            documents: its former name, accepted until the next release.
        Returns (logits (B, T, V), loss) with targets and (logits (B, 1, V) of the last position, None) without.
        A training step (train mode, gradients on) with kernels.cross_entropy="triton" never computes all logits at
        once and returns None in their place.
        Raises ValueError for a wrong shape and for a token or target out of range (under torch.compile a RuntimeError,
        on a GPU a device-side assertion, because the check does not wait for it), TypeError for a wrong dtype.
        """
        document_starts = inputs.renamed_documents(document_starts, documents)
        inputs.check_tokens("idx", idx, self.config)
        if targets is not None:
            inputs.check_tokens("targets", targets, self.config, idx.shape)
        if cache is not None:
            cache.make_room(idx, targets, self.training)
        kernels = ops.kernels_for(self._kernels, idx.device, self.config.activation)
        context = Context(kernels, cache)
        if document_starts is not None:
            inputs.check_document_starts(document_starts, idx, cache)
            context = Context(kernels, mask=ops.document_mask(document_starts, idx.size(0), idx.size(1), kernels))
        x = self.transformer(idx, context)
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
        """Continues idx (B, T) int64 by max_new_tokens tokens: (B, T + max_new_tokens) int64.
        more: min_p, repetition_penalty, prompt_lengths and the others of `fastgpt2.gpt2.generation.generate`."""
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
        """Loads a hub name ("gpt2", "gpt2-medium", ...) or a local folder. See `fastgpt2.gpt2.weights.pretrained`."""
        from fastgpt2.gpt2.weights.pretrained import from_pretrained

        return from_pretrained(name_or_folder, override_args, kernels=kernels)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """A folder that `GPT2LMHeadModel.from_pretrained` reads: see `fastgpt2.gpt2.weights.pretrained`."""
        from fastgpt2.gpt2.weights.pretrained import save_pretrained

        save_pretrained(self, folder, tokenizer)

    @classmethod
    def from_huggingface(cls, hf_model: GPT2LMHeadModel, *, kernels: str | Kernels = "auto") -> GPT:
        """A GPT with copies of the weights of `hf_model`, on its device and in its dtype."""
        from fastgpt2.gpt2.weights.huggingface import from_huggingface

        return from_huggingface(hf_model, kernels=kernels)

    def to_huggingface(self) -> GPT2LMHeadModel:
        """A `GPT2LMHeadModel` with copies of these weights, on this device and in this dtype."""
        from fastgpt2.gpt2.weights.huggingface import to_huggingface

        return to_huggingface(self)

    # ------------------------------------------------------------------------------------- nanoGPT's companions

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters. The tied head counts once, the position table by default not at all."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first `block_size` positions. Call it before the optimizer is built.
        Raises ValueError for a block_size out of range, TypeError if the position table is not a stock nn.Embedding."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size is {block_size}, allowed are 1..{self.config.block_size}")
        wpe = self.transformer.wpe
        if not is_stock(wpe, nn.Embedding):
            kind = type(wpe).__name__
            raise TypeError(f"transformer.wpe is a {kind}, changed or with hooks: call crop_block_size before that")
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
        """Model FLOPs utilisation: the FLOP/s of `fwdbwd_per_iter` sequences in `dt` seconds, counted by
        `GPTConfig.flops_per_token`, divided by this GPU's bf16 peak. NaN if the peak is unknown."""
        flops = self.config.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        peak = hardware.peak_flops(self.device)
        return math.nan if peak is None else flops / dt / peak


def unwrap(model: nn.Module) -> GPT:
    """The GPT inside the wrappers of torch.compile, DistributedDataParallel and peft; TypeError if there is none."""
    inner: Any = model
    while not isinstance(inner, GPT):
        base = getattr(inner, "get_base_model", None)
        wrapped = base() if base else getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if wrapped is None:
            raise TypeError(f"model is {type(model)}, expected a GPT, alone, compiled or in DistributedDataParallel")
        inner = wrapped
    return inner
