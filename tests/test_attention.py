"""Causal attention on packed qkv: numbers, layouts, launches, and the operator around it."""

import pytest
import torch
from attention_inputs import DTYPES, interpreted, offsets, packed, rule
from interpreter import count_launches, red_zones
from numerics import compare

from fastgpt2.kernels._attention_tiles import rows_contiguous
from fastgpt2.kernels.attention import causal_attention, causal_attention_fwd, causal_attention_reference, visible

# Numpy warns where hardware does not: exp2 of a masked score may overflow before the mask sets it to 0, and some tests
# put NaN where nobody may look.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


# --------------------------------------------------------------------------------------------------------- numbers

SHAPES = [  # B, T, H, D; on the table's sm_80 rows 16-bit tiles are 64 to 128 tokens, float32 ones 16 to 32
    (1, 1, 1, 64),
    (2, 2, 3, 16),
    (2, 63, 1, 64),
    (1, 65, 2, 32),
    (1, 129, 1, 64),
    (1, 67, 1, 128),
    (2, 40, 2, 17),
    (1, 70, 1, 24),
    (1, 45, 1, 100),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(device, shape, dtype):
    rule(packed(*shape, dtype, device), shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [12, 16, 20, 25])
def test_rule_at_gpt2s_widths(device, H, dtype):
    rule(packed(1, 19, H, 64, dtype, device), H)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_rule_on_many_tiles(device, dtype):
    """Long enough for every part of the run of tiles: masked, whole, past the end."""
    rule(packed(1, 321, 1, 64, dtype, device), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_large_scores(device, dtype):
    """Scores in the hundreds or thousands: one key takes everything, and nothing overflows.

    In float32 less: backward knows p by lse alone, whose own rounding grows with the scores, unlike eager's.
    """
    rule((3 if dtype == torch.float32 else 20) * packed(2, 50, 8, 32, dtype, device), 8, scale=0.5)


def test_equal_scores(device):
    qkv = torch.ones(1, 40, 3 * 32, device=device)
    expected = torch.ones(1, 40, 32, device=device)
    torch.testing.assert_close(causal_attention(qkv, 1), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_one_huge_value(device):
    qkv = packed(1, 40, 1, 32, torch.float32, device)
    qkv[0, 7, 70] = 1e30  # in v: it must not reach queries before 7
    rule(qkv, 1)
    assert causal_attention(qkv, 1)[0, :7].abs().max() < 10


def test_tf32_only_when_asked(device):
    qkv = packed(1, 70, 2, 64, torch.float32, device)
    truth = causal_attention_reference(qkv.double(), 2)
    exact, short = ((causal_attention(qkv, 2, tf32=tf32) - truth).abs().max() for tf32 in (False, True))
    assert exact < 2e-6 and 5e-5 < short < 5e-3


def test_log_sum_exp(device):
    """What backward relies on: base 2, float32, every head in its place, finite where nothing is seen."""
    qkv = packed(2, 70, 3, 16, torch.float16, device)
    cu_seqlens = offsets(device, 5, 90)
    _, lse = causal_attention_fwd(qkv, 3, 0.25, 0.0, None, cu_seqlens, None, False)
    q, k, _ = qkv.double().view(2, 70, 3, 3, 16).permute(2, 0, 3, 1, 4)
    seen = visible(2, 70, cu_seqlens, device=device)
    truth = (q @ k.mT * 0.25).masked_fill(~seen, -torch.inf).logsumexp(-1) * torch.tensor(2.0).log().reciprocal()
    truth = truth.where(seen.any(-1), 0.0)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, 70)
    torch.testing.assert_close(lse.double(), truth, atol=1e-5, rtol=1e-5)


def test_same_bits_every_time(device):
    qkv = packed(2, 40, 2, 16, torch.float32, device).requires_grad_()

    def run():
        out = causal_attention(qkv, 2)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    first = run()
    for again in (run(), run()):
        assert all(map(torch.equal, first, again))


# --------------------------------------------------------------------------------------------- layouts and launches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "strided",
    [
        lambda B, T, N: torch.randn(B, T, N + 24)[..., 8 : N + 8],
        lambda B, T, N: torch.randn(T, B, N).transpose(0, 1),
        lambda B, T, N: torch.randn(B, 3 * T, N)[:, 1::3],
        lambda B, T, N: torch.randn(B, 1, N).expand(B, T, N),
        lambda B, T, N: torch.randn(1, T, N).expand(B, T, N),
        lambda B, T, N: torch.randn(B, N, T).transpose(1, 2),
    ],
    ids=["slice", "time-first", "every-third", "one-token", "one-row", "channels-last"],
)
def test_strided(device, strided, dtype):
    rule(strided(2, 50, 96).to(device, dtype), 2)


@pytest.mark.parametrize(
    "upstream",
    [
        lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand_as(y),
        lambda y: torch.randn(*y.shape[:2], 1, dtype=y.dtype).to(y.device).expand_as(y),
        lambda y: torch.randn(*y.shape[:1], 1, y.shape[2], dtype=y.dtype).to(y.device).expand_as(y),
        lambda y: torch.randn(*y.shape[:2], 5 + y.shape[2], dtype=y.dtype).to(y.device)[..., 5:],
    ],
    ids=["scalar", "column", "row", "slice"],
)
def test_strided_gradients(device, upstream):
    rule(packed(2, 50, 2, 16, torch.float32, device), 2, upstream=upstream)


def test_rows_too_far_apart_for_32_bits_are_copied():
    near = torch.empty(1, 2, 48)
    far = torch.empty(2**24 + 1, dtype=torch.uint8).as_strided((1, 2, 1), (1, 2**24, 1))
    assert rows_contiguous(near) is near
    assert rows_contiguous(far).stride(1) == 1 and torch.equal(rows_contiguous(far), far)


@pytest.mark.parametrize("shape", [(0, 5, 96), (2, 0, 96)])
def test_empty(device, shape):
    qkv = torch.empty(shape, device=device, requires_grad=True)
    out = causal_attention(qkv, 2)
    assert out.shape == (*shape[:2], 32)
    out.sum().backward()
    assert qkv.grad.shape == shape


def test_launches(device):
    """One forward; two backward: delta, then dq, dk and dv. No copies of a sliced input."""
    qkv = packed(1, 40, 2, 20, torch.float32, device)[..., 0:96].requires_grad_()
    with count_launches() as log:
        out = causal_attention(qkv, 2)
        assert [launch.name for launch in log] == ["_attention_fwd_kernel"]
        out.backward(torch.ones_like(out))
    assert [launch.name for launch in log][1:] == ["_attention_delta_kernel", "_attention_bwd_kernel"]


@interpreted
def test_bytes(device):
    """Forward moves each tensor once; backward reads dout twice, for delta and for the rest."""
    B, T, H, D = 1, 256, 2, 64
    qkv = packed(B, T, H, D, torch.bfloat16, device).requires_grad_()
    with count_launches() as log:
        out = causal_attention(qkv, H)
        out.backward(torch.ones_like(out))
    element, statistics = 2 * B * T * H * D, 4 * B * H * T
    assert log[0].bytes_read + log[0].bytes_written == 4 * element + statistics
    moved = sum(launch.bytes_read + launch.bytes_written for launch in log[1:])
    assert moved == 9 * element + 3 * statistics  # delta is written, then read beside lse
    assert moved <= 1.15 * (8 * element + statistics)


@interpreted
@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=str)
def test_red_zones(device, options):
    """NaN around and between the rows that may be read, canaries around what may be written."""
    qkv = torch.randn(2, 37, 3 * 40 + 8)[..., :120].to(device).requires_grad_()
    plain = causal_attention(qkv, 2, **options)
    dplain = torch.autograd.grad(plain, qkv, torch.ones_like(plain))[0]
    with red_zones() as zone:
        guarded = zone(qkv)
        out = causal_attention(guarded, 2, **options)
        dqkv = torch.autograd.grad(out, guarded, zone(torch.ones_like(out)))[0]
    assert torch.equal(out, plain) and torch.equal(dqkv, dplain)


