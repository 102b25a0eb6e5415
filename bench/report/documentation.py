"""README's and docs/' tables and pictures, made from the result files that are committed in bench/results/.

    python -m fastgpt2.bench.report.documentation            # rewrites them in place

A table stands between two comments, `<!-- figures: NAME -->` and `<!-- end of figures -->`, where NAME is a key of
`TABLES`. Everything between them is replaced. Pictures are written to docs/pictures/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgpt2.bench.report import plots, tables
from fastgpt2.bench.report.measured import COMMITTED
from fastgpt2.bench.report.record import HERE, Results, describe
from fastgpt2.gpt2.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = HERE.parent
PICTURES = ROOT / "docs" / "pictures"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
GIB = 2**30
Row = dict[str, Any]


def result(name: str) -> Results:
    """The committed result file `name`.json."""
    return Results.load(COMMITTED / f"{name}.json")


def row(results: Results, label: str) -> Row:
    """The only row with this label. Raises ValueError where there is none, or more than one."""
    found = [row for row in results.rows if row["label"] == label]
    if len(found) != 1:
        raise ValueError(f"{results.kind} has {len(found)} rows with the label {label!r}, expected 1")
    return found[0]


# --------------------------------------------------------------------------------------------------------- tables


def first_screen() -> str:
    """Three rows: this package and what it is compared with, on a GPU. The speed-ups are of runs with both in turns."""
    whole, medians = result("train-nvidia-h200"), result("train-medians-nvidia-h200")
    ours, theirs = row(whole, "Triton + CUDA graph"), row(whole, "HuggingFace, sdpa")
    compiled = row(medians, "PyTorch, SDPA + compile")["median_tokens_per_s"]
    to_compiled = row(medians, "Triton + CUDA graph")["median_tokens_per_s"] / compiled
    to_theirs = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
    lines = [
        ["**fastgpt2**, CUDA graph", _tokens(ours), "", _gib(ours)],
        ["PyTorch's ops, `torch.compile`", f"{compiled:,}", f"{to_compiled:.2f}x", "not recorded"],
        ["HuggingFace's GPT-2, SDPA", _tokens(theirs), f"{to_theirs:.1f}x", _gib(theirs)],
    ]
    return tables.as_markdown(
        ["one training step of GPT-2 124M", "tokens/s", "fastgpt2 is faster by", "peak memory"], lines
    )


def train_table(name: str) -> str:
    """Every variant of a file of `bench train`."""
    results = result(name)
    headers = ["variant", "tokens/s", "20th to 80th percentile", "MFU", "peak memory", "speed-up over PyTorch, SDPA"]
    lines = []
    for r in results.rows:
        rate = r["tokens_per_s"]
        spread = f"{tables.quantity(rate['p20'])} to {tables.quantity(rate['p80'])}"
        setting = "" if len({(q["dtype"], q["batch"]) for q in results.rows}) == 1 else f", {r['dtype']}"
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        lines.append([r["label"] + setting, _tokens(r), spread, mfu, _gib(r), f"{r['speedup']['median']:.2f}x"])
    filled = [i for i in range(len(headers)) if any(line[i] for line in lines)]  # a CPU has no MFU
    return tables.as_markdown([headers[i] for i in filled], [[line[i] for i in filled] for line in lines])


def generate_table(name: str) -> str:
    """A line for every variant and dtype, a column for every number of rows."""
    results = result(name)
    batches = sorted({r["batch"] for r in results.rows})
    lines: dict[str, dict[int, Row]] = {}
    for r in results.rows:
        lines.setdefault(f"{r['label']}, {r['dtype']}", {})[r["batch"]] = r
    over = results.rows[0]["speedup"]["over"].removesuffix(", cache")
    headers = ["variant", *(f"{b} row{'s' * (b > 1)}, tokens/s" for b in batches), f"speed-up over {over}"]
    cells = []
    for label, found in lines.items():
        rates = [tables.quantity(found[b]["tokens_per_s"]["median"]) if b in found else "-" for b in batches]
        speedups = [f"{found[b]['speedup']['median']:.2f}x" if b in found else "-" for b in batches]
        cells.append([label, *rates, ", ".join(speedups)])
    return tables.as_markdown(headers, cells)


def medians_table(name: str, figure: str, headers: tuple[str, str]) -> str:
    """The label and the only figure of files that kept medians alone."""
    rows = result(name).rows
    several = len({r["batch"] for r in rows}) > 1
    label = [f"{r['label']}, {r['batch']} row{'s' * (r['batch'] > 1)}" if several else r["label"] for r in rows]
    return tables.as_markdown(headers, [[name, f"{r[figure]:,}"] for name, r in zip(label, rows, strict=True)])


def race_table(name: str) -> str:
    """Every implementation of a file of `bench race`, without what is the same for all."""
    headers, rows = tables.table(result(name))
    return tables.as_markdown(headers[1:], [row[1:] for row in rows])


def kernels_table(name: str) -> str:
    """Single kernels of a file of `bench tune`."""
    lines = []
    for r in result(name).rows:
        op, direction, _ = r["name"].split(" ")
        rate = f"{r['tflop_per_s']:,} TFLOP/s" if r.get("tflop_per_s") else f"{r['gb_per_s'] / 1e3:.1f} TB/s"
        direction = "forward and backward" if direction == "both" else direction
        lines.append([f"`{op}`", direction, f"{r['best_ms']:.3f}", rate])
    return tables.as_markdown(["op and size", "direction", "ms", "rate"], lines)


def _tokens(row: Row) -> str:
    return tables.quantity(row["tokens_per_s"]["median"])


def _gib(row: Row) -> str:
    return f"{row['peak_bytes'] / GIB:.1f} GiB"


TABLES: dict[str, Callable[[], str]] = {
    "first-screen": first_screen,
    "train-nvidia-h200": lambda: train_table("train-nvidia-h200"),
    "train-medians-nvidia-h200": lambda: medians_table(
        "train-medians-nvidia-h200", "median_tokens_per_s", ("variant", "tokens/s")
    ),
    "generate-nvidia-h200": lambda: generate_table("generate-nvidia-h200"),
    "decode-medians-nvidia-h200": lambda: medians_table(
        "decode-medians-nvidia-h200", "median_us_a_token", ("kernels", "microseconds a token")
    ),
    "tune-nvidia-h200": lambda: kernels_table("tune-nvidia-h200"),
    "train-amd-epyc": lambda: train_table("train-amd-epyc"),
    "generate-amd-epyc": lambda: generate_table("generate-amd-epyc"),
    "race-amd-epyc": lambda: race_table("race-amd-epyc"),
    "train-intel-xeon": lambda: train_table("train-intel-xeon"),
    "generate-intel-xeon": lambda: generate_table("generate-intel-xeon"),
}


# ------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Bar:
    """One variant: tokens per second, peak memory in bytes (None where it was not recorded), what to call it."""

    name: str
    tokens_per_s: float
    peak_bytes: int | None


def training_speed() -> Figure:
    """What does it give me? Tokens per second and peak memory of a training step on each measured GPU."""
    from matplotlib.figure import Figure

    whole, medians = result("train-nvidia-h200"), result("train-medians-nvidia-h200")
    bars = [
        Bar("fastgpt2, CUDA graph", *_speed_and_memory(row(whole, "Triton + CUDA graph"))),
        Bar("PyTorch, torch.compile", row(medians, "PyTorch, SDPA + compile")["median_tokens_per_s"], None),
        Bar("nanoGPT, CUDA graph", *_speed_and_memory(row(whole, "nanoGPT, SDPA + CUDA graph"))),
        Bar("nanoGPT", *_speed_and_memory(row(whole, "nanoGPT, SDPA"))),
        Bar("HuggingFace", *_speed_and_memory(row(whole, "HuggingFace, sdpa"))),
    ]
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained", facecolor="white")
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names, colours = [bar.name for bar in bars], [_colour(bar.name) for bar in bars]
    speed.barh(names, [bar.tokens_per_s / 1e3 for bar in bars], color=colours, height=0.7)
    memory.barh(names, [(bar.peak_bytes or 0) / GIB for bar in bars], color=colours, height=0.7)
    for i, bar in enumerate(bars):
        _write(speed, bar.tokens_per_s / 1e3, i, f"{bar.tokens_per_s / 1e3:,.0f}k")
        gib = (bar.peak_bytes or 0) / GIB
        _write(memory, gib, i, f"{gib:.1f}" if gib else "not recorded")
    speed.invert_yaxis()
    speed.set_title("thousand tokens a second: more is better", fontsize=12)
    memory.set_title("peak memory in GiB: less is better", fontsize=12)
    for axes in (speed, memory):
        axes.tick_params(labelsize=13)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2)
    days = f"{whole.date[:10]}; torch.compile on {medians.date[:10]}"
    where = f"GPT-2 124M, B=16 T=1024, bf16 autocast, {describe(whole.machine)}; {days}"
    figure.supxlabel(where, fontsize=9, color="#555555")
    return figure


def attention_tiles() -> Figure:
    """Which tiles of the T x T scores the attention kernel computes, and which of them need a mask."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tile, tiles = 8, 8
    T = tile * tiles
    query, key = torch.arange(T).view(T, 1), torch.arange(T).view(1, T)
    causal = key <= query
    document = torch.bucketize(torch.arange(T), torch.tensor([20, 44]), right=True)
    seen = {
        "causal": causal,
        "causal, window of 2.5 tiles": causal & (query - key < 20),
        "causal, three documents": causal & (document.view(T, 1) == document.view(1, T)),
    }
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained", facecolor="white")
    colours = ("#e9e9e9", "#56b4e9", "#0072b2")
    for axes, (title, mask) in zip(figure.subplots(1, 3), seen.items(), strict=True):
        blocks = mask.view(tiles, tile, tiles, tile).permute(0, 2, 1, 3).flatten(2)
        axes.imshow(blocks.any(-1).int() + blocks.all(-1).int(), cmap=ListedColormap(colours), vmin=0, vmax=2)
        axes.set_xticks([i - 0.5 for i in range(1, tiles)], [])
        axes.set_yticks([i - 0.5 for i in range(1, tiles)], [])
        axes.grid(color="white", linewidth=2)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("tiles of keys", fontsize=12)
    figure.axes[0].set_ylabel("tiles of queries", fontsize=12)
    names = ("never loaded", "computed with a mask", "computed without a mask")
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=12, frameon=False)
    return figure


