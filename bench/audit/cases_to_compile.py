"""The cases that the audit compiles: those of the registry, and those with more options, which compile other code."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.registry import DESCRIPTIONS, all_cases


def cases_to_compile(rows: int = 4096) -> Iterator[Case]:
    """`all_cases`, and every description's variants, whose code may spill where the plain case's does not."""
    yield from all_cases(rows)
    for description in DESCRIPTIONS.values():
        yield from description.variants(rows)
