"""Whether a module is an unmodified module of PyTorch or this package: a fused region may then compute it without
calling it.

    if is_stock(self.c_proj, nn.Linear): ...     # its weight and bias determine what it computes
    else: self.c_proj(y)                         # a replaced or modified module must be called

Users put hooks on modules, replace them (LoRA, quantised layers), parametrise their weights or patch their `forward`. A
fused region that only reads `weight` and `bias` would silently ignore all of that, so every region asks here first.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as every_module

Kind = TypeVar("Kind", bound=nn.Module)

# Types of parameters that are neither quantised nor sharded. Besides nn.Parameter: Tensor, which `torch.func` and
# packing put in the place of parameters, and the types that stand for them while torch.export traces.
PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


# The classes that fused regions can compute, with their `forward` as it was defined, to detect a patched one.
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout)
}


def stock(kind: type[Kind]) -> type[Kind]:
    """Class decorator for a module of this package that a fused region can compute."""
    FORWARDS[kind] = kind.forward
    return kind


class LinearWeights(NamedTuple):
    """weight (out, in) and bias (out,) of a stock layer that stores them in another layout, such as transformers'
    Conv1D. It stands for an `nn.Linear` with these parameters and counts as stock."""

    weight: Tensor
    bias: Tensor | None


def is_stock(module: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling `module` does exactly what class `kind` does with the module's weight and bias.

    False for subclasses (LoRA, quantised layers and parametrised modules are subclasses), for a class or module with
    another `forward`, for a module that `is_watched`, and for parameters of other types than `PLAIN`.
    kind: Linear, LayerNorm, Embedding, Dropout, or a class decorated with `stock`.
    """
    if type(module) is not kind:
        return kind is nn.Linear and type(module) is LinearWeights
    if is_watched(module):
        return False
    if torch.compiler.is_compiling():
        getattr(module.forward, "__func__", None)  # what is read is guarded on: a `forward` set later compiles anew
    elif kind.forward is not FORWARDS[kind]:
        return False
    parameters = module._parameters  # takes a fifth of the time of reading the attributes
    if kind is nn.Linear or kind is nn.LayerNorm:
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if kind is nn.LayerNorm and weight is not None and weight.dim() != 1:  # normalises over several dimensions
            return False
        return type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
    if kind is nn.Embedding:
        options = module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse
        return type(parameters.get("weight")) in PLAIN and options == (None, None, False, False)
    return True


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The parameters of a stock nn.Linear or nn.LayerNorm, in a tenth of the time that nn.Module's attributes take."""
    if type(layer) is LinearWeights:
        return layer
    parameters = layer._parameters
    return parameters["weight"], parameters["bias"]


def called(module: nn.Module, x: Tensor, context: Any) -> Tensor:
    """Calls a block, attention or MLP that is not stock: with x (B, T, C) and the context if its `forward` takes two
    arguments, as this package's modules do, and with x alone otherwise, as for `nn.Sequential`."""
    kind: Any = type(module)
    return module(x, context) if _takes_two(kind) else module(x)


def _takes_two(kind: Any) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]  # self included
    return len(positional) > 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)


# What `torch.compiler.assume_constant_result` sets, after it has imported all of Dynamo: half of the import of GPT.
_takes_two._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_watched(module: nn.Module, but_forward_hooks: bool = False) -> bool:
    """Whether calling the module does more than its class's `forward`: it has hooks (global hooks included), a
    `forward` set on the instance, or was compiled by its method `compile`. but_forward_hooks: its own forward hooks do
    not count."""
    code = module._compiled_call_impl
    compiled = code is not None and not getattr(code, "is_transparent", False)  # `graphed` sets a transparent one
    return compiled or "forward" in module.__dict__ or has_hooks(module, but_forward_hooks)


def has_hooks(module: nn.Module, but_forward_hooks: bool = False) -> bool:
    """Whether calling the module calls a hook of any kind, global hooks included."""
    return bool(
        (module._forward_hooks and not but_forward_hooks)
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )
