"""linear_cross_entropy: exact in every option, gradients once, memory by formula, and nothing read where nothing is."""

import pytest
import torch
import torch.nn.functional as F
import triton
from interpreter import count_launches, red_zones
from numerics import check
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt2.kernels import _device
from fastgpt2.kernels.linear_cross_entropy import (
    extra_bytes,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

HALF = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_option = pytest.mark.parametrize(
    "options", [{}, dict(label_smoothing=0.1), dict(label_smoothing=0.3, z_loss=0.1)], ids=["plain", "smoothed", "both"]
)


def make(N, C, V, dtype=torch.float32, device="cpu", scale=0.5):
    x, weight = torch.randn(N, C, device=device), scale * torch.randn(V, C, device=device)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(V, (N,), device=device)


def eager(x, weight, targets, *, vocab_size=None, ignore_index=-100, z_loss=0.0, reduction="mean", label_smoothing=0.0):
    """What PyTorch users write: logits in the inputs' dtype, cross-entropy in fp32."""
    logits = F.linear(x, weight[:vocab_size])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets.masked_fill((targets < 0) | (targets == ignore_index), -100)
    rows = logits.reshape(-1, logits.shape[-1]), kept.reshape(-1)
    losses = F.cross_entropy(*rows, reduction="none", label_smoothing=label_smoothing).view_as(kept)
    losses = losses + z_loss * torch.where(kept >= 0, logits.logsumexp(-1).square(), 0)
    return {"mean": losses.sum() / (kept >= 0).sum().clamp(min=1), "sum": losses.sum(), "none": losses}[reduction]


def check_rule(inputs, op=linear_cross_entropy, **options):
    reference_options = {k: v for k, v in options.items() if k != "chunk_bytes"}
    return check(
        lambda *t: op(*t, **options),
        lambda *t: linear_cross_entropy_reference(*t, **reference_options),
        *inputs,
        eager=lambda *t: eager(*t, **reference_options),
        names=("x", "weight", "targets"),
    )


@every_option
@every_reduction
@every_dtype
def test_rule(dtype, reduction, options, device):
    x, weight, targets = make(5, 24, 67, dtype, device)
    targets[3] = -1
    three_rows = 3 * 128 * x.element_size()
    check_rule((x, weight, targets), reduction=reduction, chunk_bytes=three_rows if options else 2**29, **options)


ENDS_OF_BLOCKS = [(1, 1, 1), (3, 7, 2), (2, 64, 64), (2, 33, 4096), (3, 16, 4097), (2, 5, 12289)]


@pytest.mark.parametrize("shape", ENDS_OF_BLOCKS + [(3, C, 131) for C in (768, 1024, 1280, 1600)], ids=str)
@every_dtype
def test_rule_for_shapes(shape, dtype, device):
    check_rule(make(*shape, dtype, device), label_smoothing=0.1)


def test_rule_at_gpt2s_vocabulary(device):
    x, weight, targets = make(3, 32, 50257, torch.bfloat16, device)
    targets[0], targets[1] = 50256, 49152  # the last column, and the first one of the last block
    check_rule((x, weight, targets))


@pytest.mark.parametrize("scale", [30.0, 0.0], ids=["huge", "equal"])
def test_rule_for_huge_and_for_equal_logits(scale, device):
    check_rule(make(5, 64, 131, torch.float32, device, scale=scale), z_loss=1e-3)


def test_small_probabilities_survive_float16(device):
    """1e-7 / N is below fp16's least number: the mean's 1/N and a loss scaler's factor must come after the rounding."""
    x, weight, targets = make(6, 16, 67, torch.float16, device, scale=0.02)
    targets.zero_()
    with torch.no_grad():
        x[:, 0], weight[0, 0] = 1.0, 16.0  # token 0 takes nearly all of the probability
    truth = weight.detach().double().requires_grad_()
    (linear_cross_entropy(x, weight, targets) * 2.0**16).backward()
    (eager(x.double(), truth, targets) * 2.0**16).backward()
    error = (weight.grad - truth.grad)[1:].norm() / truth.grad[1:].norm()
    assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_reduction
def test_rows_beyond_vocab_size_take_no_part(dtype, reduction, device):
    x, weight, targets = make(9, 16, 80, dtype, device)
    targets %= 67
    with torch.no_grad():
        weight[67:] = float("nan")
    result = linear_cross_entropy(x, weight, targets, vocab_size=67, reduction=reduction)
    for upstream in (1.0, float("nan")):  # NaN stays away from the padding
        grads = torch.autograd.grad(result.sum(), (x, weight), torch.tensor(upstream, device=device), retain_graph=True)
        assert torch.equal(grads[1][67:], torch.zeros_like(grads[1][67:]))
        assert result.isfinite().all() and grads[0].isfinite().all() == (upstream == 1.0)
    check_rule((x, weight.detach().nan_to_num(), targets), vocab_size=67, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-100, 5])
