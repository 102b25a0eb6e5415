"""Parameters that are one under several names, as the head's weight and the token table are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Names = list[tuple[nn.Module, str]]


def shared_parameters(model: nn.Module) -> list[Names]:
    """The names of every parameter that has several, as (module, its name there)."""
    names: dict[int, Names] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append((module, name))
    return [several for several in names.values() if len(several) > 1]


def share_again(shared: list[Names]) -> None:
    """What `shared_parameters` found before is one parameter again: the one under the first name."""
    for (owner, own_name), *others in shared:
        for module, name in others:
            module._parameters[name] = owner._parameters[own_name]


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both may be loaded into one parameter. One that is missing or has no values yet says nothing against."""
    if a is None or b is None or a is b or a.device.type == "meta" or b.device.type == "meta":
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.device))
