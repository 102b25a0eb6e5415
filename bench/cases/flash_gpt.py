"""flash-attn's own GPT-2, `flash_attn/models/gpt.py`, with the flags that its authors train with.

Two of the flags need the extension `fused_dense_lib`, which is built from flash-attn's repository, and one needed
`dropout_layer_norm` in older versions. A flag whose extension is missing stays off, and the label says which are on.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastgpt2.bench.cases import peers
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.model import GPT

FLAGS = ("use_flash_attn", "fused_dropout_add_ln", "fused_bias_fc", "fused_mlp")
IGNORED_TARGET = -1


def why_not(device: torch.device) -> str | None:
    """Why this model cannot be built here; None where it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    if not peers.installed("flash_attn"):
        return "flash_attn is not installed"
    try:
        importlib.import_module("flash_attn.models.gpt")
    except Exception as error:  # a package built for another PyTorch or CUDA raises errors of any class
        return f"flash_attn.models.gpt cannot be imported: {peers.first_line(error)}"
    return None


def build(config: GPTConfig, weights: GPT) -> Any:
    """Its GPTLMHeadModel with our weights, in float32, with as many of the FLAGS as this installation has.

    Raises ImportError where it does not even have the first one.
    """
    from flash_attn.models.gpt import GPTLMHeadModel, remap_state_dict_hf_gpt2

    hf = weights.to_huggingface()
    hf_config = hf.config
    hf_config.residual_in_fp32 = True  # as it is in our model and HuggingFace's under autocast
    refused: ImportError | None = None
    for flags in (FLAGS, FLAGS[:2], FLAGS[:1]):
        for flag in FLAGS:
            setattr(hf_config, flag, flag in flags)
        try:
            model = GPTLMHeadModel(hf_config)
        except ImportError as error:
            refused = error
            continue
        # Its mapping drops HuggingFace's causal mask, which newer versions of transformers no longer save.
        masks = {f"h.{layer}.attn.bias": torch.empty(0) for layer in range(config.n_layer)}
        model.load_state_dict(remap_state_dict_hf_gpt2(masks | hf.transformer.state_dict(), hf_config))
        return model
    assert refused is not None
    raise refused


def label(model: Any) -> str:
    """Names the flags that are on in a live model."""
    active = [flag for flag in FLAGS if getattr(model.config, flag)]
    return "flash-attn's GPT, " + ("all four flags" if len(active) == len(FLAGS) else " ".join(active))


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Computed by flash-attn's own kernel, which overwrites the logits (B, T, V). targets: (B, T), -1 where none."""
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss(ignore_index=IGNORED_TARGET, inplace_backward=True)(logits.flatten(0, 1), targets.flatten())
