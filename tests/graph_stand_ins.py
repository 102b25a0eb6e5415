"""What stands for CUDA graphs on a machine without a GPU, for `step_graphs.Recorder`."""

from __future__ import annotations

import contextlib

import torch

from fastgpt2.gpt2.training import step_graphs


class Recorder:
    """Captured work changes no value; a replay computes again, as at the capture, into the memory of the capture, which
    holds NaN until then. Random numbers go on from replay to replay."""

    serves = staticmethod(lambda device: True)

    def __init__(self, device):
        self.pool_bytes = 0

    @contextlib.contextmanager
    def random_numbers_kept(self):
        before = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(before)

    def warm_up(self, work):
        before = torch.get_rng_state()
        return work(), not torch.equal(before, torch.get_rng_state())

    def capture(self, work):
        autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        static = [None if t is None else t.detach().clone() for t in work()]
        for t in static:
            if t is not None:
                t.fill_(float("nan"))

        def replay():
            with autocast, torch.enable_grad():
                for own, new in zip(static, work(), strict=True):
                    if own is not None:
                        own.copy_(new.detach())

        return replay, static


def count_replays(monkeypatch, device) -> list[str]:
    """A list that grows by one at each replayed forward; without a GPU what stands for graphs is put in."""
    if device.type != "cuda":
        monkeypatch.setattr(step_graphs, "Recorder", Recorder)
    replays = []
    original = step_graphs.StepGraphs.__call__

    def call(self, **inputs):
        replays.append("forward")
        return original(self, **inputs)

    monkeypatch.setattr(step_graphs.StepGraphs, "__call__", call)
    return replays
