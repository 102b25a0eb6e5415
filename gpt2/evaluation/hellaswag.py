"""HellaSwag: choosing the right one of four endings of a text by the loss of each ending after the context.

    examples = read_examples("hellaswag_val.jsonl")             # the official file; by default it is downloaded
    hellaswag(model, tokenizer, examples, device=device).harness_acc_norm

Two conventions are in use, and their numbers cannot be compared:

    nanogpt_acc, nanogpt_acc_norm       unchanged texts (build-nanogpt, llm.c). The ending with the smallest sum or the
                                        smallest mean of its tokens' losses is chosen.
    harness_acc, harness_acc_norm,      EleutherAI's harness (lm_eval 0.4: acc, acc_norm and acc_bytes):
    harness_acc_bytes                   the activity is put before the context and WikiHow's markup is removed. The
                                        ending with the smallest sum, the smallest sum divided by its length in
                                        characters, or in UTF-8 bytes, is chosen.

Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", 2019; github.com/rowanz/hellaswag.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt2.gpt2.data.sources import SURROGATE
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.evaluation.evaluate import Watch, continuation_loss
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.model import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
TIMEOUT_S = 60
DOWNLOAD = "download"
ENDINGS = 4


@dataclass(frozen=True)
class Example:
    """One example. `endings[label]` is the right continuation of `context`."""

    activity: str
    context: str
    context_a: str
    context_b: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class HellaSwag:
    """The scores of a model: the fraction of the examples that it answers correctly. Chance is 0.25."""

    examples: int
    nanogpt_acc: float
    nanogpt_acc_norm: float
    harness_acc: float
    harness_acc_norm: float
    harness_acc_bytes: float


def hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    device: torch.device,
    watch: Watch = iter,
) -> HellaSwag:
    """Computes all scores. batch_size: endings in a batch. watch: shows progress over batches."""
    plain = nanogpt_scores(model, tokenizer, examples, batch_size=batch_size, device=device, watch=watch)
    pairs = [(_harness_context(e), _harness_text(ending)) for e in examples for ending in e.endings]
    rows = [_joint_row(tokenizer, *pair) for pair in pairs]
    losses = continuation_loss(model, rows, batch_size=batch_size, device=device, watch=watch)
    characters, size = (np.array([len(form(ending)) for _, ending in pairs]) for form in (str, str.encode))
    scores = (_right(each, examples) for each in (losses, losses / characters, losses / size))
    return HellaSwag(len(examples), *plain, *scores)


def nanogpt_scores(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    device: torch.device,
    watch: Watch = iter,
) -> tuple[float, float]:
    """Computes `nanogpt_acc` and `nanogpt_acc_norm` only. Arguments as for `hellaswag`."""
    rows = [_plain_row(tokenizer, e.context, ending) for e in examples for ending in e.endings]
    losses = continuation_loss(model, rows, batch_size=batch_size, device=device, watch=watch)
    tokens = np.array([n for _, n in rows])
    return _right(losses, examples), _right(losses / tokens, examples)


def _right(losses: np.ndarray, examples: Sequence[Example]) -> float:
    """The fraction of the examples whose label has the smallest loss. losses: (4 * number of examples,)."""
    labels = [example.label for example in examples]
    return float((losses.reshape(-1, ENDINGS).argmin(1) == labels).mean())


def _plain_row(tokenizer: Tokenizer, context: str, ending: str) -> tuple[np.ndarray, int]:
    before, after = tokenizer.encode(context), tokenizer.encode(" " + ending)
    return np.concatenate([before, after]), len(after)


def _joint_row(tokenizer: Tokenizer, context: str, ending: str) -> tuple[np.ndarray, int]:
    """Encodes both as one text. Spaces at the end of the context count as the ending's, because a word's first token
    includes the space before it."""
    whole = tokenizer.encode(f"{context} {ending}")
    return whole, len(whole) - len(tokenizer.encode(context.rstrip()))


def _harness_context(example: Example) -> str:
    return _harness_text(f"{example.activity}: {example.context_a} {example.context_b.capitalize()}")


def _harness_text(text: str) -> str:
    """`text` without WikiHow's markup, such as [header]."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# ------------------------------------------------------------------------------------------------------- reading


def read_examples(path: str | Path = DOWNLOAD) -> list[Example]:
    """The examples of an official .jsonl file. "download" is the validation file, downloaded once into the cache.

    Raises OSError for a file that cannot be read or downloaded, ValueError naming the file and line of an invalid
    example or of one without a label, such as those of the test file.
    """
    path = _download() if path == DOWNLOAD else Path(path)
    examples = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                examples.append(_example(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{path}, line {number} is not an example with a label: {reason}") from None
    if not examples:
        raise ValueError(f"{path} has no examples")
    return examples


def _example(row: dict[str, Any]) -> Example:
    example = Example(
        row["activity_label"], row["ctx"], row["ctx_a"], row["ctx_b"], tuple(row["endings"]), int(row["label"])
    )
    if len(example.endings) != ENDINGS or not all(isinstance(e, str) and e for e in example.endings):
        raise ValueError(f"endings is {row['endings']!r}, expected {ENDINGS} texts")
    if not 0 <= example.label < ENDINGS:
        raise ValueError(f"label is {example.label}, allowed are 0..{ENDINGS - 1}")
    for text in (example.activity, example.context, example.context_a, example.context_b, *example.endings):
        if not isinstance(text, str) or SURROGATE.search(text):
            raise ValueError(f"it holds {text!r}, expected text")
    if not example.context.strip():
        raise ValueError("ctx is empty")
    return example


def _download() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt2" / URL.rpartition("/")[2]
    if not path.is_file():
        try:
            with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as answer:
                write_atomically(path, answer.read())
        except OSError as error:
            raise OSError(f"{URL} could not be downloaded ({error}); give a local copy: --hellaswag FILE") from None
    return path
