"""Column sums without a second launch: the last program adds up what all have stored. Tickets say which is the last.

Barriers and the order of memory, which the interpreter lacks, are read in the compiled code of LayerNorm's backward.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from interpreter import grid_order, red_zones

from fastgpt2.kernels import _device
from fastgpt2.kernels._column_sum import GROUP, fold_columns, fold_groups, fold_options, fold_tickets

pytestmark = pytest.mark.skipif(torch.version.hip is not None, reason="AMD has two launches")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter runs programs in turn")


@triton.jit
def _fold_kernel(
    rows_ptr, partials_ptr, tickets_ptr, out0_ptr, out1_ptr, out2_ptr, K: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copies its row of each of K tensors into partials, and folds."""
    offs_c = tl.arange(0, WIDTH)
    for k in range(K):
        offs = (k * tl.num_programs(0) + tl.program_id(0)) * C + offs_c
        row = tl.load(rows_ptr + offs, mask=offs_c < C, other=0.0)
        tl.store(partials_ptr + offs, row, mask=offs_c < C)
    fold_columns(partials_ptr, tickets_ptr, out0_ptr, out1_ptr, out2_ptr, K, C, GROUP, BLOCK_P, BLOCK_C)


def fold(rows: torch.Tensor, dtypes: list[torch.dtype], tickets: torch.Tensor) -> list[torch.Tensor]:
    """rows (K, P, C). Blocks of 32 columns and 8 rows, so that there are several of each."""
    K, P, C = rows.shape
    partials, outs = rows.new_empty(K, P + fold_groups(P), C), [rows.new_empty(C, dtype=t) for t in dtypes]
    options = fold_options(C, rows.element_size(), 8) | dict(BLOCK_C=32)
    padded = (*outs, *(None,) * (3 - K))
    _fold_kernel[(P,)](rows, partials, tickets, *padded, K, C, **options, WIDTH=triton.next_power_of_2(C), num_warps=8)
    return outs


def new_tickets(programs: int, device) -> torch.Tensor:
    return torch.zeros(fold_tickets(programs, device), dtype=torch.int32, device=device)


@pytest.mark.parametrize("K, C", [(1, 1), (2, 33), (3, 70)])
@pytest.mark.parametrize("P", [1, 2, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 5 * GROUP + 3])
def test_each_row_is_added_once(P, K, C, device):
    """Whole numbers, whose sum is exact in any order; and the tickets serve a second time."""
    rows = torch.randint(-99, 99, (K, P, C), device=device).float()
    dtypes = [torch.float64, torch.float32, torch.float32][:K]
    tickets = new_tickets(P, device)
    for _ in range(2):
        outs = fold(rows, dtypes, tickets)
        assert [o.dtype for o in outs] == dtypes
        assert all(torch.equal(out.double(), one.double().sum(0)) for out, one in zip(outs, rows, strict=True))
        assert not tickets.any()


