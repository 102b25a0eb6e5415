"""Triton's interpreter in a quarter of its time, with the same results.

    with quickened():                    # in a process with TRITON_INTERPRET=1; without it, nothing changes
        y = layer_norm(x, weight)

Most of the stock interpreter's time goes neither into NumPy nor into the kernel. What it does again and again is done
once here, or in NumPy: at each launch and at each call of a device function it exchanges the functions of
triton.language for interpreted ones; it checks each sum and product of int32 for overflow by ten interpreted
operations; and each operation makes the type and the shape of its result anew, element by element. Tried with Triton
3.7 to 3.9; the interpreters of 3.4 to 3.6 do not run with the NumPy that was installed then, 2.4.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@contextlib.contextmanager
def quickened() -> Iterator[None]:
    """Inside, kernels are interpreted faster. An overflow of int32 is an AssertionError, as it was."""
    if not triton.knobs.runtime.interpret or stock._patch_lang is _nothing_to_exchange:
        yield
        return
    with mock.patch.object(stock, "_patch_attr", _exchange):
        # As for a kernel's module, which imports triton.language, and for Triton's own, which imports its core.
        exchanged: Any = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    quick: list[tuple[Any, str, Any]] = [
        (stock, "_patch_lang", _nothing_to_exchange),
        (stock, "_get_np_dtype", _numpy_dtype),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow),
        (TritonSemantic, "binary_op_type_checking_impl", _operands),
        (TritonSemantic, "broadcast_impl_value", _broadcast),
        (stock.InterpreterBuilder, "create_expand_dims", _expand_dims),
        (tl.core.block_type, "__init__", _make_block_type),
        (tl.core.block_type, "with_element_ty", _block_of),
        (tl.core.block_type, "to_ir", _itself),
        (tl.core.dtype, "to_ir", _itself),
        (tl.core.tensor, "__init__", _make_tensor),
    ]
    try:
        with contextlib.ExitStack() as patches:
            for owner, name, function in quick:
                patches.enter_context(mock.patch.object(owner, name, function))
            yield
    finally:
        if exchanged is not None:  # old versions of Triton never go back
            exchanged.restore()


def _nothing_to_exchange(function: Any) -> Any:
    return SimpleNamespace(restore=lambda: None)


def _exchange(owner: Any, name: str, builtin: Any, builder: Any, *scope: Any) -> None:
    """`owner.name` becomes the builtin with the interpreter's semantics, without the two functions in between."""
    function = inspect.unwrap(builtin)

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = stock.interpreter_semantic
        return function(*args, **kwargs)

    if scope:
        scope[0].set_attr(owner, name, interpreted)
    else:
        setattr(owner, name, interpreted)


def _check_overflow(semantic: Any, a: Any, b: Any, operation: Any) -> None:
    kind = a.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = EXACT[operation.__name__](a.handle.data, b.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")


# ----------------------------------------------------------------------------------- types and shapes are made once

_block_type_init, _tensor_init = tl.core.block_type.__init__, tl.core.tensor.__init__
_stock_operands, _stock_broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
_stock_numpy_dtype = stock._get_np_dtype
_NUMPY_DTYPES: dict[str, np.dtype] = {}  # by the name of a scalar type


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Block types of one element type and shape share their attributes, which are kept with the element type."""
    sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in getattr(shape, "values", shape)])
    made = vars(element_ty).setdefault("block_types", {})
    if sizes in made:
        self.__dict__ = vars(made[sizes])
    else:
        _block_type_init(self, element_ty, list(sizes))
        self.sizes = sizes
        made[sizes] = self


def _block_of(self: Any, scalar: Any) -> Any:
    made = vars(scalar).get("block_types", {}).get(vars(self).get("sizes"))
    return tl.core.block_type(scalar, self.shape) if made is None else made


def _itself(self: Any, builder: Any) -> Any:
    """The interpreter's own types are those of the language."""
    return self


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    """Tensors of one type share all attributes but the handle: they are constants."""
    attributes = vars(type).get("of_tensors")
    if attributes is None:
        _tensor_init(self, handle, type)
        vars(type)["of_tensors"] = {name: value for name, value in vars(self).items() if name != "handle"}
    else:
        vars(self).update(attributes)
        self.handle = handle


def _numpy_dtype(type: Any) -> np.dtype:
    scalar = type.scalar
    if scalar.name not in _NUMPY_DTYPES:
        _NUMPY_DTYPES[scalar.name] = _stock_numpy_dtype(scalar)
    return _NUMPY_DTYPES[scalar.name]


def _operands(semantic: Any, a: Any, b: Any, *flags: bool, **named: bool) -> Any:
    """Operands of one type stay as they are; other types, pointers and divisions are left to Triton."""
    divides = len(flags) > 2 or named
    if isinstance(a, tl.core.tensor) and isinstance(b, tl.core.tensor) and a.dtype is b.dtype and not divides:
        if not a.dtype.is_ptr():
            return _broadcast(semantic, a, b)
    return _stock_operands(semantic, a, b, *flags, **named)


def _broadcast(semantic: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """a and b in their common shape. Blocks of different ranks, and errors, are left to Triton."""
    a_sizes, b_sizes = vars(a.type).get("sizes"), vars(b.type).get("sizes")
    if a_sizes == b_sizes:
        return a, b
    if a_sizes is None or b_sizes is None:
        return (_filled(a, b_sizes), b) if a_sizes is None else (a, _filled(b, a_sizes))
    sizes = tuple(map(max, a_sizes, b_sizes))
    fits = all(n == 1 or n == size for n, size in zip(a_sizes + b_sizes, sizes + sizes, strict=False))
    if len(a_sizes) != len(b_sizes) or not fits:
        return _stock_broadcast(semantic, a, b)
    return _expanded(a, a_sizes, sizes), _expanded(b, b_sizes, sizes)


def _filled(scalar: Any, sizes: tuple[int, ...]) -> Any:
    kind = scalar.type.scalar
    data = np.empty(sizes, _numpy_dtype(kind))
    data[...] = scalar.handle.data
    return tl.core.tensor(stock.TensorHandle(data, kind), tl.core.block_type(kind, sizes))


def _expanded(x: Any, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    if sizes == wanted:
        return x
    data = x.handle.data
    if data.flags.c_contiguous:  # what np.broadcast_to does, in an eighth of its time
        strides = [0 if n == 1 else stride for n, stride in zip(sizes, data.strides, strict=True)]
        data = np.ndarray(wanted, data.dtype, data, 0, strides)
    else:
        data = np.broadcast_to(data, wanted)
    kind = x.type.scalar
    return tl.core.tensor(stock.TensorHandle(data, kind), tl.core.block_type(kind, wanted))


def _expand_dims(builder: Any, x: Any, axis: int) -> Any:
    return stock.TensorHandle(x.data[(slice(None),) * axis + (None,)], x.dtype.scalar)
