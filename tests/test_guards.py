"""What every kernel must keep, whatever it computes: its memory, its order, its inputs, and the host's hands off it.

Each guard runs every call of `calls.py`, forward and backward, and asks for the same bits as a plain run. The cases of
bench/cases/ops/, at GPT-2's widths, go through all guards at once.
"""

import contextlib
import functools

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from calls import CALLS
from interpreter import BackwardToo, far_apart, grid_order, red_zones
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import Case
from fastgpt2.bench.cases.ops.attention import diagonal_first
from fastgpt2.bench.cases.registry import all_cases
from fastgpt2.kernels._cross_entropy import cross_entropy_
from fastgpt2.kernels.attention import causal_attention
from fastgpt2.kernels.embedding import token_position_embedding
from fastgpt2.kernels.gelu import gelu
from fastgpt2.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt2.kernels.mlp import fused_mlp

# exp2 overflows where GELU's tail is 0: numpy warns of it, hardware does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16)
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda c: c.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter runs programs in turn")


@functools.cache
def plain(call: Call, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    results = call.results(call.inputs(dtype, device))
    assert all(r.isfinite().all() for r in results), "poisoned memory, or a wrong number, reached a result"
    return results


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        different = a.contiguous().view(-1).view(torch.uint8) != b.contiguous().view(-1).view(torch.uint8)
        assert not different.any(), f"result {i}: {int(different.sum())} bytes of {different.numel()} differ"


def snapshot(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


class Fresh(BackwardToo):
    """torch.empty and its kin give `value` instead of the poison: what is never written shows up as a difference."""

    ALLOCATORS = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made.fill_(self.value) if func in self.ALLOCATORS else made


class HostSync(AssertionError):
    """The host waited for, or looked at, what a tensor on a GPU holds."""


class NoSync(TorchDispatchMode):
    """Refuses the operators whose result, or its shape, the host must wait for."""

    aten = torch.ops.aten
    REFUSED = {
        *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim),
        *(aten._unique, aten._unique2, aten.unique_consecutive, aten.repeat_interleave, aten.bincount),
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        masks = indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func.overloadpacket in self.REFUSED or masks:
            raise HostSync(f"host sync: {func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync():
    """Also refuses `tolist` and `numpy`, which read a CPU tensor without an operator."""

    class NoLook(BackwardToo):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (Tensor.tolist, Tensor.numpy):
                raise HostSync(f"host sync: {func.__name__}")
            return func(*args, **(kwargs or {}))

    with NoLook(), NoSync():
        yield


# ------------------------------------------------------------------------------------------------------ the guards


@every_dtype
@every_call
def test_only_its_own_memory_is_read_and_written(call, dtype, device):
    inputs = call.inputs(dtype, device)
    with red_zones() as zone:
        zoned = tuple(zone(t) for t in inputs)
        assert_same_bits(call.results(zoned, zone), plain(call, dtype, device))
        assert_same_bits(snapshot(zoned), snapshot(inputs))


@interpreted
@pytest.mark.parametrize("dtype, order", zip(DTYPES, ("reversed", "shuffled"), strict=True), ids=str)
@every_call
def test_programs_run_in_any_order(call, dtype, order, device):
    with grid_order(order):
        results = call.results(call.inputs(dtype, device))
    assert_same_bits(results, plain(call, dtype, device))


@every_dtype
@every_call
def test_every_output_is_written(call, dtype, device):
    with Fresh(12345.0):
        results = call.results(call.inputs(dtype, device))
    assert_same_bits(results, plain(call, dtype, device))


@every_dtype
@every_call
def test_repeated_runs_agree_without_a_host_sync(call, dtype, device):
    inputs = call.inputs(dtype, device)
    memory = {t.untyped_storage().data_ptr() for t in inputs}
    with no_sync():
        results = call.results(inputs)
    assert_same_bits(results, plain(call, dtype, device))
    shared = [i for i, r in enumerate(results) if r.numel() and r.untyped_storage().data_ptr() in memory]
    assert not shared, f"results {shared} are inputs' memory"


@pytest.mark.parametrize("call", [c for c in CALLS if c.differentiable], ids=lambda c: c.name)
def test_backward_runs_twice(call, device):
    """What forward saved is not consumed by backward."""
    inputs = call.inputs(torch.float32, device)
    outputs = call.function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [t for t in inputs if t.is_floating_point()]
    backward = functools.partial(torch.autograd.grad, outputs, floating, outputs, allow_unused=True, retain_graph=True)
    first = snapshot(tuple(g for g in backward() if g is not None))
    assert_same_bits([g for g in backward() if g is not None], first)


# ------------------------------------------------------------------------------------------- offsets beyond 32 bits


OFFSETS = {
    "gelu": (gelu, (3, 24)),
    "fused_mlp": (fused_mlp, (3, 24), (40, 24), (40,), (24, 40)),
    "layer_norm": (layer_norm, (3, 24), (24,)),
    "add_layer_norm": (add_layer_norm, (3, 24), (3, 24), (24,)),
    "attention rows": (lambda qkv: causal_attention(qkv[None], 1), (3, 48)),
    "attention batch": (lambda qkv: causal_attention(qkv, 1), (3, 2, 48)),
    "attention over many tiles": (lambda qkv: causal_attention(qkv[None], 1), (300, 48)),
    "attention over many tiles, the diagonal first": (lambda qkv: diagonal_first(1, qkv[None]), (300, 48)),
    "attention in a window far from the first token": (lambda qkv: causal_attention(qkv[None], 1, window=7), (300, 48)),
    "attention of documents": (
        lambda qkv: causal_attention(qkv, 1, cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32)),
        (3, 2, 48),
    ),
    "embedding": (lambda wte, wpe: token_position_embedding(torch.tensor([[2, 0, 2]]), wte, wpe), (3, 24), (3, 24)),
    "embedding batch": (
        lambda wte, wpe: token_position_embedding(torch.tensor([[0], [2], [1]]), wte, wpe),
        (3, 24),
        (3, 24),
    ),
}


@interpreted
@pytest.mark.parametrize("what", OFFSETS)
def test_offsets_have_64_bits(what):
    """Rows of inputs, and of the gradient that comes back, lie 2 GiB apart."""
    function, *shapes = OFFSETS[what]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]

    def results(move):
        own = [(move(t) if t.dim() > 1 else t.clone()).requires_grad_() for t in inputs]
        outputs = function(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in outputs]
        far = [move(g) if g.shape[0] > 1 else move(g[0])[None] for g in upstream]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, own, far)]

    assert_same_bits(results(far_apart), results(torch.clone))


