"""Parameters that are one under several names, as the head's weight and the token table are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Names = list[tuple[nn.Module, str]]


def shared_parameters(model: nn.Module) -> list[tuple[nn.Parameter, Names]]:
    """Every parameter that has several names, and these as (module, its name there)."""
    found: dict[int, tuple[nn.Parameter, Names]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return [(parameter, names) for parameter, names in found.values() if len(names) > 1]


def share_again(shared: list[tuple[nn.Parameter, Names]]) -> None:
    """What `shared_parameters` found before is one parameter again: the first that has been replaced since."""
    for before, names in shared:
        now = [module._parameters[name] for module, name in names]
        one = next((p for p in now if p is not before), before)
        for module, name in names:
            module._parameters[name] = one


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both may be loaded into one parameter. One that is missing or has no values yet says nothing against."""
    if a is None or b is None or a is b or a.device.type == "meta" or b.device.type == "meta":
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.device))
