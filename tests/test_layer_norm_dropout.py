"""Dropout inside add_layer_norm: its mask, drawn again in backward, is a function of the seed and the place."""

import numpy as np
import pytest
import torch
from numerics import check

from fastgpt2.kernels.layer_norm import add_layer_norm, add_layer_norm_reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 127, 129, 768, 1024, 1280, 1600)
GPT2_WIDTHS = (768, 1024, 1280, 1600)
EPS = 1e-5


def materialised_mask(seed: int, N: int, C: int, p: float) -> torch.Tensor:
    """Philox-4x32-10 at (seed, row * C + column), written out: the first word over 2^31, kept where >= p."""
    counter = np.zeros((4, N * C), np.uint64)
    counter[0] = np.arange(N * C, dtype=np.uint64)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = np.stack([(b >> 32) ^ counter[1] ^ k0, b & low, (a >> 32) ^ counter[3] ^ k1, a & low])
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    word = counter[0].astype(np.uint32).view(np.int32)
    word = np.where(word < 0, -word - 1, word)
    return torch.from_numpy(word.astype(np.float32) * np.float32(4.6566127342e-10) >= p).view(N, C)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("C", [129, 768])
def test_dropout_is_the_materialised_mask(C, p, device):
    """Forward and both gradients; the same mask is drawn again in backward."""
    N, seed = 11, 0x1234567890ABCDE
    keep = materialised_mask(seed, N, C, p).to(device)
    assert 0 < keep.double().mean() < 1
    x, residual = torch.randn(2, N, C, device=device)
    check(
        lambda x, r, w, b, x_bias: add_layer_norm(
            x, r, w, b, x_bias=x_bias, dropout_p=p, seed=torch.tensor([seed], device=device)
        ),
        lambda x, r, w, b, x_bias: add_layer_norm_reference(
            x, r, w, b, x_bias=x_bias, dropout_p=p, keep=keep.to(x.dtype)
        ),
        x, residual, *torch.randn(3, C, device=device),
    )  # fmt: skip


def test_dropout_share_and_seeds(device):
    x, residual = torch.ones(20, 768, device=device), torch.zeros(20, 768, device=device)
    w = torch.ones(768, device=device)

    def kept(seed):
        return add_layer_norm(x, residual, w, dropout_p=0.25, seed=seed)[0] != 0

    first, second = kept(torch.tensor(1, device=device)), kept(torch.tensor(2, device=device))
    for mask in (first, second):
        assert abs(mask.float().mean() - 0.75) < 4 * (0.25 * 0.75 / mask.numel()) ** 0.5
        assert mask.any(1).all() and len(mask.unique(dim=0)) == 20, "rows repeat"
    assert abs((first == second).float().mean() - 0.625) < 0.02, "masks of two seeds are related"
    torch.manual_seed(5)
    drawn = kept(None)
    assert not torch.equal(drawn, kept(None)), "two calls without a seed drop the same elements"
    torch.manual_seed(5)
    assert torch.equal(drawn, kept(None)), "torch.manual_seed does not decide"


def test_dropout_zero_needs_no_seed(device):
    x, residual = torch.randn(2, 3, 16, device=device)
    w = torch.ones(16, device=device)
    state = torch.get_rng_state()
    plain = add_layer_norm(x, residual, w)
    assert all(map(torch.equal, plain, add_layer_norm(x, residual, w, seed=torch.tensor(3, device=device))))
    assert torch.equal(state, torch.get_rng_state())
