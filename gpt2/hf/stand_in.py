"""A class that takes the place of one of transformers' in a live module, and can be taken away again.

The module stays the object it is: parameters, buffers, hooks, names. Its class becomes a subclass of its own one, which
computes by `compute` and carries transformers' name, because Trainer, `save_pretrained` and others go by that.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import nn

from fastgpt2.gpt2.ops import Kernels
from fastgpt2.gpt2.stock import is_watched, stock


@dataclass(frozen=True)
class Settings:
    """What `hf.accelerate` was given."""

    kernels: str | Kernels
    training_logits: bool


class Theirs(NamedTuple):
    """The classes of transformers whose arithmetic we know."""

    Attention: type
    MLP: type
    Conv1D: type
    Gelu: type


class StandIn(nn.Module):
    """What the classes made by `stand_in` have in common. `compute` is called with forward's own arguments."""

    _fastgpt2: Settings
    theirs: ClassVar[Theirs]
    names: ClassVar[tuple[str, ...]]  # of forward's arguments, in order

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __reduce_ex__(self, protocol):
        """Copies and pickles are accelerated too; what is pickled names transformers' class and ours."""
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

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        return self.compute(*args, **kwargs)

    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    # A class that was patched before we came is called, and never computed in its place.
    known = [
        kind if kind.forward.__module__ == kind.__module__ else object
        for kind in (GPT2Attention, GPT2MLP, Conv1D, NewGELUActivation)
    ]
    for kind in known:
        if kind is not object:
            stock(kind)
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


def is_untouched(module: Any, kind: Any) -> bool:
    """`is_stock` for classes whose `forward` transformers wraps, which torch.compile cannot tell from another one."""
    return type(module) is kind and not is_watched(module)
