"""Registers a launcher as `torch.ops.fastgpt2.<name>` with a fake and a gradient. Eager calls skip the dispatcher.

A launcher is called in one of several ways:

- Eager mode calls it directly, inside a `torch.autograd.Function` if a gradient is needed. A registered operator takes
  several times the host time of a Function, and at GPT-2's sizes host time matters.
- `torch.compile` traces into it. Dynamo's graph holds the registered operator and its fake. AOTAutograd, which traces
  forward and backward, runs the launcher on fake tensors instead, as for `torch.library.triton_op`. PyTorch's operators
  in the launcher (products, sums, sorting) become nodes that Inductor compiles with the rest, and each launch becomes
  a node that Inductor's code starts: no Python of this package runs between launches, and Inductor owns the buffers.
- The operator remains one opaque node, whose launcher compiled code calls, in three cases: it was registered as
  `opaque`; `torch.export` traces, because its programs must be stored in files; or Triton interprets kernels, which
  Inductor does not support.
- Tensors of other types (DTensor, FakeTensor, ...) go through the registered operator.

Because of `torch.compile`, a launcher must accept symbolic sizes, allocate its outputs with PyTorch, and pass whole
tensors to kernels that write to them, because Inductor copies the base of a view that is written to.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _device
from ._frozen import MOST_PLANS
from ._trace import traced
from ._watched import flops_are_counted, one_by_one, refusing, register_flops, transformed_function

PLAIN = (Tensor, Parameter)  # neither sharded nor traced
TRACED_TYPES = (FakeTensor, FunctionalTensor)
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LIBRARY = torch.library.Library("fastgpt2", "FRAGMENT")

# PyTorch keeps compiled code on disk, by what its graph calls and not by what an operator does: without this tag, code
# that an older version of this folder compiled would be taken from there, and would expect that version's outputs.
SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
torch.compiler.config.cache_key_tag += f" fastgpt2 {SOURCES}"


def op(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    toggle: str,
    mutates: tuple[str, ...] = (),
    opaque: bool = False,
    strided: tuple[str, ...] = (),
    differentiable: int | None = None,
    eager_only: int = 0,
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Registers `launcher` as `torch.ops.fastgpt2.<launcher name>` and returns the function that calls it.

    launcher: has positional, annotated arguments, from which the operator's schema is made. It allocates its outputs,
        launches kernels and changes none of its inputs except `mutates`. It returns tensors that alias nothing, or None
        for an output that is not needed; the operator returns an empty tensor (0,) for None.
    fake: takes the same arguments and returns empty tensors with the launcher's shapes, dtypes and strides.
    toggle: the field of `Kernels` that switches this operator off. Errors name it.
    mutates: names of the tensor arguments that the kernels write to, where they are not None.
    opaque: torch.compile calls the launcher instead of tracing into it.
    strided: names of the tensor arguments that the launcher accepts with any strides. The others are made contiguous.
    differentiable: the number of outputs, from the first on, that have gradients; all by default. The other outputs are
        for backward only, and eager calls with gradients do not return them.
    eager_only: the number of outputs, from the last on, that are None for the operator and its fake.
    setup_context, backward: as in `torch.library.register_autograd`. Give both or neither.
    flops: takes the same arguments with shapes in the place of tensors and returns the floating-point operations of
        matrix products inside the kernels. `torch.utils.flop_counter` counts PyTorch's own products itself.
    """
    name = launcher.__name__
    parameters = inspect.signature(launcher, eval_str=True).parameters.values()
    mutated = [place for place, p in enumerate(parameters) if p.name in mutates]
    tensor_places = [place for place, p in enumerate(parameters) if p.annotation in (Tensor, Tensor | None)]
    flat = [place for place, p in enumerate(parameters) if place in tensor_places and p.name not in strided + mutates]

    def check_device(tensors: list[Tensor]) -> None:
        try:
            _device.check_device(*tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error} (or switch this kernel off: {toggle}='torch')") from None

    def contiguous(args: tuple) -> tuple:
        for place in flat:
            tensor = args[place]
            if tensor is not None and not tensor.is_contiguous():
                args = (*args[:place], tensor.contiguous(), *args[place + 1 :])
        return args

    def launch(*args):
        index = args[tensor_places[0]].get_device()
        args = contiguous(args)
        for place in mutated:  # so that autograd refuses a backward that needs the previous values
            if args[place] is not None:
                torch.autograd.graph.increment_version(args[place])
        if index < 0 or index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(index):  # Triton launches on the current device
            return launcher(*args)

    def trace(mode, operator, types, args, kwargs=None):
        """AOTAutograd calls this in place of the operator, under a mode that makes all operations functional."""
        if not _visible():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        if not all(issubclass(t, TRACED_TYPES) or t is Tensor for t in types):
            return NotImplemented
        check_device([a for a in args if isinstance(a, Tensor)])
        with mode, traced():
            return _all_there(launcher(*contiguous(args)), args)

    def dispatched(*args):
        check_device([a for a in args if isinstance(a, Tensor)])
        return _all_there(launch(*args), args, eager_only)

    # Inputs must have the strides that they would have in eager mode, as for an operator without a tag.
    _LIBRARY.define(name + _schema(launcher, mutates), tags=(torch.Tag.needs_exact_strides,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, dispatched, key)

    def fake_op(*args):
        _let_inductor_call(f"fastgpt2::{name}")
        return _all_there(fake(*args), args)

    torch.library.register_fake(f"fastgpt2::{name}", fake_op, lib=_LIBRARY)
    registered = getattr(torch.ops.fastgpt2, name).default
    if not mutates:
        torch.library.register_vmap(f"fastgpt2::{name}", functools.partial(one_by_one, registered), lib=_LIBRARY)
    if flops is not None:
        register_flops(getattr(torch.ops.fastgpt2, name), flops)
    if not (opaque or _device.INTERPRETED):
        torch.library.register_torch_dispatch(f"fastgpt2::{name}", FunctionalTensorMode, trace, lib=_LIBRARY)

    apply = None
    if backward is None or setup_context is None:
        in_transforms = transformed_function(name, registered, *refusing(no_second_derivative(name, toggle))).apply
        in_transforms = registered if mutates else in_transforms
    else:

        def registered_context(ctx, inputs, output):
            if differentiable is not None:
                ctx.mark_non_differentiable(*output[differentiable:])
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(f"fastgpt2::{name}", backward, setup_context=registered_context, lib=_LIBRARY)
        in_transforms = transformed_function(name, registered, registered_context, backward).apply
        refusal = no_second_derivative(name, toggle)
        function = _autograd_function(name, launch, setup_context, backward, differentiable, refusal)
        # `Function.apply` without its search of all arguments for functorch's transforms.
        apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args):
        if torch.compiler.is_compiling() or (flops and torch._C._len_torch_dispatch_stack() and flops_are_counted()):
            return registered(*args)
        tensors = [args[place] for place in tensor_places if args[place] is not None]
        for tensor in tensors:
            if type(tensor) not in PLAIN:
                return registered(*args)
        if torch._C._are_functorch_transforms_active():
            return in_transforms(*args)
        check_device(tensors)
        # The Function raises for forward-mode derivatives, which are not implemented.
        if apply is not None and (_require_grad(tensors) or forward_ad._current_level >= 0):
            return apply(*args)
        return launch(*args)

    return call


