"""AdamW over all parameters in two launches: norm of the gradient, clipping, decay, update, and 16-bit copies.

    g    = gradient / grad_scale                                     norm = sqrt(sum of g^2 over all parameters)
    g   *= min(1, max_norm / (norm + 1e-6))                          where there is a max_norm
    p   *= 1 - lr * weight_decay
    m   += (1 - beta1) * (g - m)                                     v = beta2 * v + (1 - beta2) * g^2
    p   -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    shadow = p, rounded                                              where a parameter has one

Shapes: any; p, g, m, v of one parameter lie in memory alike, without gaps. t is a float32 scalar of each parameter.

Many tensors, one launch: their addresses are a table on the device, and a program takes one chunk of one parameter. The
first launch sums each chunk's squares and computes what depends on t alone, the second adds the sums up, in every
program anew, and updates its chunk. Tables are copied to the device where something in them changed: addresses of
gradients, or a learning rate that is a number. Parameters of several dtypes are as many pairs of launches.

HBM traffic, e bytes an element: g is read for the norm, then p, g, m, v are read and p, m, v written: 8 e an element
with clipping, 7 e without, and what the shadow's element has. PyTorch's `clip_grad_norm_` and fused AdamW move 10 e.
The second read of g is the price of exact clipping: the first update needs the norm of all gradients, and only who
writes them, PyTorch's products, could sum squares without a read. In fp32, with a shadow, 34 bytes are the least.

Numerics: fp32 (fp64) inside, one rounding at each store; factors of t in fp64. The order of every sum is fixed: bitwise
reproducible, no atomics. A norm that is no number makes every parameter NaN, as PyTorch's clipping does. t is advanced
in the second launch, from what the first one noted: without the second, nothing has happened.

Sources: Loshchilov and Hutter 2019; PyTorch's `_fused_adamw_` and its chunks; a table of addresses as in Triton's
grouped-gemm tutorial.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _device, _op, _tuning
from ._adamw_kernels import ADDRESSES, FACTORS, _adamw_begin_kernel, _adamw_update_kernel
from ._frozen import Launch, planned

TOGGLE = "optimizer"


class Settings(NamedTuple):
    """Of one group of parameters. lr: a number, or a float32 scalar on the device, which may change between replays of
    a CUDA graph."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Member(NamedTuple):
    """One parameter and what a step reads and writes of it. shadow: its copy in 16 bits, or None."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    shadow: Tensor | None = None


def adamw_reference(
    members: Sequence[Member], settings: Settings, max_norm: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """The truth: (new p, m, v of each member in turn, norm of the gradient). Changes nothing."""
    norm = torch.stack([m.gradient.square().sum() for m in members]).sum().sqrt()
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    lr, beta1, beta2, eps, weight_decay = settings
    new: list[Tensor] = []
    for p, g, m, v, step, _ in members:
        g, t = g * clip, step.to(torch.float64) + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        denominator = v.sqrt() / (1 - beta2**t).sqrt() + eps
        new += [p * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / denominator, m, v]
    return new, norm


class _Part(NamedTuple):
    """Parameters of one dtype. first: how many chunks those before have."""

    like: int  # its first member
    shadow: int | None  # its first member with a shadow
    chunks: Tensor
    first: int


class Update:
    """The launches for a set of parameters, whose shapes, dtypes and groups stay: made once, used step after step.

        update = Update(members, groups)
        update.begin(members, settings, max_norm=1.0)
        norm = update.finish()

    Between the two nothing has been changed yet: leave `finish` out to leave the step out.
    """

    def __init__(self, members: Sequence[Member], groups: Sequence[int]):
        """groups: of each member, which of the settings are its own.

        Raises TypeError, ValueError or RuntimeError for what the kernels cannot do.
        """
        check(members)
        self.device, self._groups = members[0].parameter.device, tuple(groups)
        dtypes = [m.parameter.dtype for m in members]
        self._parts: list[_Part] = []
        n_chunks = 0
        for dtype in dict.fromkeys(dtypes):
            size = _options(8 * dtype.itemsize, self.device)["CHUNK"]
            mine = [i for i, d in enumerate(dtypes) if d == dtype]
            parts = {i: max(1, _tuning.cdiv(members[i].parameter.numel(), size)) for i in mine}
            chunks = self._on_device([(i, part) for i in mine for part in range(parts[i])], torch.int32)
            shadow = next((i for i in mine if members[i].shadow is not None), None)
            self._parts.append(_Part(mine[0], shadow, chunks, n_chunks))
            n_chunks += len(chunks)
        pairs = [(m.parameter.numel(), group) for m, group in zip(members, groups, strict=True)]
        self._sizes = self._on_device(pairs, torch.int64)
        self._factors = torch.empty(len(members), FACTORS.value, dtype=torch.float64, device=self.device)
        accumulator = torch.float64 if torch.float64 in dtypes else torch.float32
        self.squares = torch.empty(n_chunks, dtype=accumulator, device=self.device)
        self._known: dict[torch.dtype, tuple] = {}
        self._read_by_graphs: list[Tensor] = []

    def begin(
        self,
        members: Sequence[Member],
        settings: Sequence[Settings],
        max_norm: float | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Sums squares, where there is a max_norm, and computes factors. members: those of before, in their order.
        grad_scale: a float32 scalar, by which gradients are still to be divided.

        Raises as `__init__`.
        """
        lrs = [s.lr.data_ptr() if isinstance(s.lr, Tensor) else 0 for s in settings]
        addresses = tuple(
            address
            for (p, g, m, v, t, shadow), group in zip(members, self._groups, strict=True)
            for address in (
                *(p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), t.data_ptr()),
                *(0 if shadow is None else shadow.data_ptr(), lrs[group]),
            )
        )
        per_group = [(0.0 if isinstance(s.lr, Tensor) else s.lr, *s[1:]) for s in settings]
        numbers = (0.0 if max_norm is None else max_norm, *itertools.chain(*per_group))
        if self._known.get(torch.int64) != addresses:
            check(members)
            per_element = (addresses[k :: ADDRESSES.value] for k in (0, 1, 2, 3, 5))
            self._aligned = all(address % 16 == 0 for column in per_element for address in column)
            self._addresses = self._kept_copy(addresses, torch.int64)
        if self._known.get(torch.float64) != numbers:
            self._settings = self._kept_copy(numbers, torch.float64)
        self._members, self._grad_scale, self._clip = members, grad_scale, max_norm is not None
        for part in self._parts:
            launch = self._plan(_adamw_begin_kernel, part)
            launch(*self._tables(part), grad_scale, self.squares, self._factors)

    def finish(self, found_inf: Tensor | None = None, squares: Tensor | None = None) -> Tensor | None:
        """The update -> the norm of the gradient, a scalar on the device; None without a max_norm.

        found_inf: a float32 scalar; where it is not 0 nothing changes. squares: what to take instead of `self.squares`:
        a sum over all ranks, say.
        """
        squares = self.squares if squares is None else squares
        norm = torch.empty((), dtype=squares.dtype, device=self.device) if self._clip else None
        for part in self._parts:
            launch = self._plan(_adamw_update_kernel, part, squares.numel())
            shadow = None if part.shadow is None else self._members[part.shadow].shadow
            launch(*self._tables(part), self._grad_scale, found_inf, squares, self._factors, norm, shadow)
        # Autograd refuses a backward that needs what was there before.
        torch.autograd.graph.increment_version([t for m in self._members for t in (m[0], *m[2:]) if t is not None])
        return norm

    def _plan(self, kernel: Any, part: _Part, *more: int) -> Launch:
        bits = 8 * self._members[part.like].parameter.dtype.itemsize
        return _plan(kernel, len(part.chunks), bits, self._clip, self._aligned, self.device, part.first, *more)

    def _tables(self, part: _Part) -> tuple[Tensor, ...]:
        return self._members[part.like].parameter, self._addresses, self._sizes, part.chunks, self._settings

    def _kept_copy(self, values: tuple, dtype: torch.dtype) -> Tensor:
        """On the device, and known from now on. A graph that is captured copies when it runs, from memory that stays,
        and until then there is nothing on the device."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._known[dtype] = () if capturing else values
        return self._on_device(values, dtype, keep=capturing)

    def _on_device(self, values: Sequence, dtype: torch.dtype, keep: bool = False) -> Tensor:
        """Without waiting for it."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        if keep:
            self._read_by_graphs.append(host)
        return host.to(self.device, non_blocking=True)