@interpreted
def test_logits_offsets_have_64_bits():
    def losses_and_gradients(logits):
        losses = torch.empty(3)
        cross_entropy_(logits, torch.tensor([1, 9, 5]), torch.ones(1), losses, -100, 0.0, 0.0, True)
        return [losses, logits]

    logits = torch.randn(3, 10)
    padded = torch.empty(3, 64)[:, :10].copy_(logits)
    assert_same_bits(losses_and_gradients(far_apart(logits)), losses_and_gradients(padded))


def small_cases() -> list[Case]:
    """Every op's cases with few rows, the narrowest and widest model, and an odd vocabulary smaller than GPT-2's.

    The two slowest ops come once: `every_call` has them in more dtypes.
    """
    every = list(all_cases(rows=8, widths=(768, 1600), V=5003))
    slow = ("causal_attention", "linear_cross_entropy")
    return [case for case in every if case.op not in slow or (case.dtype == torch.bfloat16 and not case.autocast)]


@pytest.mark.parametrize("case", small_cases(), ids=lambda c: c.name)
def test_cases_of_the_registry(case, device):
    inputs = case.inputs(device)
    outputs = case.forward(inputs)
    upstream = tuple(torch.randn(o.shape, device=device).to(o.dtype) for o in outputs)

    def results(inputs, outputs, upstream):
        return [o.detach() for o in outputs] + list(case.backward(inputs, outputs, upstream))

    expected = results(inputs, outputs, upstream)
    assert all(r.isfinite().all() for r in expected)
    order = grid_order("shuffled") if triton.knobs.runtime.interpret else contextlib.nullcontext()
    with red_zones() as zone, order:
        zoned = tuple(zone(t) if isinstance(t, Tensor) else t for t in inputs)
        zoned_upstream = tuple(map(zone, upstream))
        with no_sync():
            again = results(zoned, case.forward(zoned), zoned_upstream)
    assert_same_bits(again, expected)
    assert_same_bits(snapshot(zoned + zoned_upstream), snapshot(inputs + upstream))


# ------------------------------------------------------------------------------------------- each guard shown to bite


@triton.jit
def _twice_kernel(x_ptr, y_ptr, N, LESS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, 2.0 * x, mask=offs < N - LESS)


def twice(x: Tensor, less: int = 0) -> Tensor:
    y = torch.empty_like(x)
    _twice_kernel[(triton.cdiv(x.numel(), 8),)](x, y, x.numel(), less, 8)
    return y


def test_an_unwritten_element_is_seen(device):
    x = torch.randn(20, device=device)
    for less in (0, 1):
        with Fresh(12345.0):
            y = twice(x, less)
        assert bool((y == 12345.0).any()) == bool(less)
        assert bool(twice(x, less).isnan().any()) == bool(less)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.arange(x.long().max()),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_look_at_the_values_is_seen(look):
    with pytest.raises(HostSync), no_sync():
        look(torch.randn(4))


def test_a_changed_bit_is_seen():
    x = torch.zeros(3)
    with pytest.raises(AssertionError, match="result 1: 1 bytes of 12"):
        assert_same_bits([x, torch.tensor([0.0, -0.0, 0.0])], [x, x])
    with pytest.raises(interpreter.OutOfBounds), red_zones() as zone:
        moved = zone(x)
        moved.as_strided((4,), (1,), moved.storage_offset()).zero_()
