"""Copies of a model for generation on a CPU, with weights in a layout whose products of few rows run at nearly memory
bandwidth. PyTorch's own product of one row with a (N, K) weight, as in decoding, reaches only a part of it.

    packed(model)           weights in oneDNN's layout, or bfloat16 ones in FBGEMM's; `generate` calls it by itself
    quantize_int8(model)    weights of 8 bits: other results, a quarter of float32's bytes
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2 import fbgemm, linear
from fastgpt2.gpt2.model import GPT, MLP, Block, CausalSelfAttention, Transformer, unwrap
from fastgpt2.gpt2.stock import is_stock, is_watched

CONTAINERS = (Transformer, nn.ModuleList, Block, CausalSelfAttention, MLP)  # `ops.linear` computes the layers inside
Fingerprint = tuple[int, int, bytes]
# Module name -> fingerprint of the weight, and the packed weight; None if the weight cannot be packed.
Packed = dict[str, tuple[Fingerprint, Any]]

_RANDOM = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=torch.Generator().manual_seed(0))

# Packing a weight takes as long as about ten products with it, so packed weights are kept as long as their model lives.
# Only for models in eval mode, because training changes the weights.
_KEPT: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether `packed` supports the model and is worth it: plain parameters of one dtype on a CPU, float32 if oneDNN is
    the faster one or bfloat16, and no hooks, because a hook would receive modules of the copy."""
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if any(is_watched(module) for module in model.modules()):
        return False
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes == {torch.bfloat16}:
        return _by_onednn(torch.bfloat16) or fbgemm.is_available()
    return dtypes == {torch.float32} and _by_onednn(torch.float32)


def _by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype.

    On an Intel Xeon with AMX its bfloat16 rows read 8 to 12 GB/s of 20; on one with AVX512-BF16 and no AMX 20, where
    FBGEMM's read 19.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return not torch.cpu._is_amx_tile_supported()
    return linear.ONEDNN_IS_FASTER and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(model: GPT) -> GPT:
    """A copy of `model` in eval mode whose linear layers have packed weights, which `ops.linear` computes with.

    The copy shares everything else with the model: other parameters, modules of other packages and attributes. The
    packed weights take as many bytes again. They do not follow changes of the model: call `packed` again after one.
    """
    before, kept = _KEPT.pop(model, {}), Packed()

    layers: dict[str, nn.Linear] = {}
    _copied(model, "", layers.setdefault)
    weights = {name: layer.weight.detach() for name, layer in layers.items() if _is_words(layer.weight)}
    weights = dict(sorted(weights.items(), key=lambda item: -item[1].nbytes))  # so that threads end together
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # PyTorch multiplies whole numbers in one thread
        fingerprints = dict(zip(weights, threads.map(_fingerprint, weights.values()), strict=True))

    def pack(name: str, layer: nn.Linear) -> nn.Module:
        if name not in weights:
            return layer
        if name not in before or before[name][0] != fingerprints[name]:
            before[name] = fingerprints[name], _pack(weights[name])
        kept[name] = before[name]
        return _with_packed(layer, kept[name][1])

    copied = _copied(model, "", pack)
    if not model.training:
        _KEPT[model] = kept
    return copied


def _pack(weight: Tensor) -> Any:
    if _by_onednn(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return fbgemm.pack_float16(weight)


def _with_packed(layer: nn.Linear, weight: Any) -> nn.Module:
    """A layer in eval mode that computes what `layer` computes, with its weight packed by `_pack`."""
    if weight is None:
        return layer
    if not isinstance(weight, Tensor):
        return fbgemm.Float16Linear(layer.weight, layer.bias, weight).eval()
    copied = copy.copy(layer)
    copied._parameters = dict[str, Any](layer._parameters, weight=weight)
    copied.training = False
    return copied


def quantize_int8(model: nn.Module) -> GPT:
    """A copy of `model` in eval mode for generation on a CPU, whose linear layers have weights of 8 bits.

    model: a GPT, also in a wrapper. The copy shares its embeddings and LayerNorms; the other weights do not follow its
    changes. The copy cannot be trained or saved. `fastgpt2 verify --model NAME --weights int8` says how far its logits
    are from the model's.
    Raises ValueError for a model that is not on a CPU, and for a linear layer that is changed (by LoRA, say) or has
    hooks; RuntimeError if PyTorch has no FBGEMM here.
    """
    model = unwrap(model)
    if model.device.type != "cpu":
        raise ValueError(f"model is on {model.device}, weights of 8 bits are for a CPU: call model.cpu() first")
    if not fbgemm.is_available():
        raise RuntimeError("weights of 8 bits need FBGEMM, which PyTorch has on x86-64 processors with AVX2 only")
    quantized = _copied(model, "", lambda name, layer: fbgemm.Int8Linear(layer).eval())
    for name, module in quantized.named_modules():
        if not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"model.{name} is no plain nn.Linear or has hooks, or what is around it has been replaced, and only "
                "plain layers are rounded to 8 bits: merge LoRA into them, remove hooks"
            )
    return quantized


def _copied(module: Any, name: str, replaced: Callable[[str, nn.Linear], nn.Module]) -> Any:
    """A copy in eval mode with `replaced(name, layer)` for each plain linear layer. It shares all else with the model:
    modules that call their linear layers themselves, too, whose layers are not replaced."""
    if is_stock(module, nn.Linear):
        return replaced(name, module)
    if not isinstance(module, GPT) and type(module) not in CONTAINERS:
        return module
    copied = copy.copy(module)
    copied._modules = {child: _copied(m, f"{name}.{child}", replaced) for child, m in module._modules.items()}
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
