"""The tuner without a GPU: its search by made-up times, and the table that it writes."""

import copy
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
from interpreter import count_launches

from fastgpt2.bench.__main__ import main
from fastgpt2.bench.cases.ops.attention import attention_case
from fastgpt2.bench.cases.registry import all_cases
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import tune
from fastgpt2.kernels import _tuning
from fastgpt2.kernels._configurations import AttentionBwd, AttentionFwd, AttentionTmaBwd, Elementwise, Key, LayerNormBwd

SOURCE = Path(_tuning.__file__).read_text("utf-8")


def test_descent_finds_the_minimum_and_survives_configurations_that_fail():
    def time_ms(c):
        if c["num_warps"] > 8:
            return float("inf")  # does not compile
        return 1.0 + abs(c["BLOCK"] - 512) / 512 + 0.1 * abs(c["num_warps"] - 8) + 0.2 * abs(c["num_stages"] - 3)

    start = {"BLOCK": 64, "num_warps": 2, "num_stages": 1, "MIN_ROWS": 64}
    best, ms, before = tune.descend(start, time_ms)
    assert best == {"BLOCK": 512, "num_warps": 8, "num_stages": 3, "MIN_ROWS": 64}
    assert ms == time_ms(best) < before == time_ms(start)


def test_descent_keeps_what_noise_alone_beats():
    start = {"BLOCK": 64, "num_warps": 2}
    assert tune.descend(start, lambda c: 1.0 if c == start else 0.99) == (start, 1.0, 1.0)


def test_descent_reaches_designs_that_are_many_steps_away():
    start, design = {"ROWS": 1, "num_warps": 1, "STAGES": 1}, {"ROWS": 64, "num_warps": 8, "STAGES": 3}
    times = {1: 1.0, 64: 0.5}
    best, ms, before = tune.descend(start, lambda c: times.get(c["ROWS"], 9.0) - 0.02 * c["STAGES"], [design])
    assert best == design | {"STAGES": 5} and (ms, before) == (0.4, 0.98)


def reloaded(source):
    """The module that a source is."""
    module = types.ModuleType(_tuning.__name__)
    module.__package__ = _tuning.__package__
    exec(compile(source, "rewritten", "exec"), vars(module))
    return module


def test_rewriting_changes_the_rows_asked_for_and_nothing_else():
    gelu = Key("gelu_fwd", bits=16)
    best = {
        gelu: dict(ROWS=2, BLOCK_C=128, num_warps=2),
        Key("attention_bwd", bits=16, head_size=64): AttentionBwd(16, 32, 32, 16, 8, 1)._asdict(),  # has a comment
        Key("layer_norm_bwd", row_bytes=4096): LayerNormBwd(8, 2048, 8, 1, 64)._asdict(),  # has a row of 90
        Key("attention_fwd", bits=16, head_size=64, bounded=True): AttentionFwd(32, 32, 2, 2)._asdict(),
    }
    once = tune.rewrite(SOURCE, best, 90, "Some GPU, 2026-01-01")
    expected = copy.deepcopy(_tuning.TABLE)
    for key, config in best.items():
        expected[key][90] = type(expected[key]["any"])(**config)
    found = reloaded(once)
    assert found.TABLE == expected and found.TUNED == {90: "Some GPU, 2026-01-01"}
    assert found.BEFORE_TRITON == _tuning.BEFORE_TRITON
    types_of = lambda table: {key: [*map(type, rows.values())] for key, rows in table.items()}  # noqa: E731
    assert types_of(found.TABLE) == types_of(expected), "rows of other types with the same numbers would be equal"
    comments = [line for line in SOURCE.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in once.splitlines() if line.lstrip().startswith("#")] == comments
    again = tune.rewrite(once, {gelu: dict(ROWS=4, BLOCK_C=64, num_warps=2)}, "hip", 'A "GPU", 2026-02-02')
    found, expected[gelu]["hip"] = reloaded(again), Elementwise(ROWS=4, BLOCK_C=64, num_warps=2)
    assert found.TABLE == expected
    assert found.TUNED == {90: "Some GPU, 2026-01-01", "hip": 'A "GPU", 2026-02-02'}


