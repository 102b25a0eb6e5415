"""The kernels of AdamW over many tensors: one step against PyTorch's and against the formula in float64."""

import pytest
import torch
from interpreter import count_launches
from numerics import check, compare

from fastgpt2.bench.cases.ops import adamw as case
from fastgpt2.kernels.adamw import Member, Settings, Update, adamw, adamw_reference

SETTINGS = Settings(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
TILE, CHUNK = 1024, 32768  # of float32, in kernels/_tuning.py


def member(*shape: int, dtype=torch.float32, device="cpu", shadow=None, step: float = 3.0, size: float = 1.0) -> Member:
    p, g, m, v = (size * torch.randn(shape, dtype=torch.float64) for _ in range(4))
    p, g, m, v = (t.to(device, dtype) for t in (p, g, m, v.square()))
    copy = None if shadow is None else torch.empty_like(p, dtype=shadow)
    return Member(p, g, m, v, torch.tensor(step, device=device), copy)


def wide(members: list[Member]) -> list[Member]:
    return [Member(*(t.double() for t in m[:5])) for m in members]


def held_to_the_rule(members: list[Member], settings: Settings = SETTINGS, max_norm: float | None = 1.0) -> None:
    """Steps, and compares p, m and v with the formula in float64."""
    truth, norm = adamw_reference(wide(members), settings, max_norm)
    ours = adamw(members, settings, max_norm)
    for i, new in enumerate(t for m in members for t in (m.parameter, m.exp_avg, m.exp_avg_sq)):
        compare(new, None, truth[i])
    if max_norm is not None:
        compare(ours, None, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [((5, 7), (1,), ()), ((TILE,),), ((TILE + 1,), (3, TILE))], ids=str)
def test_one_step_is_pytorchs(shapes, dtype, device):
    inputs = [torch.randn(shape).to(device, dtype) for shape in shapes for _ in range(4)]

    def reference(*tensors):
        return case._flat(*adamw_reference(case._members(tensors), case.SETTINGS, case.MAX_NORM))

    check(case.ours, reference, *inputs, eager=case.eager, grads=False)


def test_parameters_of_several_chunks(device):
    """Each chunk's end and beginning, and the one element of the last."""
    held_to_the_rule([member(2 * CHUNK + 1, device=device), member(CHUNK, device=device), member(3, device=device)])


def test_float64_stays_float64(device):
    members = [member(5, 7, dtype=torch.float64, device=device)]
    truth, norm = adamw_reference(members, SETTINGS, 0.1)
    ours = adamw(members, SETTINGS, 0.1)
    for got, expected in zip([*(members[0][k] for k in (0, 2, 3)), ours], [*truth, norm], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("step", [0.0, 1.0, 999.0, 2.0**20 - 1])
def test_bias_corrections_have_all_their_digits(step, device):
    """In float32 1 - 0.999^t would lose a hundredthousandth of itself at the first step. Parameters are 0, so that
    nothing else rounds what shows it."""
    members = [member(33, device=device, step=step)]
    members[0].parameter.zero_()
    settings = SETTINGS._replace(beta2=0.999)
    (expected, *_), _ = adamw_reference(wide(members), settings)
    adamw(members, settings)
    torch.testing.assert_close(members[0].parameter.double(), expected, rtol=2e-6, atol=0.0)
    assert members[0].step == step + 1


@pytest.mark.parametrize(("max_norm", "size"), [(None, 1.0), (1.0, 1.0), (1.0, 1e-3), (0.25, 1e4)])
def test_clipping(max_norm, size, device):
    held_to_the_rule([member(3, 5, device=device, size=size), member(7, device=device, size=size)], max_norm=max_norm)


def test_dtypes_side_by_side(device):
    """One norm of all, two launches for each dtype."""
    dtypes = torch.float32, torch.bfloat16, torch.float32, torch.float16
    members = [member(5, 7, dtype=dtype, device=device) for dtype in dtypes]
    with count_launches() as log:
        held_to_the_rule(members)
    assert [launch.name for launch in log] == ["_adamw_begin_kernel"] * 3 + ["_adamw_update_kernel"] * 3


@pytest.mark.parametrize("shadow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2 * TILE + 3,)])
def test_a_shadow_is_the_parameter_rounded(shape, shadow, device):
    members = [member(9, device=device), member(*shape, device=device, shadow=shadow)]
    adamw(members, SETTINGS, 1.0)
    assert torch.equal(members[1].shadow, members[1].parameter.to(shadow))


def test_transposed_and_unaligned_parameters(device):
    def unaligned(shape):
        buffer = torch.randn(shape[0] * shape[1] + 1, device=device)
        return buffer[1:].view(shape)

    for make in (lambda: torch.randn(7, 300, device=device).t(), lambda: unaligned((7, 300))):
        members = [Member(make(), make(), make(), make().square_(), torch.zeros((), device=device))]
        if make().is_contiguous():
            v = make()
            members = [members[0]._replace(exp_avg_sq=v.copy_(v.square()))]
        held_to_the_rule(members)


def test_only_an_update_changes_anything(device):
    members = [member(5, 7, device=device, shadow=torch.bfloat16), member(11, device=device)]
    members[0].shadow.zero_()
    before = [t.clone() for m in members for t in m if t is not None]
    update = Update(members, [0, 0])
    update.begin(members, [SETTINGS], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for m in members for t in m if t is not None), strict=True))
    norm = update.finish(found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for m in members for t in m if t is not None), strict=True))
    assert norm.isfinite()
    update.finish(found_inf=torch.zeros((), device=device))
    assert not torch.equal(before[0], members[0].parameter) and members[0].step == 4.0 == members[1].step


