"""The rule for every kernel: at most twice as far from the fp64 truth as eager PyTorch in the same dtype.

    from numerics import check

    x = torch.randn(64, 768, dtype=torch.bfloat16)
    w = torch.randn(768)                                     # dtypes may be mixed, integers are passed on
    errors = check(
        lambda x, w: layer_norm(x, w),                       # ours
        lambda x, w: layer_norm_reference(x, w),             # plain PyTorch: in fp64 it is the truth
        x, w,
        eager=lambda x, w: F.layer_norm(x, (768,), w.to(x.dtype)),   # default: the reference in the inputs' dtypes
        names=("x", "weight"),
    )
    errors["grad of x"].ours                                 # figures, for messages and further claims

What is checked, for every floating output and for the gradient of every floating input:

- shape and dtype are eager's, and it is finite wherever the truth is (in its dtype) and eager is;
- max and root-mean-square error, by the rule of bench/verify/error_rule.py

(`roundings=` of a store, where several ops in a row give results of few elements). The truth is computed from the
inputs as rounded to their dtypes. Inputs keep their strides on the way to ours (pass a slice, an expanded or transposed
tensor).

Options: `rows=True` holds each row (last dimension) to the rule by itself, so that one huge row does not excuse the
others; `grads=False` leaves gradients out, `grads=("x", ...)` takes those alone; `upstream(output) -> gradient`
replaces the random upstream gradient (for example `lambda y: torch.ones((), dtype=y.dtype).expand_as(y)`; None leaves
an output out); `factor=` replaces 2; `cancelling=` is how large the terms are where the truth is 0 because they cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt2.bench.verify.error_rule import allowed_error


@dataclass(frozen=True)
class Error:
    """Distance from the truth, the worst row's where rows are checked by themselves; `bound` is what ours may reach."""

    measure: str  # "max" or "rms"
    ours: float
    eager: float
    bound: float
    scale: float

    @property
    def ratio(self) -> float:
        """Ours over what is allowed: above 1 fails."""
        return self.ours / self.bound if self.bound else (0.0 if self.ours == 0 else float("inf"))

    def __str__(self) -> str:
        return (
            f"{self.measure} error {self.ours:.3g}, eager {self.eager:.3g}, allowed {self.bound:.3g}, "
            f"scale {self.scale:.3g}: {self.ratio:.2f} of what is allowed"
        )


def check(
    op: Callable,
    reference: Callable,
    *inputs,
    eager: Callable | None = None,
    names: Sequence[str] | None = None,
    grads: bool | Sequence[str] = True,
    upstream: Callable[[Tensor], Tensor | None] | None = None,
    rows: bool = False,
    factor: float = 2.0,
    roundings: int = 1,
    cancelling: float = 0.0,
) -> dict[str, Error]:
    """Raises AssertionError unless `op` keeps the rule above; returns the worse of its two errors for each result."""
    names = tuple(names or map(str, range(len(inputs))))
    assert len(names) == len(inputs), f"{len(names)} names for {len(inputs)} inputs"
    floating = [isinstance(t, Tensor) and t.is_floating_point() for t in inputs]
    wanted = [
        f and (grads is True or (grads is not False and n in grads)) for f, n in zip(floating, names, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    upstreams: list[Tensor | None] = []

    def run(function: Callable, wide: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        own = [
            (t.detach().double() if wide else t.detach()).requires_grad_(want) if f else t
            for t, f, want in zip(inputs, floating, wanted, strict=True)
        ]
        outputs = function(*own)
        outputs = [o for o in (outputs if isinstance(outputs, tuple | list) else (outputs,)) if isinstance(o, Tensor)]
        outputs = [o for o in outputs if o.is_floating_point()]
        if not any(wanted):
            return outputs, []
        if not upstreams:
            for o in outputs:
                random = torch.randn(o.shape, generator=generator).to(o.device, o.dtype)
                upstreams.append(upstream(o) if upstream else random)
        pairs = [(o, g) for o, g in zip(outputs, upstreams, strict=True) if g is not None and o.requires_grad]
        got = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, want in zip(own, wanted, strict=True) if want],
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        return [o.detach() for o in outputs], list(got)

    ours, theirs, truth = run(op, False), run(eager or reference, False), run(reference, True)
    assert len(ours[0]) == len(theirs[0]) == len(truth[0]), (
        f"floating outputs: ours {len(ours[0])}, eager {len(theirs[0])}, truth {len(truth[0])}"
    )
    titles = ["output"] if len(ours[0]) == 1 else [f"output {i}" for i in range(len(ours[0]))]
    titles += [f"grad of {n}" for n, want in zip(names, wanted, strict=True) if want]
    results = zip(titles, ours[0] + ours[1], theirs[0] + theirs[1], truth[0] + truth[1], strict=True)
    errors, failures = {}, []
    for title, a, b, t in results:
        try:
            errors[title] = compare(a, b, t, rows=rows, factor=factor, roundings=roundings, cancelling=cancelling)
        except AssertionError as failure:
            failures.append(f"{title}: {failure}")
    assert not failures, "\n".join(failures)
    return errors


def compare(
    ours: Tensor | None,
    eager: Tensor | None,
    truth: Tensor | None,
    *,
    rows: bool = False,
    factor: float = 2.0,
    roundings: int = 1,
    cancelling: float = 0.0,
) -> Error:
    """The rule for one result. `eager` and `truth` None means that there is nothing to compute; then so must `ours`."""
    if truth is None:
        assert ours is None or not ours.any(), "a value where the truth depends on nothing"
        return Error("max", 0.0, 0.0, 0.0, 0.0)
    assert ours is not None, "missing"
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, the truth's is {tuple(truth.shape)}"
    assert eager is None or ours.dtype == eager.dtype, f"{ours.dtype}, eager gives {eager.dtype}"
    if ours.numel() == 0:
        return Error("max", 0.0, 0.0, 0.0, 0.0)
    dtype, truth = ours.dtype, truth.double()
    theirs = truth.to(dtype).double() if eager is None else eager.double()
    countable = truth.to(dtype).isfinite() & theirs.isfinite()
    broken = countable & ~ours.isfinite()
    assert not broken.any(), f"{int(broken.sum())} of {broken.numel()} values are not finite, first at {_first(broken)}"

    def zeroed(x: Tensor) -> Tensor:
        x = torch.where(countable, x, 0.0)
        return x.reshape(-1, x.shape[-1]) if rows and x.dim() else x.reshape(1, -1)

    t, a, b = zeroed(truth), zeroed(ours.double()), zeroed(theirs)
    measures = {"max": lambda x: x.abs().amax(-1), "rms": lambda x: x.square().mean(-1).sqrt()}
    worst = []
    for measure, size in measures.items():
        error, base, scale = size(a - t), size(b - t), size(t)
        bound = allowed_error(base, scale, dtype, factor=factor, roundings=roundings, cancelling=cancelling)
        row = int((error / bound).argmax())
        worst.append(Error(measure, *(float(x[row]) for x in (error, base, bound, scale))))
    for error in worst:
        far = (a - t).abs()
        assert error.ours <= error.bound, f"{error}; farthest at {_first(far == far.amax(), truth.shape)}"
    return max(worst, key=lambda e: e.ratio)


def _first(where: Tensor, shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """Index of the first true element, in a tensor of `shape`."""
    flat = int(where.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tuple(shape or where.shape)))
