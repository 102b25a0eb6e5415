"""One block's budget, forward and backward, all kernels on: launches, bytes, memory kept, and no wait for the device;
and that of a whole step under autocast, with the update of the block's parameters by TritonAdamW.

The block is the difference between two models of which one has a block more, so that embedding, head and loss cancel.
Budgets are stated for GPT-2's block at B=8, T=256, C=768, in bytes per element of (B, T, C), the traffic of matrix
products left out. The default run has the same B*T / C, and with it the same share of the weights (which autocast
casts) at a twelfth of the width; what does not scale weighs more there, so that it bounds the full size.
"""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
import triton

from fastgpt2 import GPT, GPTConfig, Kernels
from fastgpt2.bench.audit.dispatch import Traffic, count_traffic
from fastgpt2.bench.cases.ops.layer_norm import folded
from fastgpt2.gpt2 import inputs
from fastgpt2.kernels import _device

FULL = ((8, 256, 768), (3, 2), "triton")  # (B, T, C), layers, kernels
NARROW = ((3, 57, 64), (2, 1), "attention,layer_norm,mlp")  # head and embedding, which cancel, on PyTorch: quicker
SIZES = [pytest.param(NARROW, id="narrow"), pytest.param(FULL, id="full", marks=pytest.mark.slow)]
HEAD_SIZE, VOCAB = 64, 64
A100_SMS = 108  # the number of programs, and so the bytes of partial sums, depend on it

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="bytes are counted by the interpreter")


