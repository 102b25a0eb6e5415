"""Compiled code without a GPU: what Triton makes of a callable's kernels for a given architecture.

    with recording("80") as launches:         # CPU tensors; everything is compiled, nothing runs
        y = layer_norm(x, weight)
    launches[0].figures()                     # registers, shared memory, spills, widths, ...

A launch takes the same steps as on a GPU (Triton's specialisation on divisibility by 16 and on arguments equal to 1,
the numbers that `_tuning` has for the architecture), up to the point where the kernel would start. Needs a process
without TRITON_INTERPRET. The audit runs it in a process of its own, because a compiler pass can abort the process:

    python -m fastgpt2.bench.audit.compiled --json FILE [--arch 80,90] [--op layer_norm,gelu]
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastgpt2.bench.audit import asm
from fastgpt2.bench.audit.cases_to_compile import cases_to_compile
from fastgpt2.bench.cases import peers
from fastgpt2.bench.cases.case import Case
from fastgpt2.gpt2.cli.cli import in_a_process
from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.ops import kernels_digest
from fastgpt2.gpt2.options import CommandOptions, File, Names
from fastgpt2.kernels import _device

TARGETS = {name: GPUTarget("cuda", int(name), 32) for name in asm.LIMITS} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
SM_COUNT = {"80": 108, "86": 84, "89": 128, "90": 132, "100": 148, "120": 170, "gfx942": 304}

# 16 * 257 rows: divisible by 16 as 4096 is, and 257 divides no size of the model, so that every tensor whose size is
# divisible by 257 grows with the batch.
ROWS_TO_COMPILE = 16 * 257
NOT_ON_AMD = ("hgmma", "waits", "atomics", "occupancy")  # figures


@dataclass(frozen=True)
class Figures:
    """One kernel's code on one architecture. On AMD, registers and spills are those of vector registers."""

    kernel: str
    architecture: str
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    stack: int
    spills: int
    dots: int  # matrix products in the code
    plain_dots: int  # those of them that do not use tensor cores
    tensor_core: str
    hgmma: int | None  # how many of these instructions the code has, and waits for them; None for other instructions
    waits: int | None
    widths: dict[str, dict[int, int]]  # source line -> {width in bits: number of global accesses}; empty on AMD
    narrow: tuple[str, ...]  # arguments that grow with the batch and are addressed with int32 offsets only
    atomics: int | None  # on data; those on tickets add nothing up
    occupancy: float | None


@dataclass(frozen=True)
class Recorded:
    """One launch that was compiled and not made. `sizes`: the number of elements of each tensor argument."""

    name: str
    architecture: str
    grid: tuple[int, ...]
    kernel: Any  # triton's CompiledKernel
    sizes: dict[str, int]

    def figures(self, rows: int = 0) -> Figures:
        """rows: tensors with a larger multiple of this number of elements grow with the batch."""
        texts, metadata = self.kernel.asm, self.kernel.metadata
        arguments = [name for name, kind in self.kernel.src.signature.items() for _ in range(_values(kind))]
        growing = {name for name, size in self.sizes.items() if rows and size > rows and size % rows == 0}
        common: dict[str, Any] = dict(
            kernel=self.name,
            architecture=self.architecture,
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            dots=texts["ttir"].count("tt.dot "),
            plain_dots=asm.plain_products(texts["ttgir"]),
            narrow=tuple(n for n in asm.narrow_pointers(texts["ttir"], arguments) if n in growing),
        )
        if "cubin" not in texts:
            registers, spills = asm.amd_code(texts["amdgcn"])
            rest: dict[str, Any] = dict(stack=0, tensor_core="", widths={}, **dict.fromkeys(NOT_ON_AMD))
            return Figures(registers=registers, shared=metadata.shared, spills=spills, **rest, **common)
        tensor_core = asm.tensor_core(texts["ptx"])
        code = asm.machine_code(texts["cubin"], tensor_core == "HGMMA")
        shared = metadata.shared + code.static_shared
        return Figures(
            registers=code.registers,
            shared=shared,
            stack=code.stack,
            spills=code.spills,
            tensor_core=tensor_core,
            hgmma=code.hgmma,
            waits=code.waits,
            widths=asm.access_widths(texts["ptx"]),
            atomics=asm.atomics(texts["ptx"], asm.on_tickets(texts["ttir"], arguments)),
            occupancy=asm.occupancy(self.architecture, code.registers, shared, metadata.num_warps),
            **common,
        )


def _values(kind: str) -> int:
    """The number of values that an argument of a kernel becomes in its code: a descriptor has sizes and strides too."""
    if kind == "constexpr":
        return 0
    block = re.fullmatch(r"tensordesc<\w+\[([\d, ]+)\].*>", kind)
    return 1 if block is None else 1 + 2 * len(block[1].split(","))


