"""Figures of compiled code, read from the texts of Triton's compilation stages.

- SASS (the machine code, by the cuobjdump in Triton's wheel): resource usage; spills; on sm_90 products and waits.
- PTX: how wide the global accesses of each source line are; atomics; tensor-core instructions.
- TTIR: pointers whose offsets grow with the batch and are computed in int32 alone.
- Occupancy, from registers, shared memory and warps.

Nothing here needs a GPU. Sources: PTX ISA 8.7; CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability", for `LIMITS`; CUDA Binary Utilities for the tools.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton


@dataclass(frozen=True)
class Limits:
    """Resources of one architecture: shared memory in bytes, registers in 32-bit words."""

    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536


LIMITS = {
    "80": Limits(166912, 167936, 64, 32),
    "86": Limits(101376, 102400, 48, 16),
    "89": Limits(101376, 102400, 48, 24),
    "90": Limits(232448, 233472, 64, 32),
    "100": Limits(232448, 233472, 64, 32),
    "120": Limits(101376, 102400, 48, 24),
}
ARCHITECTURES = (*LIMITS, "gfx942")


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most that a multiprocessor holds; registers, shared memory and numbers of warps and
    blocks limit them."""
    limits = LIMITS[architecture]
    registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        limits.blocks_per_sm,
        limits.warps_per_sm // warps,
        limits.registers_per_sm // (registers_per_warp * warps),
        limits.shared_per_sm // (shared + 1024),
    )
    return blocks * warps / limits.warps_per_sm


# ------------------------------------------------------------------------------------------------------------ SASS

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """Figures of one cubin."""

    registers: int
    stack: int
    static_shared: int
    spills: int  # STL and LDL: stores to and loads from local memory
    hgmma: int | None = None  # asynchronous products of Hopper
    waits: int | None = None  # waits for them: as many as products if the assembler lets none run beside anything


