"""GPT-2's MLP as one autograd function, which saves the pre-activation and recomputes the activation in backward.

    pre = x fc_weight^T                       act = gelu(pre + fc_bias)
    out = act proj_weight^T + proj_bias

    dact = dout proj_weight                   dpre = dact * gelu'(pre + fc_bias),   dfc_bias = sum_N(dpre)
    dproj_weight = dout^T act                 dfc_weight = dpre^T x,                dx = dpre fc_weight

Shapes: x (..., C), fc_weight (F, C), fc_bias (F,), proj_weight (C', F), proj_bias (C',), out (..., C'); F is 4 C in
GPT-2. Backward needs x and pre. The activation, which is as large as pre, is not saved.

HBM traffic besides the matrix products, in bytes per element of pre at 2 bytes each: forward 4 (read pre, write act) in
1 launch; backward 8 (read pre and dact, write act, overwrite dact with dpre) in 2 launches, the second of which sums
dfc_bias. Numerics: as in gelu.py; PyTorch computes the matrix products. Under autocast the products read 16-bit copies
of the weights, and the gradients of the weights are the products' fp32 sums, not rounded to 16 bits (_matmul.py).
`fused_mlp` computes GELU in the epilogue of our own products x fc_weight^T and dout proj_weight (_gelu_product.py).
That saves 2 bytes forward, 4 backward and a launch in each. The tuning table has the architectures on which it was
measured to be faster; there `mlp` does the same.
Sources: gelu.py; recomputation, Chen et al. 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _op, _tuning
from ._frozen import planned
from ._gelu_product import gelu_product_bwd, gelu_product_fwd
from ._matmul import weight_gradient, weight_gradient_fake
from .gelu import bias_gelu_reference, gelu_fwd, gelu_reference, launch_gelu_bwd


def mlp_reference(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None = None
) -> Tensor:
    """The reference for `mlp` in plain PyTorch: (..., C) -> (..., C')."""
    pre = F.linear(x, fc_weight)
    act = gelu_reference(pre) if fc_bias is None else bias_gelu_reference(pre, fc_bias)
    return F.linear(act, proj_weight, proj_bias)


def fused_mlp_reference(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None = None
) -> Tensor:
    """The reference for `fused_mlp`: that for `mlp`."""
    return mlp_reference(x, fc_weight, fc_bias, proj_weight, proj_bias)


@planned
def is_fused(direction: str, bits: int, device: torch.device) -> bool:
    """Whether `mlp` has GELU in the epilogue of its products on this device: what the tuning table says.

    direction: "fwd" or "bwd". bits: of an element.
    """
    return bool(_tuning.config(_tuning.Key(f"mlp_{direction}", bits=bits), device)["FUSED"])


def mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    keep_pre: bool,
    fused: bool,
    fc_copy: Tensor | None = None,
    proj_copy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> out (..., C'), and pre (..., F) if keep_pre. fused: whatever the tuning table says.

    fc_copy, proj_copy: the weights in the dtype of x, read in their place where they have another.
    """
    fc_weight = fc_weight if fc_copy is None else fc_copy
    proj_weight = proj_weight if proj_copy is None else proj_copy
    if fused or is_fused("fwd", 8 * x.element_size(), x.device):
        act, pre = gelu_product_fwd(x, fc_weight.t(), fc_bias, keep_pre)
    else:
        pre = F.linear(x, fc_weight)
        act = gelu_fwd(pre, fc_bias)
    return F.linear(act, proj_weight, proj_bias), pre if keep_pre else None


def _mlp_fwd_fake(x, fc_weight, fc_bias, proj_weight, proj_bias, keep_pre, fused, fc_copy=None, proj_copy=None):
    rest = x.shape[:-1]
    pre = x.new_empty(*rest, fc_weight.shape[0]) if keep_pre else None
    return x.new_empty(*rest, proj_weight.shape[0]), pre


def mlp_bwd(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    needs: list[bool],
    fused: bool,
    dfc_weight_dtype: torch.dtype,
    dproj_weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> the gradients of x, fc_weight, fc_bias, proj_weight and proj_bias; None for each that is not needed.

    fused: whatever the tuning table says.
    """
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = needs
    dout = dout.reshape(-1, dout.shape[-1])  # (N, C')
    dfc_bias_dtype = fc_bias.dtype if fc_bias is not None and need_fc_bias else None
    if fused or is_fused("bwd", 8 * dout.element_size(), dout.device):
        dpre, act, dfc_bias = gelu_product_bwd(dout, proj_weight, fc_bias, pre, need_proj_weight, dfc_bias_dtype)
    else:
        dpre = torch.mm(dout, proj_weight)  # (N, F): holds dact until the kernel overwrites it with dpre
        act = torch.empty_like(dpre) if need_proj_weight else None
        dfc_bias = launch_gelu_bwd(dpre, pre, fc_bias, act, dpre, dfc_bias_dtype)
    return (
        torch.mm(dpre, fc_weight).view(x.shape) if need_x else None,
        weight_gradient(dpre, x.reshape(-1, x.shape[-1]), fc_weight, dfc_weight_dtype) if need_fc_weight else None,
        dfc_bias,
        None if act is None else weight_gradient(dout, act, proj_weight, dproj_weight_dtype),
        dout.sum(0) if need_proj_bias else None,
    )


def _mlp_bwd_fake(
    dout, x, pre, fc_weight, fc_bias, proj_weight, needs, fused, dfc_weight_dtype, dproj_weight_dtype
):  # fmt: skip
    need_x, need_fc_weight, need_fc_bias, need_proj_weight, need_proj_bias = needs
    return (
        x.new_empty(x.shape) if need_x else None,
        weight_gradient_fake(fc_weight, dfc_weight_dtype) if need_fc_weight else None,
        fc_bias.new_empty(fc_bias.shape) if fc_bias is not None and need_fc_bias else None,
        weight_gradient_fake(proj_weight, dproj_weight_dtype) if need_proj_weight else None,
        dout.new_empty(dout.shape[-1]) if need_proj_bias else None,
    )


def _setup_context(ctx, inputs, output):
    x, fc_weight, fc_bias, proj_weight, _, _, ctx.fused, fc_copy, proj_copy = inputs
    _, pre = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = fc_weight.dtype, proj_weight.dtype
    fc_read, proj_read = fc_weight if fc_copy is None else fc_copy, proj_weight if proj_copy is None else proj_copy
    ctx.save_for_backward(x, pre, fc_read, fc_bias, proj_read)


def _backward(ctx, dout, *_):
    needs = list(ctx.needs_input_grad[:5])
    if dout is None:
        return (None,) * 9
    grads = _mlp_bwd(dout, *ctx.saved_tensors, needs, ctx.fused, *ctx.dtypes)
    return *[g if need else None for g, need in zip(grads, needs)], *(None,) * 4  # noqa: B905


_mlp_bwd = _op.op(mlp_bwd, _mlp_bwd_fake, toggle="mlp", strided=("dout", "x", "fc_weight", "proj_weight"))
_mlp_fwd = _op.op(
    mlp_fwd, _mlp_fwd_fake, toggle="mlp", strided=("x", "fc_weight", "proj_weight", "fc_copy", "proj_copy"),
    differentiable=1, setup_context=_setup_context, backward=_backward,
)  # fmt: skip


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *,
    fc_copy: Tensor | None = None,
    proj_copy: Tensor | None = None,
) -> Tensor:
    """proj(gelu(fc(x))): (..., C) -> (..., C'). Weights are (out, in) as in nn.Linear.

    Under autocast x and the weights are cast as by F.linear, and each gradient has the dtype of its tensor. fc_copy,
    proj_copy: the weights in autocast's dtype, if the caller has them, to be read in place of a cast. Raises TypeError
    for an unsupported dtype, ValueError for shapes that do not fit, or if x and the weights have different dtypes
    outside autocast.
    """
    return _mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, False, fc_copy, proj_copy)


