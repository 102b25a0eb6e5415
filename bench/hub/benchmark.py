"""`kernels benchmark REPOSITORY`: this package's kernels beside PyTorch's, at the sizes of GPT-2 124M."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

N, C = 8192, 768


class GELU(Benchmark):
    seed = 0

    def setup(self):
        self.x = torch.randn(N, 4 * C, device=self.device, dtype=torch.float16)

    def benchmark_gelu(self):
        self.out = self.kernel.gelu(self.x)

    def verify_gelu(self) -> torch.Tensor:
        return F.gelu(self.x, approximate="tanh")


class LayerNorm(Benchmark):
    seed = 0

    def setup(self):
        self.x = torch.randn(N, C, device=self.device, dtype=torch.float16)
        self.weight, self.bias = torch.randn(2, C, device=self.device, dtype=torch.float16)

    def benchmark_layer_norm(self):
        self.out = self.kernel.layer_norm(self.x, self.weight, self.bias, 1e-5)

    def verify_layer_norm(self) -> torch.Tensor:
        return F.layer_norm(self.x, (C,), self.weight, self.bias, 1e-5)


class Attention(Benchmark):
    seed = 0

    def setup(self):
        self.qkv = torch.randn(4, 1024, 3 * C, device=self.device, dtype=torch.float16)

    def benchmark_causal_attention(self):
        self.out = self.kernel.causal_attention(self.qkv, C // 64)

    def verify_causal_attention(self) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (C // 64, 64)).transpose(1, 2) for t in self.qkv.split(C, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