@pytest.fixture(autouse=True)
def memory_is_not_poisoned():
    """Filling fresh memory would be counted."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def step_traffic(size: tuple[int, int, int], layers: int, kernels: str, autocast: bool) -> Traffic:
    """Traffic of one forward and backward of a bf16 model, or of an fp32 one under autocast to bf16."""
    B, T, C = size
    config = GPTConfig(block_size=T, vocab_size=VOCAB, n_layer=layers, n_head=C // HEAD_SIZE, n_embd=C)
    model = GPT(config, kernels=kernels)
    model = model if autocast else model.bfloat16()
    idx, targets = torch.randint(VOCAB, (2, B, T))
    # Without a GPU tokens are checked on the spot.
    with mock.patch.object(inputs, "check_tokens"), mock.patch.object(_device, "sm_count", lambda device: A100_SMS):
        with count_traffic(model.parameters()) as traffic:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(idx, targets)[1]
            loss.backward()
    return traffic


def whole_step_traffic(size: tuple[int, int, int], layers: int, kernels: Kernels, residual: str) -> Traffic:
    """Traffic of a step under autocast to bf16 with TritonAdamW, clipping included, from the second step on."""
    B, T, C = size
    model = GPT(GPTConfig(T, VOCAB, layers, C // HEAD_SIZE, C), kernels=kernels)
    model.residual = residual
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", optimizer="triton", max_norm=1.0)
    idx, targets = torch.randint(VOCAB, (2, B, T))
    with mock.patch.object(inputs, "check_tokens"), mock.patch.object(_device, "sm_count", lambda device: A100_SMS):
        with torch.autocast("cpu", torch.bfloat16):
            model(idx, targets)  # makes the copies of weights that later passes read
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes moments and tables
        optimizer.zero_grad()
        with count_traffic(model.parameters()) as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(idx, targets)[1]
            loss.backward()
            optimizer.step()
    return traffic


def block_traffic(sizes, autocast: bool) -> tuple[Traffic, int]:
    """What one block does, and its elements (B * T * C)."""
    (B, T, C), layers, kernels = sizes
    more, less = (step_traffic((B, T, C), n, kernels, autocast) for n in layers)
    return more - less, B * T * C


@pytest.mark.parametrize("sizes", SIZES)
def test_block_in_bfloat16(sizes):
    block, elements = block_traffic(sizes, autocast=False)
    assert block.launches <= 25, f"\n{block}"
    assert block.bytes / elements <= 130, f"\n{block}"
    assert block.kept_bytes / elements <= 26, f"\n{block}"


@pytest.mark.parametrize("sizes", SIZES)
def test_block_under_autocast(sizes):
    block, elements = block_traffic(sizes, autocast=True)
    assert block.bytes / elements <= 160.5, f"\n{block}"


@pytest.mark.parametrize(
    ("sizes", "residual", "mlp", "allowed", "launches"),  # mlp: "fused, folded" with LayerNorm's backward in one launch
    [
        pytest.param(NARROW, "bfloat16", "triton", 109.5, 25, id="narrow-bfloat16"),
        pytest.param(NARROW, "bfloat16", "fused", 85.5, 23, id="narrow-bfloat16-fused"),
        pytest.param(NARROW, "bfloat16", "fused, folded", 85.5, 21, id="narrow-bfloat16-folded"),
        pytest.param(NARROW, "float32", "triton", 133.5, 25, id="narrow-float32", marks=pytest.mark.slow),
        pytest.param(NARROW, "float32", "fused", 109.5, 23, id="narrow-float32-fused", marks=pytest.mark.slow),
        pytest.param(FULL, "bfloat16", "triton", 109.5, 25, id="full-bfloat16", marks=pytest.mark.slow),
        pytest.param(FULL, "bfloat16", "fused", 85.5, 23, id="full-bfloat16-fused", marks=pytest.mark.slow),
        pytest.param(FULL, "bfloat16", "fused, folded", 85.5, 21, id="full-bfloat16-folded", marks=pytest.mark.slow),
        pytest.param(FULL, "float32", "triton", 133.5, 25, id="full-float32", marks=pytest.mark.slow),
    ],
)
def test_block_in_a_whole_step(sizes, residual, mlp, allowed, launches):
    """No weight is cast, and no gradient converted or summed in a pass of its own: the products write those of weights
    in fp32, kernels sum those of biases. Exact clipping reads fp32 gradients twice, so AdamW moves 32 bytes a
    parameter, and 34 with the copies that it writes."""
    (B, T, C), layers, kernels = sizes
    mlp, _, one_launch = mlp.partition(", ")
    kernels = dataclasses.replace(Kernels.parse(kernels), mlp=mlp)
    with folded(torch.device("cpu")) if one_launch else contextlib.nullcontext():
        more, less = (whole_step_traffic((B, T, C), n, kernels, residual) for n in layers)
    block, elements = more - less, B * T * C
    if mlp == "fused":  # two products and GELU in one launch each: what the products alone read and write
        block.moved["_gelu_product_kernel"] -= 2 * 2 * (5 * elements + 4 * C * C)
    update = sum(n for name, n in block.moved.items() if name.startswith("_adamw"))
    parameters = sum(p.numel() for p in GPT(GPTConfig(T, VOCAB, 1, C // HEAD_SIZE, C)).transformer.h.parameters())
    assert update / parameters <= 34.1, f"\n{block}"
    assert (block.bytes - update) / elements <= allowed, f"\n{block}"
    assert block.calls["_to_copy"] == block.calls["copy_"] == block.calls["sum"] == 0, f"\n{block}"
    assert block.launches <= launches and block.syncs == 0, f"\n{block}"


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_a_step_does_not_wait_for_the_device(autocast):
    step = step_traffic((2, 5, 64), 1, "triton", autocast)
    assert step.syncs == 0, f"\n{step}"


def test_a_wait_for_the_device_is_seen():
    with count_traffic() as traffic:
        torch.ones(3).sum().item()
    assert traffic.syncs == 1


def test_operators_and_kept_tensors_are_counted():
    """Against figures made by hand: 4 B an element, y = (x W + b) * x, broadcast b read once."""
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    with count_traffic([w, b]) as traffic:
        y = (x @ w + b) * x
    assert traffic.launches == 3
    assert traffic.matmul_bytes == 4 * (32 + 16 + 32)
    assert traffic.bytes == 4 * (32 + 4 + 32) + 4 * (32 + 32 + 32)
    assert traffic.kept_bytes == 4 * 32  # x, for both gradients
    assert y.requires_grad


def test_a_product_that_fills_its_output_is_counted():
    """Our own, which returns nothing, as PyTorch's: 2 bytes an element of the factors, 4 of the result."""
    a, b, out = torch.ones(3, 4).bfloat16(), torch.ones(4, 5).bfloat16(), torch.empty(3, 5)
    with count_traffic() as traffic:
        torch.ops.fastgpt2.upcast_matmul(a, b, out=out)
    assert (traffic.launches, traffic.bytes, traffic.matmul_bytes) == (1, 0, 2 * 12 + 2 * 20 + 4 * 15)


def test_pytorch_alone_is_over_budget():
    """The budgets bite: eager PyTorch keeps activations twice and moves the residual add and LayerNorm apart."""
    block, elements = block_traffic((NARROW[0], (2, 1), "torch"), autocast=False)
    assert block.launches > 25, f"\n{block}"
    assert block.bytes / elements > 130, f"\n{block}"
    assert block.kept_bytes / elements > 26, f"\n{block}"
