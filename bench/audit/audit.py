"""The kernel audit: figures of every kernel's code on every architecture, checked against limits, without a GPU.

    result = run()                       # starts a process for each architecture, and one that counts bytes
    result.failures()                    # figures beyond a limit
    result.worse_than(committed())       # figures worse than in bench/results/kernel_card.json

Limits, called gates, for every launch of every case: no spills (SASS: STL + LDL; AMD: VGPR spills) and no stack, shared
memory within the block's limit, no atomics but on tickets, which count programs, tensor cores for every product of
16-bit matrices, int64 for every offset into a tensor that grows with the batch, and on sm_90, for cases that are
written for it (`Case.asynchronous`), fewer waits for products than products. For every pass of a 16-bit case: 95% of
its global bytes in accesses of 128 bits.

The card has one entry for each launch and architecture with registers, shared memory, spills, occupancy (the share of a
multiprocessor's warps that can be resident), tensor-core instruction, on sm_90 the numbers of these and of waits for
them, and 128-bit share, and one for each pass with launches and bytes over minimum bytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastgpt2.bench.audit import asm
from fastgpt2.bench.audit.asm import ARCHITECTURES
from fastgpt2.bench.audit.card_table import table
from fastgpt2.bench.cases.registry import chosen_operations
from fastgpt2.bench.report import roofline
from fastgpt2.gpt2.options import CommandOptions, File, Names, Word, about

AMD_SHARED_PER_BLOCK = 65536
VECTOR_SHARE = 0.95
CARD = Path(__file__).parents[1] / "results" / "kernel_card.json"
HOST = CARD.with_name("host.md")

# Figures of the card that may not get worse, each with the difference that is allowed. Negative: less is worse.
LAUNCH_LIMITS = dict(registers=0, shared=0, spills=0, stack=0, waits=0, occupancy=-0.001, vector_share=-0.005)
PASS_LIMITS = {"launches": 0, "bytes_over_minimum": 0.005}


@dataclass(frozen=True)
class Audit:
    """launches: as compiled.py writes them, with "vector_share" added. passes: figures by (op, direction)."""

    triton: str
    launches: list[dict[str, Any]]
    passes: dict[tuple[str, str], dict[str, Any]]
    errors: tuple[str, ...] = ()  # messages of processes that failed
    peers: list[dict[str, Any]] = field(default_factory=list)  # like `launches`, of Liger's kernels

    def failures(self) -> list[str]:
        """One line for each figure beyond a limit."""
        broken = list(self.errors)
        for launch in self.launches:
            where = f"{launch['case']} {launch['direction']} {launch['kernel']} on {launch['architecture']}"
            broken += [f"{where}: {what}" for what in _broken_gates(launch)]
        for key, launches in self._by_pass().items():
            case, direction, architecture = key
            if architecture in asm.LIMITS and launches[0]["itemsize"] == 2:
                share = _weighted_share(launches)
                if share < VECTOR_SHARE:
                    each = ", ".join(f"{launch['kernel']} {launch['vector_share']:.3f}" for launch in launches)
                    broken.append(
                        f"{case} {direction} on {architecture}: {share:.1%} of bytes in 128-bit accesses, "
                        f"required {VECTOR_SHARE:.0%} ({each})"
                    )
        return broken

    def _by_pass(self) -> dict[tuple[str, str, str], list[dict]]:
        groups: dict[tuple[str, str, str], list[dict]] = {}
        for launch in self.launches:
            groups.setdefault((launch["case"], launch["direction"], launch["architecture"]), []).append(launch)
        return groups

    def card(self) -> dict[str, Any]:
        """The committed figures: "passes" by "op direction", "kernels" by "case direction kernel" and architecture."""
        passes = {" ".join(key): figures for key, figures in self.passes.items()}
        found = {"triton": self.triton, "passes": passes, "kernels": self._kernels(self.launches)}
        return found | ({"Liger's kernels": self._kernels(self.peers)} if self.peers else {})

    @staticmethod
    def _kernels(launches: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        kernels: dict[str, dict[str, Any]] = {}
        names = ("num_warps", "num_stages", "registers", "shared", "stack", "spills", "occupancy", "vector_share")
        for launch in launches:
            key = f"{launch['case']} {launch['direction']} {launch['kernel']}"
            products = ("tensor_core", "hgmma", "waits")
            figures = {n: launch[n] for n in (*names, *products) if launch.get(n) not in (None, "")}
            entry = {name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}
            architecture = launch["architecture"]
            while architecture in kernels.get(key, {}):
                key += " again"
            kernels.setdefault(key, {})[architecture] = entry
        return kernels

    def worse_than(self, card: dict[str, Any]) -> list[str]:
        """One line for each figure that is worse than in `card`; none where that is of another version of Triton."""
        if card["triton"] != self.triton:
            return []
        mine = self.card()
        worse: list[str] = []
        for key, before in card["passes"].items():
            worse += _worse(key, before, mine["passes"].get(key, {}), PASS_LIMITS)
        for key, architectures in card["kernels"].items():
            for architecture, before in architectures.items():
                after = mine["kernels"].get(key, {}).get(architecture, {})
                worse += _worse(f"{key} on {architecture}", before, after, LAUNCH_LIMITS)
                core, now = before.get("tensor_core"), after.get("tensor_core")
                if after and core != now:
                    worse.append(f"{key} on {architecture}: tensor_core was {core}, is {now}")
        return worse


def _broken_gates(launch: dict[str, Any]) -> Iterable[str]:
    limits = asm.LIMITS.get(launch["architecture"])
    shared = limits.shared_per_block if limits else AMD_SHARED_PER_BLOCK
    if launch["spills"] or launch["stack"]:
        yield f"{launch['spills']} spills, {launch['stack']} bytes of stack"
    if launch["shared"] > shared:
        yield f"{launch['shared']} bytes of shared memory, a block has {shared}"
    if launch["atomics"]:
        yield f"{launch['atomics']} atomics"
    if limits and launch["dots"] and launch["itemsize"] == 2:
        if launch["plain_dots"] or not launch["tensor_core"]:
            plain = launch["plain_dots"] or launch["dots"]
            yield f"{plain} of {launch['dots']} products of matrices without tensor cores"
    if launch["asynchronous"] and launch["hgmma"] and launch["waits"] >= launch["hgmma"]:
        yield f"{launch['waits']} waits for {launch['hgmma']} asynchronous products: each runs alone"
    if launch["narrow"]:
        yield f"int32 offsets into {', '.join(launch['narrow'])}"


def _worse(where: str, before: dict[str, Any], after: dict[str, Any], limits: dict[str, float]) -> Iterable[str]:
    for name, slack in limits.items():
        if name not in before or not after:  # left out by --arch or --op
            continue
        if name not in after:
            yield f"{where}: {name} was {before[name]}, is missing"
            continue
        difference = after[name] - before[name]
        if difference > slack if slack >= 0 else difference < slack:
            yield f"{where}: {name} was {before[name]}, is {after[name]}"


def _weighted_share(launches: Sequence[dict[str, Any]]) -> float:
    total = sum(launch["bytes"] for launch in launches)
    return sum(launch["bytes"] * launch["vector_share"] for launch in launches) / total if total else 1.0


def run(
    architectures: Sequence[str] = ARCHITECTURES,
    ops: Sequence[str] = (),
    jobs: int | None = None,
    triton: Path | None = None,
    with_peers: bool = False,
) -> Audit:
    """Compiles and counts in `jobs` processes at a time, by default one for each CPU core.

    triton: a folder with another version of Triton to compile with. Bytes are counted with the installed version.
    with_peers: also count eager PyTorch's and Liger's launches and bytes (peer_traffic.py), which takes minutes.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        only = ("--op", ",".join(ops)) if ops else ()
        # The slowest first.
        counting = pool.submit(_process, "traffic", Path(folder) / "traffic.json", only, interpret=True)
        file = Path(folder) / "peer_traffic.json"
        comparing = with_peers and pool.submit(_process, "peer_traffic", file, only, interpret=True)
        also = ("--peers",) if with_peers else ()
        compiling = [
            pool.submit(
                _process, "compiled", Path(folder) / f"{name}.json", (*only, *also, "--arch", name), triton=triton
            )
            for name in architectures
        ]
        counted, count_error = counting.result()
        others, others_error = comparing.result() if comparing else ([], "")
        results = [future.result() for future in compiling]
    errors = [error for _, error in results if error] + [e for e in (count_error, others_error) if e]
    compiled = [found for found, _ in results if found]
    launches = [launch for found in compiled for launch in found["launches"]]
    if len({found["sources"] for found in (*compiled, counted) if found}) > 1:
        errors.append("the kernels' files changed while they were compiled: figures do not belong together, run again")
    passes, lines = _traffic(counted["passes"] if counted else [])
    for entry in others or ():
        figures = passes.get((entry["op"], entry["direction"]), {})
        for name in ("launches", "bytes_over_minimum"):
            figures[f"{entry['label']} {name}"] = entry[name]
    for launch in launches:
        bytes_by_line = lines.get((launch["op"], launch["direction"], launch["kernel"]), {})
        widths = {line: {int(w): n for w, n in made.items()} for line, made in launch.pop("widths").items()}
        launch["bytes"] = sum(bytes_by_line.values())
        launch["vector_share"] = asm.vector_share(widths, bytes_by_line) if widths else None
    peers = [launch for found in compiled for launch in found["peers"]]
    return Audit(compiled[0]["triton"] if compiled else "", launches, passes, tuple(errors), peers)