@every_reduction
def test_ignored_rows(ignore_index, reduction, device):
    x, weight, targets = make(9, 16, 67, torch.float32, device)
    targets[:6] = torch.tensor([-1, ignore_index, -100, 5, -(2**40), 66], device=device)
    check_rule((x, weight, targets), ignore_index=ignore_index, reduction=reduction)


@every_reduction
@every_dtype
def test_all_ignored_gives_zero_and_zero_gradients(dtype, reduction, device):
    x, weight, targets = make(5, 16, 67, dtype, device)
    result = linear_cross_entropy(x, weight, targets * 0 - 1, reduction=reduction)
    result.sum().backward()
    assert not result.any() and not x.grad.any() and not weight.grad.any()


def test_ignored_row_with_infinite_logits_has_gradient_zero(device):
    x, weight, targets = make(3, 16, 67, torch.float16, device)
    with torch.no_grad():
        x[1] = 6e4
    targets[1] = -1
    linear_cross_entropy(x, weight, targets).backward()
    assert not x.grad[1].any() and weight.grad.isfinite().all() and weight.grad.any()


@every_reduction
@pytest.mark.parametrize("bad", [67, 80, 2**40], ids=["padding", "beyond", "far"])
def test_target_beyond_the_vocabulary_is_nan_and_not_read(bad, reduction, device):
    x, weight, targets = make(4, 16, 80, torch.float32, device)
    targets = (targets % 67).index_fill(0, torch.tensor([2], device=device), bad)
    with red_zones() as zone:
        result = linear_cross_entropy(x, weight, zone(targets), vocab_size=67, reduction=reduction)
        result.sum().backward()
    if reduction == "none":
        assert result.isnan().tolist() == [False, False, True, False]
        assert x.grad.isnan().any(1).tolist() == [False, False, True, False]
    else:
        assert result.isnan()
    assert x.grad[2].isnan().all() and weight.grad[:67].isnan().all() and not weight.grad[67:].any()


@every_reduction
def test_no_rows(reduction, device):
    x, weight, targets = make(0, 16, 67, torch.bfloat16, device)
    result = linear_cross_entropy(x, weight, targets, reduction=reduction)
    result.sum().backward()
    assert result.shape == ((0,) if reduction == "none" else ()) and not result.any()
    assert x.grad.shape == (0, 16) and not weight.grad.any()


# --------------------------------------------------------------------------------------------------- autograd


@every_reduction
@every_option
def test_gradcheck(reduction, options, device):
    x, weight, targets = make(3, 2, 5, torch.float64, device)
    targets %= 4
    targets[1] = -1

    def op(x, weight):
        return linear_cross_entropy(x, weight, targets, reduction=reduction, vocab_size=4, chunk_bytes=1024, **options)

    assert torch.autograd.gradcheck(op, (x, weight))


