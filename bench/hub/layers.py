"""Layers that HuggingFace's `kernels` puts in place of transformers': stateless, only `forward`, the same arguments.

GELU for `NewGELU` and `GeluTanh`, LayerNorm for nn.LayerNorm under the layer name "LayerNorm", and the MLP of their
GPT-2, whose Conv1D keeps weights as (in, out), under "GPT2MLP".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgpt2.kernels.gelu import gelu
from fastgpt2.kernels.layer_norm import layer_norm
from fastgpt2.kernels.mlp import mlp


class GELU(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class LayerNorm(nn.Module):
    can_torch_compile = True
    has_backward = True

    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)


class GPT2MLP(nn.Module):
    can_torch_compile = True
    has_backward = True

    c_fc: Any
    c_proj: Any
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        c_fc, c_proj = self.c_fc, self.c_proj
        return self.dropout(mlp(hidden_states, c_fc.weight.t(), c_fc.bias, c_proj.weight.t(), c_proj.bias))
