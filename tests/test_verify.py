"""`fastgpt2 verify`: green on what stands, red on a kernel that is wrong by little."""

import pytest
import torch
from torch import Tensor

from fastgpt2.gpt2 import comparison, ops, verify, verify_ops

OPS = verify_ops.op_cases(2, 9, 32, 2, 37, torch.device("cpu"))


def off_by_one_percent(function):
    """The same result, and with it the same gradients, times 1.01."""

    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        return tuple(t * 1.01 for t in out) if isinstance(out, tuple) else out * 1.01

    return wrong


@pytest.fixture
def shown(monkeypatch) -> list[comparison.Row]:
    """The rows that `main` shows."""
    rows: list[comparison.Row] = []
    show = verify.show
    monkeypatch.setattr(verify, "show", lambda found: (rows.extend(found), show(found)))
    return rows


def test_all_is_well(shown, capsys, device):
    assert verify.main(["--dtype", "float16", "--device", device.type]) == 0
    assert all(row.ok for row in shown)
    assert all(row.to_hf is not None and row.to_hf < 0.02 for row in shown), "HuggingFace's column is filled"
    assert {row.toggle for row in shown} == {*ops.Kernels.names(), "all"}
    printed = capsys.readouterr().out
    assert f"all {len(shown)} within 2" in printed
    assert "…" not in printed, "every name can be read"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_is_well(op, dtype):
    rows = list(verify_ops.verify_op(op, dtype, with_hf=True))
    assert all(row.ok for row in rows), rows
    assert len(rows) >= 1 + len(op.inputs) * op.gradients


KERNELS = {
    "attention": "triton_causal_attention",
    "decode attention": "triton_decode_attention",
    "LayerNorm": "triton_layer_norm",
    "add + LayerNorm": "triton_add_layer_norm",
    "MLP with GELU": "triton_mlp",
    "head + cross-entropy": "triton_linear_cross_entropy",
    "embedding": "triton_embedding",
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_kernel_that_is_wrong_by_one_percent_is_named(op, monkeypatch):
    name = KERNELS[op.name]
    monkeypatch.setattr(ops, name, off_by_one_percent(getattr(ops, name)))
    rows = list(verify_ops.verify_op(op, torch.float32, with_hf=False))
    assert not any(row.ok for row in rows), rows


def test_a_wrong_kernel_is_an_exit_status_of_1(shown, capsys, monkeypatch, device):
    """The ops alone, without the model, so that it is quick."""
    monkeypatch.setattr(verify, "verify_model", lambda *args: iter(()))
    monkeypatch.setattr(ops, "triton_embedding", off_by_one_percent(ops.triton_embedding))
    assert verify.main(["--dtype", "float32", "--device", device.type]) == 1
    assert {row.subject for row in shown if not row.ok} == {"embedding"}
    assert f"3 of {len(shown)} above 2" in capsys.readouterr().out


def test_a_wrong_kernel_shows_in_the_model(monkeypatch, device):
    """In the loss too, although that is held to less."""
    model = verify.random_model(verify.GPTConfig(block_size=9, vocab_size=37, n_layer=1, n_head=2, n_embd=32), device)
    monkeypatch.setattr(ops, "triton_add_layer_norm", off_by_one_percent(ops.triton_add_layer_norm))
    idx = torch.randint(37, (2, 10)).to(device)
    rows = list(verify.verify_model(model, idx, torch.float32, with_hf=False))
    wrong = {(row.toggle, row.result.split()[0]) for row in rows if not row.ok}
    assert wrong == {(toggle, result) for toggle in ("layer_norm", "all") for result in ("logits", "loss", "d")}


def test_not_a_number_is_no_agreement():
    def row(value: float) -> comparison.Row:
        ours: Tensor = torch.tensor([1.0, value])
        return comparison.compare("op", "toggle", "output", ours, torch.ones(2), None, torch.ones(2).double())

    assert row(1.0).ok
    assert not row(float("nan")).ok
    assert not row(float("inf")).ok


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="device is 'warp'"):
        verify.main(["--device", "warp"])
