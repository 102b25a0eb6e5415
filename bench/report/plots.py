"""Figures of results; each function returns None if the results have nothing to show.

An implementation has the same colour in all figures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.variants import GRAPH, LAUNCHED, MODES, SUFFIXES
from fastgpt2.bench.report import tables
from fastgpt2.bench.report.record import Results, describe
from fastgpt2.gpt2.ops import ALL_TORCH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
SDPA = variants.label(ALL_TORCH)


class Ladder(NamedTuple):
    """A panel with the speed-up of each switch: its roads, its baseline, and the suffix that all its labels share."""

    title: str
    roads: tuple[str, ...]
    over: str
    suffix: str = ""


LADDERS = (
    Ladder("In CUDA graphs: what the kernels give", (GRAPH,), variants.label(ALL_TORCH, GRAPH), SUFFIXES[GRAPH]),
    Ladder("Launched from Python: with what Python costs", (LAUNCHED,), SDPA),
    Ladder("Compiled", tuple(MODES), f"{SDPA}, compiled in the same mode"),
    Ladder("All over PyTorch launched from Python", (), SDPA),  # files of older versions, which had one baseline
)
MARKERS = "osv^D<>pPX*hH"
NO_GRAPHS = "each switch in a graph: not measured; fastgpt2 bench train --road graph"
# The first match counts. Colours that colour-blind people can tell apart, readable on white (Okabe and Ito).
COLOURS = (
    ("Triton + compile", "#005a8c"),
    ("Triton", "#0072b2"),
    ("fastgpt2", "#0072b2"),
    ("HuggingFace", "#cc79a7"),
    ("nanoGPT", "#009e73"),
    ("Liger", "#d55e00"),
    ("flash-attn", "#e69f00"),
    ("quack", "#882255"),
    ("xformers", "#f0e442"),
    ("F.linear", "#56b4e9"),
    ("SDPA by", "#56b4e9"),
    ("compile", "#555555"),
    ("", "#999999"),
)


def colour(label: str) -> str:
    return next(value for part, value in COLOURS if part in label)


def plots(results: Results) -> dict[str, Figure]:
    """Title -> figure, for every figure that these results have data for."""
    makers: dict[str, dict[str, Callable[[Results], Figure | None]]] = {
        "train": {"Tokens a second": throughput, "What each switch gives": ladder, "Memory against batch": memory},
        "generate": {"Tokens a second": throughput},
        "ops": {"Roofline": roofline, "Time against sequence length": lengths},
        "race": {"Loss against seconds": losses},
    }
    made = {title: maker(results) for title, maker in makers.get(results.kind, {}).items()}
    return {title: figure for title, figure in made.items() if figure is not None}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def throughput(results: Results) -> Figure | None:
    """Bars of tokens/s with the 20th and 80th percentiles, one panel for each setting."""
    panels = _by([r for r in results.rows if r["time_ms"] and not r.get("alone")], _setting)
    if not panels:
        return None
    figure = _figure(results, 9, sum(0.42 * len(rows) + 1.0 for rows in panels.values()))
    heights = [len(rows) + 1.5 for rows in panels.values()]
    for axes, (setting, rows) in zip(_column(figure, heights), panels.items(), strict=True):
        values = [row["tokens_per_s"] for row in rows]
        medians = [v["median"] for v in values]
        errors = [[v["median"] - v["p20"] for v in values], [v["p80"] - v["median"] for v in values]]
        labels = [row["label"] for row in rows]
        axes.barh(labels, medians, xerr=errors, color=[colour(label) for label in labels], capsize=3, height=0.7)
        _write_values(axes, [v["p80"] for v in values], [tables.quantity(m) for m in medians])
        axes.invert_yaxis()
        axes.set(title=setting, xlabel="tokens/s (median, 20th to 80th percentile)")
    return figure


def ladder(results: Results) -> Figure | None:
    """Speed-up of each switch alone, and of all together, over PyTorch's kernels; needs rows with Triton.

    One panel for each road: CUDA graphs, where only the device's time counts; launched from Python, which includes
    Python's time; compiled. The panel of CUDA graphs says so where they were not measured.
    """
    rows = [r for r in results.rows if r["speedup"] and r["kernels"] and "Triton" in r["label"]]
    panels: list[tuple[str, Ladder, list[Row]]] = []
    for setting, mine in _by(rows, _setting).items():
        of = {shown: [row for row in mine if _ladder_of(row) is shown] for shown in LADDERS}
        panels += [(setting, shown, found) for shown, found in of.items() if found or shown is LADDERS[0]]
    if not panels:
        return None
    heights = [0.4 * len(rows) + 1.0 if rows else 0.8 for *_, rows in panels]
    figure = _figure(results, 8, sum(heights) + 0.3 * len(panels))
    bars = [len(rows) + 0.6 if rows else 0.5 for *_, rows in panels]
    for axes, (setting, shown, rows) in zip(_column(figure, bars, sharex=True), panels, strict=True):
        axes.set_title(f"{shown.title}\n{setting}", fontsize=10.5)
        if not rows:
            axes.tick_params(bottom=False)
            axes.set_yticks([])
            axes.text(0.5, 0.5, NO_GRAPHS, transform=axes.transAxes, ha="center", va="center", color="#555555")
            continue
        speedups = [row["speedup"] for row in rows]
        medians = [s["median"] for s in speedups]
        errors = [[s["median"] - s["p20"] for s in speedups], [s["p80"] - s["median"] for s in speedups]]
        labels = [row["label"].removesuffix(shown.suffix) for row in rows]
        colours = [colour(row["label"]) for row in rows]
        axes.axvline(1.0, color="black", linewidth=1)
        axes.barh(labels, medians, xerr=errors, color=colours, capsize=3, height=0.7)
        _write_values(axes, [s["p80"] for s in speedups], [f"{m:.2f}x" for m in medians])
        axes.invert_yaxis()
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(f"times as fast as {shown.over} (round by round)")
    return figure


def _ladder_of(row: Row) -> Ladder:
    return next((shown for shown in LADDERS if row.get("road") in shown.roads), LADDERS[-1])


def memory(results: Results) -> Figure | None:
    """Peak memory of a step against the batch size; needs two batch sizes of one variant."""
    rows = [row for row in results.rows if row.get("peak_bytes") and row["time_ms"]]
    lines = _by(rows, lambda r: f"{r['label']}, {r['size']}, T={r['block']}, {r['dtype']}")
    lines = {label: rows for label, rows in lines.items() if len({row["batch"] for row in rows}) > 1}
    if not lines:
        return None
    figure = _figure(results, 9, 5)
    axes = figure.subplots()
    for marker, (label, rows) in zip(MARKERS * len(lines), lines.items(), strict=False):
        rows = sorted(rows, key=lambda row: row["batch"])
        gib = [row["peak_bytes"] / 2**30 for row in rows]
        axes.plot([row["batch"] for row in rows], gib, marker=marker, color=colour(label), label=label)
    _doubling(axes, {row["batch"] for rows in lines.values() for row in rows})
    axes.set(xlabel="sequences a step", ylabel="peak memory of a step, GiB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def losses(results: Results) -> Figure | None:
    """Loss against seconds: thin lines for training batches, markers for held-out text."""
    if not results.rows:
        return None
    figure = _figure(results, 9, 5)
    axes = figure.subplots()
    for marker, row in zip(MARKERS, results.rows, strict=False):
        seconds, _, training = zip(*row["training"], strict=True)
        axes.plot(seconds, training, color=colour(row["label"]), linewidth=0.8, alpha=0.5)
        seconds, _, held_out = zip(*row["held_out"], strict=True)
        label = f"{row['label']}: {tables.quantity(row['tokens_per_s']['median'])} tokens/s"
        axes.plot(seconds, held_out, marker=marker, markersize=5, color=colour(row["label"]), label=label)
    lowest = min(loss for row in results.rows for *_, loss in row["training"] + row["held_out"])
    highest = max(row["held_out"][0][2] for row in results.rows)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest))
    axes.set(
        xlabel="seconds of training, compilation included",
        ylabel="loss, nats a token",
        title=f"{_setting(results.rows[0])}\nmarkers: held-out text; thin lines: training batches",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def roofline(results: Results) -> Figure | None:
    """Measured time against the least time that the measured copy and matmul speeds allow; the diagonal is the roof."""
    copy, matmul = results.settings["copy_bytes_per_s"], results.settings["matmul_flops_per_s"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row["time_ms"] and row["fraction"] is not None:
            least_ms = 1e3 * max(row["minimum_bytes"] / copy, (row["flops"] or 0) / matmul)
            points.setdefault(row["label"], []).append((least_ms, row["time_ms"]["median"]))
    if not points:
        return None
    figure = _figure(results, 9, 5.5)
    axes = figure.subplots()
    every = [value for pairs in points.values() for pair in pairs for value in pair]
    ends = (0.7 * min(every), 1.4 * max(every))
    axes.plot(ends, ends, color="black", linewidth=1, label="roof: the measured copy or matrix product")
    axes.plot(ends, [2 * e for e in ends], color="black", linewidth=0.7, linestyle=":", label="half of it")
    for marker, (label, pairs) in zip(MARKERS, points.items(), strict=False):
        least, measured = zip(*pairs, strict=True)
        axes.scatter(least, measured, s=28, marker=marker, color=colour(label), alpha=0.8, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="least time at this machine's measured peaks, ms", ylabel="measured, ms"
    )
    if any(measured < least for pairs in points.values() for least, measured in pairs):
        axes.set_title(f"Below the roof: {tables.CACHED.partition(': ')[2]}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def lengths(results: Results) -> Figure | None:
    """Time of forward and backward (of forward, for ops without backward) against T at the smallest width, one panel
    for each op."""
    narrow = min((row["C"] for row in results.rows), default=0)
    whole = {row["op"] for row in results.rows if row["direction"] == "both"}
    rows = [
        row
        for row in results.rows
        if row["C"] == narrow and row["direction"] == ("both" if row["op"] in whole else "forward")
    ]
    panels = {op: rows for op, rows in _by(rows, lambda r: r["op"]).items() if len({row["T"] for row in rows}) > 1}
    if not panels:
        return None
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the same ticks as its base, without exponents."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = _figure(results, 4 * columns + 1, 3.2 * height + 0.6)
    grid = figure.subplots(height, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (op, rows) in zip(grid.flat, panels.items(), strict=False):
        for marker, (label, mine) in zip(MARKERS, _by(rows, lambda r: r["label"]).items(), strict=False):
            mine = sorted(mine, key=lambda row: row["T"])
            times = [row["time_ms"] for row in mine]
            errors = [[t["median"] - t["p20"] for t in times], [t["p80"] - t["median"] for t in times]]
            axes.errorbar(
                [row["T"] for row in mine], [t["median"] for t in times], yerr=errors,
                marker=marker, markersize=4, capsize=2, color=colour(label), label=label,
            )  # fmt: skip
        _doubling(axes, {row["T"] for row in rows})
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
        direction = "forward + backward" if op in whole else "forward"
        axes.set(title=f"{op}, C={narrow}", xlabel="T", ylabel=f"{direction}, ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


# ------------------------------------------------------------------------------------------------------- helpers


def _figure(results: Results, width: float, height: float) -> Figure:
    """An empty figure with the machine and the date in it, so that a copied picture still says what it shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + 0.4), dpi=110, layout="constrained")
    figure.supxlabel(f"{describe(results.machine)}; {results.date[:10]}", fontsize=8, color="#555555")
    return figure


def _column(figure: Figure, heights: list[float], sharex: bool = False) -> Iterable[Any]:
    grid = dict(height_ratios=heights)
    return figure.subplots(len(heights), 1, squeeze=False, sharex=sharex, gridspec_kw=grid).flat


def _write_values(axes: Any, places: list[float], texts: list[str]) -> None:
    """Writes a text at the end of each bar, beyond its error bar."""
    for i, (place, text) in enumerate(zip(places, texts, strict=True)):
        around = dict(boxstyle="square,pad=0.1", color="white", alpha=0.8)  # readable where it crosses a line
        axes.annotate(text, (place, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, bbox=around)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _doubling(axes: Any, values: set[int]) -> None:
    """Makes the x axis logarithmic, with ticks at these numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axes.minorticks_off()


def _by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _setting(row: Row) -> str:
    tokens = f"T={row['block']}" if "block" in row else f"{row['new']} tokens after {row['prompt']}"
    return f"{row['size']}, B={row['batch']}, {tokens}, {row['dtype']}"
