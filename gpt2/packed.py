"""Weights as oneDNN likes them: on a CPU, a product with few rows then reads them at nearly the memory's speed.

PyTorch's own product of one row and a (N, K) weight, as decoding has it, reaches a part of that.
"""

from __future__ import annotations

import copy
import weakref
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Fingerprint = tuple[int, int, int]

# Laying a weight out takes as long as some ten products with it, so it is kept while its model lives: a model that is
# in eval mode, because in training weights change. Module's name -> (fingerprint of the weight, the weight laid out).
_KEPT: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Fingerprint, Tensor]]] = weakref.WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether `packed` works here: plain float32 or bfloat16 parameters on a CPU for which oneDNN has products."""
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if not all(_is_words(weight) for weight in weights):
        return False
    dtypes = {p.dtype for p in model.parameters()}
    return dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(model: Model) -> Model:
    """A copy of `model` in eval mode, its linear layers laid out for products with few rows, which `ops.linear` takes.

    It shares all other parameters. The laid-out weights are as many bytes again, and follow no change of the model's:
    after one, ask again.
    """
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()
    kept = _KEPT.pop(model, {})
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            fingerprint = _fingerprint(weight)
            if name not in kept or kept[name][0] != fingerprint:
                kept[name] = fingerprint, torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            del module.weight
            module.weight = kept[name][1]
    if not model.training:
        _KEPT[model] = kept
    return twin


def _is_words(weight: Tensor) -> bool:
    """Whether the weight can be read as the 64-bit numbers of `_fingerprint`."""
    offset_bytes = weight.storage_offset() * weight.itemsize
    return weight.is_contiguous() and weight.nbytes % 8 == 0 and offset_bytes % 8 == 0


def _fingerprint(weight: Tensor) -> Fingerprint:
    """Tells a changed weight, also one that was changed through `.data`, which no version counts: where it is, its
    version, and the sum of its bits as 64-bit numbers, each row's times an odd number of its own. A CPU takes it at the
    memory's speed. What it does not see: `.data` of one row whose numbers have changed places."""
    version = 0 if weight.is_inference() else weight._version
    words = weight.view(-1).view(torch.int64)
    rows = words.view(weight.size(0) if words.numel() % weight.size(0) == 0 else 1, -1).sum(1)
    return weight.data_ptr(), version, int((rows * torch.arange(1, 2 * len(rows), 2)).sum())
