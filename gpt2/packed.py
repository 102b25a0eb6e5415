"""Weights as oneDNN likes them: on a CPU, a product with few rows then reads them at nearly the memory's speed.

PyTorch's own product of one row and a (N, K) weight, as decoding has it, reaches a part of that.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.model import GPT, MLP, Block, CausalSelfAttention, Transformer
from fastgpt2.gpt2.stock import is_stock, is_watched

CONTAINERS = (Transformer, nn.ModuleList, Block, CausalSelfAttention, MLP)  # whose linear layers `ops.linear` computes
Fingerprint = tuple[int, int, bytes]
Laid = dict[str, tuple[Fingerprint, Tensor]]  # a module's name -> of what, and the weight laid out

_RANDOM = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=torch.Generator().manual_seed(0))

# Laying a weight out takes as long as some ten products with it, so it is kept while its model lives: a model that is
# in eval mode, because in training weights change.
_KEPT: weakref.WeakKeyDictionary[nn.Module, Laid] = weakref.WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether `packed` works here: plain float32 or bfloat16 parameters on a CPU for which oneDNN has products, and no
    hooks, which would be given modules of the copy."""
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if any(is_watched(module) for module in model.modules()):
        return False
    dtypes = {p.dtype for p in model.parameters()}
    return dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(model: GPT) -> GPT:
    """A copy of `model` in eval mode, its linear layers laid out for products with few rows, which `ops.linear` takes.

    It shares all else: other parameters, modules that are not of this package, whatever hangs on a module. The laid-out
    weights are as many bytes again, and follow no change of the model's: after one, ask again.
    """
    before, kept = _KEPT.pop(model, {}), Laid()
    twin = _twin(model, "", before, kept)
    if not model.training:
        _KEPT[model] = kept
    return twin


def _twin(module: Any, name: str, before: Laid, kept: Laid) -> Any:
    if is_stock(module, nn.Linear) and _is_words(module.weight):
        weight = module.weight.detach()
        fingerprint = _fingerprint(weight)
        if name not in before or before[name][0] != fingerprint:
            before[name] = fingerprint, torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        kept[name] = before[name]
        twin = copy.copy(module)
        twin._parameters = dict[str, Any](module._parameters, weight=kept[name][1])
    elif isinstance(module, GPT) or type(module) in CONTAINERS:
        twin = copy.copy(module)
        twin._modules = {child: _twin(m, f"{name}.{child}", before, kept) for child, m in module._modules.items()}
    else:  # it calls what is inside, and PyTorch's linear layer takes no laid-out weight
        return module
    twin.training = False
    return twin


def _is_words(weight: Tensor) -> bool:
    """Whether the weight can be read as the 64-bit numbers of `_fingerprint`."""
    offset_bytes = weight.storage_offset() * weight.itemsize
    return weight.is_contiguous() and weight.nbytes > 8 and weight.nbytes % 8 == 0 and offset_bytes % 8 == 0


def _fingerprint(weight: Tensor) -> Fingerprint:
    """Tells a changed weight, also one that was changed through `.data`, which no version counts: where it is, its
    version, and a digest of its bits, which a CPU takes at a good part of the memory's speed.

    The digest is of products with random numbers modulo 2^64, of the weight as 64-bit words and again of words that
    begin in the middle of these. A change whose lowest bit is the p-th of its word goes unseen with a probability of
    2^(p-64), and in one of the two readings p is below 32. Universal hashing after Dietzfelbinger et al., 1997.
    """
    version = 0 if weight.is_inference() else weight._version
    data = weight.view(torch.uint8).view(-1).numpy()
    digest = hashlib.sha256()
    for start in (0, 4):
        words = torch.frombuffer(data, dtype=torch.int64, offset=start, count=(weight.nbytes - start) // 8)
        whole = len(words) // len(_RANDOM) * len(_RANDOM)
        digest.update((words[:whole].view(-1, len(_RANDOM)) @ _RANDOM).numpy().tobytes())
        digest.update(words[whole:].numpy().tobytes())
    return weight.data_ptr(), version, digest.digest()
