"""Training runs: 32 steps of AdamW by each toggle alone, all and none give the same losses, gradients and weights.

How far two right float32 runs may lie apart is measured, not felt: PyTorch's own float32 run is held against its
float64 run, step for step from the same weights. A run on Triton may lie FACTOR times as far from float64, and one
float32 rounding a step farther:

    distance(Triton, fp64) <= FACTOR * distance(torch fp32, fp64) + STEPS * 2^-24

distance is that of the worst tensor: largest difference over largest magnitude. The op's own rule allows twice eager's
error; over many steps errors add up in other ways than eager's, hence 4. Figures of one run, on a CPU:

                        losses    last gradients    last weights
    torch fp32          1.7e-7        2.0e-5           4.3e-5
    all on Triton       7.0e-7        2.4e-5           6.1e-5
    allowed             2.6e-6        8.3e-5           1.7e-4
    erf for tanh        5.4e-6        2.3e-4           2.7e-4      (GELU's other form, which the test must tell apart)
"""

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2 import GPT, GPTConfig, Kernels

CONFIG = GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=2, n_embd=32)
STEPS, B, T = 32, 1, 6
FACTOR = 4.0
# AdamW's epsilon: at its default, gradients that are 0 in exact arithmetic (those of the keys' biases, which softmax
# does not see) would move weights by as much as any other, in the direction of their rounding errors.
EPSILON = 1e-6


@functools.cache
def run(kernels: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """The losses of all steps, the gradients of the last and the weights after it, in float64."""
    torch.manual_seed(0)
    model = GPT(CONFIG, kernels=kernels).to(dtype)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
    for group in optimizer.param_groups:
        group["eps"] = EPSILON
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        start = torch.randint(CONFIG.vocab_size, (B, 1), generator=generator)
        text = (start + torch.arange(T + 1)) % CONFIG.vocab_size  # counting, from anywhere
        optimizer.zero_grad()
        loss = model(text[:, :-1], text[:, 1:])[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return {
        "losses": {"": torch.stack(losses)},
        "gradients": {name: p.grad.double() for name, p in model.named_parameters()},
        "weights": {name: p.detach().double() for name, p in model.named_parameters()},
    }


def distances(a: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """From the float64 run: of losses, gradients and weights, each that of the worst tensor."""
    truth = run("torch", torch.float64)

    def distance(kind: str) -> float:
        return max(float((a[kind][n] - t).abs().max() / t.abs().max()) for n, t in truth[kind].items())

    return {kind: distance(kind) for kind in truth}


def bounds() -> dict[str, float]:
    return {kind: FACTOR * spread + STEPS * 2.0**-24 for kind, spread in distances(run("torch")).items()}


@pytest.mark.parametrize("kernels", [*Kernels.names(), "triton"])
def test_training_on_triton_is_training_on_torch(kernels):
    allowed = bounds()
    for kind, found in distances(run(kernels)).items():
        assert found <= allowed[kind], f"{kind}: {found:.2g}, allowed {allowed[kind]:.2g}"


def test_the_model_learns():
    losses = run("torch")["losses"][""]
    assert losses[-4:].mean() < losses[:4].mean() - 1


def test_a_slightly_different_model_is_told_apart():
    """Everything right but for GELU's other form, which differs by 5e-4 at most."""
    gelu = F.gelu
    with mock.patch.object(F, "gelu", lambda x, approximate: gelu(x)):
        other = run.__wrapped__("torch")
    allowed = bounds()
    for kind, found in distances(other).items():
        assert found > allowed[kind], f"{kind}: {found:.2g}, allowed {allowed[kind]:.2g}"
