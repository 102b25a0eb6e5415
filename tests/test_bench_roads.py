"""`bench train` on every road, as if there were a GPU: each has its own base, and what takes long comes last."""

import dataclasses

import bench_runs
import pytest
import torch
from bench_runs import read, run

from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.variants import (
    COMPILE,
    CUDAGRAPH_TREES,
    FLASH_ATTN,
    GRAPH,
    LAUNCHED,
    MAX_AUTOTUNE,
    NANOGPT,
    OURS,
    REDUCE_OVERHEAD,
    ROADS,
    Family,
    Variant,
)
from fastgpt2.bench.report.record import Results
from fastgpt2.bench.timing import steps
from fastgpt2.bench.timing import train as bench_train
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import Kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    bench_runs.make_small(monkeypatch)


@pytest.mark.parametrize("road", [LAUNCHED, GRAPH])
def test_the_ladder_has_each_switch_alone(road):
    alone = [v.kernels for v in variants.all_variants(False) if v.road == road and v.one_switch]
    assert alone == [Kernels.parse(name) for name in Kernels.names()]


def test_values_of_single_switches_are_in_the_ladder_and_named():
    fused = dataclasses.replace(Kernels.all("triton"), mlp="fused")
    assert {v.road for v in variants.all_variants(False) if v.kernels == fused} == set(ROADS)
    assert not Variant(OURS, fused).one_switch and Variant(OURS, Kernels(mlp="fused")).one_switch
    assert variants.label(fused, GRAPH) == "Triton, mlp=fused + CUDA graph"
    assert variants.label(Kernels(attention="triton", mlp="fused")) == "Triton: attention, mlp=fused"


def test_both_kinds_of_kernels_take_every_road():
    for road in ROADS:
        here = [v for v in variants.all_variants(True, True) if v.road == road]
        assert {Variant(OURS, road=road), Variant(OURS, Kernels.all("triton"), road)} <= set(here)
        assert len(here) == len(set(here))


def test_what_takes_long_comes_last():
    """Whoever stops a run keeps the stages before."""
    listed = variants.all_variants(True, True)
    stages = variants.stages(listed)
    assert sorted(map(repr, listed)) == sorted(repr(v) for stage in stages for v in stage)
    assert [(stage[0].road, {v.family for v in stage} == {OURS}) for stage in stages] == [
        (LAUNCHED, False), (GRAPH, False), (COMPILE, True), (REDUCE_OVERHEAD, True),
        (COMPILE, False), (REDUCE_OVERHEAD, False), (MAX_AUTOTUNE, True), (MAX_AUTOTUNE, False),
    ]  # fmt: skip
    assert all(len({v.road for v in stage}) == 1 for stage in stages)


@pytest.fixture
def on_every_road(monkeypatch):
    """A run of some variants on each road, as if there were a GPU: what happened, in order. Interpreting Triton's
    kernels here would take minutes, so PyTorch's compute."""
    happened, loss = [], Family.loss

    class Graphs:
        pool_bytes = 1 << 20

        def __init__(self, forward, module, inputs):
            happened.append("captured")
            self.forward = forward

        def __call__(self):
            return self.forward()

    def compiled(model, dynamic, mode):
        happened.append(mode)
        return lambda *args: model(*args)

    some = [Kernels.all("torch"), Kernels.parse("mlp"), Kernels.all("triton")]
    listed = [
        v for v in variants.all_variants(False) if v.family == OURS and v.kernels in some and not v.naive_attention
    ]
    monkeypatch.setattr(
        Family, "loss", lambda self, v, *batch: loss(self, dataclasses.replace(v, kernels=Kernels.all("torch")), *batch)
    )
    monkeypatch.setattr(variants, "StepGraphs", Graphs)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: happened.append("step"))
    monkeypatch.setattr(bench_train, "select", lambda *args: listed)
    return happened


