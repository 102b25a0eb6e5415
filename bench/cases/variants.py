"""The ways to train GPT-2 that are compared: ours by every switch, HuggingFace's, nanoGPT's and flash-attn's model.

Each computes a step on one road, which is how its kernels are launched: from Python, as CUDA graphs, or by
torch.compile in one of its modes. Variants of one family share a model and an optimizer, so that three or four models
are in memory, not thirty. All start from the same weights and see the same batch; dropout is 0 everywhere. Labels say
what is active: they are made from the model's `Kernels` and from what the other models say of themselves.
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

from fastgpt2.bench.cases import flash_gpt
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import ALL_TORCH, Kernels
from fastgpt2.gpt2.training.optim import adamw
from fastgpt2.gpt2.training.step_graphs import StepGraphs

OURS, HUGGINGFACE, NANOGPT, FLASH_ATTN = "fastgpt2", "HuggingFace", "nanoGPT", "flash-attn"
LR = 1e-4
GRAD_CLIP = 1.0
Autocast = Callable[[], contextlib.AbstractContextManager]

# How a step's kernels are launched; the last three are torch.compile, by its mode. Quick to start first.
LAUNCHED, GRAPH = "launched", "graph"
COMPILE, REDUCE_OVERHEAD, MAX_AUTOTUNE = "compile", "reduce-overhead", "max-autotune"
ROADS = (LAUNCHED, GRAPH, COMPILE, REDUCE_OVERHEAD, MAX_AUTOTUNE)
MODES = {COMPILE: "default", REDUCE_OVERHEAD: "reduce-overhead", MAX_AUTOTUNE: "max-autotune"}  # of torch.compile
CUDAGRAPH_TREES = (REDUCE_OVERHEAD, MAX_AUTOTUNE)  # Inductor captures and replays CUDA graphs by itself
SUFFIXES = {LAUNCHED: "", GRAPH: " + CUDA graph", COMPILE: " + compile"} | {
    road: f" + compile ({MODES[road]})" for road in CUDAGRAPH_TREES
}


@dataclass(frozen=True)
class Variant:
    """One way to compute a step. `kernels` and `naive_attention` concern our model only."""

    family: str
    kernels: Kernels = ALL_TORCH
    road: str = LAUNCHED
    naive_attention: bool = False

    @property
    def mode(self) -> str | None:
        """Of torch.compile; None where nothing is compiled."""
        return MODES.get(self.road)

    @property
    def base(self) -> Variant:
        """What its speed-up is over: our model with PyTorch's kernels, launched in the same way."""
        return Variant(OURS, road=self.road)

    @property
    def one_switch(self) -> bool:
        """Whether it is a rung of the ladder: some kernels on Triton, some not."""
        return len(set(dataclasses.astuple(self.kernels))) > 1


def label(kernels: Kernels, road: str = LAUNCHED, naive_attention: bool = False) -> str:
    """What a variant of our model is called, by what is active in it."""
    on_triton = [op for op in Kernels.names() if getattr(kernels, op) == "triton"]
    if not on_triton:
        name = "PyTorch, naive attention" if naive_attention else "PyTorch, SDPA"
    elif len(on_triton) == len(Kernels.names()):
        name = "Triton"
    else:
        name = "Triton: " + ", ".join(on_triton)
    return name + SUFFIXES[road]


def all_variants(with_nanogpt: bool, with_flash_attn: bool = False) -> list[Variant]:
    """Every comparison, road by road and baselines first; the ladder has each switch alone on Triton, launched from
    Python and as a CUDA graph.

    HuggingFace's model is launched or compiled, as its users do; flash-attn's is not compiled: Dynamo would stop at
    each of its operators.
    """
    ladder = [Variant(OURS)]
    if ops.TRITON_INSTALLED:
        ladder += [Variant(OURS, Kernels.parse(op)) for op in Kernels.names()] + [Variant(OURS, Kernels.all("triton"))]
    others = [Variant(HUGGINGFACE)] + [Variant(NANOGPT)] * with_nanogpt
    flash_attn = [Variant(FLASH_ATTN)] * with_flash_attn
    on_roads = [
        (LAUNCHED, [Variant(OURS, naive_attention=True), *ladder, *others, *flash_attn]),
        (GRAPH, [*ladder, *(v for v in others if v.family != HUGGINGFACE), *flash_attn]),
        *((road, [*(v for v in ladder if not v.one_switch), *others]) for road in MODES),
    ]
    return [dataclasses.replace(variant, road=road) for road, some in on_roads for variant in some]