# -------------------------------------------------------------------------------------------- operator and autograd


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7, "scale": 0.7}, {"cu_seqlens": (2, 13, 29)}, {"dropout_p": 0.4}],
    ids=str,
)
def test_gradcheck(device, options):
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": offsets(device, *options["cu_seqlens"])}
    if "dropout_p" in options:
        options = options | {"seed": torch.tensor(5, device=device)}
    qkv = torch.randn(2, 17, 3 * 16, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x: causal_attention(x, 1, **options), qkv, fast_mode=True)


def test_gradcheck_padded_head(device):
    qkv = torch.randn(1, 5, 3 * 17, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda x: causal_attention(x, 1), qkv, fast_mode=True)


def test_double_precision(device):
    """Nothing on the way is rounded to float32."""
    qkv = packed(1, 40, 2, 20, torch.float64, device).requires_grad_()
    upstream = torch.randn(1, 40, 40, dtype=torch.float64).to(device)
    for ours, truth in zip(
        *((out, torch.autograd.grad(out, qkv, upstream)[0]) for out in (causal_attention(qkv, 2, scale=0.3),)),
        *(
            (out, torch.autograd.grad(out, qkv, upstream)[0])
            for out in (causal_attention_reference(qkv, 2, scale=0.3),)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "window": 9}, {"cu_seqlens": True}], ids=str)