def _traffic(counted: list[dict]) -> tuple[dict, dict]:
    """-> (op, direction) -> launches and bytes; (op, direction, kernel) -> bytes by source line."""
    passes: dict[tuple, dict] = {}
    lines: dict[tuple, Counter[str]] = {}
    for entry in counted:
        place = (entry["op"], entry["direction"])
        moved = sum(launch["bytes"] for launch in entry["launches"])
        passes[place] = dict(
            case=entry["case"],
            launches=len(entry["launches"]),
            bytes_over_minimum=round(moved / entry["minimum_bytes"], 4),
        )
        for launch in entry["launches"]:
            lines.setdefault((*place, launch["kernel"]), Counter()).update(launch["lines"])
    return passes, lines


def _process(
    module: str, file: Path, options: Sequence[str], interpret: bool = False, triton: Path | None = None
) -> tuple[Any, str]:
    """Runs a module of bench in its own process; -> (what it wrote, the last lines of its errors if it failed)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if triton is not None:
        paths = filter(None, (str(triton), environment.get("PYTHONPATH")))
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", f"fastgpt2.bench.audit.{module}", "--json", str(file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        return None, f"{' '.join(command[2:])} ended with status {done.returncode}: {tail}"
    return json.loads(file.read_text(encoding="utf-8")), ""


def committed() -> dict[str, Any]:
    return json.loads(CARD.read_text(encoding="utf-8"))


def merged(card: dict[str, Any], found: dict[str, Any], ops: Sequence[str]) -> dict[str, Any]:
    """`card` with the entries of `ops` taken from `found`, in their place. Raises ValueError for cards of different
    versions of Triton."""
    if card["triton"] != found["triton"]:
        raise ValueError(
            f"bench audit: --op with --write, but the card is of Triton {card['triton']} and this one is "
            f"{found['triton']}: leave --op out"
        )
    result = dict(card)
    for section in ("passes", "kernels", "Liger's kernels"):
        before = card.get(section, {})
        places = {op: i for i, op in enumerate(dict.fromkeys(map(_op_of, before)))}
        if entries := {k: v for k, v in before.items() if _op_of(k) not in ops} | found.get(section, {}):
            result[section] = dict(sorted(entries.items(), key=lambda e: places.get(_op_of(e[0]), len(places))))
    return result


def _op_of(key: str) -> str:
    """The op of an entry of the card such as "gelu[514x3072-float16] forward _kernel"."""
    return re.split(r"[ \[]", key)[0]


def write_card(audit: Audit, ops: Sequence[str] = ()) -> None:
    """Writes kernel_card.json, with a line for each kernel and architecture, and kernel_card.md.

    ops: if given, only their entries change.
    """
    card = merged(committed(), audit.card(), ops) if ops else audit.card()
    CARD.parent.mkdir(exist_ok=True)
    CARD.write_text(_json(card) + "\n", encoding="utf-8")
    write_markdown()


def write_markdown() -> None:
    """Writes kernel_card.md: the committed card, the tables of `bench host --write`, and the roofline model."""
    parts = [table(committed()), roofline.as_markdown()]
    if HOST.exists():
        parts.insert(1, "#" + HOST.read_text(encoding="utf-8"))  # its title becomes a section's
    CARD.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _json(value: Any, depth: int = 0) -> str:
    """JSON with each innermost dictionary on one line."""
    if not isinstance(value, dict) or not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    pad = " " * (depth + 1)
    entries = (f"{pad}{json.dumps(key)}: {_json(entry, depth + 1)}" for key, entry in value.items())
    return "{\n" + ",\n".join(entries) + "\n" + " " * depth + "}"


# --------------------------------------------------------------------------------------------------------- command


HELP = "compile every kernel for every architecture and check it, without a GPU"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compiles every kernel for every architecture, counts launches and bytes in the interpreter, and prints the kernel
    card and what breaks a gate. Needs no GPU and some minutes.
    """

    arch: Annotated[Names | None, about(f"comma-separated, from {','.join(ARCHITECTURES)}; None: all")] = None
    op: Names | None = None  # comma-separated public kernel functions, such as layer_norm; None: all
    jobs: int | None = None  # processes at a time; None: one for each CPU core
    # compile with the Triton in this folder, made by: pip install --no-deps --target FOLDER triton==3.4.0
    triton: Annotated[Path, Word("FOLDER")] | None = None
    json: File | None = None  # also write the card to this file
    # write the card to bench/results, to be committed; with --op, the entries of these functions alone
    write: bool = False


