"""token_position_embedding: runs of equal indices, dropout drawn twice alike, and no address from a bad index."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import count_launches, grid_order, red_zones
from numerics import check

from fastgpt2.kernels import _tuning
from fastgpt2.kernels._configurations import Key
from fastgpt2.kernels.embedding import token_position_embedding, token_position_embedding_reference

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
WINDOW = _tuning.config(Key("embedding_segment_sum"), torch.device("cpu"))["WINDOW"]
NAMES = ("idx", "token_weight", "position_weight")


def make(B, T, V, P, C, dtype=torch.float32, device="cpu"):
    """idx (B, T), token_weight (V, C), position_weight (P, C)."""
    weights = (torch.randn(rows, C, device=device).to(dtype).requires_grad_() for rows in (V, P))
    return torch.randint(V, (B, T), device=device), *weights


def check_rule(inputs, **options):
    return check(
        lambda *t: token_position_embedding(*t, **options),
        lambda *t: token_position_embedding_reference(*t, **options),
        *inputs,
        names=NAMES,
    )


@pytest.mark.parametrize("positions", [None, "(T,)", "(B, T)"])
@every_dtype
def test_rule(dtype, positions, device):
    B, T, V, P, C = 3, 23, 11, 29, 40
    shape = {"(T,)": (T,), "(B, T)": (B, T)}.get(positions)
    check_rule(
        make(B, T, V, P, C, dtype, device), positions=None if shape is None else torch.randint(P, shape, device=device)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_output_in_16_bits_is_rounded_once(dtype, device):
    """And gradients of fp32 tables are sums in fp32 of its gradient."""
    idx, token_weight, position_weight = make(3, 23, 11, 29, 40, device=device)
    y = token_position_embedding(idx, token_weight, position_weight, dtype=dtype)
    reference = token_position_embedding_reference(idx, token_weight, position_weight)
    assert y.dtype == dtype and torch.equal(y, reference.to(dtype))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (token_weight, position_weight), dy)
    expected = torch.autograd.grad(reference, (token_weight, position_weight), dy.float())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (2, 5, 3, 7, 13),
        (1, 9, 50257, 9, 64),
        (5, 1, 2, 4, 257),
        *((2, 3, 4, 5, C) for C in (768, 1024, 1280, 1600)),
    ],
    ids=str,
)
@every_dtype
def test_rule_for_shapes(shape, dtype, device):
    check_rule(make(*shape, dtype, device))


@pytest.mark.parametrize("wide", [0, 1])
def test_weights_of_two_dtypes(wide, device):
    idx, *weights = make(2, 5, 7, 9, 24, torch.bfloat16, device)
    weights[wide] = weights[wide].detach().float()
    check_rule((idx, *weights))


@pytest.mark.parametrize(
    "runs",
    [
        [1] * 5,
        [WINDOW],
        [WINDOW + 1],
        [WINDOW - 1, 2],
        [3 * WINDOW],
        [5, 3 * WINDOW, 2],
        [WINDOW // 2, WINDOW // 2, 2 * WINDOW, 1],
        [WINDOW, WINDOW, WINDOW],
        [WINDOW - 1, WINDOW + 1, 1, WINDOW - 1],
        [10 * WINDOW + 3, 4],
    ],
    ids=str,
)
def test_runs_of_every_length(runs, device):
    """Runs of equal tokens that end within, at and after the ends of windows; exact sums of small integers."""
    idx = torch.cat([torch.full((n,), 2 * i) for i, n in enumerate(runs)])
    idx = idx[torch.randperm(idx.numel())].to(device).view(1, -1)
    weight = torch.zeros(2 * len(runs) + 3, 24, device=device, requires_grad=True)
    positions = torch.zeros(idx.shape[1], 24, device=device)
    upstream = torch.randint(-8, 9, (*idx.shape, 24), device=device).float()
    token_position_embedding(idx, weight, positions).backward(upstream)
    expected = torch.zeros_like(weight).index_add(0, idx.flatten(), upstream[0])
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_order_of_programs_does_not_matter(order, device):
    idx, *weights = make(3, 40, 4, 64, 40, torch.float32, device)
    positions = torch.randint(5, (3, 40), device=device)
    upstream = torch.randn(3, 40, 40, device=device)

    def gradients():
        return torch.autograd.grad(token_position_embedding(idx, *weights, positions), weights, upstream)

    plain = gradients()
    with grid_order(order):
        assert all(map(torch.equal, plain, gradients()))


def test_frequent_tokens_are_added_up_in_fp32(device):
    """In bfloat16 a running sum of ones would stop at 256."""
    idx = torch.zeros(1, 520, dtype=torch.int64, device=device)
    weights = [torch.zeros(rows, 8, dtype=torch.bfloat16, device=device, requires_grad=True) for rows in (3, 520)]
    token_position_embedding(idx, *weights).sum().backward()
    assert weights[0].grad[0].eq(520).all() and weights[1].grad.eq(1).all()


def test_strided_indices_weights_and_gradients(device):
    idx, token_weight, position_weight = make(4, 6, 11, 9, 24, torch.float32, device)
    cases = [
        (idx.t().contiguous().t(), token_weight, position_weight),
        (idx[:, ::2], token_weight[::2].expand(6, 24), position_weight),
        (idx[:1].expand(4, 6), torch.randn(11, 48, device=device)[:, ::2], torch.randn(24, 9, device=device).t()),
    ]
    for i, w, p in cases:
        check_rule((i % w.shape[0], w.detach(), p.detach()))
    for make_upstream in (
        lambda y: torch.ones((), device=y.device).expand_as(y),
        lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1], device=y.device)[..., ::2],
        lambda y: torch.randn(y.shape[1], y.shape[0], y.shape[2], device=y.device).transpose(0, 1),
    ):
        check(
            token_position_embedding,
            token_position_embedding_reference,
            idx, token_weight, position_weight, names=NAMES, upstream=make_upstream,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_no_rows(shape, device):
    idx, *weights = make(*shape, 7, 9, 24, torch.bfloat16, device)
    y = token_position_embedding(idx, *weights)
    y.sum().backward()
    assert y.shape == (*shape, 24) and not any(w.grad.any() for w in weights)


@pytest.mark.parametrize("bad", [-1, 11, 2**31, 2**32 + 3, -(2**40)])
def test_index_outside_its_table_is_no_address(bad, device):
    idx, token_weight, position_weight = make(2, 5, 11, 9, 24, torch.float32, device)
    positions = torch.randint(9, (2, 5), device=device)
    idx[0, 1], positions[1, 3] = bad, bad
    with red_zones() as zone:
        weights = zone(token_weight), zone(position_weight)
        y = token_position_embedding(zone(idx), *weights, zone(positions))
        grads = torch.autograd.grad(y, weights, torch.ones_like(y))
    assert y.isnan().any(-1).nonzero().tolist() == [[0, 1], [1, 3]]
    for table, index, grad in zip(weights, (idx, positions), grads, strict=True):
        known = index[(index >= 0) & (index < len(table))]
        assert torch.equal(grad[:, 0], torch.bincount(known, minlength=len(table)).float())


# ---------------------------------------------------------------------------------------------------- dropout


def kept(y: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements dropout kept, seen from the embedding of weights that are one half each."""
    assert set((y * (1 - p)).unique().tolist()) <= {0.0, 1.0}
    return y != 0