@functools.cache
def machine_code(cubin: bytes, hgmma: bool = False) -> MachineCode:
    """Reads a cubin with the tools in Triton's wheel. Without local memory, which spills would need, it is not
    disassembled: that takes as long as compiling it.

    hgmma: whether to count these and the waits for them, which needs disassembly.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        registers, stack, shared, local = (
            _number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK", "SHARED", "LOCAL")
        )
        if not (stack or local or hgmma):
            return MachineCode(registers, stack, shared, spills=0)
        sass = dump("-sass")
    opcodes = Counter(_OPCODE.findall(sass))
    if not opcodes:
        raise RuntimeError(f"no instruction found in the SASS: {sass[:200]!r}")
    spills = opcodes["STL"] + opcodes["LDL"]
    counts = (opcodes["HGMMA"], sass.count("WARPGROUP.DEPBAR")) if hgmma else (None, None)
    return MachineCode(registers, stack, shared, spills, *counts)


def amd_code(amdgcn: str) -> tuple[int, int]:
    """-> (VGPRs, VGPR spills), from the metadata at the end of AMD assembly."""
    return _number(r"\.vgpr_count:\s*(\d+)", amdgcn), _number(r"\.vgpr_spill_count:\s*(\d+)", amdgcn)


_PRODUCT = re.compile(r"\btt\.dot .* -> tensor<[^>]*, #blocked", re.MULTILINE)


def plain_products(ttgir: str) -> int:
    """The number of matrix products without tensor cores: their results do not have a tensor-core layout."""
    return len(_PRODUCT.findall(ttgir))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return int(found[1])


# -------------------------------------------------------------------------------------------------------------- PTX

_ACCESS = re.compile(r"\b(?:ld|st)\.(?:\w+(?:::\w+)*\.)*global\S*")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.\S*global\S* \[.*?\], \[.*?\], (\w+)")
_TILE_COPY = re.compile(r"\bcp\.async\.bulk\.tensor\.")  # by a descriptor (TMA): rows of 16 bytes and more
_ATOMIC = re.compile(r"\b(?:atom|red)\.(?!async)\S+")
# PTX's products of matrices on tensor cores, and what ptxas makes of them for 16-bit matrices.
_TENSOR_CORE = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}
_LOC = re.compile(r"\s*\.loc\s+(\d+) (\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+) "[^"]*?([^"/]+)"(?: "([^"]+)")?', re.MULTILINE)


def tensor_core(ptx: str) -> str:
    """The tensor-core instruction: "HMMA" (80, 86, 89, 120), "HGMMA" (90), "UTCHMMA" (100), "" for none."""
    made = (name for name in _TENSOR_CORE if re.search(rf"^\s*(@\S+ )?{name}\.", ptx, re.MULTILINE))
    return "+".join(sorted(_TENSOR_CORE[name] for name in made))


def atomics(ptx: str, tickets: int = 0) -> int:
    """The number of atomic operations on data. tickets: how many of them only count programs (`on_tickets`)."""
    return len(_ATOMIC.findall(re.sub(r"//.*", "", ptx))) - tickets


def access_widths(ptx: str) -> dict[str, dict[int, int]]:
    """Source line ("layer_norm.py:103") -> {width in bits: number of its global loads and stores}."""
    files = {number: (name or folder).rpartition("/")[2] for number, folder, name in _FILE.findall(ptx)}
    found: dict[str, Counter[int]] = {}
    place, inside_asm, fixed = "", False, False
    for line in ptx.splitlines():
        if "begin inline asm" in line or "end inline asm" in line:
            inside_asm, fixed = "begin" in line, False
        elif loc := _LOC.match(line):
            # Inside inline assembly only the first .loc names the source line; later ones number the assembly's lines.
            if not (inside_asm and fixed):
                place = f"{files.get(loc[1])}:{loc[2]}"
            fixed = inside_asm
        elif width := _width(line.split("//")[0]):
            found.setdefault(place, Counter())[width] += 1
    return {place: dict(widths) for place, widths in found.items()}


def _width(line: str) -> int:
    """Bits that one thread moves in a line of PTX with a global load or store; 0 for other lines."""
    if copy := _ASYNC_COPY.search(line):
        return 8 * int(copy[1], 0)
    if _TILE_COPY.search(line):
        return 128
    access = _ACCESS.search(line)
    if not access:
        return 0
    vector = re.search(r"\.v(\d)\b", access[0])
    return (int(vector[1]) if vector else 1) * _number(r"\.[bsuf](8|16|32|64|128)(?:x2)?\b", access[0])


def vector_share(widths: dict[str, dict[int, int]], bytes_by_line: dict[str, int]) -> float:
    """Share of bytes in accesses of 128 bits and more: widths are read from the code, bytes were counted in a run.

    A line that has bytes and no access in the code counts as narrow. Where `bytes_by_line` is empty, every access in
    the code counts once.
    """
    weights = bytes_by_line or {line: sum(w * n for w, n in made.items()) for line, made in widths.items()}
    wide = 0.0
    for line, size in weights.items():
        made = widths.get(line, {})
        total = sum(width * count for width, count in made.items())
        wide += size * sum(w * n for w, n in made.items() if int(w) >= 128) / total if total else 0
    return wide / sum(weights.values()) if weights else 1.0


# -------------------------------------------------------------------------------------------------- offsets in TTIR

_DEFINITION = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)?\s*=\s*\"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_MOVES = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui")
_CARRIERS = (*_MOVES, "arith.addi", "arith.subi", "carried")


@dataclass
class _Op:
    name: str
    operands: list[str] = field(default_factory=list)
    type: str = ""


def narrow_pointers(ttir: str, arguments: list[str]) -> list[str]:
    """Pointer arguments whose offsets have no varying part in int64.

    A part varies if it depends on the program's id, on a loop's counter or on loaded data. An offset is wide if at
    least one such part is computed (or loaded) as int64: the row. Its narrow parts are columns inside that row.
    arguments: names of the function's parameters, in order.
    """
    ops, accesses, _ = _parse(ttir, arguments)
    narrow = set()
    for pointer in accesses:
        bases, offsets = _chain(pointer, ops)
        kinds = {kind for offset in offsets for kind in _kinds(offset, ops, set())}
        if kinds == {"narrow"}:
            narrow |= bases
    return sorted(narrow)


def on_tickets(ttir: str, arguments: list[str]) -> int:
    """The number of atomic operations on single elements of an argument `tickets_ptr`, from which a program learns that
    it is the last one (kernels/_column_sum.py). All others would add up data in the order in which programs end."""
    ops, _, atomic = _parse(ttir, arguments)
    return sum(_chain(pointer, ops)[0] == {"tickets_ptr"} and "tensor" not in ops[pointer].type for pointer in atomic)


def _unique_names(ttir: str) -> Iterator[str]:
    """The lines with a name of its own for each value, because regions that follow one another use the same names."""
    times: Counter[str] = Counter()
    names: dict[str, str] = {}
    for line in ttir.splitlines():
        defined = re.findall(r"(%[\w$.-]+)(?::\d+)? = ", line)
        if "tt.func" in line or line.lstrip().startswith("^bb"):
            defined += re.findall(r"(%[\w$.-]+): ", line)
        for name in defined:
            names[name] = f"{name}.{times[name]}" if times[name] else name
            times[name] += 1
        yield re.sub(r"%[\w$.-]+", lambda found: names.get(found[0], found[0]), line)


@dataclass
class _Region:
    """An open region of scf.if, scf.for or scf.while: the values that its yield and its condition assign to."""

    yields_to: list[list[str]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    condition: list[str] = field(default_factory=list)


def _parse(ttir: str, arguments: list[str]) -> tuple[dict[str, _Op], list[str], list[str]]:
    """-> (value -> its operation, the pointers that are loaded from or stored to, those of them by atomics)."""
    ops: dict[str, _Op] = {}
    accesses: list[str] = []
    atomic: list[str] = []
    regions: list[_Region] = []

    def feed(targets: list[str], values: list[str]) -> None:
        for target, value in zip(targets, values, strict=True):
            ops[target].operands.append(value)

    for line in _unique_names(ttir):
        code = re.sub(r" loc\((?!.*\{).*\)$", "", line).strip()
        if "tt.func" in code:
            parameters = re.findall(r"(%[\w$.-]+): ", code)
            ops.update((value, _Op("argument", [name])) for value, name in zip(parameters, arguments, strict=True))
        if code.startswith("}") and not code.endswith("{"):
            regions.pop()
        if code.startswith("scf.yield"):
            for targets in regions[-1].yields_to:
                feed(targets, _VALUE.findall(code.split(" : ")[0]))
        if code.startswith("scf.condition"):
            regions[-1].condition = _VALUE.findall(code.split(" : ")[0])[1:]
            feed(regions[-1].results, regions[-1].condition)
        if code.startswith("^bb") and regions[-1].condition:
            carried = re.findall(r"(%[\w$.-]+): ", code)
            ops.update((value, _Op("carried")) for value in carried)
            feed(carried, regions[-1].condition)
        definition = _DEFINITION.match(code)
        if definition:
            name, op, rest = definition.groups()
            kind = re.split(r" : | to | -> ", rest)[-1]
            ops[name] = _Op(op, _VALUE.findall(rest), kind)
        if re.search(r"\btt\.(load|store|atomic_rmw|atomic_cas)\b", code):
            accesses.append(_VALUE.findall(definition[3] if definition else code)[0])
            atomic += accesses[-1:] * ("tt.atomic" in code)
        if code.endswith("{") and not code.startswith("}"):
            regions.append(_region(code, definition[1] if definition else "", ops))
    return ops, accesses, atomic


def _region(code: str, name: str, ops: dict[str, _Op]) -> _Region:
    """Opens a region and adds the values that its first line defines to `ops`."""
    if "scf." not in code:
        return _Region()
    results = []
    if name:
        count = re.match(r"%[\w$.-]+:(\d+)", code)
        results = [f"{name}#{i}" for i in range(int(count[1]))] if count else [name]
    starts = code.partition("scf.while" if "scf.while" in code else "iter_args")[2]
    carried = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", starts)
    if counter := re.search(r"scf\.for (?:unsigned )?(%[\w$.-]+) = ", code):
        ops[counter[1]] = _Op("counter", [], "i64" if code.endswith(": i64 {") else "i32")
    ops.update((value, _Op("carried")) for value in results)
    ops.update((value, _Op("carried", [start])) for value, start in carried)
    arguments = [value for value, _ in carried]
    if "scf.if" in code:
        return _Region([results])
    return _Region([arguments], results) if "scf.while" in code else _Region([results, arguments])


def _chain(pointer: str, ops: dict[str, _Op]) -> tuple[set[str], list[str]]:
    """-> (the arguments that a pointer derives from, all offsets added to it)."""
    bases, offsets, seen, todo = set(), [], set(), [pointer]
    while todo:
        value = todo.pop()
        if value in seen or value not in ops:
            continue
        seen.add(value)
        op = ops[value]
        if op.name == "argument":
            bases |= set(op.operands)
        elif op.name == "tt.addptr":
            todo.append(op.operands[0])
            offsets.append(op.operands[1])
        else:
            todo += op.operands
    return bases, offsets


def _kinds(value: str, ops: dict[str, _Op], seen: set[str]) -> set[str]:
    """Which varying parts an offset is a sum of: "wide" for int64, "narrow" for int32."""
    if value in seen or value not in ops:
        return set()
    seen.add(value)
    op = ops[value]
    if op.name in _CARRIERS:
        return {kind for operand in op.operands for kind in _kinds(operand, ops, seen)}
    if not _varies(value, ops, set()):
        return set()
    return {"wide"} if "i64" in op.type else {"narrow"}


def _varies(value: str, ops: dict[str, _Op], seen: set[str]) -> bool:
    if value in seen or value not in ops:
        return False
    seen.add(value)
    op = ops[value]
    if op.name in ("tt.get_program_id", "counter", "tt.load"):
        return True
    return op.name != "argument" and any(_varies(operand, ops, seen) for operand in op.operands)
