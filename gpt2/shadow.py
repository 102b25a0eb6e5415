"""Shadows: 16-bit copies of fp32 parameters that stay from step to step, read under autocast in place of a cast.

    shadow = shadow_of(parameter)            # an optimizer, once
    product = F.linear(x, as_read(weight))   # the model, in each pass: its shadow if it has one, else the weight itself
    shadow.written()                         # the optimizer, after it has updated the parameter and `shadow.copy`

A shadow begins with the first pass that reads it, so there are no shadows of parameters that no product reads. It
belongs to who holds it, the optimizer and captured graphs, and ends with the last of them. Before each read it is
compared with its parameter: if PyTorch's version counter, the storage or the strides of the parameter are others than
at the last write, the shadow is written anew, which costs the cast that autocast would have made. Therefore anyone may
change parameters, in place or by replacing them or their `.data`. The one change that PyTorch does not count is one in
place through `.data` (`p.data.mul_(2)`): change `p` itself under `torch.no_grad()`. Weights that are put in through
`.data` for an evaluation and taken out again are right, because evaluation does not read shadows.

Gradients are those of a cast: the product's, in 16 bits, converted to fp32. Passes without gradients (evaluation,
generation), compiled code, functorch's transforms, views of parameters and captures of CUDA graphs by other code than
`graphed` read the parameter itself.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastgpt2.gpt2 import hardware


class Shadow:
    """copy: the parameter in the dtype of the last autocast that read it, None before the first one."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter
        self.address = parameter.data_ptr()
        self.copy: Tensor | None = None
        self._written: tuple | None = None
        self._storage: StorageWeakRef | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether `copy` has the parameter's values."""
        return self._written == _state(self.parameter)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether `copy` is there in this dtype and lies in memory as the parameter does."""
        copy, p = self.copy, self.parameter
        return copy is not None and (copy.dtype, copy.shape, copy.stride()) == (dtype, p.shape, p.stride())

    def written(self) -> None:
        """Says that `copy` has been given the parameter's values."""
        self._written = _state(self.parameter)
        if self._storage is None or self._storage.cdata != self._written[1]:
            self._storage = StorageWeakRef(self.parameter.untyped_storage())  # no later storage has this one's number

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """`copy` with the parameter's values in `dtype`: cast only if it has not got them."""
        copy = self.copy
        if copy is None or not self.fits(dtype):
            copy = torch.empty_like(self.parameter, dtype=dtype, requires_grad=False)
        return self.refreshed(copy)

    def refreshed(self, copy: Tensor) -> Tensor:
        """Makes `copy` this shadow's, with the parameter's values."""
        if copy is not self.copy or not self.is_fresh:
            self.copy = copy
            with torch.no_grad():
                copy.copy_(self.parameter)
            self.written()
        return copy

    def stands_for(self, weight: Tensor) -> bool:
        """Whether `weight`, whose address is this shadow's, has the memory of the parameter and not of a part of it."""
        p = self.parameter
        return weight is p or (
            (weight.dtype, weight.shape, weight.stride()) == (p.dtype, p.shape, p.stride())
            and p.data_ptr() == self.address
        )


def _state(p: Tensor) -> tuple:
    """What changes with the values of a parameter: how often it was written, its storage, and its place there."""
    return p._version, p.untyped_storage()._cdata, p.data_ptr(), p.shape, p.stride()


Read = dict[int, tuple[Shadow, Tensor]]  # what a capture read, by the copy's address
_SHADOWS: weakref.WeakValueDictionary[int, Shadow] = weakref.WeakValueDictionary()  # by the parameter's address
_read: Read | None = None


def shadow_of(parameter: Tensor) -> Shadow | None:
    """The shadow of a parameter where it lies now, the same one for everybody who asks; None for what autocast does not
    cast, and for parameters that ranks hold shards of."""
    plain = type(parameter) in (nn.Parameter, Tensor) and parameter.layout == torch.strided
    if not plain or parameter.dtype != torch.float32 or parameter.is_inference() or not parameter.data_ptr():
        return None
    shadow = _SHADOWS.get(parameter.data_ptr())
    if shadow is None or shadow.parameter is not parameter:
        shadow = _SHADOWS[parameter.data_ptr()] = Shadow(parameter)
    return shadow


def forget(shadow: Shadow) -> None:
    """From now on passes read the parameter itself."""
    if _SHADOWS.get(shadow.address) is shadow:
        del _SHADOWS[shadow.address]


def as_read(weight: Tensor | None) -> Any:
    """`weight` as a product reads it under autocast: its shadow, through which gradients reach it, or else itself."""
    copy = None if weight is None or not _SHADOWS else copy_as_read(weight)
    return weight if copy is None else _apply(weight, copy)


def copy_as_read(weight: Tensor) -> Tensor | None:
    """The values of `weight` in autocast's dtype, without a gradient; None if products are to read `weight` itself."""
    if torch.compiler.is_compiling() or not _SHADOWS or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    kind = "cuda" if weight.is_cuda else weight.device.type
    if not torch.is_autocast_enabled(kind) or torch._C._are_functorch_transforms_active():
        return None
    if torch.autograd.forward_ad._current_level >= 0 or type(weight) not in (nn.Parameter, Tensor):
        return None
    shadow = _SHADOWS.get(weight.data_ptr())
    if shadow is None or not shadow.stands_for(weight):
        return None
    if _read is None and hardware.is_capturing():
        return None
    dtype = torch.get_autocast_dtype(kind)
    if dtype.itemsize != 2:
        return None
    copy = shadow.in_dtype(dtype)
    if _read is not None:
        _read[copy.data_ptr()] = shadow, copy
    return copy


@contextlib.contextmanager
def noted() -> Iterator[Read]:
    """Inside, passes may be captured in a CUDA graph. What they read is in the dictionary at the end: who replays the
    graph holds it and calls `shadow.refreshed(copy)` before."""
    global _read
    before, _read = _read, {}
    try:
        yield _read
    finally:
        _read = before


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor):  # type: ignore[override]
        ctx.dtype = weight.dtype
        return copy.detach()  # has the copy's version counter: a backward after a change is refused

    @staticmethod
    def backward(ctx, dcopy: Tensor):  # type: ignore[override]
        return dcopy.to(ctx.dtype), None


_apply = super(torch.autograd.Function, _Read).apply  # type: ignore[misc]  # without a search for functorch's transforms
