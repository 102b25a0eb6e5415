"""Plots of loss curves from the logs of runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.training.log import LOG, read_log

FORMATS = (".pdf", ".png", ".svg")
# Hours per unit of time. A plot uses the largest unit in which the longest run takes at least 2.
UNITS = {"days": 24.0, "hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600}
SMOOTHING_WINDOWS = 50  # the running mean is over a 50th of the run
# acc_norm by chance and of OpenAI's weights as build-nanogpt reports it. All models answer the same examples.
HELLASWAG_REFERENCES = {"chance": 0.25, "OpenAI's GPT-2 124M (build-nanogpt)": 0.2955}


@dataclass(frozen=True)
class Curve:
    """The log of one run as arrays over its steps. hours: time in training, without validation and sampling. loss and
    val_loss: nats a token. Values that a step does not have are NaN."""

    name: str
    tokens: np.ndarray
    hours: np.ndarray
    loss: np.ndarray
    val_loss: np.ndarray
    hellaswag: np.ndarray

    @classmethod
    def read(cls, run: Path) -> Curve:
        """Reads the folder of a run. Raises FileNotFoundError if it has no log, ValueError if the log has no steps."""
        if not (run / LOG).is_file():
            raise FileNotFoundError(f"{run} is not the folder of a run: it has no {LOG}")
        records = read_log(run / LOG)
        if not records:
            raise ValueError(f"{run / LOG} has no steps yet")

        def column(name: str) -> np.ndarray:
            return np.array([record.get(name) for record in records], dtype=float)  # None becomes NaN

        hours = np.cumsum(column("step_ms")) / 3.6e6
        columns = (column(name) for name in ("loss", "val_loss", "hellaswag"))
        return cls(run.resolve().name, column("tokens"), hours, *columns)


def plot_runs(runs: Sequence[Path], picture: Path, references: Mapping[str, float] | None = None) -> None:
    """Plots all runs in one picture: loss against tokens and time, and HellaSwag against tokens if it was scored.

    runs: their folders. picture: the file to write, .pdf, .png or .svg. references: name -> loss, drawn as horizontal
        lines. Thin lines are all steps, thick lines running means, dots validation.
    Raises ValueError for another kind of file or a log without steps, FileNotFoundError for a folder without a log.
    """
    if picture.suffix not in FORMATS:
        raise ValueError(f"out is {str(picture)!r}, allowed are names that end in {', '.join(FORMATS)}")
    from matplotlib.figure import Figure

    curves = [Curve.read(run) for run in {run.resolve(): run for run in runs}.values()]  # each once
    scored = [curve for curve in curves if np.isfinite(curve.hellaswag).any()]
    panels = 3 if scored else 2
    figure = Figure(figsize=(6.5 * panels, 5), dpi=100, layout="constrained")
    unit = time_unit(max(float(curve.hours[-1]) for curve in curves))
    by_tokens, by_time, *rest = figure.subplots(1, panels)
    for i, curve in enumerate(curves):
        _draw_loss(by_tokens, curve, curve.tokens, f"C{i}")
        _draw_loss(by_time, curve, curve.hours / UNITS[unit], f"C{i}")
    for axes, label in ((by_tokens, "tokens trained on"), (by_time, f"{unit} of training")):
        _references(axes, references or {})
        axes.set(xlabel=label, ylabel="cross-entropy, nats a token")
    for axes in rest:
        for curve in scored:
            there = np.isfinite(curve.hellaswag)
            color = f"C{curves.index(curve)}"
            axes.plot(curve.tokens[there], curve.hellaswag[there], color=color, marker="o", label=as_drawn(curve.name))
        _references(axes, HELLASWAG_REFERENCES)
        axes.set(xlabel="tokens trained on", ylabel="HellaSwag, build-nanogpt's acc_norm")
    _finish([by_tokens, by_time, *rest], [by_time])
    _save(figure, picture)


def time_unit(hours: float) -> str:
    """The name in `UNITS` of the unit of time for a longest run of `hours`."""
    return next((unit for unit, size in UNITS.items() if hours >= 2 * size), "seconds")


def as_drawn(text: str) -> str:
    """`text` for matplotlib, which cannot draw bytes of a path that are no text and reads $...$ as a formula."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def plot_losses(log: Path, png: Path, title: str) -> None:
    """Plots one run against tokens: the training loss of every step, its running mean and the validation loss."""
    from matplotlib.figure import Figure

    curve = Curve.read(log.parent)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    _draw_loss(axes, curve, curve.tokens, "tab:blue")
    axes.set(title=as_drawn(title), xlabel="tokens trained on", ylabel="cross-entropy, nats a token")
    _finish([axes], [])
    _save(figure, png)


def _draw_loss(axes: Any, curve: Curve, x: np.ndarray, color: str) -> None:
    window = max(1, len(curve.loss) // SMOOTHING_WINDOWS)
    axes.plot(x, curve.loss, color=color, alpha=0.25 if window > 1 else 1.0, linewidth=0.8)
    mean = np.convolve(curve.loss, np.full(window, 1 / window), mode="valid")
    middle = x[window // 2 : window // 2 + len(mean)]
    axes.plot(middle, mean, color=color, label=f"{as_drawn(curve.name)}, training")
    validated = np.isfinite(curve.val_loss)
    if validated.any():
        axes.plot(
            x[validated], curve.val_loss[validated],
            color=color, linestyle="--", marker="o", markersize=4, label=f"{as_drawn(curve.name)}, validation",
        )  # fmt: skip


def _references(axes: Any, references: Mapping[str, float]) -> None:
    for i, (name, value) in enumerate(references.items()):
        axes.axhline(
            value, color="black", linestyle=(":", "-.", "--")[i % 3], linewidth=1, label=f"{as_drawn(name)}: {value:g}"
        )


def _finish(all_axes: Sequence[Any], against_time: Sequence[Any]) -> None:
    from matplotlib.ticker import EngFormatter

    for axes in all_axes:
        if axes not in against_time:
            axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        axes.legend()


def _save(figure: Any, picture: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture.suffix.removeprefix("."))
    write_atomically(picture, buffer.getvalue())
