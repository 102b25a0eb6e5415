"""How fast `kernels="auto"` was measured to be on this GPU's architecture, for each road, or that it was not measured.

"auto" means Triton's kernels on a GPU, except for the roads in `switches.SLOWER`, on which they were measured to be
slower than PyTorch's. That depends on the road (how kernels are launched), on the architecture and on the kernels. So
only result files of `fastgpt2 bench train` from the same architecture with unchanged kernels count; others are marked
as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt2.bench.cases.variants import COMPILE, GRAPH, LAUNCHED, ROADS, label
from fastgpt2.bench.report.record import FOLDER, HERE, Results, short
from fastgpt2.gpt2 import ops, switches

DIGEST = "kernels"  # the key in a result file's settings: SHA-256 of the kernels' sources
COMMITTED = HERE / "results"
SAID = {LAUNCHED: "launched from Python", GRAPH: "as CUDA graphs", COMPILE: "torch.compile"}


@dataclass(frozen=True)
class Measurement:
    """Triton's kernels compared with PyTorch's on one road. ratio: how many times as fast a training step is."""

    road: str
    ratio: float
    setting: str
    peak_bytes: tuple[int | None, int | None]  # Triton's, PyTorch's
    gpu: str
    date: str
    commit: str | None
    kernels: str | None  # their digest

    @property
    def text(self) -> str:
        ours, theirs = self.peak_bytes
        memory = f", {ours / 2**30:.1f} GiB against {theirs / 2**30:.1f}" if ours and theirs else ""
        where = f"{self.gpu}, {self.setting}, {self.date[:10]}, commit {short(self.commit)}"
        instead = (
            "fastgpt2.graphed(model), or " * (self.road == LAUNCHED) + 'model.kernels = "torch" where memory allows'
        )
        return f"Triton {self.ratio:.2f}x of PyTorch{memory} ({where})" + f"; slower: {instead}" * (self.ratio < 1)


def road_of(row: dict[str, Any]) -> str:
    """How a row's kernels were launched. Files of older versions have no field "road"."""
    compiled = COMPILE if row["compiled"] else LAUNCHED
    return row.get("road") or (GRAPH if row.get("cuda_graph") else compiled)


def measurements(results: Results) -> Iterator[Measurement]:
    """The measurements in one file of `bench train`: each road and setting with a time for both kinds of kernels."""
    rows = [row for row in results.rows if row["time_ms"] and not row["alone"]]
    found = {(row["size"], row["batch"], row["block"], row["dtype"], row["label"]): row for row in rows}
    for (*setting, name), row in found.items():
        road = road_of(row)
        base = found.get((*setting, label(ops.ALL_TORCH, road)))
        if base is None or name != label(ops.ALL_TRITON, road):
            continue
        speedup = row["speedup"]
        within_rounds = speedup and speedup["over"] == base["label"]
        medians = base["time_ms"]["median"] / row["time_ms"]["median"]
        size, batch, block, dtype = setting
        yield Measurement(
            road=road,
            ratio=speedup["median"] if within_rounds else medians,
            setting=f"{size} B={batch} T={block} {dtype}",
            peak_bytes=(row["peak_bytes"], base["peak_bytes"]),
            gpu=results.machine["name"],
            date=results.date,
            commit=results.commit,
            kernels=results.settings.get(DIGEST),
        )


def of_architecture(device: torch.device, folders: Iterable[Path]) -> list[Measurement]:
    """All measurements in `folders` on GPUs with this one's compute capability or name, newest first."""
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    found: list[Measurement] = []
    for file in sorted({file for folder in folders for file in folder.glob("train-*.json")}):
        try:
            results = Results.load(file)
        except ValueError:  # written by another version, or no result file
            continue
        if results.machine["name"] == properties.name or results.machine.get("capability") == capability:
            found += measurements(results)
    return sorted(found, key=lambda m: m.date, reverse=True)


def slower(*folders: Path) -> dict[tuple[int, int], tuple[str, ...]]:
    """The value that `switches.SLOWER` must have by the result files in `folders`: every road that is slower in any
    setting or compile mode."""
    digest = ops.kernels_digest()
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for file in sorted(file for folder in folders for file in folder.glob("train-*.json")):
        results = Results.load(file)
        capability = results.machine.get("capability")
        if results.settings.get(DIGEST) != digest or capability is None:
            continue
        roads = {m.road if m.road in (LAUNCHED, GRAPH) else COMPILE for m in measurements(results) if m.ratio < 1}
        major, minor = map(int, capability.split("."))
        if roads:
            found[major, minor] = tuple(sorted({*roads, *found.get((major, minor), ())}))
    return found


def lines(device: torch.device, *folders: Path) -> list[str]:
    """Text lines: what "auto" is on this device, and how it compares on each road. Result files are looked for in
    `folders`, in the folder where commands write by default, and in this checkout."""
    if device.type != "cuda":
        return ['kernels="auto" is PyTorch here: Triton\'s kernels need a GPU']
    gpu, digest = torch.cuda.get_device_name(device), ops.kernels_digest()
    found = of_architecture(device, {*folders, FOLDER, COMMITTED})
    less = switches.SLOWER.get(torch.cuda.get_device_capability(device), ())
    but = f", but PyTorch where a step is {' or '.join(map(_said, less))}" if less else ""
    said = [f'kernels="auto" is Triton on {gpu}{but}; measured on its architecture with these kernels ({digest[:10]}):']
    for road in ROADS:
        here = [m for m in found if m.road == road]
        current = [m for m in here if m.kernels == digest]
        if current:
            text = min(current, key=lambda m: m.ratio).text
        else:
            text = f"not measured on {gpu} with these kernels; run fastgpt2 bench train"
            text += f"; with others: {here[0].text}" if here else ""
        said.append(f"  {_said(road)}: {text}")
    return said


def _said(road: str) -> str:
    return SAID.get(road, f"torch.compile, {road}")