def _options(bits: int, device: torch.device) -> dict[str, int]:
    return _tuning.config(_tuning.Key("adamw", bits=bits), device)


@planned
def _plan(
    kernel: Any, n_chunks: int, bits: int, clip: bool, aligned: bool, device: torch.device, *numbers: int
) -> Launch:
    flags = dict(CLIP=clip, ALIGNED=aligned, FP64=bits == 64)
    return Launch(kernel, (n_chunks,), *numbers, **flags, **_options(bits, device))


def check(members: Sequence[Member]) -> None:
    """Raises TypeError, ValueError or RuntimeError for what the kernels cannot do, naming a parameter by its number."""
    check_device(*(t for m in members for t in m if t is not None))
    for i, (p, g, m, v, step, shadow) in enumerate(members):
        what = f"parameter {i}, of shape {tuple(p.shape)}"
        _op.check_dtypes(f"adamw: {what}", TOGGLE, parameter=p)
        if step.dtype != torch.float32 or step.numel() != 1:
            raise TypeError(
                f"adamw: {what}, has a step of {step.dtype} and {step.numel()} elements, expected one float32"
            )
        if not _without_gaps(p):
            raise ValueError(
                f"adamw: {what}, has strides {p.stride()}, allowed are tensors without gaps in memory "
                f"(toggle: {TOGGLE}='torch')"
            )
        for name, t in dict(gradient=g, exp_avg=m, exp_avg_sq=v, shadow=shadow).items():
            if t is None:
                continue
            if t.dtype != p.dtype and name != "shadow":
                raise TypeError(f"adamw: {what}, is {p.dtype} and its {name} {t.dtype}, allowed is the same dtype")
            if t.layout != torch.strided or t.shape != p.shape or _strides(t) != _strides(p):
                raise ValueError(
                    f"adamw: {what}, has strides {p.stride()} and its {name}, of shape {tuple(t.shape)}, "
                    f"{t.stride() if t.layout == torch.strided else t.layout}, allowed are the same ones"
                )


def check_device(*tensors: Tensor) -> None:
    """Raises RuntimeError where Triton does not run on these tensors."""
    try:
        _device.check_device(*tensors, instead=f"{TOGGLE}='torch'")
    except RuntimeError as error:
        raise RuntimeError(f"adamw: {error}") from None


def _strides(t: Tensor) -> list[int]:
    """Those that matter."""
    return [] if t.numel() == 0 else [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _without_gaps(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def adamw(
    members: Sequence[Member],
    settings: Settings,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor | None:
    """One step of AdamW on all `members`, in place -> the norm of the gradient before clipping, a scalar on the device;
    None without a max_norm. For many steps make an `Update` once.

    grad_scale, found_inf: float32 scalars of a GradScaler: gradients are divided by the one, and nothing changes where
    the other is not 0.
    Raises TypeError for dtypes and ValueError for strides that the kernels do not take, RuntimeError for devices.
    """
    update = Update(members, [0] * len(members))
    update.begin(members, [settings], max_norm, grad_scale)
    return update.finish(found_inf)
