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

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import _launch
from ._trace import traced

TRACED_TYPES = (FakeTensor, FunctionalTensor)
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LIBRARY = torch.library.Library("fastgpt2", "FRAGMENT")

# PyTorch keeps compiled code on disk, ours in it, under a key that holds the sources of the kernels noted here for an
# operator, and the strings that they name. One kernel that names the digest of this folder stands for all kernels,
# launchers and tuning numbers. A PyTorch without such notes would take code of an older version of them.
KERNELS_IN_KEYS: dict[str, list[object]] | None = getattr(torch._library.triton, "triton_ops_to_kernels", None)
SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


@triton.jit
def _sources_kernel():
    SOURCES  # noqa: B018


def op(
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    toggle: str,
    mutates: tuple[str, ...] = (),
    opaque: bool = False,
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `launcher` as `torch.ops.fastgpt2.<launcher name>` and returns the function to call it by.

    launcher: positional arguments only, annotated (the operator's schema is read from them); allocates its outputs,
        launches kernels, mutates none of its inputs but `mutates` and returns tensors that alias nothing.
    fake: same arguments, returns empty tensors with the launcher's shapes, dtypes and strides.
    toggle: the field of `Kernels` that switches this operator off; named in errors.
    mutates: names of tensor arguments that the kernels write to.
    opaque: torch.compile calls the launcher, and does not look into it.
    setup_context, backward: as in `torch.library.register_autograd`; both or neither.
    """
    name = launcher.__name__
    mutated = [place for place, argument in enumerate(inspect.signature(launcher).parameters) if argument in mutates]

    def first_tensor(args: tuple) -> Tensor:
        """The first of the tensors, if Triton can run on them."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        try:
            _launch.check_device(*tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error} (or switch this kernel off: {toggle}='torch')") from None
        return tensors[0]

    def launch(*args):
        first = first_tensor(args)
        for place in mutated:  # so that autograd refuses a backward that needs what was there before
            torch.autograd.graph.increment_version(args[place])
        with _launch.device_guard(first):
            return launcher(*args)

    def trace(mode, operator, types, args, kwargs=None):
        """What AOTAutograd calls, under which PyTorch makes everything functional, in place of the operator."""
        if not _visible():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        if not all(issubclass(t, TRACED_TYPES) or t is Tensor for t in types):
            return NotImplemented
        first_tensor(args)
        with mode, traced():
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
    if not (opaque or _launch.INTERPRETED or KERNELS_IN_KEYS is None):
        KERNELS_IN_KEYS[f"fastgpt2::{name}"] = [_sources_kernel]
        torch.library.register_torch_dispatch(f"fastgpt2::{name}", FunctionalTensorMode, trace, lib=_LIBRARY)

    if backward is None or setup_context is None:

        def call(*args):
            return registered(*args) if _dispatched(args) else launch(*args)

        return call

    torch.library.register_autograd(f"fastgpt2::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

    function = _autograd_function(name, launch, setup_context, backward)

    def call_with_gradient(*args):
        if _dispatched(args):
            return registered(*args)
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
