"""Column sums of partial sums: more of them than one block, odd widths, one to three at a time."""

import pytest
import torch
from interpreter import red_zones

from fastgpt2.kernels._column_sum import column_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("K, P, C", [(1, 1, 1), (1, 33, 64), (2, 100, 65), (3, 64, 130), (0, 4, 7)])
def test_sums(K, P, C, dtype, device):
    partials = torch.randn(K, P, C, dtype=dtype, device=device)
    dtypes = [torch.float64, torch.float32, torch.bfloat16][3 - K :]
    sums = column_sum(partials, dtypes)
    assert [s.dtype for s in sums] == dtypes
    for ours, partial, out_dtype in zip(sums, partials, dtypes, strict=True):
        eps = max(torch.finfo(out_dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(ours.double(), partial.double().sum(0), rtol=eps, atol=P * eps)


def test_only_its_own_memory_is_touched(device):
    with red_zones() as zone:
        sums = column_sum(zone(torch.ones(3, 5, 7, device=device)), [torch.float32] * 3)
    assert all(s.tolist() == [5.0] * 7 for s in sums)


def test_the_order_of_the_additions_is_fixed(device):
    partials = torch.randn(2, 90, 40, device=device)
    first, second = (column_sum(partials, [torch.float32] * 2) for _ in range(2))
    assert all(map(torch.equal, first, second))