def _schema(launcher: Callable[..., Any], mutates: tuple[str, ...]) -> str:
    """The operator's schema. An output that may be None is a tensor in it (see `_all_there`)."""

    def prototype():
        pass

    signature = inspect.signature(launcher, eval_str=True)
    if outputs := get_args(signature.return_annotation):
        signature = signature.replace(return_annotation=tuple[(Tensor,) * len(outputs)])  # type: ignore[misc]
    prototype.__signature__ = signature  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def _all_there(output: Any, args: tuple, left_out: int = 0) -> Any:
    """The launcher's output with an empty tensor (0,) for each None and for the last `left_out`, because operators
    return tensors only."""
    if not isinstance(output, tuple):
        return output
    tensor = next(a for a in args if isinstance(a, Tensor))
    output = (*output[: len(output) - left_out], *(None,) * left_out)
    return tuple(tensor.new_empty(0) if t is None else t for t in output)


def _autograd_function(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Any],
    differentiable: int | None,
    refusal: str,
) -> type[torch.autograd.Function]:
    """A Function that calls the launcher and the gradient without going through the dispatcher.

    It raises RuntimeError(refusal) if a second derivative is asked for. PyTorch's `once_differentiable` silently drops
    that if the upstream gradient is a constant.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = launch(*args)
            setup_context(ctx, args, output)
            return output if differentiable is None else output[:differentiable]

        @staticmethod
        def backward(ctx, *grads):
            if torch.is_grad_enabled():  # here by create_graph=True alone
                raise RuntimeError(refusal)
            return gradient(ctx, *grads)

    Eager.__name__ = name
    return Eager


def _visible() -> bool:
    """False while torch.export traces: its programs cannot hold kernels and keep operators instead."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return not custom_triton_ops_decomposition_disabled()


def _let_inductor_call(operator: str) -> None:
    """Puts this operator on Inductor's list of operators that it calls. Inductor is imported before it runs fakes.

    Otherwise Inductor adds the operator itself. In PyTorch 2.11 (not in 2.13) it then builds a log text, which is never
    logged, of everything that the operator's arguments were computed from. Its length is exponential in the depth of
    the model.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    called = getattr(lowering, "FALLBACK_ALLOW_LIST", None)
    if called is not None:
        called.add(operator)


def _require_grad(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop, because any() takes three times as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def gradients_wanted(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow. Inside a transform of torch.func, tensors do not say, so that it may."""
    if torch._C._are_functorch_transforms_active():
        return torch.is_grad_enabled()
    return _require_grad(tensors)


def no_second_derivative(name: str, toggle: str) -> str:
    return f"{name} has no second derivative, which create_graph=True asks for: use {toggle}='torch' for it"


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


def dropout_seed(
    op_name: str, toggle: str, dropout_p: float, seed: Tensor | None, device: torch.device
) -> Tensor | None:
    """The seed that determines the dropout mask: `seed`, or one drawn from the device's generator if `seed` is None, or
    None without dropout. Raises ValueError for a dropout_p outside [0, 1) and a seed that is not one int64."""
    if dropout_p == 0.0:
        return None
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op_name}: dropout_p is {dropout_p}, allowed is [0, 1) (toggle: {toggle}='torch')")
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{op_name}: seed is {seed.dtype} of shape {tuple(seed.shape)}, expected one int64 on the device "
            f"(toggle: {toggle}='torch')"
        )
    return seed


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) with a contiguous last dimension: a view if the strides allow it, else a copy."""
    C = x.shape[-1] if x.dim() else 1
    x = x.reshape(x.numel() // max(C, 1), C)
    return x if C == 1 or x.stride(1) == 1 else x.contiguous()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x (..., C) as a tensor of rows of C elements and its row stride in elements: two arguments of a kernel. A
    contiguous x is returned itself, which saves creating a view."""
    shape = x.shape
    if x.is_contiguous():
        return x, shape[-1] if shape else 1
    x = as_rows(x)
    return x, x.stride(0)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of x's shape, in half of the time of `torch.empty` and `new_empty`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def check_once(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check`, but skipped for arguments whose shapes, dtypes and values have passed it before."""
    passed: dict[tuple, Any] = {}

    def checked(*args):
        if torch.compiler.is_compiling():
            return check(*args)
        key = tuple([
            a if a is None else (a.shape, a.dtype) if type(a) in PLAIN or isinstance(a, Tensor) else (type(a), a)
            for a in args
        ])  # fmt: skip
        try:
            return passed[key]
        except KeyError:
            if len(passed) >= MOST_PLANS:
                passed.clear()
            return passed.setdefault(key, check(*args))
        except TypeError:  # symbolic sizes are not hashable
            return check(*args)

    return checked


def autocast_dtype(tensor: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype of the next matrix product's inputs: autocast's if it is on, else `default`. float64 is never cast."""
    kind = "cuda" if tensor.is_cuda else tensor.device.type  # is_cuda is several times as fast as device.type
    cast = torch.is_autocast_enabled(kind) and default != torch.float64
    return torch.get_autocast_dtype(kind) if cast else default
