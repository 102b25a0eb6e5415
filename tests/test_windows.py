"""The windows that a model trains on: each once an epoch, disjoint over ranks, resumed at any place."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.gpt2.data.shards import Shards
from fastgpt2.gpt2.data.windows import MAX_SEED, Windows, eval_batches


def test_targets_are_one_token_later():
    idx, targets = Windows(np.arange(100, dtype=np.uint16), 8, seed=0).next_batch(4)
    assert idx.shape == targets.shape == (4, 8) and idx.dtype == targets.dtype == torch.int64
    assert (targets == idx + 1).all()


@given(length=st.integers(2, 200), block_size=st.integers(1, 20), seed=st.integers(0, MAX_SEED))
def test_every_window_comes_once_an_epoch(length, block_size, seed):
    if length < block_size + 1:
        with pytest.raises(ValueError, match=f"{length} tokens.*block_size {block_size}"):
            Windows(np.arange(length), block_size, seed)
        return
    windows = Windows(np.arange(length), block_size, seed)
    for _ in range(3):
        idx, targets = windows.next_batch(windows.per_epoch)
        starts = idx[:, 0].sort().values
        assert (starts.diff() == block_size).all()  # none overlaps another, none is left out
        assert idx.min() >= 0 and targets.max() < length
    assert windows.per_epoch >= max(1, (length - 1) // block_size - 1)


def test_epochs_differ_in_order_and_offset():
    windows = Windows(np.arange(1000), 7, seed=3)
    epochs = [windows.next_batch(windows.per_epoch)[0] for _ in range(4)]
    assert len({tuple(e[:, 0].tolist()) for e in epochs}) == 4
    assert len({int(e.min()) for e in epochs}) > 1


def test_the_last_token_is_trained_on():
    windows = Windows(np.arange(30), 7, seed=0)
    assert max(int(windows.next_batch(windows.per_epoch)[1].max()) for _ in range(50)) == 29


class Usage:
    """One way to read windows: any text, window, seed, ranks and batch; `take` plays that many global batches."""

    def __init__(self, draw):
        self.block_size = draw(st.integers(1, 12))
        self.length = draw(st.integers(self.block_size + 1, 150))
        self.seed = draw(st.integers(0, MAX_SEED))
        self.world_size = draw(st.integers(1, 4))
        self.batch_size = draw(st.integers(1, 5))

    def ranks(self):
        tokens = np.arange(self.length)
        return [Windows(tokens, self.block_size, self.seed, r, self.world_size) for r in range(self.world_size)]

    def take(self, ranks, batches):
        """idx (batches, world_size * batch_size, T): what all ranks see, batch by batch."""
        return torch.stack([torch.cat([w.next_batch(self.batch_size)[0] for w in ranks]) for _ in range(batches)])


USAGE = st.composite(Usage)()


@given(USAGE)
def test_ranks_are_disjoint_and_leave_nothing_out(usage):
    ranks = usage.ranks()
    per_epoch, at_once = ranks[0].per_epoch, usage.batch_size * usage.world_size
    starts = usage.take(ranks, -(-2 * per_epoch // at_once))[..., 0].flatten()
    for epoch in (starts[:per_epoch], starts[per_epoch : 2 * per_epoch]):
        assert len(epoch.unique()) == per_epoch


@given(USAGE)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(usage):
    alone = Windows(np.arange(usage.length), usage.block_size, usage.seed)
    for together in usage.take(usage.ranks(), 5):
        passes = [alone.next_batch(usage.batch_size)[0] for _ in range(usage.world_size)]
        assert torch.equal(torch.cat(passes), together)


@given(USAGE, st.integers(0, 30), st.integers(1, 4))
def test_resumed_anywhere_on_any_number_of_ranks_the_stream_goes_on(usage, before, world_size):
    ranks = usage.ranks()
    if before:
        usage.take(ranks, before)
    states = [json.loads(json.dumps(windows.state_dict())) for windows in ranks]
    assert all(state == states[0] for state in states)
    expected = usage.take(ranks, world_size).flatten(0, 1)
    usage.world_size = world_size
    resumed = usage.ranks()
    for windows in resumed:
        windows.load_state_dict(states[0])
    found = usage.take(resumed, -(-len(expected) // (usage.batch_size * world_size))).flatten(0, 1)
    assert torch.equal(found[: len(expected)], expected)


def test_the_seed_decides_the_order():
    first, same, other = (Windows(np.arange(500), 8, seed).next_batch(16)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((np.arange(99), 8, 0), "tokens of the data is 99, the saved position has 100"),
        ((np.arange(100), 9, 0), "block_size of the data is 9, the saved position has 8"),
        ((np.arange(100), 8, 1), "seed of the data is 1, the saved position has 0"),
    ],
)
def test_a_position_in_other_data_is_refused(other, message):
    state = Windows(np.arange(100), 8, 0).state_dict()
    with pytest.raises(ValueError, match=message):
        Windows(*other).load_state_dict(state)


def test_windows_run_across_shards():
    tokens = np.arange(1000, dtype=np.uint16)
    shards = Shards(np.split(tokens, [1, 70, 71, 400]))
    whole, cut = Windows(tokens, 16, seed=0), Windows(shards, 16, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.next_batch(100), cut.next_batch(100), strict=True))


def test_a_seed_out_of_range_is_refused():
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            Windows(np.arange(100), 8, seed)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_out_of_range_is_refused(rank, world_size):
    with pytest.raises(ValueError, match=f"rank is {rank}, allowed are 0..{world_size - 1}"):
        Windows(np.arange(100), 8, 0, rank, world_size)


def test_validation_windows_are_fixed_and_spread():
    tokens = np.arange(1000)
    batches = list(eval_batches(tokens, block_size=10, batch_size=4, windows=12))
    starts = torch.cat([idx[:, 0] for idx, _ in batches])
    assert len(starts) == 12 and (starts.diff() >= 10).all()
    assert starts[0] == 0 and starts[-1] >= 900
    again = torch.cat([idx[:, 0] for idx, _ in eval_batches(tokens, 10, 4, 12)])
    assert torch.equal(starts, again)


def test_validation_takes_all_there_is_of_a_short_text():
    batches = list(eval_batches(np.arange(51), block_size=10, batch_size=4, windows=12))
    assert [len(idx) for idx, _ in batches] == [4, 1]
    assert batches[-1][1][-1, -1] == 50


@given(st.integers(3, 100), st.integers(1, 5), st.integers(1, 30), st.integers(1, 4))
def test_validation_is_the_same_for_any_batch_and_number_of_ranks(length, batch_size, windows, world_size):
    tokens = np.arange(length)
    alone = torch.cat([idx for idx, _ in eval_batches(tokens, 2, 1, windows)])
    ranks = [list(eval_batches(tokens, 2, batch_size, windows, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert all((idx >= 0).all() for idx, _ in in_order)
    counted = [idx[targets[:, 0] >= 0] for idx, targets in in_order]
    assert torch.equal(torch.cat(counted), alone)
