"""Compares two result files of one kind row by row: what became slower, and whether by more than noise.

A row is a regression if its median is slower by more than the threshold *and* the intervals from the 20th to the 80th
percentile do not overlap; it is faster by the same rule. A row with a time in A and none in B, for example because
memory ran out, is a regression too. Rows that only one file has are listed.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt2.bench.report.record import Results

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """A row that both files have. ratio: the time in B over the time in A; low, high: the same from percentiles."""

    name: str
    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float
    verdict: str  # "slower", "faster", "same"


def list_changes(a: Results, b: Results, threshold: float = THRESHOLD) -> tuple[list[Change], list[str], list[str]]:
    """-> (changes of rows in both files, rows with a time in A and none in B, other rows that are in one file only).

    Raises ValueError for files of two kinds, files without a common row, or a threshold below 0.
    """
    if threshold < 0:
        raise ValueError(f"--threshold is {threshold}, allowed are numbers of at least 0")
    if a.kind != b.kind:
        raise ValueError(f"--compare got results of kinds {a.kind!r} and {b.kind!r}; they must be of one kind")
    before, after = ({row["name"]: row["time_ms"] for row in r.rows} for r in (a, b))
    after_what = {row["name"]: row["what"] for row in b.rows}
    missing = [f"{name}: only in {which}" for which, name in _only(before, after)]
    changes, lost = [], []
    for name in before:
        if name not in after:
            continue
        old, new = before[name], after[name]
        if not old or not new:
            if old:
                lost.append(f"{name}: {after_what[name]} in B")
            elif new:
                missing.append(f"{name}: no time in A")
            continue
        ratio, low, high = new["median"] / old["median"], new["p20"] / old["p80"], new["p80"] / old["p20"]
        slower, faster = ratio > 1 + threshold and low > 1, ratio < 1 / (1 + threshold) and high < 1
        verdict = "slower" if slower else "faster" if faster else "same"
        changes.append(Change(name, old["median"], new["median"], ratio, low, high, verdict))
    if not changes:
        raise ValueError("--compare: the two files have no timed row in common")
    return changes, lost, missing


def _only(before: dict, after: dict) -> list[tuple[str, str]]:
    return [("A", n) for n in before if n not in after] + [("B", n) for n in after if n not in before]


def differences(a: Results, b: Results) -> list[str]:
    """How the machines and versions of the two runs differ, because that also changes times."""
    found = []
    for key in sorted({*a.machine, *b.machine} - {"versions", "load"}):
        if a.machine.get(key) != b.machine.get(key):
            found.append(f"{key}: {a.machine.get(key)} -> {b.machine.get(key)}")
    mine, theirs = a.machine["versions"], b.machine["versions"]
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            found.append(f"{name}: {mine.get(name)} -> {theirs.get(name)}")
    return found
