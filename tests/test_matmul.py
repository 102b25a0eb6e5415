"""matmul_: 16-bit factors, fp32 result, by each of PyTorch's ways and by our own."""

import contextlib

import pytest
import torch
from numerics import compare

from fastgpt2.kernels import _device, _matmul


@contextlib.contextmanager
def widening_products_on_the_cpu():
    """aten::mm.dtype, mm.dtype_out and addmm.dtype_out as GPUs have them: calls are checked against the schemas."""

    def new_mm(a, b, out_dtype):
        assert a.dtype == b.dtype != out_dtype
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm(a, b, out_dtype, *, out):
        assert a.dtype != out_dtype == out.dtype
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert c.dtype == out_dtype == out.dtype and beta == alpha == 1
        return out.copy_(c + a.to(out_dtype) @ b.to(out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", new_mm, "CPU")
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield


@pytest.mark.parametrize("support", ["", "mm", "addmm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_product_in_fp32(support, dtype, device, monkeypatch):
    on_gpu = device.type == "cuda"
    if on_gpu and support == "addmm" != _device.mixed_matmul(device):
        pytest.skip("this PyTorch does not add products to fp32 matrices")
    monkeypatch.setattr(_device, "mixed_matmul", lambda device: support)
    monkeypatch.setattr(_matmul, "PIECE", 5)
    M, K, N = 13, 40, 7
    a = torch.randn(K, M + 3, device=device).to(dtype)[:, :M].t()  # as dlogits are
    b = torch.randn(K, N, device=device).to(dtype)
    if dtype == torch.bfloat16:
        b *= 2.0**20  # beyond float16
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(M + 2, N, dtype=wide, device=device)[1:-1]  # NaN
    with contextlib.nullcontext() if on_gpu else widening_products_on_the_cpu():
        _matmul.matmul_(out, a, b, add=False)
        once = out.clone()
        _matmul.matmul_(out, a, b, add=True)
    truth = a.double() @ b.double()
    for times, result in ((1, once), (2, out)):
        compare(result, times * (a.to(wide) @ b.to(wide)), times * truth)


def test_what_stands_in_is_one_operator(device):
    if _device.mixed_matmul(device):
        pytest.skip("PyTorch has the product")
    a, b, out = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.empty(3, 5)
    with torch.profiler.profile() as profile:
        _matmul.matmul_(out, a, b, add=False)
    assert "fastgpt2::upcast_matmul" in {event.key for event in profile.key_averages()}