def stages(variants: list[Variant]) -> list[list[Variant]]:
    """The variants in the order of what they cost to prepare, those of one stage together: whoever stops a run keeps
    the stages before. What is compiled begins with ours, and max-autotune is last."""

    def place(variant: Variant) -> tuple[bool, bool, int]:
        compiled = variant.mode is not None
        return variant.road == MAX_AUTOTUNE, compiled and variant.family != OURS, ROADS.index(variant.road)

    places = sorted({place(v) for v in variants})
    return [[v for v in variants if place(v) == where] for where in places]


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
        qkv: Tensor, n_head: int, scale: float, dropout_p: float, kernels: Kernels, mask: Tensor | None = None
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

    def __init__(self, loss: Callable[[], Tensor], model: nn.Module, road: str):
        self.loss, self.model, self.road = loss, model, road
        self.graphs: StepGraphs | None = None

    def __call__(self) -> None:
        if self.road == GRAPH:
            if self.graphs is None:
                self.graphs = StepGraphs(lambda: (None, self.loss()), self.model, {})
            self.graphs()[1].backward()
            return
        if self.road in CUDAGRAPH_TREES:  # what the step before has returned may be overwritten: nothing of it is kept
            torch.compiler.cudagraph_mark_step_begin()
        self.loss().backward()

    def held_bytes(self) -> int | None:
        """GPU memory that stays between calls, beside gradients; None where nobody can tell: cudagraph trees keep it
        in one pool for all that is compiled."""
        if self.road in CUDAGRAPH_TREES:
            return None
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
                return label(self.model.kernels, variant.road, variant.naive_attention)
        if self.name == FLASH_ATTN:
            return flash_gpt.label(self.model) + SUFFIXES[variant.road]
        if self.name == HUGGINGFACE:
            attention = self.model.config._attn_implementation
        else:
            attention = "SDPA" if self.model.transformer.h[0].attn.flash else "naive attention"
        return f"{self.name}, {attention}" + SUFFIXES[variant.road]

    def state_bytes(self) -> int:
        """Of parameters and the optimizer's state, which stay between steps; gradients do not."""
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in (*self.model.parameters(), *moments))

    def loss(self, variant: Variant, idx: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """A function that computes the loss; compiles at its first call."""
        # Static shapes: a later batch size would otherwise be compiled for any size.
        forward: Any = torch.compile(self.model, dynamic=False, mode=variant.mode) if variant.mode else self.model
        if self.name == FLASH_ATTN:
            return lambda: flash_gpt.loss(forward(idx).logits, targets)
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

        return Backward(loss, self.model, variant.road)

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
        embeddings = self.model.transformer
        weight = embeddings.embeddings.position_embeddings.weight if self.name == FLASH_ATTN else embeddings.wpe.weight
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
    if name == FLASH_ATTN:
        return flash_gpt.build(config, weights)
    assert nanogpt is not None
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with contextlib.redirect_stdout(None):  # it prints its size
        model = nanogpt.GPT(nanogpt.GPTConfig(**{field: getattr(config, field) for field in fields}))
    missing, unexpected = model.load_state_dict(weights.state_dict(), strict=False)
    if unexpected or any(not key.endswith("attn.bias") for key in missing):
        raise ValueError(f"nanoGPT's model has other parameters: {[*missing, *unexpected]}")
    return model
