"""The gradient of c_attn's bias, which attention's backward sums up while it has dqkv in registers."""

import pytest
import torch
from attention_inputs import DTYPES, packed, tiles
from interpreter import count_launches
from numerics import check
from shadow_runs import a_batch, new_model

from fastgpt2.bench.audit.dispatch import count_traffic
from fastgpt2.kernels import _tuning
from fastgpt2.kernels.attention import causal_attention, causal_attention_reference
from fastgpt2.kernels.attention_backward import causal_attention_bwd

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


SHAPES = [(1, 1, 1, 64), (2, 63, 3, 16), (1, 129, 2, 64), (2, 40, 2, 17), (1, 67, 1, 128)]  # B, T, H, D


def biased_reference(qkv, bias, n_head: int, **options):
    """qkv has the bias already: what is added is 0 and has its gradient."""
    return causal_attention_reference(qkv + (bias - bias.detach()).to(qkv.dtype), n_head, **options)


def rule(qkv, n_head: int, bias_dtype=None, **options):
    bias = torch.zeros(qkv.shape[2], dtype=bias_dtype or qkv.dtype, device=qkv.device)
    return check(
        lambda x, b: causal_attention(x, n_head, bias=b, **options),
        lambda x, b: biased_reference(x, b, n_head, **options),
        *(qkv, bias),
        names=("qkv", "bias"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape, dtype, device):
    rule(packed(*shape, dtype, device), shape[2])


def test_many_tiles_and_rows(device):
    with tiles(DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16):
        rule(packed(3, 150, 2, 16, torch.float32, device), 2)


@pytest.mark.parametrize("shape", [(3, 150, 2, 48), (2, 13, 3, 64)], ids=str)
def test_from_the_diagonal_on(shape, device):
    with tiles(DIAGONAL_FIRST=True, DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16):
        rule(packed(*shape, torch.bfloat16, device), shape[2])


def test_tiles_of_keys_and_queries_of_other_sizes(device):
    """Their numbers differ, and the sum is PyTorch's."""
    with tiles(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=32, DQ_BLOCK_N=16):
        rule(packed(2, 70, 2, 16, torch.float32, device), 2)


def test_every_row_of_the_table_has_tiles_of_one_size():
    rows = [row for table in (_tuning.TABLE, *_tuning.BEFORE_TRITON.values()) for key, row in table.items()
            if key.op == "attention_bwd"]  # fmt: skip
    for row in rows:
        assert all(options.DKV_BLOCK_N == options.DQ_BLOCK_M for options in row.values())


@pytest.mark.parametrize("what", ["documents", "window", "documents, window"])
def test_bounds(what, device):
    """Some tokens are outside all documents: their gradients are 0."""
    options: dict = dict(window=17) if "window" in what else {}
    if "documents" in what:
        options["cu_seqlens"] = torch.tensor([3, 40, 41, 80, 147], dtype=torch.int32, device=device)
    with tiles(DKV_BLOCK_M=16, DKV_BLOCK_N=16, DQ_BLOCK_M=16, DQ_BLOCK_N=16):
        rule(packed(2, 75, 2, 16, torch.float32, device), 2, **options)


def test_float32_bias_of_16_bit_activations(device):
    """As under autocast. Rows are summed before dqkv is rounded, so that the error is far below eager's."""
    errors = rule(packed(2, 150, 2, 32, torch.bfloat16, device), 2, torch.float32)
    assert errors["grad of bias"].ours < errors["grad of bias"].eager


def test_dropout(device):
    """The sum of dqkv as it is, whose numbers other tests hold."""
    qkv = packed(2, 70, 2, 16, torch.float32, device).requires_grad_()
    bias, seed = torch.zeros(96, device=device, requires_grad=True), torch.tensor([5], device=device)
    y = causal_attention(qkv, 2, dropout_p=0.3, seed=seed, bias=bias)
    dqkv, dbias = torch.autograd.grad(y.square().sum(), (qkv, bias))
    torch.testing.assert_close(dbias, dqkv.sum((0, 1)))


def test_launches(device):
    qkv = packed(1, 70, 2, 16, torch.float32, device).requires_grad_()
    bias = torch.zeros(96, device=device, requires_grad=True)
    for b, launches in ((bias, 3), (bias.detach(), 2), (None, 2)):
        y = causal_attention(qkv, 2, bias=b)
        with count_launches() as log:
            y.sum().backward()
        assert len(log) == launches


def test_the_bias_alone(device):
    qkv, bias = packed(1, 20, 2, 16, torch.float32, device), torch.zeros(96, device=device, requires_grad=True)
    causal_attention(qkv, 2, bias=bias).square().sum().backward()
    both = qkv.clone().requires_grad_()
    again = bias.detach().clone().requires_grad_()
    causal_attention(both, 2, bias=again).square().sum().backward()
    assert torch.equal(bias.grad, again.grad) and bias.grad.any()


def test_no_tokens(device):
    qkv = packed(2, 0, 2, 16, torch.float32, device).requires_grad_()
    bias = torch.zeros(96, device=device, requires_grad=True)
    causal_attention(qkv, 2, bias=bias).sum().backward()
    assert bias.grad.shape == (96,) and not bias.grad.any()


def test_repeated_runs_are_bitwise_equal(device):
    qkv = packed(2, 150, 2, 16, torch.float32, device).requires_grad_()
    bias = torch.zeros(96, device=device, requires_grad=True)
    runs = [torch.autograd.grad(causal_attention(qkv, 2, bias=bias).square().sum(), bias)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_operators(device):
    qkv, bias = packed(2, 20, 2, 16, torch.float32, device), torch.zeros(96, device=device)
    common = (2, 0.25, 0.0, None, None, None, False)
    inputs = (qkv.clone().requires_grad_(), *common, bias.clone().requires_grad_())
    torch.library.opcheck(torch.ops.fastgpt2.causal_attention_fwd.default, inputs)
    out, lse = torch.ops.fastgpt2.causal_attention_fwd(qkv, *common)
    backward = (torch.ones_like(out), qkv, out, lse, *common, torch.float32)
    torch.library.opcheck(torch.ops.fastgpt2.causal_attention_bwd.default, backward)
    assert causal_attention_bwd(*backward[:-1])[1] is None


def test_an_error_names_the_bias(device):
    with pytest.raises(ValueError, match=r"bias has shape \(95,\), expected \(96,\).*attention='torch'"):
        causal_attention(packed(1, 4, 2, 16, torch.float32, device), 2, bias=torch.zeros(95, device=device))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_does_not_read_dqkv_for_the_bias(autocast, device):
    """And it has PyTorch's gradient. The head and the loss are left to PyTorch, whose sums are those counted."""
    gradients = {}
    for kernels in ("torch", "attention,layer_norm,mlp"):
        model, (idx, targets) = new_model(device, kernels, n_layer=2), a_batch(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(idx, targets)[1]
        with count_traffic() as traffic:
            loss.backward()
        gradients[kernels] = [block.attn.c_attn.bias.grad for block in model.transformer.h], traffic.calls["sum"]
    (theirs, more), (ours, less) = gradients.values()
    assert more - less >= 2 * 4, "of four linear layers"
    for a, b in zip(ours, theirs, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, **(dict(rtol=2**-5, atol=2**-9) if autocast else {}))
