"""What a callable costs on the device: launches, bytes moved, synchronizations, and bytes kept for backward.

    with count_traffic(model.parameters()) as traffic:
        model(idx, targets)[1].backward()
    traffic.launches, traffic.bytes, traffic.matmul_bytes, traffic.kept_bytes, traffic.syncs
    more - less                          # the difference of two counts; str() is a table

Triton kernels are counted by `traffic.count_launches` (each 32-byte sector once a launch), PyTorch's own operators
by a dispatch mode: one launch each, its distinct inputs read once, its outputs written once. Views and allocations
are free. Bytes of matrix products are counted apart, because they depend on the library's tiles.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt2.bench.audit.traffic import Launches, count_launches

MATMULS = {"mm", "bmm", "addmm", "baddbmm", "fastgpt2::upcast_matmul"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
OVERWRITES = {"copy_", "fill_", "zero_", "random_", "normal_", "uniform_"}  # do not read the tensor that they write
GATHERS = {"embedding", "index_select", "gather"}  # read as many bytes of their table as they write
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


@dataclass
class Traffic:
    """Counts by the name of an operator or kernel. MATMULS names those whose bytes are matrix products'."""

    calls: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    kept_bytes: int = 0

    @property
    def launches(self) -> int:
        return sum(n for name, n in self.calls.items() if name not in WAITS)

    @property
    def bytes(self) -> int:
        """Without matrix products."""
        return sum(n for name, n in self.moved.items() if name not in MATMULS)

    @property
    def matmul_bytes(self) -> int:
        return sum(n for name, n in self.moved.items() if name in MATMULS)

    @property
    def syncs(self) -> int:
        return sum(self.calls[name] for name in WAITS)

    def __sub__(self, less: Traffic) -> Traffic:
        calls, moved = Counter(self.calls), Counter(self.moved)
        calls.subtract(less.calls)
        moved.subtract(less.moved)
        return Traffic(calls, moved, self.kept_bytes - less.kept_bytes)

    def __str__(self) -> str:
        lines = [f"{n:6} {name:32} {self.moved[name]:14,} B" for name, n in sorted(self.calls.items()) if n]
        return "\n".join([*lines, f"kept for backward {self.kept_bytes:,} B"])


class _CountOperators(TorchDispatchMode):
    def __init__(self, traffic: Traffic, launches: Launches):
        super().__init__()
        self.traffic, self.launches = traffic, launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        # The interpreter moves tensors with PyTorch: that is part of a kernel.
        if not (self.launches.interpreting or name in ALLOCATIONS or _is_view(func)):
            read, written = _operands(name, args, kwargs or {}, result)
            if read or written:  # promote_types, for example, takes and returns no tensors
                self.traffic.calls[name] += 1
                read = [t for t in read if not (name in GATHERS and t is args[0])] + written * (name in GATHERS)
                self.traffic.moved[name] += sum(map(footprint, read + written))
        return result


def _is_view(func) -> bool:
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _operands(name: str, args: tuple, kwargs: dict, result) -> tuple[list[Tensor], list[Tensor]]:
    """-> (the distinct tensors that an operator reads, the tensors that it writes)."""
    out = kwargs.get("out")
    written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]  # of an operator in place, the argument itself
    written += [out] if isinstance(out, Tensor) and not written else []  # of our own operators, which return nothing
    overwritten = [out, args[0] if name in OVERWRITES else None]
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not any(t is o for o in overwritten)]
    return list({(t.data_ptr(), t.shape, t.stride()): t for t in read}.values()), written


def footprint(t: Tensor) -> int:
    """Bytes of memory that a tensor occupies: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


@contextlib.contextmanager
def _count_kept(traffic: Traffic, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Counts storages that autograd keeps for backward, each once, without parameters'. `kept` holds them, so that no
    address is used again."""
    addresses = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in addresses and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage
            traffic.kept_bytes += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


@contextlib.contextmanager
def count_traffic(parameters: Iterable[Tensor] = ()) -> Iterator[Traffic]:
    """Counts everything that happens inside. parameters: are not counted as kept for backward."""
    traffic = Traffic()
    with count_launches() as launches, _count_kept(traffic, parameters), _CountOperators(traffic, launches):
        yield traffic
    for one in launches:
        traffic.calls[one.name] += 1
        traffic.moved[one.name] += one.bytes