def test_opcheck(device, options):
    qkv = packed(2, 20, 2, 16, torch.float32, device).requires_grad_()
    p, window = options.get("dropout_p", 0.0), options.get("window")
    seed = torch.tensor([5], device=device) if p else None
    cu_seqlens = offsets(device, 0, 12, 40) if "cu_seqlens" in options else None
    common = (2, 0.25, p, seed, cu_seqlens, window, False)
    torch.library.opcheck(torch.ops.fastgpt2.causal_attention_fwd.default, (qkv, *common))
    out, lse = causal_attention_fwd(qkv.detach(), *common)
    torch.library.opcheck(
        torch.ops.fastgpt2.causal_attention_bwd.default, (torch.ones_like(out), qkv.detach(), out, lse, *common)
    )


def test_compiled_whole_with_dynamic_time(device):
    """One graph serves every T, forward and backward, and gives eager's bits."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def loss(qkv):
        return causal_attention(qkv * 2, 2).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    counted = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for T in (5, 18, 33):
        qkv = packed(2, T, 2, 16, torch.float32, device).requires_grad_()
        expected = torch.autograd.grad(loss(qkv), qkv)[0]
        assert torch.equal(torch.autograd.grad(compiled(qkv), qkv)[0], expected)
        counted(qkv)
    assert len(graphs) == 1


def test_no_gradient_asked(device):
    qkv = packed(1, 20, 1, 16, torch.float32, device)
    out = causal_attention(qkv, 1)
    assert not out.requires_grad
    with torch.no_grad():
        assert torch.equal(out, causal_attention(qkv.requires_grad_(), 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(qkv=(1, 5, 97)), r"qkv is of shape \(1, 5, 97\) with n_head 2, allowed is \(B, T, 3 \* n_head"),
        (dict(qkv=(5, 96)), "qkv is of shape"),
        (dict(n_head=0), "qkv is of shape .* with n_head 0"),
        (dict(qkv=(1, 5, 90)), "the head size is 15, allowed is 16 to 128"),
        (dict(qkv=(1, 5, 6 * 129)), "the head size is 129, allowed is 16 to 128"),
        (dict(scale=0.0), "scale is 0.0, allowed is a positive number"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(dropout_p=1.0), "dropout_p is 1.0, allowed is 0 <= dropout_p < 1"),
        (dict(window=0), "window is 0, allowed is None or at least 1"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed is torch.int64 .2,. on cpu, allowed is one int64"),
        (dict(seed=torch.zeros(1)), "seed is torch.float32"),
        (dict(cu_seqlens=torch.zeros(3, dtype=torch.int64)), "cu_seqlens is torch.int64 .3,. on cpu, allowed is"),
        (dict(cu_seqlens=torch.zeros(1, dtype=torch.int32)), "cu_seqlens is"),
    ],
)
def test_refused(device, arguments, message):
    arguments = dict(qkv=(1, 5, 96), n_head=2) | arguments
    arguments["qkv"] = torch.zeros(arguments["qkv"], device=device)
    with pytest.raises(ValueError, match=rf"causal_attention: {message}.*attention='torch'"):
        causal_attention(**arguments)


def test_refused_dtype(device):
    with pytest.raises(TypeError, match="causal_attention: qkv is torch.int32, allowed are .*attention='torch'"):
        causal_attention(torch.zeros(1, 5, 96, dtype=torch.int32, device=device), 2)


def test_reference_is_attention(device):
    """The truth that everything here is held to, against PyTorch's own."""
    qkv = packed(2, 33, 2, 16, torch.float64, device)
    q, k, v = (x.view(2, 33, 2, 16).transpose(1, 2) for x in qkv.chunk(3, -1))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    compare(causal_attention_reference(qkv, 2), None, sdpa)
