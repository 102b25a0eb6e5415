"""`fastgpt2 bench report`: makes one self-contained HTML page, and Markdown with image files, from result files.

fastgpt2 bench report bench-results/*.json --out report
fastgpt2 bench report --compare before.json after.json     # exits with 1 where something became slower
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastgpt2.bench.report import differences, plots, tables
from fastgpt2.bench.report.record import FOLDER, Results, slug
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.options import CommandOptions, Positional, Word, about
from fastgpt2.gpt2.output import plain_console

TITLES = {"train": "Training", "ops": "Ops", "generate": "Generation", "race": "The same training"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 2rem auto; max-width: 84rem;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { margin-top: 1.5rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: 2px 6px; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
.wide td:nth-child(n+3), .wide th:nth-child(n+3) { text-align: right; }
img { max-width: 100%; } li { font-size: 13px; }
"""


def write(every: Sequence[Results], folder: Path) -> tuple[Path, Path]:
    """Writes folder/report.html, folder/report.md and the image files of the latter; -> the first two."""
    page = ["<!doctype html><html lang='en'><head><meta charset='utf-8'><title>fastgpt2 bench</title>"]
    page += ["<meta name='viewport' content='width=device-width'>", f"<style>{STYLE}</style></head><body>"]
    page += ["<h1>fastgpt2 bench</h1>"]
    text, pictures = ["# fastgpt2 bench", ""], []
    for results in every:
        title = f"{TITLES.get(results.kind, results.kind)}: {results.machine['name']}"
        page.append(f"<h2>{html.escape(title)}</h2>")
        text += [f"## {title}", ""]
        page.append(f"<div class='where'>{tables.as_html(('', ''), tables.where(results))}</div>")
        text += [tables.as_markdown(("", ""), tables.where(results)), ""]
        for name, figure in plots.plots(results).items():
            picture = plots.png(figure)
            encoded = base64.b64encode(picture).decode()
            page.append(f"<h3>{name}</h3><img alt='{name}' src='data:image/png;base64,{encoded}'>")
            stem = f"{results.kind}-{slug(results.machine['name'])}-{slug(name)}"
            pictures.append(stem)
            again = f"-{pictures.count(stem)}" if pictures.count(stem) > 1 else ""  # two files of one machine
            file = folder / f"{stem}{again}.png"
            write_atomically(file, picture)
            text += [f"![{name}]({file.name})", ""]
        page.append(f"<div class='wide'>{tables.as_html(*tables.table(results))}</div>")
        text += [tables.as_markdown(*tables.table(results)), ""]
        page.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in tables.notes(results)) + "</ul>")
        text += [*(f"- {line}" for line in tables.notes(results)), ""]
    page.append("</body></html>")
    files = folder / "report.html", folder / "report.md"
    for file, lines in zip(files, (page, text), strict=True):
        write_atomically(file, "\n".join(lines) + "\n")
    return files


# ------------------------------------------------------------------------------------------------------- command


HELP = "an HTML page and Markdown with pictures from result files; or compare two of them"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Makes one HTML page that needs nothing else, and Markdown, from result files."""

    files: Annotated[
        Positional[tuple[Annotated[Path, Word("FILE")], ...]], about(f"result files; none: all in {FOLDER}/")
    ] = ()
    out: Annotated[Path, Word("FOLDER")] = FOLDER  # where the report goes
    # list what changed from the first file to the second; the exit status is 1 where the second is slower
    compare: tuple[Annotated[Path, Word("FILE")], Annotated[Path, Word("FILE")]] | None = None
    # with --compare: how much slower a median may be, as a fraction
    threshold: float = differences.THRESHOLD


def main(options: Options) -> int:
    """Raises ValueError for files that hold no results."""
    if options.compare:
        if options.files:
            raise ValueError("bench report: --compare takes its two files itself, leave the others out")
        before, after = options.compare
        return show_changes(Results.load(before), Results.load(after), options.threshold)
    files = options.files or sorted(FOLDER.glob("*.json"))
    if not files:
        raise ValueError(f"bench report: no files given and none in {FOLDER}/; `fastgpt2 bench train` writes one")
    page, text = write([Results.load(file) for file in files], options.out)
    print(f"written: {page}, {text}")
    return 0


def show_changes(a: Results, b: Results, threshold: float) -> int:
    """Prints every change; returns 1 if a row became slower or has no time any more."""
    from rich.table import Table

    changes, lost, missing = differences.list_changes(a, b, threshold)
    console = plain_console()
    for line in differences.differences(a, b):
        console.print(f"the runs differ: {line}", highlight=False)
    table = Table("row", "A, ms", "B, ms", "B / A", "by the noise", "", box=None)
    styles = {"slower": "bold red", "faster": "green", "same": ""}
    for c in sorted(changes, key=lambda change: -change.ratio):
        noise = f"{c.low:.3f}..{c.high:.3f}"
        table.add_row(
            c.name, f"{c.a_ms:.3f}", f"{c.b_ms:.3f}", f"{c.ratio:.3f}", noise, c.verdict, style=styles[c.verdict]
        )
    tables.print_whole(console, table)
    for line in lost:
        console.print(f"lost: {line}", highlight=False, style=styles["slower"])
    for line in missing:
        console.print(f"not compared: {line}", highlight=False)
    slower = [c for c in changes if c.verdict == "slower"]
    console.print(f"{len(slower)} of {len(changes)} rows are slower by more than {threshold:.0%} and than noise")
    return 1 if slower or lost else 0
