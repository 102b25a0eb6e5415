"""A launcher becomes `torch.ops.fastgpt2.<name>`, with a fake and a gradient; eager calls skip the dispatcher.

Two roads lead to one launcher. Under `torch.compile` the call goes to the registered operator, which the compiler
sees as one opaque node. In eager mode it goes straight to the launcher, inside a `torch.autograd.Function` when a
gradient is wanted: a registered operator costs several times the host time of a Function, and at GPT-2's sizes host
time decides.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import _launch

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LIBRARY = torch.library.Library("fastgpt2", "FRAGMENT")


def op(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    toggle: str,
    mutates: tuple[str, ...] = (),
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Registers `launcher` as `torch.ops.fastgpt2.<launcher name>` and returns the function to call it by.

    launcher: positional arguments only, annotated (the operator's schema is read from them); allocates its outputs,
        launches kernels, mutates none of its inputs but `mutates` and returns tensors that alias nothing.
    fake: same arguments, returns empty tensors with the launcher's shapes, dtypes and strides.
    toggle: the field of `Kernels` that switches this operator off; named in errors.
    mutates: names of tensor arguments that the kernels write to.
    setup_context, backward: as in `torch.library.register_autograd`; both or neither.
    flops: of the same arguments with shapes in the place of tensors, how many floating-point operations the kernels do
        in matrix products, as `torch.utils.flop_counter` counts them; what PyTorch's products do it counts by itself.
    """
    name = launcher.__name__
    mutated = [place for place, argument in enumerate(inspect.signature(launcher).parameters) if argument in mutates]

    def launch(*args):
        tensors = [a for a in args if isinstance(a, Tensor)]
        try:
            _launch.check_device(*tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error} (or switch this kernel off: {toggle}='torch')") from None
        for place in mutated:  # so that autograd refuses a backward that needs what was there before
            torch.autograd.graph.increment_version(args[place])
        with _launch.device_guard(tensors[0]):
            return launcher(*args)

    # The strides that eager would see, which is what an operator without a tag gets too.
    schema = name + torch.library.infer_schema(launcher, mutates_args=mutates)
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, launch, key)

    def fake_op(*args):
        _let_inductor_call(f"fastgpt2::{name}")
        return fake(*args)

    torch.library.register_fake(f"fastgpt2::{name}", fake_op, lib=_LIBRARY)
    registered = getattr(torch.ops.fastgpt2, name).default
    if not mutates:
        torch.library.register_vmap(f"fastgpt2::{name}", functools.partial(_one_by_one, registered), lib=_LIBRARY)

    if flops is not None:
        flop_counter.register_flop_formula(getattr(torch.ops.fastgpt2, name))(
            lambda *shapes, out_shape=None, **_: flops(*shapes)
        )

    def flops_are_counted() -> bool:
        if flops is None or not torch._C._len_torch_dispatch_stack():
            return False
        return any(type(mode).__module__ == flop_counter.__name__ for mode in _get_current_dispatch_mode_stack())

    if backward is None or setup_context is None:

        def call(*args):
            seen = _dispatched(args) or torch._C._are_functorch_transforms_active() or flops_are_counted()
            return registered(*args) if seen else launch(*args)

        return call

    torch.library.register_autograd(f"fastgpt2::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

    function = _autograd_function(name, launch, setup_context, backward)

    transformed = _transformed_function(name, registered, setup_context, backward)

    def call_with_gradient(*args):
        if _dispatched(args) or flops_are_counted():
            return registered(*args)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return launch(*args)

    return call_with_gradient


def _autograd_function(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """The launcher with the gradient that its operator has, without the dispatcher between."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = launch(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    Eager.__name__ = name
    return Eager


def _transformed_function(
    name: str,
    operator: Callable[..., Any],
    setup: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """The operator inside of vmap, grad and the other transforms of torch.func, which want the parts separate."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    Transformed.__name__ = name
    return Transformed


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """What `vmap` makes of an operator: a call a sample, the results stacked."""
    calls = [
        operator(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def _let_inductor_call(operator: str) -> None:
    """Tells torch.compile's Inductor, which has been imported when it runs fakes, that this operator is to be called.

    Else it finds that out by itself, and in PyTorch 2.11 (not in 2.13) it then writes all that the operator's arguments
    were computed from into a text that no log takes, exponentially long in the depth of the model.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    called = getattr(lowering, "FALLBACK_ALLOW_LIST", None)
    if called is not None:
        called.add(operator)


def _dispatched(args: tuple) -> bool:
    """True where the operator must be seen by PyTorch: under torch.compile, or with tensors that are not plain ones."""
    if torch.compiler.is_compiling():
        return True
    for a in args:  # a loop, because any() takes three times as long
        if isinstance(a, Tensor) and type(a) is not Tensor and type(a) is not Parameter:
            return True
    return False


def check_dtypes(op_name: str, toggle: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless every tensor is bfloat16, float16, float32 or float64."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
            raise TypeError(
                f"{op_name}: {argument} is {tensor.dtype}, allowed are {allowed} (toggle: {toggle}='torch')"
            )


def check_shape(op_name: str, toggle: str, argument: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` is None or has `shape`."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{op_name}: {argument} has shape {tuple(tensor.shape)}, expected {tuple(shape)} (toggle: {toggle}='torch')"
        )


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C) with a contiguous last dimension: a view where strides allow, else a copy."""
    C = x.shape[-1] if x.dim() else 1
    x = x.reshape(x.numel() // max(C, 1), C)
    return x if C == 1 or x.stride(1) == 1 else x.contiguous()


def autocast_dtype(tensor: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype that the next matrix product will take: autocast's where it is on, but float64 stays as it is."""
    kind = tensor.device.type
    cast = torch.is_autocast_enabled(kind) and default != torch.float64
    return torch.get_autocast_dtype(kind) if cast else default
