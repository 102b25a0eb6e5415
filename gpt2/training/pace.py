"""Fitting the length of a run to this machine by a short measurement, so that slow machines need two minutes too."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.training.train_config import TrainConfig

RUN_S = 100.0  # for the steps; the rest of two minutes is for start, validation, sample and plot
MEASURE_S = 2.0
FEWEST_STEPS = 100
VOCABULARY = 100  # about the number of different characters of a text


def fitted(config: TrainConfig) -> tuple[TrainConfig, float]:
    """(`config` with at most the steps that take RUN_S on this machine, and eval_interval and warmup in proportion; the
    duration of a step in ms)."""
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
    """The median duration, in seconds, of a step of one process on random tokens, measured for MEASURE_S and at least
    one step. If there are several, the first one is not counted, because it allocates memory."""
    hardware.keep_freed_memory()  # as `Trainer` does
    model = GPT(config.model_config(VOCABULARY), kernels=config.kernels)
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, (0.9, config.beta2), "cpu")
    idx = torch.randint(VOCABULARY, (config.batch_size, config.block_size))
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < MEASURE_S:
        start = time.perf_counter()
        for _ in range(config.grad_accum_steps(1)):
            model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)