def fused_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    *,
    fc_copy: Tensor | None = None,
    proj_copy: Tensor | None = None,
) -> Tensor:
    """As `mlp`, with GELU in the epilogue of the products before it, whatever the tuning table says of their speed.

    float32 products are exact: PyTorch's setting of TF32 does not concern them.
    """
    return _mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, True, fc_copy, proj_copy)


def _mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    fused: bool,
    fc_copy: Tensor | None,
    proj_copy: Tensor | None,
) -> Tensor:
    _check(x, fc_weight, fc_bias, proj_weight, proj_bias)
    keep_pre = _op.gradients_wanted(x, fc_weight, fc_bias, proj_weight, proj_bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = _op.autocast_dtype(x, x.dtype)
        x = x.to(dtype)
        fc_copy, proj_copy = _copy(fc_weight, fc_copy, dtype), _copy(proj_weight, proj_copy, dtype)
        proj_bias = None if proj_bias is None else proj_bias.to(dtype)
    else:
        fc_copy = proj_copy = None
        if not x.dtype == fc_weight.dtype == proj_weight.dtype == (x.dtype if proj_bias is None else proj_bias.dtype):
            raise ValueError(
                f"mlp: x is {x.dtype}, fc_weight {fc_weight.dtype}, proj_weight {proj_weight.dtype}"
                f"{'' if proj_bias is None else f', proj_bias {proj_bias.dtype}'}: they must be equal outside of "
                "autocast (toggle: mlp='torch')"
            )
    return _mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, keep_pre, fused, fc_copy, proj_copy)[0]


def _copy(weight: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is read of `weight` in `dtype` in its place: `copy` if it fits, or a cast; None if it has this dtype."""
    if weight.dtype == dtype:
        return None
    return copy if copy is not None and copy.dtype == dtype else weight.detach().to(dtype)


@_op.check_once
def _check(x, fc_weight, fc_bias, proj_weight, proj_bias):
    _op.check_dtypes("mlp", "mlp", x=x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight)
    _op.check_dtypes("mlp", "mlp", proj_bias=proj_bias)
    if fc_weight.dim() != 2 or proj_weight.dim() != 2:
        raise ValueError(
            f"mlp: fc_weight and proj_weight have shapes {tuple(fc_weight.shape)} and {tuple(proj_weight.shape)}, "
            "expected two dimensions (toggle: mlp='torch')"
        )
    width = fc_weight.shape[0]
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] != fc_weight.shape[1]:
        raise ValueError(
            f"mlp: x has shape {tuple(x.shape)}, its last dimension must be that of fc_weight, {fc_weight.shape[1]} "
            "(toggle: mlp='torch')"
        )
    _op.check_shape("mlp", "mlp", "fc_bias", fc_bias, (width,))
    _op.check_shape("mlp", "mlp", "proj_weight", proj_weight, (proj_weight.shape[0], width))
    _op.check_shape("mlp", "mlp", "proj_bias", proj_bias, (proj_weight.shape[0],))