@every_reduction
@every_dtype
def test_backward_runs_twice_and_scales_with_its_gradient(dtype, reduction, device):
    x, weight, targets = make(5, 16, 67, dtype, device)
    result = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    first = torch.autograd.grad(result, (x, weight), retain_graph=True)
    second = torch.autograd.grad(result, (x, weight), torch.tensor(4.0, device=device), retain_graph=True)
    third = torch.autograd.grad(result, (x, weight))
    for one, four, again in zip(first, second, third, strict=True):
        assert torch.equal(one, again)
        # Exact but for the smallest fp16 numbers, which have fewer digits.
        torch.testing.assert_close(4 * one, four, rtol=0, atol=1e-5 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("frozen", ["x", "weight", "both", "no_grad"])
@every_reduction
def test_what_is_frozen_costs_no_product(frozen, reduction, device):
    class CountProducts(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    x, weight, targets = make(6, 16, 67, torch.float32, device)
    wanted = {"x": (False, True), "weight": (True, False)}.get(frozen, (False, False))
    if frozen != "no_grad":
        x.requires_grad_(wanted[0])
        weight.requires_grad_(wanted[1])
    with CountProducts() as counter, torch.set_grad_enabled(frozen != "no_grad"), count_launches() as log:
        result = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        if any(wanted):
            result.backward()
    recomputed = reduction == "none" and any(wanted)
    assert counter.products == 1 + any(wanted) + recomputed
    assert ((x.grad is not None), (weight.grad is not None)) == wanted
    check_rule(tuple(t.detach().requires_grad_(t.requires_grad) for t in (x, weight)) + (targets,), reduction=reduction)
    written = {launch.name: launch.bytes_written for launch in log}
    if not any(wanted) and log[0].bytes_read:
        assert written["_cross_entropy_kernel"] == 32  # the losses


def test_tied_embedding_gets_both_gradients(device):
    _, weight, targets = make(6, 16, 67, torch.float32, device)
    idx = torch.randint(67, (6,), device=device)

    def both(head):
        return torch.autograd.grad(head(F.embedding(idx, weight), weight, targets), weight)[0]

    torch.testing.assert_close(both(linear_cross_entropy), both(eager))


def test_checkpointing_gives_the_same_bits(device):
    x, weight, targets = make(6, 16, 67, torch.float32, device)
    plain = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    loss = torch.utils.checkpoint.checkpoint(linear_cross_entropy, x, weight, targets, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(loss, (x, weight))))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_reduction
def test_autocast_casts_as_linear_does(dtype, reduction, device):
    x, weight, targets = make(7, 24, 67, torch.float32, device)

    def under_autocast(op):
        def call(x, weight, targets, **options):
            with torch.autocast(device.type, dtype, enabled=x.dtype != torch.float64):
                return op(x, weight, targets, **options)

        return call

    for chunk_bytes in (2**29, 1024):
        errors = check(
            lambda *t, b=chunk_bytes: under_autocast(linear_cross_entropy)(*t, reduction=reduction, chunk_bytes=b),
            lambda *t: linear_cross_entropy_reference(*t, reduction=reduction),
            x, weight, targets,
            eager=lambda *t: under_autocast(eager)(*t, reduction=reduction),
            names=("x", "weight", "targets"),
        )  # fmt: skip
        assert errors["grad of weight"].eager > 1e-6  # eager did round to 16 bits
    with torch.autocast(device.type, dtype):
        assert linear_cross_entropy(x.to(dtype), weight, targets).dtype == torch.float32
        assert linear_cross_entropy(x.double(), weight.double(), targets).dtype == torch.float64


@every_reduction
def test_leading_dimensions_and_strides(reduction, device):
    flat, weight, targets = make(12, 16, 67, torch.float32, device)
    cases = {
        "batch": (flat.view(3, 4, 16), weight, targets.view(3, 4)),
        "transposed": (flat.view(4, 3, 16).transpose(0, 1), weight, targets.view(4, 3).t()),
        "columns": (torch.randn(12, 32, device=device)[:, ::2], weight, targets[::1]),
        "rows": (flat.expand(12, 16)[::2], weight.detach().t().contiguous().t(), targets[::2]),
        "expanded": (flat[:1].expand(12, 16), weight[:1].expand(67, 16), targets[:1].expand(12)),
        "one": (flat[0], weight, targets[0]),
    }
    for x, w, t in cases.values():
        check_rule((x.detach(), w.detach(), t), reduction=reduction)
    for upstream in (lambda y: torch.ones((), device=y.device).expand_as(y), lambda y: y.new_ones(3, 8)[:, ::2]):
        if reduction == "none":
            args = cases["batch"]
            assert torch.autograd.grad(linear_cross_entropy(*args, reduction="none"), weight, upstream(args[2].float()))


# ------------------------------------------------------------------------------------ operators, memory, errors


@every_reduction
def test_compiles_whole_with_dynamic_rows(reduction, device):
    compiled = torch.compile(
        lambda *t: linear_cross_entropy(*t, reduction=reduction).sum() * 2, fullgraph=True, backend="aot_eager"
    )
    for N in (5, 9, 12):
        x, weight, targets = make(N, 16, 67, torch.float32, device)
        plain = 2 * linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        result = compiled(x, weight, targets)
        assert torch.equal(result, plain)
        grads = (torch.autograd.grad(r, (x, weight)) for r in (result, plain))
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, device):
    x, weight, targets = make(5, 16, 67, torch.float32, device)
    numbers = (0.1, 0.0, 60, 2**20, torch.float32, True, True)
    targets %= 60
    torch.library.opcheck(
        torch.ops.fastgpt2.linear_cross_entropy_fwd.default, (x, weight, targets, -100, reduction, *numbers)
    )
    x, weight = x.detach(), weight.detach()
    one = torch.ones(1, device=device)
    torch.library.opcheck(
        torch.ops.fastgpt2.linear_cross_entropy_scale.default,
        (one[0], one, x, weight[:60], 67, 4.0, torch.float32, torch.bfloat16),
    )
    torch.library.opcheck(
        torch.ops.fastgpt2.linear_cross_entropy_bwd.default,
        (torch.randn(5, device=device), x, weight, targets, -100, *numbers),
    )


