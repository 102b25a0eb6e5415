"""Other libraries' implementations of our ops, where they are installed. Each takes the inputs of the op's case."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt2.bench.cases.case import HEAD_SIZE
from fastgpt2.kernels import _device

LAYER_NORM_EPS = 1e-5


class Peer(NamedTuple):
    """module: what is imported. package: its name on PyPI. makers: op -> what makes the function. capability: the least
    compute capability that a GPU must have; (0, 0) runs on CPUs too."""

    module: str
    package: str
    makers: dict[str, Callable[[], Callable]]
    capability: tuple[int, int] = (8, 0)


def peers(op: str, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """-> (label -> function, label -> why it is left out) for one op on one device."""
    found: dict[str, Callable] = {}
    missing: dict[str, str] = {}
    for label, peer in PEERS.items():
        if op not in peer.makers:
            continue
        if not installed(peer.module):
            missing[label] = f"{peer.module} is not installed"
        elif why := _not_for(device, peer.capability):
            missing[label] = why
        else:
            try:
                found[label] = peer.makers[op]()
            except NotImplementedError as error:
                missing[label] = first_line(error)
            except Exception as error:  # a package built for another PyTorch or CUDA raises errors of any class
                missing[label] = f"{peer.module} cannot be imported: {first_line(error)}"
    return found, missing


def version(label: str) -> str | None:
    """The installed version of a peer; None for other labels, and for a peer that was built in place."""
    if label not in PEERS:
        return None
    try:
        return metadata.version(PEERS[label].package)
    except metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether a module can be found. True for one whose import fails, so that its use says why."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # there is no such package
        return False
    except Exception:
        return True


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def liger() -> dict[str, Callable]:
    """op -> Liger's function; {} where Liger is not installed. To count and compile, which needs no GPU."""
    peer = PEERS["Liger"]
    return {op: make() for op, make in peer.makers.items()} if installed(peer.module) else {}


def heads(qkv: Tensor) -> Tensor:
    """Packed qkv (B, T, 3*C) -> (B, T, 3, H, D)."""
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, C3 // (3 * HEAD_SIZE), HEAD_SIZE)


def _not_for(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why a peer does not run on a device; None where it does."""
    if capability == (0, 0):
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU" if capability > (8, 0) else None
    has = _device.capability(device)
    if has < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {has[0]}.{has[1]}"
    return None


# ------------------------------------------------------------------------------------------------------ PyTorch's


def _sdpa(backend: SDPBackend) -> Callable[[], Callable]:
    """PyTorch's attention by the given backend; it raises an error where that backend does not support the inputs."""

    def make() -> Callable:
        def attend(qkv: Tensor) -> Tensor:
            q, k, v = heads(qkv).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        return attend

    return make


def _torch_linear_cross_entropy() -> Callable:
    """In chunks, as PyTorch's default options choose them; without options, the function computes all logits."""
    if not (hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")):
        raise NotImplementedError(f"PyTorch {torch.__version__} does not have it")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, targets: F.linear_cross_entropy(x, w, targets, options=options)


# ---------------------------------------------------------------------------------------------------------- Liger


def _liger_layer_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, w, b: liger_layer_norm(x, w, b, LAYER_NORM_EPS)


def _liger_linear_cross_entropy() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


# ------------------------------------------------------------------------------------------------------ flash-attn


def _flash_attention() -> Callable:
    from flash_attn import flash_attn_qkvpacked_func

    return lambda qkv: flash_attn_qkvpacked_func(heads(qkv), causal=True).flatten(2)


def _flash_attention_3() -> Callable:
    from flash_attn_interface import flash_attn_qkvpacked_func

    return lambda qkv: _first(flash_attn_qkvpacked_func(heads(qkv), causal=True)).flatten(2)


def _flash_attention_4() -> Callable:
    from flash_attn.cute import flash_attn_func

    return lambda qkv: _first(flash_attn_func(*heads(qkv).unbind(2), causal=True)).flatten(2)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the log-sum-exp too."""
    return output[0] if isinstance(output, tuple) else output


def _flash_layer_norm() -> Callable:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda x, w, b: layer_norm_fn(x, w, b, eps=LAYER_NORM_EPS)


def _flash_add_layer_norm() -> Callable:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        normed, stream = layer_norm_fn(x, w, b, residual=residual, eps=LAYER_NORM_EPS, prenorm=True)
        return stream, normed

    return add_layer_norm


def _flash_mlp() -> Callable:
    from flash_attn.ops.fused_dense import fused_mlp_func

    # As its own FusedMLP chooses: on Hopper, cuBLASLt's fused epilogue is slower.
    heuristic = -1 if torch.cuda.get_device_capability() == (9, 0) else 0
    return lambda x, w, b, v, c: fused_mlp_func(x, w, v, b, c, activation="gelu_approx", heuristic=heuristic)


# ---------------------------------------------------------------------------------------------------------- quack
# Its LayerNorm takes float32 weights only, and rmsnorm is no op of GPT-2's.


def _quack_linear_cross_entropy() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, targets: chunked_linear_cross_entropy(x, w, targets)


def _quack_mlp() -> Callable:
    from quack.mlp import mlp_func

    return lambda x, w, b, v, c: mlp_func(x, w, v, activation="gelu_tanh_approx", bias1=b, bias2=c)


# ------------------------------------------------------------------------------------------------------- xformers


def _xformers_attention() -> Callable:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    return lambda qkv: memory_efficient_attention(*heads(qkv).unbind(2), attn_bias=LowerTriangularMask()).flatten(2)


# ------------------------------------------------------------------------------------------------------------ all

PEERS: dict[str, Peer] = {
    "Liger": Peer(
        "liger_kernel",
        "liger-kernel",
        {"layer_norm": _liger_layer_norm, "linear_cross_entropy": _liger_linear_cross_entropy},
    ),
    "SDPA by cuDNN": Peer("torch", "torch", {"causal_attention": _sdpa(SDPBackend.CUDNN_ATTENTION)}),
    "SDPA by flash": Peer("torch", "torch", {"causal_attention": _sdpa(SDPBackend.FLASH_ATTENTION)}),
    "flash-attn": Peer(
        "flash_attn",
        "flash-attn",
        {
            "causal_attention": _flash_attention,
            "layer_norm": _flash_layer_norm,
            "add_layer_norm": _flash_add_layer_norm,
            "mlp": _flash_mlp,
        },
    ),
    "flash-attn 3": Peer(
        "flash_attn_interface", "flash-attn-3", {"causal_attention": _flash_attention_3}, capability=(9, 0)
    ),
    "flash-attn 4": Peer(
        "flash_attn.cute", "flash-attn-4", {"causal_attention": _flash_attention_4}, capability=(9, 0)
    ),
    "quack": Peer(
        "quack",
        "quack-kernels",
        {"linear_cross_entropy": _quack_linear_cross_entropy, "mlp": _quack_mlp},
        capability=(9, 0),
    ),
    "xformers": Peer("xformers", "xformers", {"causal_attention": _xformers_attention}),
    "F.linear_cross_entropy": Peer(
        "torch", "torch", {"linear_cross_entropy": _torch_linear_cross_entropy}, capability=(0, 0)
    ),
}
