"""How one call of a model is computed: what every block receives beside the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastgpt2.gpt2.ops import Kernels, Stream

if TYPE_CHECKING:
    from fastgpt2.gpt2.cache import KVCache


class Context(NamedTuple):
    """How one call of the model is computed. Every block receives the same values, except for `layer`.

    mask: what `ops.document_mask` returned, if attention stays inside documents. layer: the block's index, from 0.
    dtype: what `residual.stream_dtype` returned, the residual stream's.
    """

    kernels: Kernels
    cache: KVCache | None = None
    mask: Tensor | None = None
    layer: int = 0
    dtype: torch.dtype | None = None

    def sum(
        self, x: Tensor, x_bias: Tensor | None = None, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> Stream:
        """The sum that a branch leaves open, in the stream's dtype: modules of other packages compute in others."""
        return Stream(x if self.dtype is None else x.to(self.dtype), x_bias, residual, dropout_p)
