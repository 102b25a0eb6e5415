"""The cases that the audit compiles: the registry's, and what else their functions can be asked for."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.registry import DESCRIPTIONS, all_cases


def cases_to_compile(rows: int = 4096) -> Iterator[Case]:
    """`all_cases`, and every description's variants: other code, which may spill where the plain one does not."""
    yield from all_cases(rows)
    for description in DESCRIPTIONS.values():
        yield from description.variants(rows)
