"""Results as tables: the same cells on a terminal, in Markdown and in HTML.

headers, rows = table(results)
show(results)                              # prints the table of a command
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2.bench.report.record import Results, describe, short
from fastgpt2.gpt2.output import plain_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
UNKNOWN = "unknown"
CACHED = "above the peak or below the least time: data stayed in a cache, which is faster than the measured copy"
BUSY = 0.5  # load a core from which timings suffer


def _optional(value: Any, text: Callable[[Any], str], missing: str = "-") -> str:
    return missing if value is None else text(value)


def quantity(value: float) -> str:
    """At least three digits, so that 1.1 and 0.6 are not both 1."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _quantities(spread: dict[str, float]) -> str:
    return f"{quantity(spread['p20'])}..{quantity(spread['p80'])}"


def _milliseconds(ms: float) -> str:
    return f"{ms:,.1f}" if ms >= 100 else f"{ms:.3f}" if ms >= 0.1 else f"{ms:.3g}"


def _ms(row: Row) -> str:
    return _optional(row["time_ms"], lambda t: _milliseconds(t["median"]))


def _ms_spread(row: Row) -> str:
    return _optional(row["time_ms"], lambda t: f"{_milliseconds(t['p20'])}..{_milliseconds(t['p80'])}")


def _speedup(row: Row) -> str:
    return _times(row.get("speedup"))


def _times(speedup: dict[str, Any] | None) -> str:
    """The speed-up and its percentiles; without them for a baseline over itself, which is 1."""
    if speedup and speedup["p20"] == speedup["median"] == speedup["p80"]:
        return f"{speedup['median']:.2f}x"
    return _optional(speedup, lambda s: f"{s['median']:.2f}x ({s['p20']:.2f}..{s['p80']:.2f})")


def _mebibytes(row: Row) -> str:
    return _optional(row.get("peak_bytes"), lambda b: f"{b / 2**20:,.0f} MiB", UNKNOWN if row["time_ms"] else "-")


def _model_ms(row: Row) -> str:
    return _optional(row["model_ms"], lambda ms: f"{ms:,.3f}", UNKNOWN)


