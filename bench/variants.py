"""The ways to train GPT-2 that are compared: ours by every switch, HuggingFace's and nanoGPT's model.

Variants of one family share a model and an optimizer, so that three models are in memory, not twelve. All start from
the same weights and see the same batch; dropout is 0 everywhere. Labels say what is active: they are made from the
model's `Kernels` and from what the other models say of themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels
from fastgpt2.gpt2.optim import adamw
from fastgpt2.gpt2.step_graphs import StepGraphs

OURS, HUGGINGFACE, NANOGPT = "fastgpt2", "HuggingFace", "nanoGPT"
LR = 1e-4
GRAD_CLIP = 1.0
Autocast = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Variant:
    """One way to compute a step. `kernels` and `naive_attention` concern our model only."""

    family: str
    kernels: Kernels = ALL_TORCH
    compiled: bool = False
    naive_attention: bool = False
    graph: bool = False  # forward and backward replayed as CUDA graphs


def label(kernels: Kernels, compiled: bool = False, naive_attention: bool = False, graph: bool = False) -> str:
    """What a variant of our model is called, by what is active in it."""
    on_triton = [op for op in Kernels.names() if getattr(kernels, op) == "triton"]
    if not on_triton:
        name = "PyTorch, naive attention" if naive_attention else "PyTorch, SDPA"
    elif len(on_triton) == len(Kernels.names()):
        name = "Triton"
    else:
        name = "Triton: " + ", ".join(on_triton)
    return name + _suffix(compiled, graph)


def _suffix(compiled: bool, graph: bool) -> str:
    return " + compile" * compiled + " + CUDA graph" * graph


def all_variants(with_nanogpt: bool) -> list[Variant]:
    """Every comparison, baselines first; the ladder has each switch alone on Triton."""
    triton = Kernels(**dict.fromkeys(Kernels.names(), "triton")) if ops.TRITON_INSTALLED else None
    ours = [Variant(OURS, naive_attention=True), Variant(OURS), Variant(OURS, compiled=True)]
    if triton is not None:
        ours += [Variant(OURS, Kernels.parse(op)) for op in Kernels.names()]
        ours += [Variant(OURS, triton), Variant(OURS, triton, compiled=True)]
    others = [HUGGINGFACE, NANOGPT] if with_nanogpt else [HUGGINGFACE]
    ours += [Variant(family, compiled=compiled) for family in others for compiled in (False, True)]
    graphs = [v for v in ours if len(set(dataclasses.astuple(v.kernels))) == 1 and not v.compiled | v.naive_attention]
    return ours + [dataclasses.replace(v, graph=True) for v in graphs if v.family != HUGGINGFACE]


def on_triton(variant: Variant) -> bool:
    return variant.kernels != ALL_TORCH


def nanogpt_module(path: Path) -> ModuleType:
    """nanoGPT's model.py, imported from where it lies. Raises ValueError for a file without its GPT and GPTConfig."""
    if not path.is_file():
        raise ValueError(f"--nanogpt is {str(path)!r}, expected the path of nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--nanogpt is {str(path)!r}, which Python cannot import: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise ValueError(f"--nanogpt: {path} has no GPT and GPTConfig")
    return module


@contextlib.contextmanager
def naive_attention(active: bool) -> Iterator[None]:
    """Inside, our PyTorch path computes attention as textbooks do: scores, mask, softmax, product, each in memory."""
    if not active:
        yield
        return

    def attend(
        qkv: Tensor, n_head: int, scale: float, dropout_p: float, kernels: Kernels, documents: Tensor | None = None
    ) -> Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in qkv.split(C, dim=2))  # (B, H, T, D)
        future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
        p = (q @ k.transpose(-2, -1) * scale).masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T)
        return (p @ v).transpose(1, 2).reshape(B, T, C)

    with mock.patch.object(ops, "causal_attention", attend):
        yield


