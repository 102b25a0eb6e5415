"""The table of tuning numbers: which row a kernel gets."""

import pytest
import torch

from fastgpt2.kernels import _launch
from fastgpt2.kernels._attention_tiles import variant

row = _launch._row.__wrapped__  # as if asked for the first time


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(
        _launch, "TABLE", {"op": {"16": {"default": {"BLOCK": 64, "num_warps": 4}, 90: {"BLOCK": 128}}}}
    )
    before = {(3, 7): {("op", "16"): {80: {"BLOCK": 32}}}, (3, 9): {("op", "16"): {"default": {"num_warps": 8}}}}
    monkeypatch.setattr(_launch, "BEFORE_TRITON", before)


@pytest.mark.parametrize(
    "version, architecture, expected",
    [
        ((3, 9), 80, dict(BLOCK=64, num_warps=4)),
        ((3, 10), 90, dict(BLOCK=128)),
        ((3, 8), 80, dict(BLOCK=64, num_warps=8)),
        ((3, 4), 80, dict(BLOCK=32, num_warps=8)),
        ((3, 4), 86, dict(BLOCK=64, num_warps=8)),
    ],
)
def test_row_is_that_of_architecture_and_triton(table, monkeypatch, version, architecture, expected):
    monkeypatch.setattr(_launch, "TRITON_VERSION", version)
    assert row("op", "16", architecture) == expected | {"enable_fp_fusion": True}


def test_a_head_read_by_narrow_loads_has_the_rows_of_float32():
    names = [variant(dtype, D) for dtype, D in ((torch.bfloat16, 72), (torch.bfloat16, 65), (torch.float16, 20))]
    assert names == ["16x128", "32x128", "32x64"]
    assert [variant(dtype, 65) for dtype in (torch.float32, torch.float64)] == ["32x128", "64x128"]


def test_a_row_of_more_words_is_its_own_or_the_plain_one(table):
    _launch.TABLE["op"]["16 dropout"] = {"default": {"BLOCK": 16}}
    assert row("op", "16 dropout", 90)["BLOCK"] == 16 and row("op", "16 bounded", 90)["BLOCK"] == 128
    with pytest.raises(KeyError):
        row("op", "8 dropout", 90)


def test_replaced_rows_are_there_and_have_known_names():
    for replaced in _launch.BEFORE_TRITON.values():
        for (op, name), rows in replaced.items():
            for numbers in rows.values():
                assert numbers.keys() <= _launch.TABLE[op][name]["default"].keys()


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), 80), ((8, 9), 89), ((10, 0), 100), ((12, 0), 120), ((9, 4), "hip")]
)
def test_architecture_is_the_compute_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(_launch, "capability", lambda device: capability)
    assert _launch.architecture(torch.device("cpu")) == expected