def test_more_groups_than_rows_of_a_block(device):
    rows = torch.randint(-99, 99, (1, 9 * GROUP + 1, 3), device=device).float()
    assert torch.equal(fold(rows, [torch.float32], new_tickets(rows.shape[1], device))[0], rows[0].sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_as_exact_as_the_accumulator(dtype, device):
    rows = torch.randn(2, 75, 40, dtype=dtype, device=device)
    outs = fold(rows, [dtype, torch.bfloat16], new_tickets(75, device))
    for out, one in zip(outs, rows, strict=True):
        eps = torch.finfo(out.dtype).eps
        torch.testing.assert_close(out.double(), one.double().sum(0), rtol=eps, atol=75 * torch.finfo(dtype).eps)


@interpreted
def test_whoever_is_the_last_adds_in_the_same_order(device):
    rows, tickets = torch.randn(3, 5 * GROUP + 3, 40), new_tickets(5 * GROUP + 3, device)
    expected = fold(rows, [torch.float32] * 3, tickets)
    for order, seed in (("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
        with grid_order(order, seed):
            assert all(map(torch.equal, fold(rows, [torch.float32] * 3, tickets), expected))
        assert not tickets.any()


def test_only_its_own_memory_is_touched(device):
    with red_zones() as zone:
        (out,) = fold(zone(torch.ones(1, 19, 33, device=device)), [torch.float32], zone(new_tickets(19, device)))
    assert out.tolist() == [19.0] * 33


def test_a_block_is_128_bits_of_each_thread_and_no_wider_than_a_row():
    assert fold_options(768, 4, 8) == dict(GROUP=GROUP, BLOCK_P=8, BLOCK_C=1024)
    assert fold_options(1600, 8, 8)["BLOCK_C"] == 512 and fold_options(20, 4, 8)["BLOCK_C"] == 32
    assert fold_options(16384, 4, 32)["BLOCK_P"] == 4


def test_a_ticket_for_each_group_and_one_for_all(device, monkeypatch):
    assert [fold_tickets(P, device) for P in (1, GROUP, GROUP + 1, 132, 15 * GROUP, 16 * GROUP)] == [
        2,
        2,
        4,
        16,
        16,
        32,
    ]
    monkeypatch.setattr(_device, "capability", lambda device: (9, 4))
    assert fold_tickets(132, device) == 0, "on AMD the barrier does not order other warps' stores"


# ------------------------------------------------------------------------------------------------------ compiled code

COMPILE = """
import json, subprocess, tempfile, triton, torch
from pathlib import Path
from fastgpt2.bench.audit.compiled import recording
from fastgpt2.bench.cases.ops.layer_norm import folded_add_layer_norm

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).requires_grad_()

found = {}
for architecture in ("80", "90", "100", "gfx942"):
    inputs = empty(512, 768), empty(512, 768), empty(768), empty(768)
    with recording(architecture) as launches:
        total, y = folded_add_layer_norm(*inputs, x_bias=empty(768))
        torch.autograd.grad((total, y), inputs, (total, y))
    names, code = [launch.name for launch in launches], launches[1].kernel.asm
    sass = ""
    if "cubin" in code:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
            sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found[architecture] = names, code["ttgir"], code.get("ptx", ""), sass
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[list[str], str, str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


NVIDIA = ("80", "90", "100")


@pytest.mark.parametrize("architecture", NVIDIA)
def test_all_stores_come_before_a_ticket_and_all_loads_of_others_rows_after_it(compiled, architecture):
    """Two tickets are taken, each with a barrier before it, which the interpreter does not need, and one after it."""
    names, ttgir, ptx, _ = compiled[architecture]
    assert names == ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"]
    found = re.findall(r"bar\.sync|atom\.\S+|st\.global|ld\.global\S*", ptx)
    atomics = [i for i, what in enumerate(found) if what.startswith("atom")]
    assert [found[i] for i in atomics] == ["atom.global.gpu.acq_rel.add.u32"] * 2
    stores = [i for i, what in enumerate(found) if what == "st.global" and i < atomics[0]]
    assert stores and "bar.sync" in found[stores[-1] : atomics[0]]
    first, second = found[atomics[0] + 1 : atomics[1]], found[atomics[1] + 1 :]
    assert "bar.sync" in first[max(i for i, what in enumerate(first) if what == "st.global") :], "a group's sums"
    for after in (first, second):
        loads = [i for i, what in enumerate(after) if what.startswith("ld.global")]
        assert "bar.sync" in after[: loads[0]]
        assert all(after[i].startswith("ld.global.cg.") for i in loads), "by way of L2"
    order = re.findall(r"ttg\.barrier|tt\.atomic_rmw", ttgir)
    assert order == ["ttg.barrier", "tt.atomic_rmw"] * 2, "the barriers are those of the source, not the compiler's"


@pytest.mark.parametrize("architecture", NVIDIA)
def test_a_ticket_publishes_what_was_stored_and_forgets_what_was_loaded(compiled, architecture):
    """In machine code: a fence of the whole GPU before the addition, and L1 invalidated after it."""
    sass = compiled[architecture][3]
    order = re.findall(r"BAR\.SYNC|MEMBAR\.\w+\.GPU|ATOMG\.E\.ADD\.STRONG\.GPU|CCTL\.IVALL", sass)
    tickets = [i for i, what in enumerate(order) if what.startswith("ATOMG")]
    assert len(tickets) == 2
    for i in tickets:
        assert order[i - 1].startswith("MEMBAR") and order[i - 2] == "BAR.SYNC", order
        assert order[i + 1] == "CCTL.IVALL" and order[i + 2] == "BAR.SYNC", order
    assert "LDG.E.CONSTANT" not in sass


def test_amd_has_two_launches(compiled):
    assert compiled["gfx942"][0] == ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_column_sum_kernel"]
