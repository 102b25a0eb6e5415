"""Reading a run's log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, or [] if the file does not exist. An incomplete last line is ignored.

    Raises ValueError naming a line that is not JSON or not the record of a step.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(records[-1], dict) or not isinstance(records[-1].get("step"), int):
            raise ValueError(f"{path}, line {number} is not the record of a step: {line[:60]}")
    return records
