"""Cross-entropy of rows that a program holds in registers: the rule of linear_cross_entropy, and one read a logit."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import count_launches
from test_linear_cross_entropy import check_rule, every_dtype, every_option, every_reduction, make

from fastgpt2.bench.timing.tune import DESIGNS
from fastgpt2.kernels import _tuning
from fastgpt2.kernels._cross_entropy import cross_entropy_
from fastgpt2.kernels._cross_entropy_row import row_tiles


@pytest.fixture
def rows_in_registers(monkeypatch):
    """The design of the tuner that reads each logit once, instead of what the table says."""
    config, (design,) = _tuning.config, DESIGNS["cross_entropy_row"]
    changed = lambda key, *args: config(key, *args) | (design if key.op == "cross_entropy_row" else {})  # noqa: E731
    monkeypatch.setattr(_tuning, "config", changed)


@every_option
@every_reduction
@every_dtype
def test_rule_with_rows_in_registers(dtype, reduction, options, device, rows_in_registers):
    x, weight, targets = make(5, 24, 67, dtype, device)
    targets[3] = -1
    check_rule((x, weight, targets), reduction=reduction, **options)


@pytest.mark.parametrize("V", [1, 8, 9, 63, 64, 129, 1000, 5003])
def test_every_target_of_rows_in_registers(V, device, rows_in_registers):
    """Widths at the borders of tiles; targets in each tile, none, and one that does not exist."""
    targets = torch.tensor([0, V // 2, V - 1, -1, V], device=device)
    logits = torch.randn(5, -(-V // 64) * 64, device=device).bfloat16()[:, :V]
    expected = logits.double().requires_grad_()
    loss = F.cross_entropy(expected[:3], targets[:3], reduction="none", label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), expected)
    losses, scale = torch.full((5,), float("nan"), device=device), torch.ones(1, device=device)
    with count_launches() as log:
        cross_entropy_(logits, targets, scale, losses, -100, 0.1, 0.0, True)
    assert [launch.name for launch in log] == ["_cross_entropy_row_kernel"]
    torch.testing.assert_close(losses[:3].double(), loss.detach(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(logits[:3].double(), gradient[:3], atol=2**-9 * gradient.abs().max().item(), rtol=2**-8)
    assert losses[3] == 0 and not logits[3].any() and losses[4].isnan() and logits[4].isnan().all()


@pytest.mark.parametrize("V", [1, 7, 64, 50257, 65536])
def test_tiles_of_a_row_cover_it(V):
    sizes = row_tiles(V, 8)
    assert all(size >= 8 and size & (size - 1) == 0 for size in sizes) and V <= sum(sizes) < V + max(24, V // 8)


def test_rows_in_registers_are_read_once(device, monkeypatch):
    """Counted with every access, also those that a cache would serve."""
    R, V = 3, 16 * 1000

    def accesses():
        with count_launches() as log:
            logits = torch.randn(R, V, device=device).half()
            cross_entropy_(logits, torch.arange(R, device=device), torch.ones(1), torch.empty(R), -100, 0.0, 0.0, True)
        return sum(log[0].lines.values()) / (R * V * 2)

    twice = accesses()
    config, (design,) = _tuning.config, DESIGNS["cross_entropy_row"]
    monkeypatch.setattr(
        _tuning, "config", lambda key, *a: config(key, *a) | (design if key.op == "cross_entropy_row" else {})
    )
    assert accesses() == pytest.approx(2, rel=0.01) and 2.6 < twice < 3.01