@pytest.mark.parametrize("chunk_bytes", [2**29, 2**15, 1], ids=["one-chunk", "chunks", "rows"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_follows_the_formula(chunk_bytes, needs, dtype, device, monkeypatch):
    class Peak(TorchDispatchMode):
        """Most bytes alive at a time of what was allocated inside."""

        def __init__(self):
            super().__init__()
            self.alive, self.most = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    self.alive[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
            self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
            self.most = max(self.most, sum(self.alive.values()))
            return result

    if triton.knobs.runtime.interpret:  # the launchers allocate, the interpreter should not
        monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    N, C, V = 150, 24, 67
    x, weight, targets = make(N, C, V, dtype, device)
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    with Peak() as peak:
        linear_cross_entropy(x, weight, targets, chunk_bytes=chunk_bytes)
    expected = extra_bytes(N, C, V, dtype, chunk_bytes, *needs)
    adds_to_fp32 = _device.mixed_matmul(device) == "addmm" and dtype == torch.bfloat16
    assert peak.most == expected or (adds_to_fp32 and peak.most == expected - 4 * V * C)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "targets is torch.int32, allowed is torch.int64", dict(targets=torch.zeros(3, dtype=torch.int32))),
        (TypeError, "x is torch.int64", dict(x=torch.zeros(3, 4, dtype=torch.int64))),
        (TypeError, "weight is torch.float16, x is torch.float32", dict(weight=torch.zeros(7, 4, dtype=torch.float16))),
        (ValueError, r"targets has shape \(2,\), expected \(3,\)", dict(targets=torch.zeros(2, dtype=torch.int64))),
        (ValueError, r"weight has shape \(7, 5\), expected \(7, 4\)", dict(weight=torch.zeros(7, 5))),
        (ValueError, "vocab_size is 8, allowed are 1 to weight's 7 rows", dict(vocab_size=8)),
        (ValueError, "vocab_size is 0", dict(vocab_size=0)),
        (ValueError, "reduction is 'max', allowed are mean, sum, none", dict(reduction="max")),
        (ValueError, "label_smoothing is 1.5, allowed are 0 to 1", dict(label_smoothing=1.5)),
        (ValueError, "chunk_bytes is 0", dict(chunk_bytes=0)),
    ],
    ids=lambda x: None if isinstance(x, (dict, type)) else x[:20],
)
def test_errors_name_argument_value_and_toggle(error, message, change):
    arguments = dict(x=torch.zeros(3, 4), weight=torch.zeros(7, 4), targets=torch.zeros(3, dtype=torch.int64)) | change
    with pytest.raises(error, match=f"^linear_cross_entropy: {message}.*cross_entropy='torch'"):
        linear_cross_entropy(**arguments)


def test_trains_like_pytorch(device):
    """Ten steps of SGD on a tied embedding and head, in every reduction: losses and weights stay together."""
    for reduction in ("mean", "sum", "none"):
        options = dict(reduction=reduction, label_smoothing=0.1, z_loss=1e-2)
        runs = []
        for op in (linear_cross_entropy, eager):
            torch.manual_seed(0)
            weight = (0.3 * torch.randn(67, 16)).to(device).requires_grad_()
            optimizer = torch.optim.SGD([weight], lr=0.5 if reduction == "mean" else 0.05)
            losses = []
            for _ in range(10):
                idx = torch.randint(67, (4,)).to(device)
                loss = op(F.embedding(idx, weight), weight, (3 * idx + 1) % 67, **options).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            runs.append((torch.stack(losses), weight.detach()))
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert runs[0][0][-1] < runs[0][0][0]