def test_what_is_rewritten_is_formatted(tmp_path):
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    best = {key: next(iter(rows.values()))._asdict() for key, rows in _tuning.TABLE.items()}
    wide = Key("attention_bwd", bits=16, head_size=128)
    best[wide] |= tune.DESIGNS["attention_bwd"][-1]  # more than a line has room for
    file = tmp_path / "_tuning.py"
    file.write_text(tune.rewrite(SOURCE, best, 90, "Some GPU, 2026-01-01"), encoding="utf-8")
    config = Path(__file__).parents[1] / "pyproject.toml"
    for command in (("format", "--check"), ("check",)):
        subprocess.run([ruff, *command, "--config", config, file], check=True)
    written = file.read_text(encoding="utf-8")
    assert reloaded(written).TABLE[wide][90] == AttentionBwd(**best[wide])
    assert written.count("DIAGONAL_FIRST") == 1, "a default is not written"


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="no rows for no_such_op bits=16"):
        tune.rewrite(SOURCE, {Key("no_such_op", bits=16): {}}, 90, "Some GPU")


def test_a_case_is_tuned_by_its_own_rows_and_wrong_results_are_passed_over():
    case = next(c for c in all_cases(rows=8) if c.op == "gelu" and c.dtype == torch.float32)
    done: dict = {}
    launched = []

    def time_ms(run):
        with tune.overridden({}) as asked:
            run()
        launched.append(asked)
        return 1.0

    found = list(tune.tune_case(case, done, time_ms, torch.device("cpu")))
    assert {row for row, *_ in found} == done.keys() == {Key("gelu_fwd", bits=32), Key("gelu_bwd", bits=32)}
    assert all(ms == before == 1.0 for _, _, ms, before in found) and launched
    assert not list(tune.tune_case(case, done, time_ms, torch.device("cpu"))), "each row once"
    a = torch.randn(8)
    assert tune.same((a,), (a + 1e-7,)) and not tune.same((a,), (a + 1e-3,))


def test_a_choice_is_made_with_what_was_found_before():
    """As between the MLP's fused products, tuned first, and a pass of its own."""
    assert list(tune.neighbours({"FUSED": False, "enable_fp_fusion": True})) == [
        {"FUSED": True, "enable_fp_fusion": True}
    ]
    case = next(c for c in all_cases(rows=8, widths=(16,)) if c.op == "mlp" and c.dtype == torch.float32)
    product, choice = Key("gelu_product_fwd", bits=32), Key("mlp_fwd", bits=32)
    found = {product: {**_tuning.config(product, torch.device("cpu")), "BLOCK_M": 16}}
    seen = []

    def time_ms(run):
        with tune.overridden({}) as asked:
            run()
        seen.append(_tuning.config(product, torch.device("cpu"))["BLOCK_M"])
        return 1.0 if product in asked else 2.0

    rows = {
        row: (best, ms, before) for row, best, ms, before in tune.tune_case(case, found, time_ms, torch.device("cpu"))
    }
    assert rows[choice] == ({"FUSED": True, "enable_fp_fusion": True}, 1.0, 2.0) and found[choice]["FUSED"]
    assert product not in rows and set(seen) == {16}


def test_what_is_not_a_speed_knob_stays():
    config = _tuning.config(Key("gelu_bwd", bits=16), torch.device("cpu"))
    assert config["enable_fp_fusion"] is True
    assert all(c["enable_fp_fusion"] is True and c["MIN_ROWS"] == config["MIN_ROWS"] for c in tune.neighbours(config))


def test_a_kernel_that_is_off_is_offered_in_several_designs():
    off = dict(ON=False, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)
    assert list(tune.neighbours(off)) == [{**off, "ON": True}], "what it would do with other numbers is not timed"
    assert off in tune.neighbours({**off, "ON": True}), "one that is on can be switched off"
    designs = [off | design for design in tune.DESIGNS["attention_tma_fwd"]]
    times = {(False, 64): 1.0, (True, 64): 1.1, (True, 128): 0.7}
    time_ms = lambda c: times.get((c["ON"], c["BLOCK_N"]), 2.0) if c["num_warps"] == 8 else 2.0  # noqa: E731
    assert tune.descend(off, time_ms, designs) == ({**off, "ON": True, "BLOCK_N": 128}, 0.7, 1.0)
    assert tune.descend(off, lambda c: 1.0 + c["ON"], designs) == (off, 1.0, 1.0)


def test_another_order_is_tried_besides_other_tiles():
    """A choice that is not a kernel's being off leaves its numbers open."""
    present = AttentionBwd(32, 64, 64, 64, 4, 3)._asdict()
    tried = list(tune.neighbours(present))
    assert {**present, "DIAGONAL_FIRST": True} in tried and {**present, "DKV_BLOCK_M": 64} in tried
    ordered = {**present, "DIAGONAL_FIRST": True}
    assert present in tune.neighbours(ordered) and {**ordered, "num_stages": 2} in tune.neighbours(ordered)
    designs = [present | design for design in tune.DESIGNS["attention_bwd"]]
    assert ordered in designs and all(set(design) == set(AttentionBwd._fields) for design in designs)
    assert {bool(design["DIAGONAL_FIRST"]) for design in designs if design["DKV_BLOCK_N"] == 128} == {False, True}


