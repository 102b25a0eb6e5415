"""AdamW on the parameters of a block: cases, PyTorch's fused one beside it, calls.

Inputs stay as they are: every call, PyTorch's too, works on copies of parameters and moments, and is timed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, Case, New
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.kernels import _device, adamw
from fastgpt2.kernels.adamw import Member, Settings

SETTINGS = Settings(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0
DONE = 7.0  # steps before this one
SHADOW = FP16 if _device.INTERPRETED else BF16  # of a float32 parameter; Triton's interpreter has no bfloat16


def cases(sizes: Sizes) -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        yield _case(sizes.rows, sizes.widths[0], dtype)


def sized(size: Size) -> Iterator[Case]:
    """A projection of the MLP and its bias."""
    yield _case(4 * size.C, size.C, size.dtype)


def _case(rows: int, C: int, dtype: torch.dtype) -> Case:
    """A matrix with a shadow and a vector."""
    numbers = (rows + 1) * C

    def make_inputs(new: New) -> tuple:
        shapes = (rows, C), (C,)
        return tuple(new(*shape) for shape in shapes for _ in range(4))

    return Case(
        op="adamw",
        toggle=adamw.TOGGLE,
        shape=f"{rows}x{C}",
        dtype=dtype,
        make_inputs=make_inputs,
        ours=ours,
        reference=lambda *tensors: _flat(*adamw.adamw_reference(_members(tensors), SETTINGS, MAX_NORM)),
        eager=eager,
        forward_bytes=8 * numbers * dtype.itemsize + 2 * rows * C,
        backward_bytes=None,
        rows=rows,
    )


def _flat(new: list[Tensor], norm: Tensor) -> tuple[Tensor, ...]:
    return *new, norm


def _members(tensors: tuple[Tensor, ...], shadows: bool = False) -> list[Member]:
    """Of (p, g, m, v) one after another, copied but for g; v, which may have no sign, squared."""
    members = []
    for p, g, m, v in zip(*(tensors[k::4] for k in range(4)), strict=True):
        p, m, v = (torch.empty_like(p).copy_(t) for t in (p, m, v.square()))
        step = torch.full((), DONE, device=p.device)
        wanted = shadows and p.dim() >= 2
        shadow = torch.empty_like(p, dtype=SHADOW if p.dtype == FP32 else p.dtype) if wanted else None
        members.append(Member(p, torch.empty_like(p).copy_(g), m, v, step, shadow))
    return members


def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
    members = _members(tensors, shadows=True)
    norm = adamw.adamw(members, SETTINGS, MAX_NORM)
    assert norm is not None
    return _flat([t for p, _, m, v, *_ in members for t in (p, m, v)], norm.to(tensors[0].dtype))


def eager(*tensors: Tensor) -> tuple[Tensor, ...]:
    """PyTorch's clipping and fused AdamW."""
    members = _members(tensors)
    norm = torch.nn.utils.get_total_norm([m.gradient for m in members])
    clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([m.gradient for m in members], clip)
    lr, beta1, beta2, eps, weight_decay = SETTINGS
    lists: list[list] = [list(column) for column in zip(*(m[:5] for m in members), strict=True)]
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = lists
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        *(parameters, gradients, exp_avgs, exp_avg_sqs, [], steps),
        lr=float(lr),
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return _flat([t for p, _, m, v, _, _ in members for t in (p, m, v)], norm)


def calls() -> Iterator[Call]:
    def make(new) -> tuple[Tensor, ...]:
        return tuple(new(*shape) for shape in ((5, 259), (13,)) for _ in range(4))

    def with_scale(*tensors: Tensor) -> tuple[Tensor, ...]:
        members = _members(tensors, shadows=True)
        scale, found = (torch.full((), x, device=tensors[0].device) for x in (4.0, 0.0))
        adamw.adamw(members, SETTINGS, None, scale, found)
        return tuple(t for m in members for t in (m.parameter, m.exp_avg, m.exp_avg_sq, m.step))

    yield Call("adamw", "clipped", make, ours, differentiable=False)
    yield Call("adamw", "scaled", make, with_scale, differentiable=False)


huggingface: dict[str, Callable] = {"adamw": eager}

DESCRIPTION = Description(
    module=adamw,
    cases=cases,
    sized=sized,
    huggingface=huggingface,
    calls=calls,
)
