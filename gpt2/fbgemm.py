"""Linear layers for generation on a CPU whose weights are float16 or int8. FBGEMM multiplies them, which PyTorch ships.

A token's time on a CPU is mostly that of reading the weights. PyTorch's own product of a few bfloat16 rows is far from
memory bandwidth without AVX-512, and its product with int8 weights (`_weight_int8pack_mm`) is no faster than that.
FBGEMM runs on x86-64 processors with AVX2.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 16  # with more rows oneDNN is the faster one, where it has the processor's own bfloat16 instructions
NOT_SAVED = "weights of 8 bits are neither saved nor loaded: save the model that they were made of, or load into it"
TINY = 1e-30  # so that nothing is divided by 0

# Activations are in -63..63. Where the processor has no VNNI, FBGEMM adds two products in 16 bits, which activations of
# 8 bits would overflow.
STEPS = 63
LOWER = torch.tensor([0.0, 2 * STEPS]).view(2, 1, 1)
REST = torch.tensor([1.0, -2 * STEPS]).view(2, 1, 1)


def is_available() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


@contextlib.contextmanager
def _engine() -> Iterator[None]:
    """Weights that are packed inside are FBGEMM's."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


# ------------------------------------------------------------------------------------------------- bfloat16 as float16


def pack_float16(weight: Tensor) -> torch.ScriptObject | None:
    """weight (N, K) bfloat16 -> the same values as float16 in FBGEMM's layout.

    None if float16 would change a weight by more than 2^-16 of the largest one, a 256th of bfloat16's own rounding.
    float16 has three more bits than bfloat16, but no numbers above 65504 and only multiples of 2^-24.
    """
    exact = weight.float()
    narrow = exact.half().float()
    if not ((narrow - exact).abs().max() <= exact.abs().max() * 2**-16):  # NaN and infinity are None too
        return None
    with _engine():
        return torch.ops.quantized.linear_prepack_fp16(exact, None)


class Float16Linear(nn.Module):
    """An `nn.Linear` of bfloat16 for inference. Products are of float32 activations, summed in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: torch.ScriptObject):
        """weight (N, K) and bias (N,): bfloat16, those of the layer. packed: what `pack_float16(weight)` returned."""
        super().__init__()
        self.layer = weight, bias  # in a tuple, so that they are not registered: they are the model's own parameters
        self.packed = packed
        self.many_by_onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        weight, bias = self.layer
        if self.many_by_onednn and x.numel() > MOST_ROWS * x.size(-1):
            return F.linear(x, weight, bias)
        y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return (y if bias is None else y + bias).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- int8


class Int8Linear(nn.Module):
    """An `nn.Linear` for inference with weights of 8 bits, one scale for each of the N rows, and activations of 14.

    FBGEMM's activations have 7 bits, too few for GPT-2's, some of which are far larger than the others. Each row of x
    is therefore given to it as two: the upper 7 bits and the 7 bits below. So the error is nearly that of the weights.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()  # (N, K)
        scales = (weight.abs().amax(1) / 127).clamp(min=TINY)
        # It is added to the products of both parts, the second of which count a 126th.
        bias = None if layer.bias is None else layer.bias.detach().float() * (2 * STEPS / (2 * STEPS + 1))
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with _engine(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # a later PyTorch may be without it
            quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        self.N = len(scales)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N). Raises ValueError if x is not on a CPU; a gradient raises RuntimeError."""
        if not x.is_cpu:
            raise ValueError(f"x is on {x.device}, weights of 8 bits are computed with on a CPU only")
        return _Int8Product.apply(x, self) if torch.is_grad_enabled() else self.product(x)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        raise RuntimeError(NOT_SAVED)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        raise RuntimeError(NOT_SAVED)

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).float()  # (n, K)
        n = rows.size(0)
        step = max(torch.linalg.vector_norm(rows, float("inf")).item(), TINY) / STEPS
        upper = torch.fake_quantize_per_tensor_affine(rows, step, 0, -STEPS, STEPS)
        both = torch.addcmul(rows * LOWER, upper, REST)  # (2, n, K): upper, and the rest of x, 126 times as large
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = multiply(both.view(2 * n, -1), step, STEPS + 1, self.packed)  # (2 n, N)
        return torch.add(y[:n], y[n:], alpha=1 / (2 * STEPS)).to(x.dtype).view(*x.shape[:-1], self.N)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        return layer.product(x)

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("weights of 8 bits have no gradient: train the model that they were made of")
