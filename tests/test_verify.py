"""`fastgpt2 verify`: green on what stands, red on a kernel that is wrong by little."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt2.bench.cases.registry import operations, sized_cases
from fastgpt2.bench.verify import error_rule, verify
from fastgpt2.bench.verify.kernel_errors import errors_of_case
from fastgpt2.gpt2 import ops


def small_case(op: str, dtype: torch.dtype):
    return next(case for case in sized_cases(9, 64, dtype, tokens=18, V=37) if case.op == op)


def off_by_one_percent(function):
    """The same result, and with it the same gradients, times 1.01."""

    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        return tuple(t * 1.01 for t in out) if isinstance(out, tuple) else out * 1.01

    return wrong


@pytest.fixture
def shown(monkeypatch) -> list[error_rule.Row]:
    """The rows that `main` shows."""
    rows: list[error_rule.Row] = []
    show = verify.show
    monkeypatch.setattr(verify, "show", lambda found, layers: (rows.extend(found), show(found)))
    return rows


def test_all_is_well(shown, capsys, device):
    assert verify.main(["--dtype", "float16", "--device", device.type]) == 0
    assert all(row.ok for row in shown)
    assert all(row.to_hf is not None and row.to_hf < 0.02 for row in shown), "HuggingFace's column is filled"
    assert {row.toggle for row in shown} == {*ops.Kernels.names(), "mlp=fused", "optimizer", "all"}
    assert {row.subject for row in shown} == {*operations(), "model"}
    printed = capsys.readouterr().out
    assert f"all {len(shown)} within" in printed
    assert "…" not in printed, "every name can be read"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", operations())
def test_every_registered_op_is_well(op, dtype, device):
    rows = list(errors_of_case(small_case(op, dtype), device, with_hf=True))
    assert all(row.ok and row.to_hf is not None for row in rows), rows
    inputs = small_case(op, dtype).inputs(device)
    assert len(rows) >= 1 + sum(t.requires_grad for t in inputs)


@pytest.mark.parametrize("op", operations())
def test_a_kernel_that_is_wrong_by_one_percent_is_named(op, device):
    case = small_case(op, torch.float32)
    wrong = dataclasses.replace(case, ours=off_by_one_percent(case.ours))
    rows = list(errors_of_case(wrong, device, with_hf=False))
    assert not any(row.ok for row in rows), rows


def test_a_wrong_kernel_is_an_exit_status_of_1(shown, capsys, monkeypatch, device):
    """The ops alone, without the model, so that it is quick."""
    monkeypatch.setattr(verify, "verify_model", lambda *args: iter(()))

    def with_a_wrong_one(*args, **kwargs):
        for case in sized_cases(*args, **kwargs):
            wrong = case.op == "token_position_embedding"
            yield dataclasses.replace(case, ours=off_by_one_percent(case.ours)) if wrong else case

    monkeypatch.setattr(verify, "sized_cases", with_a_wrong_one)
    assert verify.main(["--dtype", "float32", "--device", device.type]) == 1
    assert {row.subject for row in shown if not row.ok} == {"token_position_embedding"}
    assert f"3 of {len(shown)} above it" in capsys.readouterr().out


def test_a_wrong_kernel_shows_in_the_model(monkeypatch, device):
    """In the loss too, although that is held to less."""
    model = verify.random_model(verify.GPTConfig(block_size=9, vocab_size=37, n_layer=1, n_head=2, n_embd=32), device)
    monkeypatch.setattr(ops, "triton_add_layer_norm", off_by_one_percent(ops.triton_add_layer_norm))
    idx = torch.randint(37, (2, 10)).to(device)
    rows = list(verify.verify_model(model, idx, torch.float32, with_hf=False))
    wrong = {(row.toggle, row.result.split()[0]) for row in rows if not row.ok}
    assert wrong == {(toggle, result) for toggle in ("layer_norm", "all") for result in ("logits", "loss", "d")}


def test_not_a_number_is_no_agreement():
    def row(value: float) -> error_rule.Row:
        ours: Tensor = torch.tensor([1.0, value])
        return error_rule.compare("op", "toggle", "output", ours, torch.ones(2), None, torch.ones(2).double())

    assert row(1.0).ok
    assert not row(float("nan")).ok
    assert not row(float("inf")).ok


def test_the_ratio_is_to_eagers_error_and_says_where_that_is_rounding():
    def row(error: float, eager_error: float) -> error_rule.Row:
        truth = torch.ones(1, dtype=torch.float64)
        ours, eager = (truth + e for e in (error, eager_error))
        return error_rule.compare("op", "toggle", "output", ours.float(), eager.float(), None, truth)

    eps = torch.finfo(torch.float32).eps
    near = row(64 * eps, 10 * eps)
    assert near.ok and near.at_rounding and near.ratio == pytest.approx(6.4)
    assert near.allowed == pytest.approx(20 * eps + 84 * eps)
    far = row(3000 * eps, 1000 * eps)
    assert not far.ok and not far.at_rounding and far.ratio == pytest.approx(3.0)
    assert row(0.0, 0.0).ratio == 1.0 and row(eps, 0.0).ratio == float("inf")


def test_the_rule_is_stated_as_it_is_computed(capsys):
    for eps, eager_error in ((2**-10, 0.0), (2**-10, 1.0), (2**-23, 0.0), (2**-23, 3e-5)):
        dtype = torch.float16 if eps == 2**-10 else torch.float32
        one = torch.ones((), dtype=torch.float64)
        stated = max(2 * eager_error, eps / 2) + 1e-5
        found = error_rule.allowed_error(eager_error * one, one, dtype).item()
        assert found == pytest.approx(stated, rel=2e-3)
    page = " ".join((Path(__file__).parents[1] / "docs" / "verify.md").read_text().split())
    with pytest.raises(SystemExit):
        verify.main(["--help"])
    assert error_rule.RULE in page and error_rule.RULE in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--batch", "a.txt"], "--batch is a.txt, which is for --model"),
        (["--tokens", "8"], "--tokens is 8, which is for --model"),
    ],
)
def test_options_of_a_model_need_one(typed, said):
    with pytest.raises(ValueError, match=said):
        verify.main(typed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has bfloat16")
def test_bfloat16_needs_a_gpu():
    with pytest.raises(ValueError, match="--dtype is bfloat16, which Triton's interpreter does not have"):
        verify.main(["--dtype", "bfloat16"])


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="device is 'warp'"):
        verify.main(["--device", "warp"])
