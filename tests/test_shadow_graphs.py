"""Replays of CUDA graphs read 16-bit copies of weights, which are compared with the weights before each replay."""

import gc

import graph_stand_ins
import pytest
import shadow_runs
import torch
from shadow_runs import READ_BY_TORCH, a_batch, a_trained_one, by_casts, optimizer_of, passed, same
from torch import Tensor

from fastgpt2 import GPT, graphed
from fastgpt2.gpt2.training.graphed import graphs_of
from fastgpt2.gpt2.training.triton_adamw import TritonAdamW


@pytest.fixture
def pair(device) -> tuple[Tensor, Tensor]:
    return a_batch(device)


@pytest.fixture
def replayed(device, pair, monkeypatch):
    return a_replayed_one(device, pair, monkeypatch)


def a_replayed_one(device, pair, monkeypatch) -> tuple[GPT, TritonAdamW, list[str]]:
    """A trained model graphed, its optimizer, and the replays; each begins with fresh copies."""
    model, optimizer = a_trained_one(device, pair)
    replays = graph_stand_ins.count_replays(monkeypatch, device)
    graphed(model, *pair)
    passed(model, pair)
    graphs = graphs_of(model)
    replay = graphs._replay_forward

    def checked() -> None:
        assert graphs._shadows and all(s.copy is c and s.is_fresh for s, c in graphs._shadows)
        assert all(torch.equal(c, s.parameter.to(c.dtype)) for s, c in graphs._shadows)
        replay()

    graphs._replay_forward = checked
    assert len(graphs._shadows) == READ_BY_TORCH
    return model, optimizer, replays


def test_replays_read_copies(replayed, pair):
    model, optimizer, replays = replayed
    for _ in range(2):
        assert same(passed(model, pair), by_casts(model, pair))
        optimizer.step()
    assert len(replays) == 3


@pytest.mark.parametrize("change", ["change_in_place", "load", "another_optimizer", "average"])
def test_a_change_between_replays_is_seen(change, replayed, device, pair):
    model, optimizer, replays = replayed
    getattr(shadow_runs, change)(model, device)
    assert same(passed(model, pair), by_casts(model, pair))
    optimizer.step()
    assert same(passed(model, pair), by_casts(model, pair))
    assert len(replays) == 3


def test_replays_after_passes_in_another_dtype(replayed, pair):
    """Which has the shadows' copies made anew, elsewhere."""
    model, optimizer, replays = replayed
    short = tuple(t[:, :4] for t in pair)
    assert same(passed(model, short, torch.float16), by_casts(model, short, torch.float16))
    optimizer.step()
    assert same(passed(model, pair), by_casts(model, pair))
    assert len(replays) == 2


def test_replays_after_the_optimizer(device, pair, monkeypatch):
    model, optimizer, replays = a_replayed_one(device, pair, monkeypatch)
    del optimizer
    gc.collect()
    shadow_runs.change_in_place(model, device)
    assert same(passed(model, pair), by_casts(model, pair))
    other = optimizer_of(model, device)
    for _ in range(2):
        other.step()
        assert same(passed(model, pair), by_casts(model, pair))
    assert len(replays) == 4
