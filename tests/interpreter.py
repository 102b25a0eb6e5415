"""Triton's interpreter made as strict as hardware, and what can be learnt from running a kernel in it.

    with mended(): ...                   bfloat16 that computes, and an end to what the stock interpreter lets pass
                                         (conftest.py applies it to the whole session)
    with grid_order("reversed"): ...     programs run last to first, or "shuffled": results must not change
    with count_launches() as log: ...    len(log); log[i].name, .grid, .bytes_read, .bytes_written, .bytes
                                         (bench/audit/traffic.py)
    with red_zones() as zone:            what is allocated inside lies between guard zones that are checked at the end
        y = op(zone(x))                  zone(x): a copy of x, same strides, between NaNs
    far_apart(x)                         a copy of x whose rows int32 offsets cannot tell apart

The first two need TRITON_INTERPRET=1; on a GPU `count_launches` gives names, neither grids nor bytes.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastgpt2.bench.audit.traffic import count_launches
from fastgpt2.bench.cases.interpreter import quickened

__all__ = ["BackwardToo", "OutOfBounds", "count_launches", "far_apart", "grid_order", "mended", "red_zones"]

REFUSAL = "arithmetic in bfloat16: cast to float32 right after the load (it may be moved, cast and given to tl.dot)"

# ------------------------------------------------------------------------------------------------------ the mend


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 numbers -> float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest number with 10 mantissa bits, which is what tensor cores multiply."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), nearest.view(np.float32), x)


def _is_bfloat16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _refusing_bfloat16(method):
    """The builder's method, with an error for bfloat16 operands: kernels upcast right after the load."""

    def refuse(self, *args, **kwargs):
        if any(map(_is_bfloat16, args)):
            raise TypeError(
                "arithmetic in bfloat16: cast to float32 right after the load (allowed: tl.dot, casts, moves)"
            )
        return method(self, *args, **kwargs)

    return refuse


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Makes the interpreter compute in bfloat16 as hardware does and stumble where compiled code would.

    - float32 -> bfloat16 rounds to nearest even; tl.dot multiplies bfloat16 values, not their bits, in float32;
    - any other arithmetic, comparison or reduction in bfloat16 raises: it would round at each step on hardware;
    - tl.dot of float32 rounds its operands to tf32 unless input_precision="ieee" asks otherwise, as compiled code does;
    - lanes that a load of a block masks off without `other=` are NaN: compiled code leaves them undefined.
    """
    cast, fp_to_fp, dot, masked_load = (
        getattr(InterpreterBuilder, name)
        for name in ("cast_impl", "create_fp_to_fp", "create_dot", "create_masked_load")
    )
    ternary = InterpreterBuilder.ternary_op

    def mended_cast(self, src, dst_type):
        if src.dtype.scalar == dst_type.scalar:
            return src
        if _is_bfloat16(src):
            wide = TensorHandle(bfloat16_values(src.data), tl.float32)
            return wide if dst_type.scalar == tl.float32 else mended_cast(self, wide, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def mended_fp_to_fp(self, src, dst_type, rounding_mode):
        to_nearest = rounding_mode in (None, ir.ROUNDING_MODE.RTNE)
        if src.dtype.scalar == tl.bfloat16 or (dst_type.scalar == tl.bfloat16 and to_nearest):
            return mended_cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def mended_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        def operand(x):
            if _is_bfloat16(x):
                return TensorHandle(bfloat16_values(x.data), tl.float32)
            if x.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
                return TensorHandle(tf32(x.data), tl.float32)
            return x

        return dot(self, operand(a), operand(b), d, input_precision, max_num_imprecise_acc)

    def mended_masked_load(self, ptrs, mask, other, *rest, **named):  # descriptors name their arguments
        element = ptrs.get_element_ty()
        # A single element is left alone: there Triton takes `other=0.0` itself for a missing one.
        if other is None and ptrs.data.size > 1 and element.is_floating() and element.primitive_bitwidth >= 16:
            nan = np.full(ptrs.data.shape, np.nan, np.float32)
            data = bfloat16_bits(nan) if element == tl.bfloat16 else nan.astype(stock._get_np_dtype(element))
            other = TensorHandle(data, element)
        return masked_load(self, ptrs, mask, other, *rest, **named)

    def mended_ternary(self, first, second, third, op):
        if op is not np.where and any(map(_is_bfloat16, (first, second, third))):
            raise TypeError(REFUSAL)
        return ternary(self, first, second, third, op)

    def mended_reduction(self, values):
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype.scalar == tl.bfloat16:
                raise TypeError(REFUSAL)
        return reduction(self, values)

    reduction = stock.ReduceScanOpInterface.apply
    methods = dict(
        cast_impl=mended_cast,
        create_fp_to_fp=mended_fp_to_fp,
        create_dot=mended_dot,
        create_masked_load=mended_masked_load,
        ternary_op=mended_ternary,
        get_bf16=lambda self, value: TensorHandle(bfloat16_bits(np.array([value], np.float32)), tl.bfloat16),
    )
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf"):
        methods[name] = _refusing_bfloat16(getattr(InterpreterBuilder, name))
    with contextlib.ExitStack() as patches:
        for name, method in methods.items():
            patches.enter_context(mock.patch.object(InterpreterBuilder, name, method, create=True))
        patches.enter_context(mock.patch.object(stock.ReduceScanOpInterface, "apply", mended_reduction))
        patches.enter_context(quickened())
        yield


# ------------------------------------------------------------------------------------------------- order of the grid


@contextlib.contextmanager
def grid_order(order: str, seed: int = 0) -> Iterator[None]:
    """Runs programs "reversed" or "shuffled": a result that changes depends on an order that no GPU promises."""
    if order not in ("reversed", "shuffled"):
        raise ValueError(f"grid_order: order is {order!r}, allowed are 'reversed', 'shuffled'")
    set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    turn: dict[str, np.ndarray] = {}

    def ordered_dim(self, nx, ny, nz):
        set_dim(self, nx, ny, nz)
        total = nx * ny * nz
        backwards = np.arange(total)[::-1]
        turn["of"] = backwards if order == "reversed" else np.random.default_rng(seed).permutation(total)

    def ordered_idx(self, x, y, z):
        flat = np.ravel_multi_index((x, y, z), self.grid_dim)
        set_idx(self, *(int(i) for i in np.unravel_index(turn["of"][flat], self.grid_dim)))

    with (
        mock.patch.object(InterpreterBuilder, "set_grid_dim", ordered_dim),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", ordered_idx),
    ):
        yield


# -------------------------------------------------------------------------------------------------------- red zones

ZONE_BYTES = 1024  # keeps the alignment that the allocator gave
_CANARY = 0xA5
_ALLOCATORS = {
    *(torch.empty, torch.empty_like, torch.empty_strided, torch.zeros, torch.zeros_like),
    *(Tensor.new_empty, Tensor.new_empty_strided, Tensor.new_zeros),
}


class BackwardToo(TorchFunctionMode):
    """A mode that sees what backward does too: `torch.autograd.grad` is else handed to a mode as one call, which runs
    without it."""

    def __enter__(self):
        self._not_one_call = mock.patch.object(torch.autograd, "has_torch_function", lambda tensors: False)
        self._not_one_call.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._not_one_call.stop()


class OutOfBounds(AssertionError):
    """A kernel wrote outside the tensors that it was given."""


class _Zones(BackwardToo):
    def __init__(self):
        super().__init__()
        self.canaries: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func not in _ALLOCATORS or type(made) is not Tensor or made.is_meta or made.numel() == 0:
            return made
        return self.between(made, f"{func.__name__}{tuple(made.shape)}", None)

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with its strides; reading past its ends gives NaN (integers: garbage)."""
        copy = self.between(tensor.detach(), f"input {tuple(tensor.shape)}", np.nan)
        return copy.requires_grad_(tensor.requires_grad)

    def between(self, tensor: Tensor, what: str, filler: float | None) -> Tensor:
        """`tensor` moved between two guard zones: of `filler` for floating inputs, of a byte pattern else."""
        size = tensor.element_size()
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        zone = ZONE_BYTES // size
        arena = torch.full((2 * ZONE_BYTES + extent * size,), _CANARY, dtype=torch.uint8, device=tensor.device)
        storage = arena[: (2 * zone + extent) * size].view(tensor.dtype)
        if filler is not None and tensor.is_floating_point():
            storage.fill_(filler)  # gaps between strided rows are guarded too
        moved = storage.as_strided(tensor.shape, tensor.stride(), zone)
        once = tuple(slice(1) if s == 0 else slice(None) for s in tensor.stride())  # expanded: one memory location
        moved[once].copy_(tensor[once])
        for side in (storage[:zone], storage[zone + extent :]):
            bits = side.view(torch.uint8)
            self.canaries.append((what, bits, bits.clone()))
        return moved

    def check(self) -> None:
        for what, bits, before in self.canaries:
            if not torch.equal(bits, before):
                raise OutOfBounds(f"something wrote outside the tensor of {what}")


@contextlib.contextmanager
def red_zones() -> Iterator[_Zones]:
    """Guards what torch.empty and its kin allocate inside, and what is passed through the value it yields."""
    with _Zones() as zones:
        yield zones
    zones.check()


# ------------------------------------------------------------------------------------------------ offsets past 32 bits

NORESERVE = 0x4000  # Linux; mmap.MAP_NORESERVE is Python 3.13's


def far_apart(x: Tensor) -> Tensor:
    """x with 2^30 elements from one index of the first dimension to the next: the third one is out of int32's reach.

    Where x has hundreds of rows, 2^24 - 16: what attention takes without a copy. The memory is address space, of which
    only what is touched becomes real. The last row has its whole pitch too: cross-entropy writes into a row's padding.
    """
    apart = 2**30 if x.shape[0] < 10 else 2**24 - 16
    extent = x.shape[0] * apart
    space = mmap.mmap(-1, extent * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    strides = (apart, *x[0].contiguous().stride())
    return torch.frombuffer(space, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
