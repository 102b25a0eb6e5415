"""The table of tuning numbers: which row a kernel gets."""

import pytest
import torch

from fastgpt2.kernels import _device, _tuning
from fastgpt2.kernels._attention_tiles import tuning_key
from fastgpt2.kernels._configurations import AttentionDelta, Elementwise, Key

PLAIN, DROPOUT = Key("op", bits=16), Key("op", bits=16, dropout=True)


def blocks(rows: int, num_warps: int) -> Elementwise:
    return Elementwise(ROWS=rows, BLOCK_C=256, num_warps=num_warps)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(_tuning, "TABLE", {PLAIN: {"any": blocks(64, 4), 90: blocks(128, 4)}})
    before = {(3, 7): {PLAIN: {80: blocks(32, 8)}}, (3, 9): {PLAIN: {80: blocks(16, 2), 86: blocks(64, 8)}}}
    monkeypatch.setattr(_tuning, "BEFORE_TRITON", before)


@pytest.mark.parametrize(
    "version, architecture, expected",
    [
        ((3, 9), 80, blocks(64, 4)),
        ((3, 10), 90, blocks(128, 4)),
        ((3, 8), 80, blocks(16, 2)),
        ((3, 4), 80, blocks(32, 8)),
        ((3, 4), 86, blocks(64, 8)),
        ((3, 4), 90, blocks(128, 4)),
    ],
)
def test_row_is_that_of_architecture_and_triton(table, monkeypatch, version, architecture, expected):
    monkeypatch.setattr(_device, "TRITON_VERSION", version)
    assert _tuning.row(PLAIN, architecture) == expected


def test_a_row_becomes_arguments_by_name(table, monkeypatch):
    monkeypatch.setattr(_device, "capability", lambda device: (9, 0))
    expected = dict(ROWS=128, BLOCK_C=256, num_warps=4, enable_fp_fusion=True)
    assert _tuning.config(PLAIN, torch.device("cpu")) == expected


def test_a_head_read_by_narrow_loads_has_the_rows_of_float32():
    keys = [
        tuning_key("op", dtype, D) for dtype, D in ((torch.bfloat16, 72), (torch.bfloat16, 65), (torch.float16, 20))
    ]
    assert [(key.bits, key.head_size) for key in keys] == [(16, 128), (32, 128), (32, 64)]
    keys = [tuning_key("op", dtype, 65) for dtype in (torch.float32, torch.float64)]
    assert [(key.bits, key.head_size) for key in keys] == [(32, 128), (64, 128)]


def test_bounds_and_dropout_have_a_row_of_their_own_or_the_plain_one(table):
    _tuning.TABLE[DROPOUT] = {"any": blocks(16, 4)}
    assert _tuning.row(DROPOUT, 90).ROWS == 16 and _tuning.row(PLAIN._replace(bounded=True), 90).ROWS == 128
    assert tuning_key("op", torch.float16, 64, bounded=True, dropout=True) == Key(
        "op", bits=16, head_size=64, dropout=True
    )
    with pytest.raises(KeyError, match="no row for op bits=8 dropout=True on 90"):
        _tuning.row(Key("op", bits=8, dropout=True), 90)


@pytest.mark.parametrize("table", [_tuning.TABLE, *_tuning.BEFORE_TRITON.values()])
def test_an_op_has_configurations_of_one_type_and_older_rows_replace_some(table):
    kinds: dict[str, type] = {}
    for key, rows in (*_tuning.TABLE.items(), *table.items()):
        assert key in _tuning.TABLE
        for row in rows.values():
            assert type(row) is kinds.setdefault(key.op, type(row)), key
    assert kinds["attention_delta"] is AttentionDelta
    assert all("any" in rows for rows in _tuning.TABLE.values())


def test_older_versions_come_first():
    assert list(_tuning.BEFORE_TRITON) == sorted(_tuning.BEFORE_TRITON)