class _Driver:
    """Replaces Triton's driver. It names the target to compile for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # kernels are cached per device

    def get_current_stream(self, device) -> int:
        return 0


class WithoutProducts(TorchDispatchMode):
    """Matrix products return uninitialized memory. They are PyTorch's, slow on a CPU, and not examined here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        a, b = [a for a in args if isinstance(a, Tensor)][-2:]
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=dtypes[0] if dtypes else a.dtype)


@contextlib.contextmanager
def pretended(architecture: str) -> Iterator[None]:
    """Inside, the functions of `_device` return what they would for a GPU of `architecture`, also for CPU tensors."""
    digits = (9, 4) if architecture == "gfx942" else (int(architecture[:-1]), int(architecture[-1]))
    mixed = "" if architecture == "gfx942" else "addmm"
    answers: dict[str, Any] = dict(
        check_device=lambda *tensors, **more: None,
        capability=lambda device: digits,
        sm_count=lambda device: SM_COUNT[architecture],
        mixed_matmul=lambda device: mixed,
    )
    with mock.patch.multiple(_device, **answers), WithoutProducts():
        yield


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Recorded]]:
    """Inside, launches are compiled for `architecture` and not made; outputs are uninitialized."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("recording: kernels decorated under TRITON_INTERPRET cannot be compiled; unset it")
    if architecture not in TARGETS:
        raise ValueError(f"recording: architecture is {architecture!r}, allowed are {', '.join(TARGETS)}")
    recorded: list[Recorded] = []
    # Patched, because nothing is launched, so that launch hooks are silent, and the hook after a compilation is called
    # once for each kernel, not for each launch.
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = inspect.signature(self.fn).parameters
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        sizes = {name: value.numel() for name, value in bound.items() if isinstance(value, Tensor)}
        grid = grid(bound) if callable(grid) else tuple(grid)
        recorded.append(Recorded(self.fn.__name__, architecture, grid, kernel, sizes))
        return kernel

    if architecture == "gfx942":
        _link_without_rocm()
    before = dict(vars(driver))  # not driver.active: reading it fails without a GPU
    driver.set_active(_Driver(TARGETS[architecture]))
    try:
        with mock.patch.object(triton.JITFunction, "run", compile_only), pretended(architecture):
            yield recorded
    finally:
        vars(driver).update(before)


def _link_without_rocm() -> None:
    """Old versions of Triton link AMD code with ROCm's lld. Where that is missing, nothing is linked: the assembly is
    enough for the audit."""
    from triton.backends.amd.compiler import HIPBackend

    if not hasattr(HIPBackend, "path_to_rocm_lld"):
        return
    try:
        HIPBackend.path_to_rocm_lld()
    except Exception:
        os.environ["TRITON_HIP_LLD_PATH"] = shutil.which("true") or "true"


def audit_case(case: Case, architecture: str, function: Callable | None = None) -> list[dict]:
    """Compiles a case's forward and backward; -> each launch's figures with the case's name and the direction.

    function: what to compile, by default our own function.
    """
    inputs = case.inputs(fill=torch.empty)
    results = []
    with recording(architecture) as launches:
        outputs = case.forward(inputs, function)
        forward = len(launches)
        case.backward(inputs, outputs)
    for i, launch in enumerate(launches):
        place = dict(
            case=case.name,
            op=case.op,
            itemsize=case.dtype.itemsize,
            direction="forward" if i < forward else "backward",
            asynchronous=case.asynchronous,
            grid=launch.grid,
        )
        results.append(place | dataclasses.asdict(launch.figures(case.rows)))
    return results


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compiled code without a GPU: what the kernels of a callable become on a given architecture."""

    json: File  # where the figures go
    arch: Names = ",".join(TARGETS)  # comma-separated
    op: Names = ""  # comma-separated kernel functions; by default all
    peers: bool = False  # compile Liger's kernels too, where it is installed


def main(argv: Sequence[str]) -> int:
    """Writes the figures; returns 0."""
    options = parse(Options, argv, "python -m fastgpt2.bench.audit.compiled")
    wanted = set(filter(None, options.op.split(",")))
    liger = peers.liger() if options.peers else {}
    results, others, met = [], [], set()
    sources = kernels_digest()
    for case in cases_to_compile(ROWS_TO_COMPILE):
        for architecture in options.arch.split(","):
            # float16 differs from bfloat16 in conversions only, so that one architecture is enough.
            repeated = case.dtype == torch.float16 and architecture != "80"
            if (not wanted or case.op in wanted) and not repeated:
                results += audit_case(case, architecture)
            if case.op in liger and (case.op, architecture) not in met:  # its first case: bfloat16, width 768
                met.add((case.op, architecture))
                launches = audit_case(case, architecture, liger[case.op])
                others += [x for i, x in enumerate(launches) if x not in launches[:i]]  # one is in a loop
    versions = {"triton": triton.__version__, "torch": torch.__version__, "sources": sources}
    found = versions | {"launches": results, "peers": others}
    Path(options.json).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(in_a_process(main))
