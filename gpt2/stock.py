"""Whether a module is as PyTorch and this package made it, so that a fused region may compute it without calling it.

    if is_stock(self.c_proj, nn.Linear): ...     # its weight and bias are all that it is
    else: self.c_proj(y)                         # whatever somebody made of it

People put hooks on modules, replace them (LoRA, quantised layers), parametrise their weights, or patch their `forward`.
A region that reads `weight` and `bias` would pass all of that over in silence. Every region asks here first.
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

# Parameters that hold what they say: no quantised or sharded ones. Tensors too, as `torch.func` and packing put in a
# parameter's place, and those that stand for them while torch.export traces.
PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


# What is computed in place of calling a module: the `forward` of these classes as it was when they were defined.
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout)
}


def stock(kind: type[Kind]) -> type[Kind]:
    """Decorates a module of this package whose `forward` has a fused road."""
    FORWARDS[kind] = kind.forward
    return kind


class LinearWeights(NamedTuple):
    """weight (out, in) and bias (out,) of a stock layer that keeps them in another layout, as transformers' Conv1D
    does: stands for an `nn.Linear` with these, and counts as a stock one."""

    weight: Tensor
    bias: Tensor | None


def is_stock(module: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling `module` computes what class `kind` does with the module's weight and bias, and nothing else.

    False for a subclass (which LoRA's and quantised layers are, and what parametrisations make of a module), where the
    class or the module got another `forward`, for a module that `is_watched`, or with parameters of another class than
    torch's own. kind: Linear, LayerNorm, Embedding or Dropout, or a class decorated with `stock`.
    """
    if type(module) is not kind:
        return kind is nn.Linear and type(module) is LinearWeights
    if is_watched(module):
        return False
    forward = getattr(module.forward, "__func__", None)  # torch.compile guards what is looked at, but cannot compare it
    if forward is not FORWARDS[kind] and not torch.compiler.is_compiling():
        return False
    parameters = module._parameters  # a fifth of the time of asking for the attributes
    if kind is nn.Linear or kind is nn.LayerNorm:
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if kind is nn.LayerNorm and weight is not None and weight.dim() != 1:  # over more than the last dimension
            return False
        return type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
    if kind is nn.Embedding:
        options = module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse
        return type(parameters.get("weight")) in PLAIN and options == (None, None, False, False)
    return True


def called(module: nn.Module, x: Tensor, context: Any) -> Tensor:
    """A block, attention or MLP that is not stock: one of this package's gets the context too, one that takes an
    argument alone, such as `nn.Sequential`, does not."""
    kind: Any = type(module)
    return module(x, context) if _takes_two(kind) else module(x)


@torch.compiler.assume_constant_result
def _takes_two(kind: Any) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)  # the first is self


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: by a hook of any kind, global ones included, by
    a `forward` of its own, or by code that its method `compile` made."""
    code = module._compiled_call_impl
    compiled = code is not None and not getattr(code, "is_transparent", False)  # `graphed` put there what calls it
    return compiled or "forward" in module.__dict__ or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of any kind is called with the module, global ones included."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )
