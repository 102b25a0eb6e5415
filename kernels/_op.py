"""A launcher becomes `torch.ops.fastgpt2.<name>`, with a fake and a gradient; eager calls skip the dispatcher.

Several roads lead to one launcher:

- Eager mode calls it straight, inside a `torch.autograd.Function` when a gradient is wanted: a registered operator
  costs several times the host time of a Function, and at GPT-2's sizes host time decides.
- `torch.compile` sees into it. Dynamo's graph holds the registered operator and its fake; AOTAutograd, which writes
  forward and backward down, runs the launcher on fake tensors in its place, as it does for `torch.library.triton_op`.
  What PyTorch computes there becomes nodes that Inductor compiles with the rest (products, sums, sorting), and each
  launch a node that its code makes by itself: no Python of ours runs between launches, and buffers are Inductor's.
- The operator stays one opaque node, whose launcher is called from compiled code, where it was registered as `opaque`,
  in `torch.export`'s programs, which have to be written to files, and where Triton interprets kernels, which Inductor
  cannot.
- Tensors that are not plain ones (DTensor, FakeTensor, ...) meet the registered operator.

What a launcher may do follows from the second road: sizes may be symbols; it allocates outputs with PyTorch, and gives
kernels whole tensors to write to, because writing to a view makes Inductor copy its base.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _device
from ._frozen import MOST_PLANS
from ._trace import traced
from ._watched import flops_are_counted, one_by_one, refusing, register_flops, transformed_function

TRACED_TYPES = (FakeTensor, FunctionalTensor)
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LIBRARY = torch.library.Library("fastgpt2", "FRAGMENT")

# PyTorch keeps compiled code on disk, under a key that holds the sources of the kernels noted here for an operator, and
# the strings that they name. One function that names the digest of this folder stands for its kernels, launchers, fakes
# and tuning numbers. Without such notes operators stay opaque: what they become would be taken from an older version.
KERNELS_IN_KEYS: dict[str, list[object]] | None = getattr(torch._library.triton, "triton_ops_to_kernels", None)
SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def _sources():
    SOURCES  # noqa: B018


_SOURCES_KERNEL = triton.JITFunction(_sources)  # also where decorated kernels are the interpreter's


def op(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    toggle: str,
    mutates: tuple[str, ...] = (),
    opaque: bool = False,
    strided: tuple[str, ...] = (),
    differentiable: int | None = None,
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Registers `launcher` as `torch.ops.fastgpt2.<launcher name>` and returns the function to call it by.

    launcher: positional arguments only, annotated (the operator's schema is read from them); allocates its outputs,
        launches kernels, mutates none of its inputs but `mutates` and returns tensors that alias nothing, or None in
        the place of one that nobody asked for: the operator then has an empty tensor (0,) there.
    fake: same arguments, returns empty tensors with the launcher's shapes, dtypes and strides.
    toggle: the field of `Kernels` that switches this operator off; named in errors.
    mutates: names of tensor arguments that the kernels write to, where they are given.
    opaque: torch.compile calls the launcher, and does not look into it.
    strided: names of tensor arguments that the launcher takes with any strides; the others it gets contiguous.
    differentiable: of how many outputs, the first ones, there are gradients; of all by default. The others are for
        backward: eager calls do not return them.
    setup_context, backward: as in `torch.library.register_autograd`; both or neither.
    flops: of the same arguments with shapes in the place of tensors, how many floating-point operations the kernels do
        in matrix products, as `torch.utils.flop_counter` counts them; what PyTorch's products do it counts by itself.
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
        for place in mutated:  # so that autograd refuses a backward that needs what was there before
            if args[place] is not None:
                torch.autograd.graph.increment_version(args[place])
        if index < 0 or index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(index):  # Triton launches on the current device
            return launcher(*args)

    def trace(mode, operator, types, args, kwargs=None):
        """What AOTAutograd calls, under which PyTorch makes everything functional, in place of the operator."""
        if not _visible():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        if not all(issubclass(t, TRACED_TYPES) or t is Tensor for t in types):
            return NotImplemented
        check_device([a for a in args if isinstance(a, Tensor)])
        with mode, traced():
            return _all_there(launcher(*contiguous(args)), args)

    def dispatched(*args):
        check_device([a for a in args if isinstance(a, Tensor)])
        return _all_there(launch(*args), args)

    # The strides that eager would see, which is what an operator without a tag gets too.
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
    if KERNELS_IN_KEYS is not None:
        KERNELS_IN_KEYS[f"fastgpt2::{name}"] = [_SOURCES_KERNEL]
        if not (opaque or _device.INTERPRETED):
            torch.library.register_torch_dispatch(f"fastgpt2::{name}", FunctionalTensorMode, trace, lib=_LIBRARY)

    if backward is None or setup_context is None:
        transformed = transformed_function(name, registered, *refusing(_no_second_derivative(name, toggle)))

        def call(*args):
            tensors = _plain(args, tensor_places)
            if tensors is None or (torch._C._len_torch_dispatch_stack() and flops is not None and flops_are_counted()):
                return registered(*args)
            if torch._C._are_functorch_transforms_active():
                return registered(*args) if mutates else transformed.apply(*args)
            check_device(tensors)
            return launch(*args)

        return call

    def registered_context(ctx, inputs, output):
        if differentiable is not None:
            ctx.mark_non_differentiable(*output[differentiable:])
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"fastgpt2::{name}", backward, setup_context=registered_context, lib=_LIBRARY)
    function = _autograd_function(name, launch, setup_context, _once(name, toggle, backward), differentiable)
    # What `Function.apply` comes to without functorch's transforms, which it looks for in every argument.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    transformed = transformed_function(name, registered, registered_context, backward)

    def call_with_gradient(*args):
        tensors = _plain(args, tensor_places)
        if tensors is None or (torch._C._len_torch_dispatch_stack() and flops is not None and flops_are_counted()):
            return registered(*args)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*args)
        check_device(tensors)
        # Forward-mode derivatives, of which there are none, are refused by the Function.
        if _require_grad(tensors) or forward_ad._current_level >= 0:
            return apply(*args)
        return launch(*args)

    return call_with_gradient


def _schema(launcher: Callable[..., Any], mutates: tuple[str, ...]) -> str:
    """The operator's schema, in which an output that may be None is a tensor, too (`_all_there`)."""

    def prototype():
        pass

    signature = inspect.signature(launcher, eval_str=True)
    if outputs := get_args(signature.return_annotation):
        signature = signature.replace(return_annotation=tuple[(Tensor,) * len(outputs)])  # type: ignore[misc]
    prototype.__signature__ = signature  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def _all_there(output: Any, args: tuple) -> Any:
    """What an operator returns for what its launcher did: tensors alone."""
    if not isinstance(output, tuple):
        return output
    tensor = next(a for a in args if isinstance(a, Tensor))
    return tuple(tensor.new_empty(0) if t is None else t for t in output)


