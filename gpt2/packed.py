"""Weights packed in oneDNN's own layout, with which a product of few rows on a CPU runs at nearly memory bandwidth.

PyTorch's product of one row with a (N, K) weight, as in decoding, reaches only a part of the bandwidth.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2 import linear
from fastgpt2.gpt2.model import GPT, MLP, Block, CausalSelfAttention, Transformer
from fastgpt2.gpt2.stock import is_stock, is_watched

CONTAINERS = (Transformer, nn.ModuleList, Block, CausalSelfAttention, MLP)  # `ops.linear` computes the layers inside
Fingerprint = tuple[int, int, bytes]
Packed = dict[str, tuple[Fingerprint, Tensor]]  # module name -> fingerprint of the weight, and the packed weight

_RANDOM = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=torch.Generator().manual_seed(0))

# Packing a weight takes as long as about ten products with it, so packed weights are kept as long as their model lives.
# Only for models in eval mode, because training changes the weights.
_KEPT: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether `packed` supports the model and is worth it: plain parameters on a CPU, in bfloat16 if oneDNN has it or
    in float32 if oneDNN is the faster one, and no hooks, because a hook would receive modules of the copy."""
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if any(is_watched(module) for module in model.modules()):
        return False
    dtypes = {p.dtype for p in model.parameters()}
    return (dtypes == {torch.float32} and linear.ONEDNN_IS_FASTER) or (
        dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def packed(model: GPT) -> GPT:
    """A copy of `model` in eval mode whose linear layers have packed weights, which `ops.linear` computes with.

    The copy shares everything else with the model: other parameters, modules of other packages and attributes. The
    packed weights take as many bytes again. They do not follow changes of the model: call `packed` again after one.
    """
    before, kept = _KEPT.pop(model, {}), Packed()
    copied = _packed_copy(model, "", before, kept)
    if not model.training:
        _KEPT[model] = kept
    return copied


def _packed_copy(module: Any, name: str, before: Packed, kept: Packed) -> Any:
    if is_stock(module, nn.Linear) and _is_words(module.weight):
        weight = module.weight.detach()
        fingerprint = _fingerprint(weight)
        if name not in before or before[name][0] != fingerprint:
            before[name] = fingerprint, torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        kept[name] = before[name]
        copied = copy.copy(module)
        copied._parameters = dict[str, Any](module._parameters, weight=kept[name][1])
    elif isinstance(module, GPT) or type(module) in CONTAINERS:
        copied = copy.copy(module)
        children = module._modules.items()
        copied._modules = {child: _packed_copy(m, f"{name}.{child}", before, kept) for child, m in children}
    else:  # such a module calls its linear layers itself, and nn.Linear does not take a packed weight
        return module
    copied.training = False
    return copied


def _is_words(weight: Tensor) -> bool:
    """Whether the weight can be read as the 64-bit words that `_fingerprint` multiplies."""
    offset_bytes = weight.storage_offset() * weight.itemsize
    return weight.is_contiguous() and weight.nbytes > 8 and weight.nbytes % 8 == 0 and offset_bytes % 8 == 0


def _fingerprint(weight: Tensor) -> Fingerprint:
    """The weight's address, version and a digest of its bits. The digest detects changes through `.data` too, which the
    version does not count, and a CPU computes it at a good part of its memory bandwidth.

    The digest hashes products modulo 2^64 of random numbers with the weight, read as 64-bit words twice: from its start
    and from the middle of the first word. A change whose lowest changed bit is bit p of its word is missed with
    probability 2^(p-64), and in one of the two readings p is below 32.
    Source: universal hashing, Dietzfelbinger et al. 1997.
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
