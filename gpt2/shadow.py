"""Shadows: 16-bit copies of fp32 parameters that stay from step to step, read under autocast in place of a cast.

    shadow = shadow_of(parameter)            # an optimizer, once
    product = F.linear(x, as_read(weight))   # the model, in each pass: its shadow if it has one, else the weight itself
    shadow.written()                         # the optimizer, after it has updated the parameter and `shadow.copy`

A shadow begins with the first pass that reads it, so there are no shadows of parameters that no product reads. It
belongs to who holds it, the optimizer and captured graphs, and ends with the last of them. Before each read it is
compared with its parameter: if PyTorch's version counter, the storage or the strides of the parameter are others than
at the last write, the shadow is written anew, which costs the cast that autocast would have made. Therefore anyone may
change parameters, in place or by replacing them or their `.data`. The one change that PyTorch does not count is one in
place through `.data` (`p.data.mul_(2)`) or another tensor over the same memory: change `p` itself under
`torch.no_grad()`. Weights that are put in through `.data` for an evaluation and taken out again are right, because
evaluation does not read shadows.

Gradients through `as_read` are those of a cast: the product's, in 16 bits, converted to fp32. Products that take the
parameter and its `copy_as_read` write fp32 themselves (`ops.linear`, `ops.mlp`, `ops.head_loss`). Passes without
gradients (evaluation, generation), compiled code, functorch's transforms, views of parameters and captures of CUDA
graphs by other code than `graphed` read the parameter itself.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastgpt2.gpt2 import hardware

PLAIN = (nn.Parameter, Tensor)  # neither sharded nor traced


class Shadow:
    """copy: the parameter in the dtype of the last autocast that read it, None before the first one."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter
        self.copy: Tensor | None = None
        self._written: tuple | None = None
        self._storage: StorageWeakRef | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether `copy` has the parameter's values."""
        return self._written == _state(self.parameter)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether `copy` is there in this dtype and lies where and as the parameter, in fp32, does."""
        copy, p = self.copy, self.parameter
        if copy is None:
            return False
        lies = copy.device, copy.shape, copy.stride()
        return copy.dtype == dtype and p.dtype == torch.float32 and lies == (p.device, p.shape, p.stride())

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


def _state(p: Tensor) -> tuple:
    """What changes with the values of a parameter: how often it was written, its storage, and its place there."""
    return p._version, p.untyped_storage()._cdata, p.data_ptr(), p.shape, p.stride()


class Capture(NamedTuple):
    """aliases: what stands for parameters, over their memory and with their version counters, while passes are
    captured, by id. read: the shadows that these passes read, with their copies."""

    aliases: dict[int, Tensor]
    read: dict[int, tuple[Shadow, Tensor]]


# By the id of the parameter, which each shadow keeps alive.
_SHADOWS: weakref.WeakValueDictionary[int, Shadow] = weakref.WeakValueDictionary()
_capture: Capture | None = None


def shadow_of(parameter: Tensor) -> Shadow | None:
    """The shadow of a parameter, the same one for everybody who asks; None for parameters that ranks hold shards of."""
    if type(parameter) not in PLAIN or parameter.layout != torch.strided or parameter.is_inference():
        return None
    shadow = _SHADOWS.get(id(parameter))
    if shadow is None:
        shadow = _SHADOWS[id(parameter)] = Shadow(parameter)
    return shadow


def forget(shadow: Shadow) -> None:
    """From now on passes read the parameter itself."""
    _SHADOWS.pop(id(shadow.parameter), None)


def as_read(weight: Tensor | None) -> Any:
    """`weight` as a product reads it under autocast: its shadow, through which gradients reach it, or else itself."""
    copy = None if weight is None or not _SHADOWS else copy_as_read(weight)
    return weight if copy is None else _apply(weight, copy)


def copy_as_read(weight: Tensor) -> Tensor | None:
    """The values of `weight` in autocast's dtype, without a gradient; None if products are to read `weight` itself."""
    if not _SHADOWS or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    kind = "cuda" if weight.is_cuda else weight.device.type
    if not torch.is_autocast_enabled(kind) or torch._C._are_functorch_transforms_active():
        return None
    parameter = weight if _capture is None else _capture.aliases.get(id(weight), weight)
    shadow = _SHADOWS.get(id(parameter))
    if shadow is None or torch.autograd.forward_ad._current_level >= 0 or parameter.dtype != torch.float32:
        return None
    if _capture is None and hardware.is_capturing():
        return None
    dtype = torch.get_autocast_dtype(kind)
    if dtype.itemsize != 2:
        return None
    copy = shadow.in_dtype(dtype)
    if _capture is not None:
        _capture.read[id(copy)] = shadow, copy
    return copy


@contextlib.contextmanager
def captured(aliases: Mapping[Any, Tensor]) -> Iterator[Capture]:
    """Inside, passes may be captured in a CUDA graph. Who replays it holds what they `read`, and calls
    `shadow.refreshed(copy)` before.

    aliases: for parameters, what stands for them meanwhile.
    """
    global _capture
    before = _capture
    _capture = Capture({id(alias): parameter for parameter, alias in aliases.items()}, {})
    try:
        yield _capture
    finally:
        _capture = before


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor):  # type: ignore[override]
        ctx.dtype = weight.dtype
        return copy.detach()  # has the copy's version counter: a backward after a change is refused

    @staticmethod
    def backward(ctx, dcopy: Tensor):  # type: ignore[override]
        return dcopy.to(ctx.dtype), None


_apply = super(torch.autograd.Function, _Read).apply  # type: ignore[misc]  # without a search for functorch's transforms