def _autograd_function(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., Any],
    differentiable: int | None,
) -> type[torch.autograd.Function]:
    """The launcher with the gradient that its operator has, without the dispatcher between."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = launch(*args)
            setup_context(ctx, args, output)
            return output if differentiable is None else output[:differentiable]

        @staticmethod
        def backward(ctx, *grads):
            return gradient(ctx, *grads)

    Eager.__name__ = name
    return Eager


def _visible() -> bool:
    """False while torch.export traces, whose programs keep operators because they cannot hold kernels."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return not custom_triton_ops_decomposition_disabled()


def _let_inductor_call(operator: str) -> None:
    """Tells torch.compile's Inductor, which has been imported when it runs fakes, that this operator is to be called.

    Else it finds that out by itself, and in PyTorch 2.11 (not in 2.13) it then writes all that the operator's arguments
    were computed from into a text that no log takes, exponentially long in the depth of the model.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    called = getattr(lowering, "FALLBACK_ALLOW_LIST", None)
    if called is not None:
        called.add(operator)


def _plain(args: tuple, tensor_places: list[int]) -> list[Tensor] | None:
    """The tensors among `args`; None where PyTorch must see the operator: under torch.compile, or where one of them is
    not a plain one."""
    if torch.compiler.is_compiling():
        return None
    tensors = []
    for place in tensor_places:
        tensor = args[place]
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            tensors.append(tensor)
        elif tensor is not None:
            return None
    return tensors


def _require_grad(tensors: list[Tensor]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop, because any() takes three times as long
            if tensor.requires_grad:
                return True
    return False


def _no_second_derivative(name: str, toggle: str) -> str:
    return f"{name} has no second derivative, which create_graph=True asks for: use {toggle}='torch' for it"


def _once(name: str, toggle: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`gradient`, which refuses to be recorded for a second derivative.

    PyTorch's `once_differentiable` drops that one, without a word, where the upstream gradient is a constant.
    """

    def once(ctx, *grads):
        if torch.is_grad_enabled():  # here by create_graph=True alone
            raise RuntimeError(_no_second_derivative(name, toggle))
        return gradient(ctx, *grads)

    return once


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
    """What the mask is a function of: `seed`, drawn by torch's generator of the device where it is None; None without
    dropout. Raises ValueError for a dropout_p outside [0, 1) and a seed that is not one int64."""
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
    """(..., C) as (N, C) with a contiguous last dimension: a view where strides allow, else a copy."""
    C = x.shape[-1] if x.dim() else 1
    x = x.reshape(x.numel() // max(C, 1), C)
    return x if C == 1 or x.stride(1) == 1 else x.contiguous()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """(..., C) as memory where rows of C elements lie, and how many elements from one to the next: a kernel's two
    arguments, which for a contiguous x need no view."""
    shape = x.shape
    if x.is_contiguous():
        return x, shape[-1] if shape else 1
    x = as_rows(x)
    return x, x.stride(0)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, of the shape of x. Several times as fast as `new_empty` where x is what is wanted."""
    if x.dtype == dtype and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def check_once(check: Callable[..., Any]) -> Callable[..., Any]:
    """`check`, which looks at shapes, dtypes and values, and says nothing of arguments in which these are known."""
    passed: dict[tuple, Any] = {}

    def checked(*args):
        if torch.compiler.is_compiling():
            return check(*args)
        key = tuple([a if a is None else (a.shape, a.dtype) if isinstance(a, Tensor) else (type(a), a) for a in args])
        try:
            return passed[key]
        except KeyError:
            if len(passed) >= MOST_PLANS:
                passed.clear()
            return passed.setdefault(key, check(*args))
        except TypeError:  # sizes that are symbols have no hash
            return check(*args)

    return checked


def autocast_dtype(tensor: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype that the next matrix product will take: autocast's where it is on, but float64 stays as it is."""
    kind = "cuda" if tensor.is_cuda else tensor.device.type  # to ask for it by name takes several times as long
    cast = torch.is_autocast_enabled(kind) and default != torch.float64
    return torch.get_autocast_dtype(kind) if cast else default