def _speed_and_memory(row: Row) -> tuple[float, int]:
    return row["tokens_per_s"]["median"], row["peak_bytes"]


def _colour(name: str) -> str:
    """As in all pictures: this package's kernels are Triton's."""
    return plots.colour("Triton" if name.startswith("fastgpt2") else name)


def _write(axes: Any, place: float, i: int, text: str) -> None:
    axes.annotate(text, (place, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=12)


FIGURES: dict[str, Callable[[], Figure | None]] = {
    "training-speed": training_speed,
    "attention-tiles": attention_tiles,
    "what-each-switch-gives": lambda: plots.ladder(result("train-nvidia-h200")),
}


# -------------------------------------------------------------------------------------------------------- command


def pages() -> Iterator[Path]:
    """README and every page of docs/."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def filled(text: str) -> str:
    """`text` with each block of figures made anew. Raises ValueError for a name that is no key of `TABLES`."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"figures {match[2]!r} are unknown, there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return BLOCK.sub(block, text)


def stale() -> list[Path]:
    """The pages whose figures are not those of the result files."""
    return [page for page in pages() if filled(text := page.read_text("utf-8")) != text]


def write() -> None:
    """Writes the pages that changed, and all pictures."""
    for page in stale():
        write_atomically(page, filled(page.read_text("utf-8")))
        print(f"written: {page.relative_to(ROOT)}")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, make in FIGURES.items():
        if (figure := make()) is not None:
            write_atomically(PICTURES / f"{name}.png", plots.png(figure))
            print(f"written: {(PICTURES / name).relative_to(ROOT)}.png")


if __name__ == "__main__":
    write()