def test_every_road_has_its_own_base(tmp_path, on_every_road):
    assert run(tmp_path) == 0
    rows = read(tmp_path).rows
    assert [row["label"] for row in rows] == [
        "PyTorch, SDPA", "Triton: mlp", "Triton",
        "PyTorch, SDPA + CUDA graph", "Triton: mlp + CUDA graph", "Triton + CUDA graph",
        "PyTorch, SDPA + compile", "Triton + compile",
        "PyTorch, SDPA + compile (reduce-overhead)", "Triton + compile (reduce-overhead)",
        "PyTorch, SDPA + compile (max-autotune)", "Triton + compile (max-autotune)",
    ]  # fmt: skip
    for row in rows:
        assert row["speedup"]["over"] == variants.label(Kernels.all("torch"), row["road"])
        assert row["speedup_over_launched"]["over"] == "PyTorch, SDPA"
        assert (row["speedup"]["median"] == 1.0) is row["label"].startswith("PyTorch")
        assert (row["peak_bytes"] is None) is (row["road"] in CUDAGRAPH_TREES), "in a pool for all"
        assert row["cuda_graph"] is (row["road"] == GRAPH)
    modes = [mode for mode in on_every_road if mode not in ("captured", "step")]
    assert list(dict.fromkeys(modes)) == ["default", "reduce-overhead", "max-autotune"]
    assert on_every_road.count("captured") == 3


def test_each_step_of_cudagraph_trees_is_begun(on_every_road):
    """Else what the step before has returned would be overwritten."""
    setting = steps.Setting("tiny", 1, 8, "float32", CPU, 0.1)
    family = Family(OURS, setting.config, GPT(setting.config), None, CPU)
    for road in ROADS:
        backward = family.backward(Variant(OURS, road=road), *setting.batch(), setting.autocast)
        on_every_road.clear()
        for _ in range(3):
            backward()
        assert on_every_road.count("step") == (3 if road in CUDAGRAPH_TREES else 0), road


def test_a_mode_that_takes_too_long_leaves_the_roads_before(tmp_path, monkeypatch, on_every_road):
    def slow(model, dynamic, mode):
        if mode == "max-autotune":
            raise KeyboardInterrupt
        return lambda *args: model(*args)

    monkeypatch.setattr(torch, "compile", slow)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [row["road"] for row in read(tmp_path).rows] == (
        [LAUNCHED] * 3 + [GRAPH] * 3 + [COMPILE] * 2 + [REDUCE_OVERHEAD] * 2
    )


def test_where_memory_ends_with_all_in_turns_halves_are_measured(tmp_path, monkeypatch, on_every_road):
    """Graphs keep their memory: five of them fit on no GPU of 80 GiB. Each half has the bases beside it."""
    measure, together = steps.timing.measure, []

    def little_memory(variants, *args, **more):
        together.append(len(variants))
        if len(variants) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(variants, *args, **more)

    monkeypatch.setattr(steps.timing, "measure", little_memory)
    assert run(tmp_path, "--road", "graph") == 0
    graphs = [row for row in read(tmp_path).rows if row["road"] == GRAPH]
    assert [row["speedup"]["over"] for row in graphs] == ["PyTorch, SDPA + CUDA graph"] * 3
    assert all(row["time_ms"] and row["speedup_over_launched"] for row in graphs)
    assert 4 in together and max(t for t in together if t != 4) <= 3


def test_quick_on_a_gpu_leaves_out_what_is_slow_to_compile():
    gpu, results = torch.device("cuda"), Results.begin("train", CPU, {})
    chosen = bench_train.select(gpu, True, None, True, results)
    assert {v.road for v in chosen} == {LAUNCHED, GRAPH, COMPILE, REDUCE_OVERHEAD}
    assert {v.family for v in chosen if v.mode} == {OURS}
    left_out = {entry["name"]: entry["why"] for entry in results.left_out}
    assert "--quick" in left_out["all variants with compile (max-autotune)"]
    assert "--quick" in left_out[f"{NANOGPT} + compile"] and "not installed" in left_out[FLASH_ATTN]
    assert {v.road for v in bench_train.select(gpu, False, None, True, results)} == set(ROADS)
    asked = bench_train.select(gpu, True, (MAX_AUTOTUNE,), True, results)
    assert {v.road for v in asked} == {MAX_AUTOTUNE} and len(
        asked
    ) == 5  # PyTorch, Triton, each with cuDNN too, and Triton with mlp=fused


def test_some_roads_are_a_file_of_their_own(tmp_path):
    assert run(tmp_path, "--road", "launched") == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("train-") and file.name.endswith("-launched.json")
    results = Results.load(file)
    assert {row["road"] for row in results.rows} == {LAUNCHED}
    assert "other roads than launched" in [entry["name"] for entry in results.left_out]