def test_a_gradient_that_is_no_number_reaches_every_parameter(device):
    """As by PyTorch's clip_grad_norm_: nothing hides it."""
    members = [member(5, device=device), member(7, device=device)]
    members[0].gradient[2] = float("nan")
    assert adamw(members, SETTINGS, 1.0).isnan()
    assert all(m.parameter.isnan().all() for m in members)


def test_gradients_are_divided_by_the_scale(device):
    plain, scaled = ([member(5, 7, device=device), member(TILE, device=device)] for _ in range(2))
    for a, b in zip(plain, scaled, strict=True):
        for k in (0, 2, 3):
            b[k].copy_(a[k])
        b.gradient.copy_(a.gradient * 1024.0)
    kept = [m.gradient.clone() for m in scaled]
    norms = adamw(plain, SETTINGS, 1.0), adamw(scaled, SETTINGS, 1.0, torch.tensor(1024.0, device=device))
    assert torch.equal(*norms)
    for a, b in zip(plain, scaled, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in (0, 2, 3, 4))
    assert all(torch.equal(m.gradient, g) for m, g in zip(scaled, kept, strict=True))


def test_the_same_bits_again_and_versions_move_on(device):
    members = [member(CHUNK + 5, device=device), member(40, 9, device=device)]
    twins = [Member(*(t.clone() for t in m[:5])) for m in members]
    versions = [t._version for m in members for t in m[:5]]
    norms = adamw(members, SETTINGS, 1.0), adamw(twins, SETTINGS, 1.0)
    assert torch.equal(*norms)
    assert all(
        torch.equal(a, b) for m, n in zip(members, twins, strict=True) for a, b in zip(m[:5], n[:5], strict=True)
    )
    moved = [t._version > v for t, v in zip((t for m in members for t in m[:5]), versions, strict=True)]
    assert moved == [True, False, True, True, True] * 2


P = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(gradient=P.half()),
            TypeError,
            r"parameter 0, of shape \(4, 6\), is torch.float32 and its gradient torch.f",
        ),
        (dict(exp_avg=P.t()), ValueError, r"its exp_avg, of shape \(6, 4\)"),
        (dict(exp_avg_sq=P.t().contiguous().t()), ValueError, r"has strides \(6, 1\) and its exp_avg_sq.* \(1, 4\)"),
        (
            dict(parameter=torch.randn(4, 12)[:, ::2]),
            ValueError,
            r"strides \(12, 2\), allowed are .* optimizer='torch'",
        ),
        (
            dict(step=torch.zeros((), dtype=torch.int64)),
            TypeError,
            "has a step of torch.int64 and 1 elements, expected one",
        ),
        (dict(parameter=torch.zeros(4, 6, dtype=torch.int32)), TypeError, "is torch.int32, allowed are bfloat16"),
        (dict(gradient=P.to_sparse()), ValueError, "torch.sparse_coo"),
    ],
)
def test_errors_name_the_parameter_and_what_is_allowed(change, error, message):
    with pytest.raises(error, match=message):
        adamw([Member(P, P, P, P, torch.zeros(()))._replace(**change)], SETTINGS, 1.0)


def test_a_device_without_triton_is_named():
    meta = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="adamw: .*'meta'.*optimizer='torch'"):
        adamw([Member(meta, meta, meta, meta, torch.empty((), device="meta"))], SETTINGS)