class Backward:
    """Makes every parameter's gradient on one batch; compiles or captures at its first call."""

    def __init__(self, loss: Callable[[], Tensor], model: nn.Module, graph: bool):
        self.loss, self.model, self.captures = loss, model, graph
        self.graphs: StepGraphs | None = None

    def __call__(self) -> None:
        if not self.captures:
            self.loss().backward()
            return
        if self.graphs is None:
            self.graphs = StepGraphs(lambda: (None, self.loss()), self.model, {})
        self.graphs()[1].backward()

    def held_bytes(self) -> int:
        """GPU memory that stays between calls, beside gradients."""
        return self.graphs.pool_bytes if self.graphs else 0


class Family:
    """One model with its optimizer: `step(variant)` and `gradient(variant)` make what is timed and what is checked."""

    def __init__(self, name: str, config: GPTConfig, weights: GPT, nanogpt: ModuleType | None, device: torch.device):
        """weights: our model on any device, copied into this family's."""
        self.name = name
        self.model = _build(name, config, weights, nanogpt).to(device).train()
        decay = dict(weight_decay=0.1, learning_rate=LR, betas=(0.9, 0.95), device_type=device.type)
        self.optimizer = adamw(self.model, **decay)  # type: ignore[arg-type]

    def label(self, variant: Variant) -> str:
        """Derived from the live model."""
        if self.name == OURS:
            with self.model.use_kernels(variant.kernels):
                return label(self.model.kernels, variant.compiled, variant.naive_attention, variant.graph)
        if self.name == HUGGINGFACE:
            attention = self.model.config._attn_implementation
        else:
            attention = "SDPA" if self.model.transformer.h[0].attn.flash else "naive attention"
        return f"{self.name}, {attention}" + _suffix(variant.compiled, variant.graph)

    def state_bytes(self) -> int:
        """Of parameters and the optimizer's state, which stay between steps; gradients do not."""
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in (*self.model.parameters(), *moments))

    def loss(self, variant: Variant, idx: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """A function that computes the loss; compiles at its first call."""
        # Static shapes: a later batch size would otherwise be compiled for any size.
        forward: Any = torch.compile(self.model, dynamic=False) if variant.compiled else self.model
        if self.name == HUGGINGFACE:
            return lambda: forward(input_ids=idx, labels=idx).loss  # shifts the labels by itself, ignores the last
        if self.name == NANOGPT:
            return lambda: forward(idx, targets)[1]

        def ours() -> Tensor:
            with self.model.use_kernels(variant.kernels), naive_attention(variant.naive_attention):
                return forward(idx, targets)[1]

        return ours

    def backward(self, variant: Variant, idx: Tensor, targets: Tensor, autocast: Autocast) -> Backward:
        compute = self.loss(variant, idx, targets)

        def loss() -> Tensor:
            with autocast():
                return compute()

        return Backward(loss, self.model, variant.graph)

    def step(self, backward: Backward) -> Callable[[], None]:
        """One optimizer step on one batch: forward, backward, clipping, fused AdamW."""

        def step() -> None:
            backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step

    def gradient(self, backward: Backward) -> Tensor:
        """Of the position table, which everything above it goes into; (block_size, C) float32 on the CPU."""
        backward()
        weight = self.model.transformer.wpe.weight
        gradient = weight.grad.detach().float().cpu()
        self.optimizer.zero_grad(set_to_none=True)
        return gradient


def _build(name: str, config: GPTConfig, weights: GPT, nanogpt: ModuleType | None) -> Any:
    if name == OURS:
        model = GPT(config, kernels="torch")
        model.load_state_dict(weights.state_dict())
        return model
    if name == HUGGINGFACE:
        hf = weights.to_huggingface()
        hf.loss_type = "ForCausalLM"  # what it takes anyway, after a warning
        return hf
    assert nanogpt is not None
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with contextlib.redirect_stdout(None):  # it prints its size
        model = nanogpt.GPT(nanogpt.GPTConfig(**{field: getattr(config, field) for field in fields}))
    missing, unexpected = model.load_state_dict(weights.state_dict(), strict=False)
    if unexpected or any(not key.endswith("attn.bias") for key in missing):
        raise ValueError(f"nanoGPT's model has other parameters: {[*missing, *unexpected]}")
    return model