def main(options: Options) -> int:
    """Prints the card; returns 1 if a figure is beyond a limit or worse than the committed one."""
    architectures = options.arch.split(",") if options.arch else ARCHITECTURES
    for name in architectures:
        if name not in ARCHITECTURES:
            raise ValueError(f"bench audit: --arch is {name!r}, allowed are {', '.join(ARCHITECTURES)}")
    if options.write and (options.arch or options.triton):
        raise ValueError(
            "bench audit: --write takes all architectures and the installed Triton, leave --arch and --triton out"
        )
    if options.triton and not (options.triton / "triton").is_dir():
        raise ValueError(f"bench audit: --triton is {str(options.triton)!r}, which holds no package triton")
    ops = chosen_operations(options.op) if options.op else ()
    result = run(
        architectures,
        ops,
        options.jobs,
        options.triton,
        with_peers=not options.triton,
    )
    card = result.card()
    print(table(card))
    print(roofline.as_markdown())
    if options.json:
        Path(options.json).write_text(_json(card) + "\n", encoding="utf-8")
    failures = result.failures()
    if options.write and not result.errors:
        write_card(result, ops)
    elif CARD.exists():
        failures += [f"worse than the card: {line}" for line in result.worse_than(committed())]
    for line in failures:
        print(f"FAIL {line}", file=sys.stderr)
    return 1 if failures else 0