def test_dropout_keeps_what_it_says_by_seed(device):
    idx = torch.zeros(4, 25, dtype=torch.int64, device=device)
    halves = [torch.full((rows, 40), 0.5, device=device) for rows in (3, 25)]
    seeds = [torch.tensor([s], device=device) for s in (7, 7, 8, 2**62)]
    masks = [kept(token_position_embedding(idx, *halves, dropout_p=0.25, seed=s), 0.25) for s in seeds]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3])
    for mask in masks:
        assert abs(mask.float().mean() - 0.75) < 4 * (0.25 * 0.75 / mask.numel()) ** 0.5
        assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[0, 0], mask[0, 1])


def test_dropout_without_a_seed_draws_from_torchs_generator(device):
    idx, *weights = make(2, 5, 7, 9, 24, torch.float32, device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(token_position_embedding(idx, *weights, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(token_position_embedding(idx, *weights, dropout_p=0.0), token_position_embedding(idx, *weights))


@pytest.mark.parametrize("with_positions", [False, True])
@every_dtype
def test_rule_with_dropout(dtype, with_positions, device):
    B, T, P, p = 3, 15, 20, 0.4
    idx, *weights = make(B, T, 4, P, 40, dtype, device)
    positions = torch.randint(P, (B, T), device=device) if with_positions else None
    seed = torch.tensor(3, device=device)
    halves = [torch.full_like(w, 0.5, dtype=torch.float32) for w in weights]
    keep = kept(token_position_embedding(idx, *halves, positions, dropout_p=p, seed=seed), p)
    check(
        lambda *t: token_position_embedding(*t, positions, dropout_p=p, seed=seed),
        lambda *t: token_position_embedding_reference(*t, positions, dropout_p=p, keep=keep),
        idx, *weights, names=NAMES,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- autograd, operators


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_positions", [False, True])
def test_gradcheck(with_positions, dropout_p, device):
    idx, *weights = make(2, 3, 2, 3, 2, torch.float64, device)
    positions = torch.randint(3, (2, 3), device=device) if with_positions else None
    seed = torch.tensor([5], device=device)

    def op(*weights):
        return token_position_embedding(idx, *weights, positions, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(op, weights)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_weight_costs_no_launch(frozen, device):
    idx, *weights = make(2, 5, 7, 9, 24, torch.float32, device)
    weights[frozen].requires_grad_(False)
    with count_launches() as log:
        token_position_embedding(idx, *weights).sum().backward()
    backward = ["_batch_sum_kernel"] if frozen == 0 else ["_segment_sum_kernel"]
    assert [launch.name for launch in log] == ["_embedding_fwd_kernel", *backward]
    assert weights[frozen].grad is None and weights[1 - frozen].grad is not None


def test_tied_weight_gets_the_sum_of_both_gradients(device):
    idx, token_weight, position_weight = make(2, 5, 7, 9, 24, torch.float32, device)

    def gradient(embed):
        h = embed(idx, token_weight, position_weight)
        return torch.autograd.grad(F.linear(h, token_weight).square().sum(), token_weight)[0]

    torch.testing.assert_close(gradient(token_position_embedding), gradient(token_position_embedding_reference))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_whole_with_dynamic_shapes(dropout_p, device):
    seed = torch.tensor([5], device=device)

    def op(idx, *weights):
        return token_position_embedding(idx, *weights, dropout_p=dropout_p, seed=seed) * 2

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for B, T in ((2, 5), (3, 9), (4, 7)):
        idx, *weights = make(B, T, 7, 16, 24, torch.float32, device)
        upstream = torch.randn(B, T, 24, device=device)
        results = [f(idx, *weights) for f in (compiled, op)]
        assert torch.equal(*results)
        assert all(map(torch.equal, *(torch.autograd.grad(y, weights, upstream) for y in results)))


def test_opcheck(device):
    idx, *weights = make(2, 5, 7, 9, 24, torch.float32, device)
    positions, seed = torch.randint(9, (2, 5), device=device), torch.tensor([5], device=device)
    for p, s in ((None, None), (positions, seed)):
        arguments = (idx, *weights, p, s, 0.3 if s is not None else 0.0)
        torch.library.opcheck(torch.ops.fastgpt2.token_position_embedding_fwd.default, arguments)
    dy = torch.randn(2, 5, 24, device=device)
    arguments = (dy, idx, positions, seed, 0.3, 7, 9, torch.float32, None)
    torch.library.opcheck(torch.ops.fastgpt2.token_position_embedding_bwd.default, arguments)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "idx is torch.int32, allowed is torch.int64", dict(idx=torch.zeros(2, 3, dtype=torch.int32))),
        (TypeError, "positions is torch.float32", dict(positions=torch.zeros(3))),
        (TypeError, "token_weight is torch.int64", dict(token_weight=torch.zeros(7, 4, dtype=torch.int64))),
        (ValueError, r"idx has shape \(3,\), expected \(B, T\)", dict(idx=torch.zeros(3, dtype=torch.int64))),
        (ValueError, r"position_weight has shape \(9, 5\), expected \(9, 4\)", dict(position_weight=torch.zeros(9, 5))),
        (ValueError, "idx has 10 positions, position_weight 9 rows", dict(idx=torch.zeros(1, 10, dtype=torch.int64))),
        (
            ValueError,
            r"positions has shape \(2,\), expected \(2, 3\)",
            dict(positions=torch.zeros(2, dtype=torch.int64)),
        ),
        (ValueError, r"dropout_p is 1.0, allowed is \[0, 1\)", dict(dropout_p=1.0)),
        (TypeError, "dtype is torch.int32, allowed are torch.bfloat16, .* and None", dict(dtype=torch.int32)),
        (
            ValueError,
            r"seed is torch.int32 of shape \(1,\)",
            dict(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int32)),
        ),
    ],
    ids=lambda x: None if isinstance(x, (dict, type)) else x[:20],
)
def test_errors_name_argument_value_and_toggle(error, message, change):
    arguments = dict(
        idx=torch.zeros(2, 3, dtype=torch.int64), token_weight=torch.zeros(7, 4), position_weight=torch.zeros(9, 4)
    )
    with pytest.raises(error, match=f"^token_position_embedding: {message}.*embedding='torch'"):
        token_position_embedding(**arguments | change)
