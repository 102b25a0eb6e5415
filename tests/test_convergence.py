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

At the end of the file, `model.residual = "bfloat16"` under autocast is held against "float32" on real text: how far it
shifts the held-out loss, beside how far that loss differs from seed to seed.
"""

import functools
import statistics
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2 import GPT, GPTConfig, Kernels
from fastgpt2.gpt2 import ops

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


# ------------------------------------------------------------------------------------- the residual stream in bfloat16

TEXT_CONFIG = GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
ROWS, RATE, WARM_UP, HELD_OUT = 8, 3e-3, 20, 40_000


@functools.cache
def python_sources() -> Tensor:
    """Bytes of the standard library's sources."""
    files = sorted(Path(statistics.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[:400_000]), dtype=torch.uint8).long()


def windows(text: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    T = TEXT_CONFIG.block_size
    found = text[torch.randint(len(text) - T, (rows, 1), generator=generator) + torch.arange(T + 1)]
    return found[:, :-1], found[:, 1:]


@functools.cache
def held_out_loss(residual: str, steps: int, seed: int) -> float:
    """After training under autocast to bf16. The seed decides the weights and the order of the text."""
    torch.manual_seed(seed)
    model = GPT(TEXT_CONFIG, kernels="torch")
    model.residual = residual
    optimizer = model.configure_optimizers(0.1, RATE, (0.9, 0.95), "cpu")
    generator, text = torch.Generator().manual_seed(seed), python_sources()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP, (steps - step) / steps * 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*windows(text[:-HELD_OUT], ROWS, generator))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(*windows(text[-HELD_OUT:], 256, torch.Generator().manual_seed(0)))[1].item()


def shift_and_noise(steps: int, seeds: int, loss=held_out_loss) -> tuple[float, float]:
    """How far a bf16 stream raises the held-out loss, the mean over seeds, and the standard deviation of the losses
    of fp32 streams over seeds, in nats a token."""
    plain = [held_out_loss("float32", steps, seed) for seed in range(seeds)]
    found = [loss("bfloat16", steps, seed) for seed in range(seeds)]
    print(f"{steps} steps, {seeds} seeds: fp32 {plain}, bf16 {found}")
    return statistics.mean(found) - statistics.mean(plain), statistics.stdev(plain)


@pytest.mark.parametrize(("steps", "seeds"), [(40, 3), pytest.param(300, 5, marks=pytest.mark.slow)])
def test_a_bfloat16_stream_shifts_the_loss_by_less_than_a_seed(steps, seeds):
    shift, noise = shift_and_noise(steps, seeds)
    print(f"shift {shift:.5f}, noise {noise:.5f}")
    assert shift <= noise / 2


@pytest.mark.slow
def test_a_coarser_stream_is_told_apart():
    """With two bits of mantissa in place of seven."""
    total = ops.total

    def coarse(stream):
        x = total(stream)
        return x + (x.to(torch.float8_e5m2).to(x.dtype) - x).detach()

    with mock.patch.object(ops, "total", coarse):
        shift, noise = shift_and_noise(300, 2, held_out_loss.__wrapped__)
    print(f"shift {shift:.5f}, noise {noise:.5f}")
    assert shift > noise / 2
