"""Rows of the tuning table replaced for some launches: to search them, and to compile what the table has off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from fastgpt2.kernels import _tuning
from fastgpt2.kernels._configurations import Key

Config = dict[str, int]


@contextlib.contextmanager
def overridden(configs: dict[Key, Config]) -> Iterator[list[Key]]:
    """Inside, launches use these configurations for their rows. Yields the list of rows that launches look up."""
    asked: list[Key] = []
    original = _tuning.config

    def config(key: Key, device: torch.device) -> Config:
        asked.append(key)
        return dict(configs[key]) if key in configs else original(key, device)

    # No launch is watched here: `_tuning.config` is the one place where kernels ask for these numbers.
    with mock.patch.object(_tuning, "config", config):
        yield asked
