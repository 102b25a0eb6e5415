"""The implementations of a training step that are compared: our model with each of its kernel switches, HuggingFace's,
nanoGPT's and flash-attn's model.

A variant's road is how its kernels are launched: from Python, by replaying CUDA graphs, or by code that torch.compile
made in one of its modes. Variants of one family share a model and an optimizer, so that three or four models are in
memory, not thirty. All start from the same weights and see the same batch; dropout is 0 everywhere. A variant's label
names what is active in it and is derived from the live model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.bench.cases import flash_gpt
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT, CausalSelfAttention, Context
from fastgpt2.gpt2.ops import ALL_TORCH, ALL_TRITON, Kernels
from fastgpt2.gpt2.switches import FURTHER_VALUES
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
        """The baseline of its speed-up: our model with PyTorch's kernels, launched in the same way."""
        return Variant(OURS, road=self.road)

    @property
    def one_switch(self) -> bool:
        """Whether some of its kernels are Triton's and some are those of "torch"."""
        values = set(dataclasses.astuple(self.kernels))
        return "torch" in values and bool(values - {"torch", "cudnn"})


def label(kernels: Kernels, road: str = LAUNCHED, naive_attention: bool = False) -> str:
    """The name of a variant of our model, made from what is active in it, such as "Triton, mlp=fused"."""
    values = dataclasses.asdict(kernels)
    cudnn = values["attention"] == "cudnn"
    by_triton = {op: value for op, value in values.items() if value not in ("torch", "cudnn")}
    on_triton = [op if value == "triton" else f"{op}={value}" for op, value in by_triton.items()]
    if not on_triton:
        name = "PyTorch" if cudnn else "PyTorch, naive attention" if naive_attention else "PyTorch, SDPA"
    elif len(on_triton) == len(values) - cudnn:
        name = ", ".join(["Triton", *(op for op in on_triton if "=" in op)])
    else:
        name = "Triton: " + ", ".join(on_triton)
    return name + ", cuDNN attention" * cudnn + SUFFIXES[road]


def all_variants(with_nanogpt: bool, with_flash_attn: bool = False, with_cudnn: bool = False) -> list[Variant]:
    """Every variant, sorted by road, baselines first. Variants with one switch on Triton are launched from Python and
    as CUDA graphs; they are not compiled. Attention by cuDNN is beside PyTorch's other ops and beside Triton's.

    HuggingFace's model is launched from Python or compiled, as its users do. flash-attn's is not compiled, because
    Dynamo would break the graph at each of its operators.
    """
    ladder = [Variant(OURS)]
    if ops.TRITON_INSTALLED:
        ladder += [Variant(OURS, Kernels.parse(op)) for op in Kernels.names()] + [Variant(OURS, ALL_TRITON)]
        for op, values in FURTHER_VALUES.items():
            ladder += [Variant(OURS, dataclasses.replace(ALL_TRITON, **{op: value})) for value in values]
    if with_cudnn:
        bases = (ALL_TORCH, ALL_TRITON) if ops.TRITON_INSTALLED else (ALL_TORCH,)
        ladder += [Variant(OURS, dataclasses.replace(kernels, attention="cudnn")) for kernels in bases]
    others = [Variant(HUGGINGFACE)] + [Variant(NANOGPT)] * with_nanogpt
    flash_attn = [Variant(FLASH_ATTN)] * with_flash_attn
    on_roads = [
        (LAUNCHED, [Variant(OURS, naive_attention=True), *ladder, *others, *flash_attn]),
        (GRAPH, [*ladder, *(v for v in others if v.family != HUGGINGFACE), *flash_attn]),
        *((road, [*(v for v in ladder if not v.one_switch), *others]) for road in MODES),
    ]
    return [dataclasses.replace(variant, road=road) for road, some in on_roads for variant in some]


def stages(variants: list[Variant]) -> list[list[Variant]]:
    """Groups of variants that are measured together, the quickest to prepare first, so that a run that is stopped has
    measured whole groups. Among compiled variants ours come first; those of max-autotune come last."""

    def place(variant: Variant) -> tuple[bool, bool, int]:
        compiled = variant.mode is not None
        return variant.road == MAX_AUTOTUNE, compiled and variant.family != OURS, ROADS.index(variant.road)

    places = sorted({place(v) for v in variants})
    return [[v for v in variants if place(v) == where] for where in places]


def on_triton(variant: Variant) -> bool:
    return "triton" in dataclasses.astuple(variant.kernels)


