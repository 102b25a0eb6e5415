"""The switch `model.residual`: the dtype of the residual stream under autocast.

"float32" is how autocast leaves it. "bfloat16" halves its bytes and those of its gradient, as `model.bfloat16()` does,
while parameters stay as they are. Outside autocast the stream has the parameters' dtype. Not saved with the model.
"""

from __future__ import annotations

import torch

RESIDUALS = ("float32", "bfloat16")


def checked(residual: str) -> str:
    """`residual` itself. Raises ValueError unless it is one of `RESIDUALS`."""
    if residual not in RESIDUALS:
        raise ValueError(f"residual is {residual!r}, allowed are {' and '.join(map(repr, RESIDUALS))}")
    return residual


def stream_dtype(residual: str, device: torch.device) -> torch.dtype | None:
    """The dtype that the switch asks for under the present autocast; None where it asks for nothing: with "float32",
    and outside autocast, where everything has the parameters' dtype.

    Raises ValueError for "bfloat16" under autocast to another dtype.
    """
    if residual == "float32" or not torch.is_autocast_enabled(device.type):
        return None
    if (dtype := torch.get_autocast_dtype(device.type)) != torch.bfloat16:
        raise ValueError(
            f"model.residual is 'bfloat16' under autocast to {dtype}, allowed is autocast to torch.bfloat16 "
            "(or model.residual = 'float32')"
        )
    return dtype
