"""Language-model head and loss in one op: cross-entropy of `x @ weight.T` in chunks of rows, so that the logits of all
rows are never stored at once.

    logits = x @ weight[:vocab_size].T                                  x (N, C), weight (V, C), targets (N,)
    lse_n  = log sum_c exp(logits_nc)
    loss_n = lse_n - (1 - s) logits_nt - s/V sum_c logits_nc + z lse_n^2     t = targets_n, s label_smoothing, z z_loss
    dx = dlogits @ weight,   dweight = dlogits.T @ x

"sum" adds loss_n over the rows that count, "mean" divides by their number (and is 0 if none counts), "none" is loss_n.
A row whose target is negative or ignore_index does not count: its loss and gradient are 0. A target of vocab_size or
more is never used as an address: its loss is NaN, and so is every gradient that it contributes to.

All chunks use one buffer of at most `chunk_bytes` of logits (at least one row): a matrix product writes the logits, a
kernel overwrites them with dlogits, and two products give dx and dweight. With "mean" and "sum" the forward does all of
this; the backward multiplies by the upstream gradient in one launch and leaves the saved tensors unchanged, so that it
can run again. With "none" each row has its own upstream gradient, and dweight sums over rows: the forward then computes
only the loss, and the backward recomputes the logits. A gradient that is not needed skips its product.

HBM traffic for a chunk of R rows with e bytes an element and s a sum (4; 8 in fp64): the weight is read twice, 2 V C e;
logits take 5 R V e (6 if L2 does not serve the second read), dweight V C s, or twice that from the second chunk on; the
backward reads V C s and writes V C e. Peak extra memory with V' = V rounded up to 64 and R rows a chunk, `extra_bytes`:
    R V' e  +  N C s [dx]  +  V C s [dweight]  +  (N + 1) s        [.]: if that gradient is needed
plus min(V, 4096) C s for the second and later chunks in 16 bits if PyTorch cannot add a product to an fp32 matrix (see
`_matmul`), plus the casts of x and weight under autocast. The backward's gradients are allocated after the buffer is
freed.

Numerics: dlogits have the scale of probabilities (times 4096 in fp16, because of its small range, or less for a large
z), and both gradients stay in fp32 (fp64) until the backward knows the upstream gradient. So nothing underflows before
the factor of a loss scaler is applied, and each gradient is rounded once. For "none" dlogits include the upstream
gradient. No atomics; sums have a fixed order.

Sources: gradients in the forward, Liger Kernel (Hsu et al. 2024, arXiv 2410.10989); chunks instead of all logits, Cut
Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009); z-loss, PaLM (Chowdhery et al. 2022, arXiv 2204.02311).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _op, _tuning
from ._cross_entropy import cross_entropy_, inverse_count, padded_vocab, statistics_dtype, total
from ._frozen import Launch, planned
from ._matmul import PIECE, matmul_

TOGGLE = "cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The reference in plain PyTorch: x (..., C), weight (V, C), targets (...) -> scalar, or (...) for "none"."""
    logits = F.linear(x, weight[:vocab_size])  # (..., V)
    counts = (targets >= 0) & (targets != ignore_index)
    lse = torch.logsumexp(logits, -1)
    target_logit = logits.gather(-1, torch.where(counts, targets, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - (1 - label_smoothing) * target_logit - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    losses = torch.where(counts, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()


@triton.jit(do_not_specialize=["dx_programs"])
def _scale_gradients_kernel(
    dloss_ptr, factor_ptr, dx_ptr, dweight_ptr, dx_out_ptr, dweight_out_ptr,
    dx_size, dweight_size, dweight_out_size, dx_programs, LOGITS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiplies both gradients by dloss * factor / LOGITS_SCALE. The first programs compute dx, the others dweight;
    dweight_out beyond dweight is 0."""
    factor = tl.load(factor_ptr) * tl.load(dloss_ptr) * (1.0 / LOGITS_SCALE)
    pid = tl.program_id(0)
    if pid < dx_programs:
        offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        dx = tl.load(dx_ptr + offs, mask=offs < dx_size, other=0.0).to(factor.dtype) * factor
        tl.store(dx_out_ptr + offs, dx.to(dx_out_ptr.dtype.element_ty), mask=offs < dx_size)
    else:
        offs = (pid - dx_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        dweight = tl.load(dweight_ptr + offs, mask=offs < dweight_size, other=0.0).to(factor.dtype) * factor
        dweight = tl.where(offs < dweight_size, dweight, 0.0)  # 0 even if factor is NaN
        tl.store(dweight_out_ptr + offs, dweight.to(dweight_out_ptr.dtype.element_ty), mask=offs < dweight_out_size)


def chunk_rows(N: int, V: int, itemsize: int, chunk_bytes: int) -> int:
    """The number of rows of a chunk: as many as fit in chunk_bytes, then evened out over chunks in multiples of 128."""
    fit = max(1, min(N, chunk_bytes // (padded_vocab(V) * itemsize)))
    even = _tuning.cdiv(N, max(1, _tuning.cdiv(N, fit)))
    return max(1, min(fit, _tuning.cdiv(even, 128) * 128))


def _logits_scale(dtype: torch.dtype, z_loss: float) -> float:
    """The factor on dlogits between the forward's kernel and the backward: 1 except in fp16.

    Without it, dlogits are at most 1 + 2 z lse. In fp16 it is a power of two with which dlogits stay finite for the
    largest lse of fp16 logits: 4096 for a z up to 1e-4.
    """
    if dtype != torch.float16:
        return 1.0
    largest = torch.finfo(dtype).max
    room = largest / (1.0 + 2.0 * abs(z_loss) * (largest + 32.0))  # lse exceeds the largest logit by less than 32 nats
    return min(4096.0, 2.0 ** math.floor(math.log2(room)))


def extra_bytes(N: int, C: int, V: int, dtype: torch.dtype, chunk_bytes: int, need_dx: bool, need_dweight: bool) -> int:
    """An upper bound, in bytes, of the forward's peak memory besides its arguments and their casts to `dtype`.

    V: vocab_size.
    """
    rows, sums = chunk_rows(N, V, dtype.itemsize, chunk_bytes), statistics_dtype(dtype).itemsize
    kept = sums * (N * C * need_dx + V * C * need_dweight + N + 1)
    beside = sums * min(V, PIECE) * C if need_dweight and rows < N and dtype.itemsize == 2 else 0
    return rows * padded_vocab(V) * dtype.itemsize + kept + beside


def _losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> losses (N,), and dx (N, C) and dweight (V, C) times scale, (1,) or (N,), all in fp32 (fp64).

    None for a gradient that is not needed.
    """
    (N, C), V, sums = x.shape, weight.shape[0], statistics_dtype(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    rows = chunk_rows(N, V, dtype.itemsize, chunk_bytes)
    buffer = torch.empty(rows, padded_vocab(V), dtype=dtype, device=x.device)
    losses = torch.empty(N, dtype=sums, device=x.device)
    dx = torch.empty(N, C, dtype=sums, device=x.device) if need_dx else None
    dweight = (torch.empty if N else torch.zeros)(V, C, dtype=sums, device=x.device) if need_dweight else None
    for n in range(0, N, rows):
        chunk = slice(n, min(n + rows, N))
        one = chunk.stop - n == N  # the only chunk, so no views are needed
        x_n, targets_n, losses_n = (x, targets, losses) if one else (x[chunk], targets[chunk], losses[chunk])
        logits = buffer[: chunk.stop - n, :V]
        torch.mm(x_n, weight.t(), out=logits)
        row_scale = scale if one or scale.shape[0] == 1 else scale[chunk]
        write_grad = need_dx or need_dweight
        cross_entropy_(logits, targets_n, row_scale, losses_n, ignore_index, label_smoothing, z_loss, write_grad)
        if dx is not None:
            matmul_(dx if one else dx[chunk], logits, weight, add=False)
        if dweight is not None:
            matmul_(dweight, logits.t(), x_n, add=n > 0)
    return losses, dx, dweight


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
    chunk_bytes: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
    weight_copy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """-> loss; dx (N, C) and dweight (vocab_size, C), not yet multiplied by factor and upstream gradient; factor (1,).

    None for a gradient that is not needed, and for both gradients with "none".
    """
    in_forward = reduction != "none"
    scale = torch.full((1,), _logits_scale(dtype, z_loss), dtype=statistics_dtype(dtype), device=x.device)
    read = weight if weight_copy is None else weight_copy
    losses, dx, dweight = _losses_and_gradients(
        x, read[:vocab_size], targets, scale, ignore_index, label_smoothing, z_loss, chunk_bytes, dtype,
        need_dx and in_forward, need_dweight and in_forward,
    )  # fmt: skip
    factor = inverse_count(targets, ignore_index, losses.dtype) if reduction == "mean" else torch.ones_like(scale)
    return total(losses, factor) if in_forward else losses, dx, dweight, factor


def _fwd_fake(
    x, weight, targets, ignore_index, reduction, label_smoothing, z_loss, vocab_size, chunk_bytes, dtype,
    need_dx, need_dweight, weight_copy=None,
):  # fmt: skip
    in_forward, sums = reduction != "none", statistics_dtype(dtype)
    shapes = (
        () if in_forward else x.shape[:1],
        x.shape if need_dx and in_forward else None,
        (vocab_size, x.shape[1]) if need_dweight and in_forward else None,
        (1,),
    )
    return tuple(None if shape is None else x.new_empty(shape, dtype=sums) for shape in shapes)


def linear_cross_entropy_scale(
    dloss: Tensor,
    factor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    weight_rows: int,
    logits_scale: float,
    dx_dtype: torch.dtype,
    dweight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dx (N, C) and dweight (V', C) times dloss * factor / logits_scale -> (N, C) and (weight_rows, C).

    Rows of the latter beyond V' are zeros.
    """
    dx_out, dweight_out = _scale_fake(dloss, factor, dx, dweight, weight_rows, logits_scale, dx_dtype, dweight_dtype)
    sizes = (dx.numel(), dweight.numel(), dweight_out.numel())
    if sizes != (0, 0, 0):
        _scale_plan(sizes, logits_scale, dx.device)(dloss, factor, dx, dweight, dx_out, dweight_out)
    return dx_out, dweight_out


@planned
def _scale_plan(sizes: tuple[int, int, int], logits_scale: float, device: torch.device) -> Launch:
    """sizes: the numbers of elements of dx, dweight and dweight_out."""
    options = _tuning.config(_tuning.Key("scale_gradients"), device)
    dx_programs = _tuning.cdiv(sizes[0], options["BLOCK"])
    grid = (dx_programs + _tuning.cdiv(sizes[2], options["BLOCK"]),)
    return Launch(_scale_gradients_kernel, grid, *sizes, dx_programs, logits_scale, **options)


def _scale_fake(dloss, factor, dx, dweight, weight_rows, logits_scale, dx_dtype, dweight_dtype):
    dweight_shape = (weight_rows, dweight.shape[1]) if dweight.dim() == 2 else (0,)
    return _op.empty_like(dx, dx_dtype), torch.empty(dweight_shape, dtype=dweight_dtype, device=dweight.device)


def linear_cross_entropy_bwd(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
    chunk_bytes: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """For reduction "none": dlosses (N,) -> dx (N, C), dweight (V, C); None for each that is not needed."""
    _, dx, dweight = _losses_and_gradients(
        x, weight[:vocab_size], targets, dlosses, ignore_index, label_smoothing, z_loss,
        chunk_bytes, dtype, need_dx, need_dweight,
    )  # fmt: skip
    dweight = None if dweight is None else dweight.to(weight.dtype)
    if dweight is not None and vocab_size < weight.shape[0]:
        dweight = F.pad(dweight, (0, 0, 0, weight.shape[0] - vocab_size))
    return None if dx is None else dx.to(x.dtype), dweight


def _bwd_fake(
    dlosses, x, weight, targets, ignore_index, label_smoothing, z_loss, vocab_size, chunk_bytes, dtype,
    need_dx, need_dweight,
):  # fmt: skip
    return x.new_empty(x.shape) if need_dx else None, weight.new_empty(weight.shape) if need_dweight else None


def _setup_context(ctx, inputs, output):
    x, weight, targets, ignore_index, reduction, *numbers, need_dx, need_dweight, _ = inputs
    _, dx, dweight, factor = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((x, weight, targets) if reduction == "none" else (factor, dx, dweight)))
    ctx.arguments = (ignore_index, *numbers, need_dx, need_dweight)
    ctx.reduction = reduction
    ctx.scale_arguments = weight.shape[0], _logits_scale(numbers[-1], numbers[1]), x.dtype, weight.dtype


def _backward(ctx, dloss, *_):
    *_, need_dx, need_dweight = ctx.arguments
    if dloss is None or not (need_dx or need_dweight):
        return (None,) * 13
    if ctx.reduction == "none":
        dx, dweight = _bwd(dloss, *ctx.saved_tensors, *ctx.arguments)
    else:
        factor, *grads = ctx.saved_tensors
        grads = [factor.new_empty(0) if t is None else t for t in grads]
        dx, dweight = _scale(dloss, factor, *grads, *ctx.scale_arguments)
    return dx if need_dx else None, dweight if need_dweight else None, *(None,) * 11


_scale = _op.op(linear_cross_entropy_scale, _scale_fake, toggle=TOGGLE)
# Opaque, because Inductor would unroll the chunks and copy the buffer of logits for each.
_bwd = _op.op(linear_cross_entropy_bwd, _bwd_fake, toggle=TOGGLE, opaque=True, strided=("x", "weight"))
_fwd = _op.op(
    linear_cross_entropy_fwd, _fwd_fake, toggle=TOGGLE, opaque=True, strided=("x", "weight", "weight_copy"),
    differentiable=1, setup_context=_setup_context, backward=_backward,
)  # fmt: skip


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    chunk_bytes: int = 512 * 2**20,
    weight_copy: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `F.linear(x, weight)`: x (..., C), weight (V, C), targets (...) int64 -> scalar or (...).

    The loss is fp32 (fp64 for fp64 inputs). Negative targets are ignored, whatever ignore_index is.
    reduction: "mean", "sum" or "none". vocab_size: weight rows from there on are padding and take no part. chunk_bytes:
    the size of the buffer of logits. Under autocast x and weight are cast as in F.linear, and each gradient has the
    dtype of its tensor. weight_copy: weight in autocast's dtype, if the caller has it, to be read in place of a cast.
    Raises TypeError for a wrong dtype, ValueError for an argument that is not allowed.
    """
    vocab_size = _check(x, weight, targets, reduction, label_smoothing, vocab_size, chunk_bytes)
    dtype = x.dtype if torch.float64 in (x.dtype, weight.dtype) else _op.autocast_dtype(x, x.dtype)
    if dtype == x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"linear_cross_entropy: weight is {weight.dtype}, x is {x.dtype}; they must be equal outside autocast "
            f"(toggle: {TOGGLE}='torch')"
        )
    rows = x.reshape(-1, x.shape[-1])  # (N, C)
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    numbers = (float(label_smoothing), float(z_loss), vocab_size, chunk_bytes)
    copy = weight_copy if reduction != "none" and weight_copy is not None and weight_copy.dtype == dtype else None
    loss = _fwd(rows, weight, targets.reshape(-1), ignore_index, reduction, *numbers, dtype, *needs, copy)[0]
    return loss.view(targets.shape) if reduction == "none" else loss


@_op.check_once
def _check(x, weight, targets, reduction, label_smoothing, vocab_size, chunk_bytes) -> int:
    """Returns vocab_size. Raises TypeError or ValueError for an argument that is not allowed."""
    name, toggle = "linear_cross_entropy", f"(toggle: {TOGGLE}='torch')"
    _op.check_dtypes(name, TOGGLE, x=x, weight=weight)
    if targets.dtype != torch.int64:
        raise TypeError(f"{name}: targets is {targets.dtype}, allowed is torch.int64 {toggle}")
    _op.check_shape(name, TOGGLE, "targets", targets, x.shape[:-1])
    _op.check_shape(name, TOGGLE, "weight", weight, (weight.shape[0], x.shape[-1]))
    V = weight.shape[0]
    vocab_size = V if vocab_size is None else vocab_size
    if not 0 < vocab_size <= V:
        raise ValueError(f"{name}: vocab_size is {vocab_size}, allowed are 1 to weight's {V} rows {toggle}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)} {toggle}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, allowed are 0 to 1 {toggle}")
    if chunk_bytes <= 0:
        raise ValueError(f"{name}: chunk_bytes is {chunk_bytes}, allowed are positive numbers {toggle}")
    return vocab_size
