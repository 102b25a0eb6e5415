"""LayerNorm's backward in one launch, where the tuning table says so: its last program adds up the sums of parameters'
gradients that all programs have stored (test_fold_columns.py)."""

import itertools

import pytest
import torch
import triton
from calls import CALLS
from interpreter import count_launches, grid_order, red_zones
from numerics import check
from tiny_models import tiny

from fastgpt2.bench.cases.ops.layer_norm import folded
from fastgpt2.bench.cases.rows import overridden
from fastgpt2.kernels import _device, _frozen, _tuning
from fastgpt2.kernels._column_sum import fold_tickets
from fastgpt2.kernels._configurations import Key
from fastgpt2.kernels._trace import traced
from fastgpt2.kernels.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_fwd

pytestmark = pytest.mark.skipif(torch.version.hip is not None, reason="AMD has two launches")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter runs programs in turn")
FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def test_the_choice_is_off():
    rows = [row for key, rows in _tuning.TABLE.items() if key.op == "layer_norm_bwd" for row in rows.values()]
    assert rows and not any(row.FOLD for row in rows)


@pytest.fixture
def many_programs(monkeypatch):
    """On a machine of 40 multiprocessors, with 2 rows for each program."""
    config = _tuning.config

    def few_rows(key, *args):
        return config(key, *args) | (dict(MIN_ROWS=2) if key.op == "layer_norm_bwd" else {})

    monkeypatch.setattr(_tuning, "config", few_rows)
    monkeypatch.setattr(_device, "sm_count", lambda device: 40)


def inputs_of(N: int, C: int, dtype: torch.dtype, device, parameters: torch.dtype | None = None) -> list[torch.Tensor]:
    """x, residual, weight, bias, x_bias."""
    shapes = [(N, C)] * 2 + [(C,)] * 3
    made = [torch.randn(s, device=device).to((parameters or dtype) if len(s) == 1 else dtype) for s in shapes]
    return [t.requires_grad_() for t in made]


def ours(x, residual, w, b, x_bias, **more):
    return add_layer_norm(x, residual, w, b, x_bias=x_bias, **more)


def truth(x, residual, w, b, x_bias):
    return add_layer_norm_reference(x, residual, w, b, x_bias=x_bias.to(x.dtype))


def gradients(inputs, wanted=range(5), **more) -> tuple[list[torch.Tensor], list[str]]:
    """-> (the gradients of `wanted`, backward's launches)."""
    own = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    total, y = ours(*own, **more)
    with count_launches() as log:
        (y.double().square().sum() + total.double().sin().sum()).backward()
    return [own[i].grad for i in wanted], [launch.name for launch in log]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("N, C", [(1, 7), (31, 129), (67, 48), (90, 768)])
def test_gradients(N, C, dtype, device, many_programs):
    """Of one program, one group, several groups, and no whole ones."""
    with folded(device), count_launches() as log:
        check(ours, truth, *inputs_of(N, C, dtype, device))
    names = [launch.name for launch in log]
    assert names.count("_layer_norm_bwd_kernel") and "_column_sum_kernel" not in names


@pytest.mark.parametrize("design", [dict(STAGES=1), dict(STAGES=3), dict(STAGES=3, ROWS=4, SPAN_BYTES=1024)], ids=str)
def test_designs(design, device, many_programs):
    """Under autocast's dtypes, where a pipelined tile has a shape of its own."""
    row = Key("layer_norm_bwd", row_bytes=4096)
    x, residual, *parameters = inputs_of(67, 768, torch.float32, device)
    with overridden({row: {**_tuning.config(row, device), **design, "FOLD": True}}), count_launches() as log:
        check(ours, truth, x.detach().bfloat16(), residual.detach(), *(p.detach() for p in parameters))
    assert "_column_sum_kernel" not in [launch.name for launch in log]


