"""Every launch of this package is made here: the first of its kind by Triton, the later ones with what that found out.

Triton's own way binds arguments, asks what they specialise a kernel on, looks the kernel up and checks what it was
compiled from: some five times as long as the start itself. All of that depends on what a `Launch`
and its keys hold, which is more than Triton looks at: every number by its value and type, every pointer by its dtype
and whether it is divisible by 16, every option by name. So a launch that is equal in these is the same kernel.

Triton does it, as without this file, wherever somebody may be watching or may have changed the way: hooks, debugging,
a patched `JITFunction.run`, an interpreted or autotuned kernel, a version of Triton that was not tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import _device, _tuning
from ._trace import is_traced, write_down

# On ROCm, Triton looks at the sizes of tensors, too.
TRIED = (3, 4) <= _device.TRITON_VERSION <= (3, 9) and not torch.version.hip
MOST_PLANS = 1024  # of each kind that are remembered
Plan = TypeVar("Plan")
_RUN = JITFunction.run
# What somebody who watches launches, or changes the way to them, leaves something in: knobs that were set, and hooks.
_WATCHED = (
    vars(knobs.runtime),
    vars(knobs.compilation),
    *(getattr(getattr(knobs.runtime, f"launch_{when}_hook"), "calls", ()) for when in ("enter", "exit")),
)


class _Frozen(NamedTuple):
    """A compiled kernel and what it is started with, but for the stream and the addresses of tensors."""

    start: Any  # Triton's launcher of this kernel
    grid: tuple[int, ...]  # three
    before: tuple  # function, metadata, no hooks, ...
    after: tuple  # what follows the pointers
    packed: bool  # whether pointers and what follows them are one argument


class Launch:
    """`kernel[grid](*tensors, *numbers, **options)`, but for its tensors; to be made once and called often.

    kernel: a function decorated with `triton.jit`, whose pointers, named `..._ptr`, come first. numbers, options: its
    other arguments in order, and constexprs and launch options such as num_warps by name.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **options: Any):
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        # None where launches are always Triton's.
        self.frozen: dict[tuple, _Frozen] | None = {} if TRIED and type(kernel) is JITFunction else None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the kernel; inside torch.compile it becomes a node of the graph that is written down (_trace.py).

        tensors: one for each pointer, or None.
        """
        if is_traced():
            write_down(self.kernel, self.grid, (*tensors, *self.numbers), dict(self.options))
            return
        kept, kernel = self.frozen, self.kernel
        settings, compilation, enter, leave = _WATCHED
        changed = settings or compilation or enter or leave or JITFunction.run is not _RUN
        if kept is None or changed or kernel.pre_run_hooks:
            kernel[self.grid](*tensors, *self.numbers, **self.options)
            return
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        dtypes = [None if t is None else t.dtype for t in tensors]
        all_bits = 0
        for address in addresses:
            all_bits |= address
        active = driver.active
        device = active.get_current_device()
        aligned = all_bits & 15 == 0 or tuple([address & 15 == 0 for address in addresses])
        key = (active, device, aligned, *dtypes)
        frozen = kept.get(key)
        if frozen is None:
            compiled = kernel[self.grid](*tensors, *self.numbers, **self.options)
            if (frozen := self._freeze(compiled, len(tensors))) is not None:
                kept[key] = frozen
            return
        start, (x, y, z), before, after, packed = frozen
        stream = active.get_current_stream(device)
        if packed:
            start(x, y, z, stream, *before, (*addresses, *after))
        else:
            start(x, y, z, stream, *before, *addresses, *after)

    def _freeze(self, compiled: Any, n_tensors: int) -> _Frozen | None:
        """What Triton just found out, unless this is not the Triton that this file was written for."""
        names = self.kernel.arg_names[n_tensors:]
        given = dict(zip(names, self.numbers, strict=False)) | self.options
        try:
            after = tuple([given[name] for name in names])
            start, before, packed = _launcher(compiled)
            return _Frozen(start, (*self.grid, 1, 1)[:3], before, after, packed)
        except (AttributeError, KeyError):
            return None


def _launcher(compiled: Any) -> tuple[Any, tuple, bool]:
    """What starts a compiled kernel, its arguments after grid and stream, and whether the kernel's own are one tuple.

    That is Triton's launcher, which is written in Python and calls one in C. Where a kernel asks for no scratch memory
    and for no instrumentation, the one in C is called straight: everything else that it gets never changes.
    """
    function, metadata, no_hooks = compiled.function, compiled.packed_metadata, (None, None, None)
    run = compiled.run
    scratch = run.global_scratch_size or getattr(run, "profile_scratch_size", 0)
    if type(run).__name__ != "CudaLauncher" or scratch or getattr(run, "gsan_enabled", False):
        return run, (function, metadata, *no_hooks), False
    first = (function, run.launch_cooperative_grid, run.launch_pdl)
    if _device.TRITON_VERSION >= (3, 7):
        return run.launch, (*first, metadata, *no_hooks, None, None, run.arg_annotations, run.kernel_signature), True
    no_scratch = 1 if _device.TRITON_VERSION == (3, 4) else 2
    return run.launch, (*first, *(None,) * no_scratch, metadata, *no_hooks), False


def planned(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """`make`, which makes launches for sizes, strides, dtypes and a device, and remembers the last of them.

    Who answers the questions about the machine, and for the tuning numbers, is part of what it remembers by: so a
    search for better numbers (`bench tune`) is not answered with plans made before.
    """

    @functools.lru_cache(MOST_PLANS, typed=True)
    def remembered(capability, sm_count, config, *args):
        return make(*args)

    @functools.wraps(make)
    def plan(*args):
        try:
            return remembered(_device.capability, _device.sm_count, _tuning.config, *args)
        except TypeError:  # sizes that are symbols, under torch.compile, have no hash
            return make(*args)

    return plan
