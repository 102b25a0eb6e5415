"""How long a run takes on this machine: a short measurement, so that "about two minutes" holds on a slow laptop too."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.recipe import TrainConfig

RUN_S = 100.0  # of steps; the rest of two minutes is for start, validations, sample and picture
MEASURE_S = 2.0
FEWEST_STEPS = 100
VOCABULARY = 100  # about as many characters as a text has


def fitted(config: TrainConfig) -> tuple[TrainConfig, float]:
    """(`config` with no more steps than take RUN_S here, and validations and warm-up in proportion; ms of a step)."""
    seconds = step_seconds(config)
    steps = int(RUN_S / seconds) // FEWEST_STEPS * FEWEST_STEPS
    steps = min(config.steps, max(FEWEST_STEPS, steps))
    shorter: dict[str, Any] = dict(
        steps=steps,
        eval_interval=max(1, config.eval_interval * steps // config.steps),
        warmup=config.warmup * steps // config.steps,
    )
    return dataclasses.replace(config, **shorter), seconds * 1e3


def step_seconds(config: TrainConfig) -> float:
    """Median time of one process's step on random tokens, measured for MEASURE_S or, where that is longer, one step.

    The first of several, which allocates, does not count.
    """
    model = GPT(config.model_config(VOCABULARY), kernels=config.kernels)
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, (0.9, config.beta2), "cpu")
    idx = torch.randint(VOCABULARY, (config.batch_size, config.block_size))
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < MEASURE_S:
        start = time.perf_counter()
        for _ in range(config.passes(1)):
            model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)
