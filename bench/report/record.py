"""Result files: what was measured, where and with what, as JSON.

    results = Results.begin("train", device, settings=dict(...))
    results.add("gpt2 B=4 T=1024 ours", what="...", time_ms=timing.as_dict(), tokens_per_s=...)
    results.leave_out("flash-attn", "not installed")
    file = results.save(folder)                          # folder/train-nvidia-h100-80gb-hbm3.json
    results = Results.load(file)

    {"format": 1, "kind": "train", "date": ..., "commit": ..., "machine": {...}, "settings": {...},
     "rows": [{"name": ..., "what": ..., "time_ms": {"median", "p20", "p80", "runs"}, ...}],
     "left_out": [{"name": ..., "why": ...}]}

A row's name is unique in its file, and the same measurement has the same name in every file of its kind, so that files
can be compared. Times are in milliseconds, memory is in bytes, and unknown figures are null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.files import write_atomically

FORMAT = 1
FOLDER = Path("bench-results")  # where commands write by default
PACKAGES = (
    *("torch", "triton", "transformers", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4"),
    *("quack-kernels", "xformers", "numpy"),
)
HERE = Path(__file__).resolve().parents[1]


@dataclass
class Results:
    kind: str
    machine: dict[str, Any]
    date: str
    commit: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, kind: str, device: torch.device, settings: dict[str, Any]) -> Results:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(kind, machine(device), date, commit(), settings)

    def add(self, name: str, *, what: str, time_ms: dict[str, Any] | None, **figures: Any) -> dict[str, Any]:
        """Adds and returns one row. what: describes what was measured. Raises ValueError if the name is taken."""
        if any(row["name"] == name for row in self.rows):
            raise ValueError(f"results: there is already a row named {name!r}")
        row = dict(name=name, what=what, time_ms=time_ms, **figures)
        self.rows.append(row)
        return row

    def leave_out(self, name: str, why: str) -> None:
        """Records what was not measured, and why."""
        self.left_out.append(dict(name=name, why=why))

    def save(self, folder: Path, part: str = "") -> Path:
        """Writes folder/KIND-MACHINE.json, or KIND-MACHINE-PART.json, atomically; replaces an older one."""
        file = folder / (slug(f"{self.kind} {self.machine['name']} {part}") + ".json")
        write_atomically(file, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")
        return file

    @contextlib.contextmanager
    def kept_if_cut_short(self, folder: Path, part: str = "") -> Iterator[None]:
        """Saves the rows measured so far if an exception, Ctrl-C or SIGTERM ends the block, and raises it again."""
        try:
            with _ended_by_sigterm():
                yield
        except BaseException:
            if self.rows:
                self.leave_out("the rest", "the run was cut short")
                print(f"cut short; what was measured is in {self.save(folder, part)}", file=sys.stderr)
            raise

    @classmethod
    def load(cls, file: Path) -> Results:
        """Raises ValueError for a file that holds no results, OSError for one that cannot be read."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not names <= set(content):
            raise ValueError(f"{file} holds no results: expected the keys {', '.join(sorted(names))}")
        if content["format"] != FORMAT:
            raise ValueError(f"{file} has format {content['format']!r}, this version reads {FORMAT}")
        return cls(**{name: content[name] for name in names})


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM (from `timeout` or a batch system) raises SystemExit. Other threads than the main one may not set
    signal handlers: there it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary_line(results: Results, file: Path, figures: dict[str, Any]) -> str:
    """The line of JSON that ends a command's output."""
    return json.dumps(
        {"kind": results.kind, "machine": results.machine["name"], "file": str(file), **figures}, allow_nan=False
    )


def slug(name: str) -> str:
    """Makes a name fit for a file: "NVIDIA H100 PCIe" -> "nvidia-h100-pcie"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: torch.device) -> dict[str, Any]:
    """What measured times depend on besides the code: hardware, system and versions. Unknown figures are None."""
    figures: dict[str, Any] = dict(
        device=device.type,
        name=_cpu_name(),
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # of other processes, at the start
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver, power_limit_w = _nvidia_smi(getattr(properties, "uuid", None))
        figures |= dict(
            name=properties.name,
            gpu=properties.name,
            gpu_bytes=properties.total_memory,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            rocm=torch.version.hip,
            driver=driver,
            power_limit_w=power_limit_w,
        )
    return figures


def describe(machine: dict[str, Any]) -> str:
    """A machine in one line."""
    if machine["device"] != "cuda":
        return f"{machine['name']}, {machine['threads']} of {machine['cores']} cores, no GPU"
    power = f", power limit {machine['power_limit_w']:g} W" if machine["power_limit_w"] else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return f"{machine['gpu']}, {machine['gpu_bytes'] / 2**30:.0f} GiB{driver}{power}"


def short(commit: str | None) -> str:
    """A commit, shortened for display."""
    return "unknown" if commit is None else commit.replace(commit[:40], commit[:10], 1)


def commit() -> str | None:
    """The checkout's commit, with "+changes" where tracked files differ from it; None outside a checkout."""
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    try:
        runs = [subprocess.run(["git", "-C", str(HERE), *c], capture_output=True, text=True) for c in commands]
    except OSError:
        return None
    if any(run.returncode for run in runs):
        return None
    head, changes = (run.stdout.strip() for run in runs)
    return head + "+changes" * bool(changes)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines: Sequence[str] = file.read_text().splitlines() if file.exists() else ()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown CPU")


def _nvidia_smi(uuid: object) -> tuple[str | None, float | None]:
    """(driver's version, power limit in watts); None for unknown ones."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run([*command, *([f"--id=GPU-{uuid}"] if uuid else [])], capture_output=True, text=True)
        driver, limit = (part.strip() for part in run.stdout.splitlines()[0].split(","))
    except (OSError, IndexError, ValueError):
        return None, None
    try:
        return driver, float(limit)
    except ValueError:  # "[N/A]"
        return driver, None
