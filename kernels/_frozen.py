"""Starts every kernel of this package. Triton makes the first launch; equal later launches reuse what it prepared.

Triton's launcher binds the arguments, computes their specialisation, looks up the compiled kernel and checks the values
of globals: about five times as long as the start itself. The results depend only on what a `Launch` and its cache key
hold: the value and type of every number, the dtype of every pointer and whether it is divisible by 16, and every option
by name. Triton specialises on less, so launches that are equal in these use the same compiled kernel.

Triton makes every launch itself if something observes or changes launches: hooks, debugging, a patched
`JITFunction.run`, an interpreted or autotuned kernel, or a version of Triton that this file was not tested with.
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
from ._trace import thread, write_down

# On ROCm, Triton specialises on the sizes of tensors too.
TRIED = (3, 4) <= _device.TRITON_VERSION <= (3, 9) and not torch.version.hip
MOST_PLANS = 1024  # cache entries for each function that is `planned`
Plan = TypeVar("Plan")
_RUN = JITFunction.run
# Containers that are not empty if something observes or changes launches: knobs that were set, and hooks.
_WATCHED = (
    vars(knobs.runtime),
    vars(knobs.compilation),
    *(getattr(getattr(knobs.runtime, f"launch_{when}_hook"), "calls", ()) for when in ("enter", "exit")),
)


class _Frozen(NamedTuple):
    """A compiled kernel and all arguments of its launcher except the stream and the tensors' addresses."""

    start: Any  # Triton's launcher of this kernel
    grid: tuple[int, ...]  # three sizes
    before: tuple  # the arguments before the pointers: function, metadata, no hooks, ...
    after: tuple  # the arguments after the pointers
    packed: bool  # whether the pointers and the arguments after them are passed as one tuple


class Launch:
    """`kernel[grid](*tensors, *numbers, **options)` with the tensors left open. Create it once and call it often.

    kernel: a function decorated with `triton.jit` whose pointer arguments, named `..._ptr`, come first. numbers: its
    other positional arguments in order. options: constexprs and launch options such as num_warps by name.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **options: Any):
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        # None if Triton makes every launch.
        self.frozen: dict[tuple, _Frozen] | None = {} if TRIED and type(kernel) is JITFunction else None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the kernel. While torch.compile traces, adds a node to its graph instead (_trace.py).

        tensors: a tensor or None for each pointer argument.
        """
        if thread.traced:
            write_down(self.kernel, self.grid, (*tensors, *self.numbers), dict(self.options))
            return
        kept, kernel = self.frozen, self.kernel
        settings, compilation, enter, leave = _WATCHED
        changed = settings or compilation or enter or leave or JITFunction.run is not _RUN
        if kept is None or changed or kernel.pre_run_hooks:
            kernel[self.grid](*tensors, *self.numbers, **self.options)
            return
        # One loop that overwrites copies of `tensors`: two comprehensions and a loop take a fifth longer.
        addresses: list[Any] = [*tensors]
        dtypes: list[Any] = [*tensors]
        all_bits = 0
        for place, tensor in enumerate(tensors):
            if tensor is None:
                addresses[place] = 0
            else:
                addresses[place] = address = tensor.data_ptr()
                dtypes[place] = tensor.dtype
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
        """What Triton prepared for the launch that it just made; None if Triton's interface is not as expected."""
        names = self.kernel.arg_names[n_tensors:]
        given = dict(zip(names, self.numbers, strict=False)) | self.options
        try:
            after = tuple([given[name] for name in names])
            start, before, packed = _launcher(compiled)
            return _Frozen(start, (*self.grid, 1, 1)[:3], before, after, packed)
        except (AttributeError, KeyError):
            return None


def _launcher(compiled: Any) -> tuple[Any, tuple, bool]:
    """Returns the launcher of a compiled kernel, its arguments after grid and stream, and whether it takes the kernel's
    own arguments as one tuple.

    Triton's launcher is written in Python and calls one in C. If a kernel needs neither scratch memory nor
    instrumentation, the launcher in C is called directly, because all its other arguments are constant.
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
    """Decorator that caches `make`, a function from sizes, strides, dtypes and a device to launches.

    The functions that query the machine and the tuning table are part of the cache key. A test or tool that replaces
    them, such as the search of `bench tune`, therefore never gets launches that were made with the original ones.
    """

    @functools.lru_cache(MOST_PLANS, typed=True)
    def remembered(capability, sm_count, config, *args):
        return make(*args)

    @functools.wraps(make)
    def plan(*args):
        try:
            return remembered(_device.capability, _device.sm_count, _tuning.config, *args)
        except TypeError:  # symbolic sizes under torch.compile are not hashable
            return make(*args)

    return plan