@pytest.mark.parametrize("direction, block", [("fwd", dict(BLOCK_M=16, BLOCK_N=16)), ("bwd", dict(BLOCK=16, STEP=16))])
def test_attention_asks_for_the_rows_that_switch_its_kernels_with_descriptors(direction, block):
    """So that `bench tune --op causal_attention` decides them."""
    case = attention_case(1, 16, 64, torch.float16)
    key = Key(f"attention_tma_{direction}", bits=16, head_size=64)
    for on in (0, 1):
        config = {**_tuning.config(key, torch.device("cpu")), **block, "ON": on}
        inputs = case.inputs()
        with tune.overridden({key: config}) as asked, count_launches() as log:
            case.backward(inputs, case.forward(inputs))
        names = [launch.name for launch in log]
        assert key in asked and (f"_attention_tma_{direction}_kernel" in names) is bool(on)
        assert (f"_attention_{direction}_kernel" in names) is not bool(on)


def test_a_part_that_is_off_leaves_the_other_numbers_to_be_tuned():
    config = dict(ROWS=4, num_warps=8, FOLD=False)
    found = list(tune.neighbours(config))
    assert {**config, "FOLD": True} in found and {**config, "ROWS": 8} in found and {**config, "num_warps": 4} in found
    assert {"FOLD": True} in tune.DESIGNS["layer_norm_bwd"]


def test_backwards_row_is_tuned_by_backwards_time():
    """Although forward asks for it too, and with sums in a second launch where that is slower. Time: launches."""
    case = next(c for c in all_cases(rows=8, widths=(16,)) if c.op == "add_layer_norm" and c.dtype == torch.float32)
    tried = []

    def time_ms(run):
        with count_launches() as log:
            run()
        tried.append(len(log))
        return float(len(log))

    tuned = tune.tune_case(case, {}, time_ms, torch.device("cpu"))
    found = {row.op: figures for row, *figures in tuned}
    assert found.keys() == {"layer_norm_fwd", "layer_norm_bwd", "column_sum"}
    best, ms, before = found["layer_norm_bwd"]
    assert best["FOLD"] is True and (ms, before) == (2.0, 3.0) and set(tried) == {1, 2, 3}


def test_the_designs_of_attentions_gradient_are_ones_it_can_be():
    for design in tune.DESIGNS["attention_tma_bwd"]:
        assert design["ON"] and design["BLOCK"] % design["STEP"] == 0
        assert set(design) == set(AttentionTmaBwd._fields)


def test_the_command_saves_its_figures_and_leaves_the_table_in_a_dry_run(tmp_path, monkeypatch, capsys):
    """With a CPU for a GPU and made-up times."""
    times = iter(range(1000, 0, -1))
    small = [c for c in all_cases(rows=8) if c.op == "gelu" and c.dtype == torch.float32]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch, "device", lambda *args: torch.zeros(0).device)
    monkeypatch.setattr(tune.gate, "verified", lambda device: True)
    monkeypatch.setattr(tune, "all_cases", lambda: small)
    monkeypatch.setattr(tune, "descend", lambda config, time_ms, designs: (config, 1.0, 2.0))
    monkeypatch.setattr(tune, "median_ms", lambda run, device: float(next(times)))
    assert main(["tune", "--op", "gelu", "--dry-run", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("tune-*.json")
    rows = Results.load(file).rows
    assert [row["name"].split(" ", 1)[1] for row in rows] == ["gelu_fwd bits=32", "gelu_bwd bits=32"]
    assert all((row["before_ms"], row["best_ms"]) == (2.0, 1.0) for row in rows)
    assert all("enable_fp_fusion" not in row["config"] for row in rows)
    assert "2 rows improved, nothing written" in capsys.readouterr().out
    assert Path(_tuning.__file__).read_text("utf-8") == SOURCE
    assert main(["tune", "--op", "gelu", "--dry-run", "--out", str(tmp_path), "--seconds", "-1"]) == 0
    assert not Results.load(file).rows and "were over" in Results.load(file).left_out[0]["why"]
    monkeypatch.setattr(tune.gate, "verified", lambda device: False)
    assert main(["tune", "--dry-run"]) == 1
    with pytest.raises(ValueError, match="--op is 'gelo'"):
        main(["tune", "--op", "gelo"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(RuntimeError, match="GPU"):
        main(["tune"])
