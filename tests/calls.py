"""Every call of every op's description (bench/cases/ops/): what the guards run."""

from fastgpt2.bench.cases.registry import DESCRIPTIONS

CALLS = tuple(call for description in DESCRIPTIONS.values() for call in description.calls())
