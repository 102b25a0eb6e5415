"""The kernel card as Markdown: what audit.py found, as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastgpt2.bench.audit.asm import ARCHITECTURES

LABELS = ("ours", "PyTorch", "Liger")  # as peer_traffic.py writes them


def table(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = [
        "# Kernel card",
        "",
        f"Written by `fastgpt2 bench audit --write` from code compiled by Triton {card['triton']}, without a GPU: no",
        "figure here is a speed. Bytes are counted in Triton's interpreter, each 32-byte sector once per launch, and",
        "divided by the least that the pass must move; matrix products by PyTorch are left out.",
        "",
        "Beside our kernels: all that a pass asks of the device, PyTorch's operators included, for ours, for eager",
        "PyTorch (whose operators count as one launch each, a lower bound) and for Liger where it has the op.",
        "",
        "| pass | counted on | kernels | bytes / minimum | " + " | ".join(f"all, {label}" for label in LABELS) + " |",
        "|---" * (4 + len(LABELS)) + "|",
    ]
    for key, figures in card["passes"].items():
        cells = [_peer_cell(figures, label) for label in LABELS]
        cells = [f"`{figures['case']}`", str(figures["launches"]), f"{figures['bytes_over_minimum']:.3f}", *cells]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each cell: registers a thread, shared memory in KiB, spills, occupancy, share of bytes in 128-bit accesses,",
        "and the tensor-core instruction where matrices are multiplied. HGMMA 60/15 is 60 asynchronous products in the",
        "code and 15 waits for them. Where the waits are as many, as in attention's gradient for heads of up to 64",
        "without bounds, no product runs beside anything else; `fastgpt2 bench tune --op causal_attention` decides on",
        "a GPU whether the order of the case `diagonal first`, which has fewer waits, takes its place.",
        "",
        *_launches(card["kernels"]),
    ]
    if "Liger's kernels" in card:
        lines += ["", "The same of Liger's kernels where it has the op, compiled the same way:", ""]
        lines += _launches(card["Liger's kernels"])
    return "\n".join(lines) + "\n"


def _launches(kernels: dict[str, dict[str, Any]]) -> Iterable[str]:
    architectures = [a for a in ARCHITECTURES if any(a in found for found in kernels.values())]
    yield "| launch | " + " | ".join(f"sm_{a}" if a.isdigit() else a for a in architectures) + " |"
    yield "|---" * (1 + len(architectures)) + "|"
    for key, found in kernels.items():
        cells = [_cell(found[a]) if a in found else "" for a in architectures]
        yield f"| {key} | " + " | ".join(cells) + " |"


def _peer_cell(figures: dict[str, Any], label: str) -> str:
    """Launches and bytes over minimum of one implementation of a pass; empty where it was not counted."""
    if f"{label} launches" not in figures:
        return ""
    return f"{figures[f'{label} launches']} launches, {figures[f'{label} bytes_over_minimum']:.3f}"


def _cell(figures: dict[str, Any]) -> str:
    parts = [f"{figures['registers']} r", f"{figures['shared'] / 1024:.3g} K", f"{figures['spills']} s"]
    parts += [f"{figures['occupancy']:.0%} occ"] if "occupancy" in figures else []
    parts += [f"{figures['vector_share']:.1%} wide"] if "vector_share" in figures else []
    if "tensor_core" in figures:
        counts = f" {figures['hgmma']}/{figures['waits']}" if "waits" in figures else ""
        parts.append(figures["tensor_core"] + counts)
    return ", ".join(parts)
