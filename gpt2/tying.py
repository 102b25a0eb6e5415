"""Shared parameters: one parameter under several names, such as the head's weight and the token table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Names = list[tuple[nn.Module, str]]


def shared_parameters(model: nn.Module) -> list[tuple[nn.Parameter, Names]]:
    """Every parameter that has several names, each with its names as (module, name in that module)."""
    found: dict[int, tuple[nn.Parameter, Names]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return [(parameter, names) for parameter, names in found.values() if len(names) > 1]


def share_again(shared: list[tuple[nn.Parameter, Names]]) -> None:
    """Shares again what `shared_parameters` found earlier. If parameters were replaced since, the first new one is
    used under all names."""
    for before, names in shared:
        now = [module._parameters[name] for module, name in names]
        one = next((p for p in now if p is not before), before)
        for module, name in names:
            module._parameters[name] = one


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both can be loaded into one parameter: equal, or one of them is missing or on the meta device."""
    if a is None or b is None or a is b or a.device.type == "meta" or b.device.type == "meta":
        return True
    return a.shape == b.shape and torch.equal(a, b.to(a.device))