TRAIN: tuple[Column, ...] = (
    ("setting", lambda r: f"{r['size']} B={r['batch']} T={r['block']} {r['dtype']}" + ", alone" * r["alone"]),
    ("variant", lambda r: r["label"]),
    ("tokens/s", lambda r: _optional(r["tokens_per_s"], lambda t: quantity(t["median"]), r["what"])),
    ("20..80%", lambda r: _optional(r["tokens_per_s"], _quantities)),
    ("ms a step", _ms),
    ("speed-up", _speedup),
    ("over", lambda r: _optional(r["speedup"], lambda s: s["over"])),
    # Files of older versions have only this speed-up.
    ("over PyTorch, SDPA launched", lambda r: _times(r.get("speedup_over_launched", r["speedup"]))),
    ("roofline model, ms", _model_ms),
    ("MFU", lambda r: _optional(r["mfu"], lambda m: f"{m:.1%}", UNKNOWN)),
    ("peak memory", _mebibytes),
)
OPS: tuple[Column, ...] = (
    ("op", lambda r: r["name"].split(" ")[0]),
    ("direction", lambda r: r["direction"]),
    ("variant", lambda r: r["label"] + (f" {r['version']}" if r.get("version") else "")),
    ("ms", _ms),
    ("20..80%", _ms_spread),
    ("GB/s", lambda r: quantity(r["gb_per_s"])),
    ("TFLOP/s", lambda r: _optional(r["tflop_per_s"], quantity)),
    ("of peak", lambda r: _optional(r["fraction"], lambda f: f"{f:.0%} {r['fraction_of']}")),
    ("roofline model, ms", _model_ms),
    ("speed-up", _speedup),
    ("peak memory", _mebibytes),
)
GENERATE: tuple[Column, ...] = (
    ("setting", lambda r: f"{r['size']} B={r['batch']} T={r['prompt']} new={r['new']} {r['dtype']}"),
    ("variant", lambda r: r["label"]),
    ("tokens/s", lambda r: quantity(r["tokens_per_s"]["median"])),
    ("20..80%", lambda r: _quantities(r["tokens_per_s"])),
    ("ms to the first token", lambda r: f"{r['first_ms']['median']:,.2f}"),
    ("ms a token", lambda r: f"{r['token_ms']:,.3f}"),
    ("GB/s", lambda r: _optional(r["gb_per_s"], quantity)),
    ("of copy speed", lambda r: _optional(r["fraction"], lambda f: f"{f:.0%}")),
    ("x ideal", lambda r: f"{r['times_ideal']:.2f}"),
    ("speed-up", _speedup),
)
RACE: tuple[Column, ...] = (
    ("setting", lambda r: f"{r['size']} B={r['batch']} T={r['block']} {r['dtype']}"),
    ("variant", lambda r: r["label"]),
    ("s", lambda r: f"{r['seconds']:,.0f}"),
    ("steps", lambda r: f"{r['steps']:,}"),
    ("tokens/s", lambda r: quantity(r["tokens_per_s"]["median"])),
    ("20..80%", lambda r: _quantities(r["tokens_per_s"])),
    ("s to the first step", lambda r: f"{r['first_s']:.1f}"),
    ("training loss", lambda r: f"{r['training'][-1][2]:.4f}"),
    ("held-out loss", lambda r: f"{r['held_out_loss']:.4f}"),
    ("s to the common loss", lambda r: _optional(r.get("common_loss_s"), lambda s: f"{s:.1f}")),
)
COLUMNS = {"train": TRAIN, "ops": OPS, "generate": GENERATE, "race": RACE}
COMMON: tuple[Column, ...] = (("what", lambda r: r["name"]), ("ms", _ms), ("20..80%", _ms_spread))


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headers and one line for each row. Results of a kind without columns above show all their numbers."""
    columns = COLUMNS.get(results.kind)
    if columns is None:
        numbers = {k: None for row in results.rows for k, v in row.items() if isinstance(v, int | float)}
        columns = COMMON + tuple((key.replace("_", " "), _number(key)) for key in numbers)
    return [title for title, _ in columns], [[text(row) for _, text in columns] for row in results.rows]


def _number(key: str) -> Callable[[Row], str]:
    return lambda row: _optional(row.get(key), lambda v: f"{v:,}" if isinstance(v, int) else f"{v:,.4g}")


def notes(results: Results) -> list[str]:
    """Lines below the table: settings, what fractions refer to, formulas, what was left out."""
    lines = []
    for key, value in results.settings.items():
        lines.append(f"{key.replace('_', ' ')}: {value:,.4g}" if isinstance(value, float) else f"{key}: {value}")
    if any((row.get("fraction") or 0) > 1 for row in results.rows):
        lines.append(CACHED)
    return lines + [f"left out: {entry['name']}: {entry['why']}" for entry in results.left_out]


def where(results: Results) -> list[tuple[str, str]]:
    """The machine and the software, as (name, value)."""
    machine = results.machine
    found = [("machine", describe(machine)), ("cpu", f"{machine['cpu']}, {machine['cores']} cores")]
    if machine["load"] is not None:
        found.append(("load at the start", f"{machine['load']:g} (an idle machine has about 0)"))
    for name in ("cuda", "rocm"):
        if machine.get(name):
            found.append((name, machine[name]))
    versions = {"Python": machine["python"], **machine["versions"]}
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [*found, ("system", machine["system"]), ("commit", short(results.commit)), ("date", results.date)]


def show(results: Results) -> None:
    """Prints the table with the machine above and notes below."""
    from rich.table import Table

    console = plain_console()
    console.print(f"{describe(results.machine)}; commit {short(results.commit)}", highlight=False)
    if (results.machine["load"] or 0) > BUSY * results.machine["cores"]:
        console.print(f"The machine was busy (load {results.machine['load']:g}): expect wide spreads.", style="bold")
    headers, rows = table(results)
    card = Table(box=None)
    for i, title in enumerate(headers):
        numeric = all(row[i][:1].isdigit() or row[i] in ("-", UNKNOWN) for row in rows)
        card.add_column(title, justify="right" if numeric else "left")
    for row in rows:
        card.add_row(*row)
    print_whole(console, card)
    for line in notes(results):
        console.print(line, highlight=False, markup=False)


def print_whole(console: Console, card: Table) -> None:
    """Prints a table without cutting cells, also wider than the terminal: a cut name does not say what was measured."""
    from rich.measure import Measurement

    console.width = max(console.width, Measurement.get(console, console.options.update(width=10_000), card).maximum)
    console.print(card)


def as_markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_html(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(headers, "th") + "".join(line(row, "td") for row in rows) + "</table>"
