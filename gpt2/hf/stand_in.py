"""Replacing the class of a live transformers module by a subclass, which can be undone.

The module remains the same object with its parameters, buffers, hooks and names. Its new class is a subclass of the old
one that computes with `compute`. It has transformers' class name, because Trainer, `save_pretrained` and others use it.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from fastgpt2.gpt2.ops import Kernels
from fastgpt2.gpt2.stock import is_watched, stock

CAPTURES = "transformers.utils.output_capturing"  # the module of those hooks


@dataclass(frozen=True)
class Settings:
    """The arguments of `hf.accelerate`."""

    kernels: str | Kernels
    training_logits: bool


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, expected a live model of transformers")


class Theirs(NamedTuple):
    """The classes of transformers that this package can compute without calling them."""

    Attention: type
    MLP: type
    Conv1D: type
    Gelu: type


class StandIn(nn.Module):
    """The base of the classes made by `stand_in`. `compute` is called with the arguments of forward."""

    _fastgpt2: Settings = None  # type: ignore[assignment]  # of a model that only has the class: type(model)(config)
    theirs: ClassVar[Theirs]
    names: ClassVar[tuple[str, ...]]  # of forward's arguments, in order

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __reduce_ex__(self, protocol):
        """Copies and unpickled modules are accelerated too. A pickle names transformers' class and the base here."""
        ours, base = type(self).__bases__
        return _empty, (base, ours), self.__dict__


def _empty(base: Any, ours: Any) -> nn.Module:
    kind = stand_in(base, ours)
    return kind.__new__(kind)


_made: dict[Any, Any] = {}


def stand_in(base: Any, ours: Any) -> Any:
    """The subclass of both, made once, with the name, the signature and the documentation of `base`."""
    if (base, ours) not in _made:
        _made[base, ours] = _make(base, ours)
    return _made[base, ours]


def _make(base: Any, ours: Any) -> Any:
    from transformers.activations import NewGELUActivation
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
    from transformers.pytorch_utils import Conv1D

    _originals[base] = base.forward if is_of_transformers(base.forward) else None

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        if self._fastgpt2 is None or not _is_original(base):
            return base.forward(self, *args, **kwargs)
        return self.compute(*args, **kwargs)

    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    # A class whose forward was patched before acceleration is always called.
    known = [
        kind if kind in _originals or is_of_transformers(kind.forward) else object
        for kind in (GPT2Attention, GPT2MLP, Conv1D, NewGELUActivation)
    ]
    for kind in known:
        if kind is not object and kind not in _originals:
            _originals[kind] = stock(kind).forward
    attributes: dict[str, Any] = dict(
        forward=forward,
        names=tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD),
        theirs=Theirs(*known),
        __module__=base.__module__,
        __qualname__=base.__qualname__,
        __doc__=base.__doc__,
    )
    made: Any = type(base.__name__, (ours, base), attributes)
    return made


# Classes of transformers with the `forward` that they had when first accelerated; None if it was already patched.
_originals: dict[Any, Any] = {}


def _is_original(kind: Any) -> bool:
    """Whether the class has transformers' own `forward`. True under torch.compile, which cannot compare wrapped
    functions."""
    return torch.compiler.is_compiling() or _originals.get(kind) is kind.forward


def is_of_transformers(function: Any) -> bool:
    """Whether a function and every function that it wraps are defined in transformers or PyTorch."""
    import transformers

    homes = tuple(str(Path(package.__file__ or "").parent) for package in (transformers, torch))
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(homes):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def is_untouched(module: Any, kind: Any) -> bool:
    """`is_stock` for classes whose `forward` transformers wraps, and for the classes that replace them.

    A call that asks for hidden states or attentions leaves hooks of transformers on modules, which do nothing in calls
    that do not ask: they do not count.
    """
    theirs = kind.__bases__[-1] if issubclass(kind, StandIn) else kind  # of a subclass over one: no class of theirs
    if type(module) is not kind or not _is_original(theirs):
        return False
    hooks = module._forward_hooks
    captures = bool(hooks) and all(getattr(hook, "__module__", "") == CAPTURES for hook in hooks.values())
    return not is_watched(module, captures)
