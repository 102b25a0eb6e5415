"""Every launch of this package is made here: the first of its kind by Triton, the later ones with what that found out.

Triton's own way binds arguments, asks what they specialise a kernel on, looks the kernel up and checks what it was
compiled from: some five times as long as the start itself. All of that depends on the key below, which holds more than
Triton looks at: every number by its value and type, every pointer by its dtype and whether it is divisible by 16, every
option by name. So a launch with an equal key is the same kernel with the same numbers at other addresses.

Triton does it, as without this file, wherever somebody may be watching or may have changed the way: hooks, debugging,
a patched `JITFunction.run`, an interpreted or autotuned kernel, a version of Triton that was not tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import _launch
from ._trace import is_traced, write_down

TRIED = (3, 4) <= _launch.TRITON_VERSION <= (3, 9)
MOST_LAUNCHES = 4096  # frozen launches kept; at one more all are forgotten
MOST_PLANS = 1024  # of each kind that are remembered
Plan = TypeVar("Plan")
_RUN = JITFunction.run
_HOOKS = [getattr(getattr(knobs.runtime, f"launch_{when}_hook"), "calls", ()) for when in ("enter", "exit")]


class _Frozen(NamedTuple):
    """A compiled kernel and all that its launches have in common; the addresses of its tensors come between."""

    run: Any  # Triton's launcher of this kernel
    grid: tuple[int, int, int]
    before: tuple  # function, metadata, and no hooks
    after: tuple  # what follows the pointers


_frozen: dict[tuple, _Frozen] = {}
_pointers: dict[Any, int] = {}  # kernel's function -> how many of its arguments, which come first, are pointers


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or a node of the graph that torch.compile is writing down (_trace.py).

    kernel: a function decorated with `triton.jit`, whose pointers, named `..._ptr`, come first. args, options: its
    arguments in order, tensors or None for pointers, then constexprs and launch options such as num_warps by name.
    """
    if is_traced():
        write_down(kernel, grid, args, options)
        return
    if type(kernel) is not JITFunction or not _unwatched(kernel):
        kernel[grid](*args, **options)
        return
    function = kernel.fn  # a kernel itself takes long to hash
    n = _pointers.get(function)
    if n is None:
        n = _pointers[function] = _leading_pointers(kernel)
    tensors, numbers = args[:n], args[n:]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    unaligned = 0
    for address in addresses:
        unaligned |= address
    active = driver.active
    device = active.get_current_device()
    key = (
        function,
        active,
        device,
        grid,
        *[t if t is None else t.dtype for t in tensors],
        unaligned & 15 and tuple([address & 15 == 0 for address in addresses]),
        numbers,
        *map(type, numbers),
        *options,
        *options.values(),
    )
    frozen = _frozen.get(key)
    if frozen is None:
        frozen = _freeze(kernel, kernel[grid](*args, **options), grid, args, options, n)
        if frozen is not None:
            if len(_frozen) >= MOST_LAUNCHES:
                _frozen.clear()
            _frozen[key] = frozen
        return
    run, (x, y, z), before, after = frozen
    run(x, y, z, active.get_current_stream(device), *before, *addresses, *after)


def planned(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """`make`, which works numbers of a launch out of sizes, dtypes and the device, and remembers the last of them.

    Who answers the questions about the machine is part of what it remembers by.
    """

    @functools.lru_cache(MOST_PLANS)
    def remembered(capability, sm_count, *args):
        return make(*args)

    @functools.wraps(make)
    def plan(*args):
        try:
            return remembered(_launch.capability, _launch.sm_count, *args)
        except TypeError:  # sizes that are symbols, under torch.compile, have no hash
            return make(*args)

    return plan


def _unwatched(kernel: JITFunction) -> bool:
    """Whether nobody has changed, or listens to, what Triton does at a launch: knobs that were set lie in `vars`."""
    return (
        TRIED
        and JITFunction.run is _RUN
        and not kernel.pre_run_hooks
        and not vars(knobs.runtime)
        and not vars(knobs.compilation)
        and not _HOOKS[0]
        and not _HOOKS[1]
    )


def _leading_pointers(kernel: JITFunction) -> int:
    names = kernel.arg_names
    return next((i for i, name in enumerate(names) if not name.endswith("_ptr")), len(names))


def _freeze(kernel, compiled, grid, args, options, n) -> _Frozen | None:
    """What `launch` just found out, or None where this is not the Triton that it was written for."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    try:
        after = tuple([given[name] for name in kernel.arg_names[n:]])
        before = (compiled.function, compiled.packed_metadata, None, None, None)
        run = compiled.run
    except (AttributeError, KeyError):
        return None
    return _Frozen(run, (*grid, 1, 1)[:3], before, after)