def nanogpt_module(path: Path) -> ModuleType:
    """nanoGPT's model.py, imported from its path. Raises ValueError for a file without its GPT and GPTConfig."""
    if not path.is_file():
        raise ValueError(f"--nanogpt is {str(path)!r}, expected the path of nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--nanogpt is {str(path)!r}, which Python cannot import: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations there
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise ValueError(f"--nanogpt: {path} has no GPT and GPTConfig")
    return module


def nanogpt_model(nanogpt: ModuleType, config: GPTConfig) -> Any:
    """nanoGPT's GPT of our config, with random weights."""
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with contextlib.redirect_stdout(None):  # it prints its size
        return nanogpt.GPT(nanogpt.GPTConfig(**{field: getattr(config, field) for field in fields}))


class NaiveAttention(CausalSelfAttention):
    """Attention as textbooks compute it: scores, mask, softmax and product, each a tensor in memory."""

    def attend(self, h: Tensor, context: Context) -> Tensor:
        B, T, C = h.shape
        qkv = ops.linear(h, self.c_attn)  # (B, T, 3C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv.split(C, dim=2))
        future = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
        p = (q @ k.transpose(-2, -1) * self.scale).masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T)
        return (p @ v).transpose(1, 2).reshape(B, T, C)


def with_naive_attention(model: GPT) -> GPT:
    """A model with PyTorch's kernels and NaiveAttention, which shares all its parameters with `model`."""
    naive = GPT(model.config, kernels="torch")
    for layer, block in enumerate(naive.transformer.h):
        block.attn = NaiveAttention(model.config, layer)
    naive.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return naive


class Backward:
    """Computes every parameter's gradient on one batch and returns the loss, (). The first call compiles or captures.
    The next call may overwrite the loss."""

    def __init__(self, loss: Callable[[], Tensor], model: nn.Module, road: str):
        self.loss, self.model, self.road = loss, model, road
        self.graphs: StepGraphs | None = None

    def __call__(self) -> Tensor:
        if self.road == GRAPH:
            if self.graphs is None:
                self.graphs = StepGraphs(lambda: (None, self.loss()), self.model, {})
            loss = self.graphs()[1]
        else:
            if self.road in CUDAGRAPH_TREES:  # the previous step's outputs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def held_bytes(self) -> int | None:
        """GPU memory that is kept between calls, without gradients. None for CUDA graph trees: they have one memory
        pool for all compiled code, so that no variant's part of it is known."""
        if self.road in CUDAGRAPH_TREES:
            return None
        return self.graphs.pool_bytes if self.graphs else 0


class Family:
    """One model with its optimizer. What `step` returns is timed, what `gradient` returns is checked."""

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
        """Bytes of parameters and optimizer state, which are kept between steps. Gradients are not."""
        moments = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in (*self.model.parameters(), *moments))

    def loss(self, variant: Variant, idx: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """A function that computes the loss; compiles at its first call."""
        # Static shapes: otherwise the second batch size would be compiled with dynamic ones.
        forward: Any = torch.compile(self.model, dynamic=False, mode=variant.mode) if variant.mode else self.model
        if self.name == FLASH_ATTN:
            return lambda: flash_gpt.loss(forward(idx).logits, targets)
        if self.name == HUGGINGFACE:
            return lambda: forward(input_ids=idx, labels=idx).loss  # shifts the labels by itself, ignores the last
        if self.name == NANOGPT:
            return lambda: forward(idx, targets)[1]

        if variant.naive_attention:
            naive = with_naive_attention(self.model)
            return lambda: naive(idx, targets)[1]

        def ours() -> Tensor:
            with self.model.use_kernels(variant.kernels):
                return forward(idx, targets)[1]

        return ours

    def backward(self, variant: Variant, idx: Tensor, targets: Tensor, autocast: Autocast) -> Backward:
        compute = self.loss(variant, idx, targets)

        def loss() -> Tensor:
            with autocast():
                return compute()

        return Backward(loss, self.model, variant.road)

    def step(self, backward: Backward) -> Callable[[], Tensor]:
        """One optimizer step on one batch: forward, backward, clipping, fused AdamW. Returns the loss before it, ()."""

        def step() -> Tensor:
            loss = backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    def gradient(self, backward: Backward) -> Tensor:
        """The position table's gradient, which depends on every layer: (block_size, C), float32, on the CPU."""
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
        hf.loss_type = "ForCausalLM"  # the default, without its warning
        return hf
    if name == FLASH_ATTN:
        return flash_gpt.build(config, weights)
    assert nanogpt is not None
    model = nanogpt_model(nanogpt, config)
    missing, unexpected = model.load_state_dict(weights.state_dict(), strict=False)
    if unexpected or any(not key.endswith("attn.bias") for key in missing):
        raise ValueError(f"nanoGPT's model has other parameters: {[*missing, *unexpected]}")
    return model
