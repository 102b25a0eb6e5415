"""Other people's implementations of our ops, where they are installed; each takes the inputs of the op's case."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases import HEAD_SIZE

LAYER_NORM_EPS = 1e-5


def peers(op: str, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """-> (label -> function, label -> why it is left out) for one op on one device."""
    found: dict[str, Callable] = {}
    missing: dict[str, str] = {}
    for label, (package, makers) in PEERS.items():
        if op not in makers:
            continue
        if package == "torch" and not hasattr(F, "linear_cross_entropy"):
            missing[label] = f"PyTorch {torch.__version__} does not have it"
        elif importlib.util.find_spec(package) is None:
            missing[label] = f"{package} is not installed"
        elif package != "torch" and device.type != "cuda":
            missing[label] = "it needs a GPU"
        else:
            try:
                found[label] = makers[op]()
            except Exception as error:  # built for another PyTorch or CUDA, it fails in ways of its own
                missing[label] = f"{package} cannot be imported: {(str(error).splitlines() or [''])[0]}"
    return found, missing


def liger() -> dict[str, Callable]:
    """op -> Liger's function, {} where it is not installed. For counting and compiling, which need no GPU."""
    package, makers = PEERS["Liger"]
    return {op: make() for op, make in makers.items()} if importlib.util.find_spec(package) else {}


def heads(qkv: Tensor) -> Tensor:
    """Packed qkv (B, T, 3*C) -> (B, T, 3, H, D)."""
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, C3 // (3 * HEAD_SIZE), HEAD_SIZE)


def _liger_layer_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, w, b: liger_layer_norm(x, w, b, LAYER_NORM_EPS)


def _liger_linear_cross_entropy() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _flash_attention() -> Callable:
    from flash_attn import flash_attn_qkvpacked_func

    return lambda qkv: flash_attn_qkvpacked_func(heads(qkv), causal=True).flatten(2)


def _xformers_attention() -> Callable:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    return lambda qkv: memory_efficient_attention(*heads(qkv).unbind(2), attn_bias=LowerTriangularMask()).flatten(2)


def _torch_linear_cross_entropy() -> Callable:
    return lambda x, w, targets: F.linear_cross_entropy(x, w, targets)


# label -> (package, op -> what makes the function)
PEERS: dict[str, tuple[str, dict[str, Callable[[], Callable]]]] = {
    "Liger": (
        "liger_kernel",
        {"layer_norm": _liger_layer_norm, "linear_cross_entropy": _liger_linear_cross_entropy},
    ),
    "flash-attn": ("flash_attn", {"causal_attention": _flash_attention}),
    "xformers": ("xformers", {"causal_attention": _xformers_attention}),
    "F.linear_cross_entropy": ("torch", {"linear_cross_entropy": _torch_linear_cross_entropy}),
}
