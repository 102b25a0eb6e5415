"""Accelerating a live GPT-2 of transformers in place, and restoring it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf.blocks import Block
from fastgpt2.gpt2.hf.models import LMHeadModel, Model
from fastgpt2.gpt2.hf.stand_in import Settings, StandIn, check_module, stand_in
from fastgpt2.gpt2.ops import Kernels


def accelerate(model: nn.Module, kernels: str | Kernels = "auto", training_logits: bool = True) -> nn.Module:
    """Makes every GPT-2 of transformers in `model` compute with this package's ops, in place, and returns `model`.

    model: a GPT2LMHeadModel, or any module that contains a GPT2Model (GPT2ForSequenceClassification, a peft model,
        DDP), before or after peft. Parameters, names, `model.config` and saved files stay transformers'.
    kernels: as for `GPT`. On a CPU "auto" means PyTorch's ops.
    training_logits: with False, a training step with labels returns a loss and no logits (`outputs.logits` is None) if
        Triton computes the loss; the head's output is then never computed. In eval mode, without labels (Trainer's
        label smoothing, `compute_loss_func`), in `generate` and with any other loss function, logits are always
        returned.

    A second call changes the arguments. Raises TypeError if `model` contains no GPT2Model.
    """
    settings = Settings(ops.requested_kernels(kernels, cudnn=False), bool(training_logits))
    check_module(model)
    kinds = _kinds()
    modules = [m for m in model.modules() if type(m) in kinds or isinstance(m, StandIn)]
    if not any(isinstance(m, Model) or kinds.get(type(m)) is Model for m in modules):
        raise TypeError(
            f"model is {type(model).__name__}, expected transformers' GPT2LMHeadModel or one with a GPT2Model"
        )
    module: Any
    for module in modules:
        if type(module) in kinds:
            module.__class__ = stand_in(type(module), kinds[type(module)])
        module._fastgpt2 = settings
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` and returns `model`. A model that was not accelerated stays unchanged.

    Raises TypeError if the class of an accelerated module was replaced since, as FSDP2 does.
    """
    check_module(model)
    modules = [m for m in model.modules() if isinstance(m, StandIn)]
    bases = [_base(m) for m in modules]
    module: Any
    for module, base in zip(modules, bases, strict=True):
        module.__dict__.pop("_fastgpt2", None)
        module.__class__ = base
    return model


def _base(module: StandIn) -> Any:
    kind: Any = type(module)
    ours, base = kind.__bases__ if len(kind.__bases__) == 2 else (None, None)
    if base is None or ours not in _kinds().values() or stand_in(base, ours) is not kind:
        raise TypeError(f"model has a {kind} over an accelerated module: restore it before such a wrapper is put on")
    return base


def _kinds() -> dict[Any, Any]:
    """transformers' classes, each with the class that computes in its place."""
    from transformers.models.gpt2 import modeling_gpt2 as theirs

    return {theirs.GPT2LMHeadModel: LMHeadModel, theirs.GPT2Model: Model, theirs.GPT2Block: Block}