@pytest.mark.parametrize("dropout", [{}, dict(dropout_p=0.3, seed=torch.tensor(5))], ids=["", "dropout"])
def test_it_is_as_with_two_launches(dropout, device, many_programs):
    """Gradients of rows bit for bit, sums but for the order of the additions."""
    inputs, dropout = inputs_of(90, 65, torch.float32, device), {k: torch.as_tensor(v) for k, v in dropout.items()}
    dropout = {k: v.to(device) if k == "seed" else float(v) for k, v in dropout.items()}
    apart, two = gradients(inputs, **dropout)
    with folded(device):
        together, one = gradients(inputs, **dropout)
    assert two == ["_layer_norm_bwd_kernel", "_column_sum_kernel"] and one == two[:1]
    assert all(map(torch.equal, together[:2], apart[:2]))
    for ours, theirs in zip(together[2:], apart[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", [w for n in range(1, 6) for w in itertools.combinations(range(5), n)], ids=str)
def test_any_choice_of_gradients(wanted, device, many_programs):
    inputs = inputs_of(67, 20, torch.float32, device)
    with folded(device):
        every, _ = gradients(inputs)
        some, launches = gradients(inputs, wanted)
    assert launches == ["_layer_norm_bwd_kernel"]
    assert all(torch.equal(grad, every[i]) for i, grad in zip(wanted, some, strict=True))


def saved_tickets(inputs):
    """-> (total, y, the tickets that are kept for backward)."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, y = ours(*inputs)
    return total, y, [t for t in kept if t.dtype == torch.int32]


def test_tickets_are_zeros_before_and_after_each_backward(device, many_programs):
    inputs = inputs_of(67, 20, torch.float32, device)
    with folded(device):
        total, y, (tickets,) = saved_tickets(inputs)
    results = []
    for again in (True, True, False):
        assert tickets.numel() == 8 and not tickets.any()
        results.append(torch.autograd.grad(y.sin().sum() + total.sum(), inputs, retain_graph=again))
    assert all(torch.equal(a, b) for more in results[1:] for a, b in zip(results[0], more, strict=True))
    assert not tickets.any()


def test_without_the_choice_there_are_no_tickets(device):
    assert not saved_tickets(inputs_of(5, 20, torch.float32, device))[2]


def test_too_few_tickets_are_not_used(device, many_programs, monkeypatch):
    """The table's numbers changed between forward and backward."""
    inputs = inputs_of(90, 20, torch.float32, device)
    monkeypatch.setattr(_device, "sm_count", lambda device: 2)
    with folded(device):
        total, y, (tickets,) = saved_tickets(inputs)
    monkeypatch.setattr(_device, "sm_count", lambda device: 40)
    with count_launches() as log:
        torch.autograd.grad(y.sum() + total.sum(), inputs)
    assert len(log) == 2 and not tickets.any()


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_empty_batch(shape, device):
    x, residual = torch.empty(2, *shape, device=device).requires_grad_().unbind()
    parameters = inputs_of(1, 24, torch.float32, device)[2:]
    with folded(device):
        total, y = ours(x, residual, *parameters)
    grads = torch.autograd.grad(y.sum() + total.sum(), (x, residual, *parameters))
    assert [g.shape for g in grads[2:]] == [(24,)] * 3 and not any(g.any() for g in grads)


@pytest.mark.gpu
def test_many_programs_at_once(device):
    """On a GPU, where programs end in any order: every run gives the same bits, and leaves its tickets at 0."""
    inputs = inputs_of(8192, 768, torch.bfloat16, device)
    with folded(device):
        total, y, (tickets,) = saved_tickets(inputs)
    upstream = torch.randn_like(y)
    first, *others = (torch.autograd.grad((total, y), inputs, (upstream,) * 2, retain_graph=True) for _ in range(300))
    assert all(torch.equal(a, b) for more in others for a, b in zip(first, more, strict=True)) and not tickets.any()


@interpreted
@pytest.mark.parametrize("dtype", FLOATING[::2], ids=str)
@pytest.mark.parametrize("call", [c for c in CALLS if "layer_norm" in c.op], ids=lambda c: c.name)
def test_memory_and_order(call, dtype, device, many_programs):
    """The guards of test_guards.py, with several groups of programs."""
    inputs = call.inputs(dtype, device)
    with folded(device):
        expected = call.results(inputs)
        for order in ("reversed", "shuffled"):
            with red_zones() as zone, grid_order(order):
                results = call.results(tuple(map(zone, inputs)), zone)
            assert all(map(torch.equal, results, expected))
    assert all(r.isfinite().all() for r in expected)


def test_operators_have_two_launches(device, many_programs):
    """Their fakes do not know the table, and Inductor would copy tickets: compiled code is as without the choice."""
    inputs = inputs_of(67, 24, torch.float32, device)
    x, residual, w, b, x_bias = inputs
    op = torch.ops.fastgpt2.layer_norm_fwd.default
    with folded(device):
        torch.library.opcheck(op, (x, residual, w, b, x_bias, None, 1e-5, 0.0, torch.float32))
        total, y, statistics, tickets = op(x, residual, w, b, x_bias, None, 1e-5, 0.0, torch.float32)
        assert tickets.numel() == 0
        with count_launches() as log:
            results = torch.autograd.grad(y.sum() + total.sum(), inputs)
        assert len(log) == 2
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        again = torch.autograd.grad(sum(o.sum() for o in compiled(*inputs)), inputs)
    assert all(map(torch.equal, results, again))
    dtypes = [torch.float32] * 5
    tickets = torch.zeros(fold_tickets(34, device), dtype=torch.int32, device=device)
    dy, total, w, statistics = (t.detach() for t in (y, total, w, statistics))
    torch.library.opcheck(
        torch.ops.fastgpt2.layer_norm_bwd.default, (dy, dy, total, w, statistics, None, tickets, 0.0, *dtypes)
    )
    assert not tickets.any(), "as they were given: the operator mutates nothing"


def test_traced_code_has_no_tickets(device, monkeypatch):
    """What torch.compile makes nodes of: Inductor would copy a tensor that forward kept and backward writes to."""
    x, _, w, b, _ = (t.detach() for t in inputs_of(5, 24, torch.float32, device))
    given = []
    monkeypatch.setattr(_frozen, "write_down", lambda kernel, grid, args, options: given.extend(args))
    with folded(device), traced():
        outputs = layer_norm_fwd(x, None, w, b, None, None, 1e-5, 0.0, torch.float32)
    assert outputs[3] is None and outputs[1].data_ptr() in [t.data_ptr() for t in given if torch.is_tensor(t)]
    assert torch.int32 not in [t.dtype for t in given if torch.is_tensor(t)]


def test_a_transform_of_a_function_has_two_launches(device, many_programs):
    x, _, w, b, _ = (t.detach() for t in inputs_of(67, 24, torch.float32, device))

    def loss(w):
        return layer_norm(x, w, b).sin().sum()

    expected = torch.func.grad(loss)(w)
    with folded(device):
        torch.testing.assert_close(torch.func.grad(loss)(w), expected, rtol=0, atol=0)


def test_a_whole_step(device, many_programs):
    model = tiny(block_size=32, n_embd=32, dropout=0.1).to(device)
    model.kernels = "attention,layer_norm,mlp"
    idx, targets = torch.randint(50, (2, 2, 32), device=device)

    def step():
        torch.manual_seed(1)
        model.zero_grad()
        with count_launches() as log:
            loss = model(idx, targets)[1]
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())], [launch.name for launch in log]

    apart, before = step()
    with folded(device):
        together, after = step()
    norms = before.count("_layer_norm_bwd_kernel")
    assert norms == 5 and before.count("_column_sum_kernel") - after.count("_column_sum_kernel") == norms
    for name, ours, theirs in zip(["loss", *dict(model.named_parameters())], together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
