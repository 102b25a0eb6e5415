"""`bench train`: every variant computes the same model, rows say what was measured, a red check prints no number."""

import dataclasses
import json
import signal
import subprocess

import pytest
import torch

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench import gate, steps, variants
from fastgpt2.bench import train as bench_train
from fastgpt2.bench.record import Results
from fastgpt2.bench.variants import (
    COMPILE,
    CUDAGRAPH_TREES,
    FLASH_ATTN,
    GRAPH,
    HUGGINGFACE,
    LAUNCHED,
    MAX_AUTOTUNE,
    NANOGPT,
    OURS,
    REDUCE_OVERHEAD,
    ROADS,
    Family,
    Variant,
)
from fastgpt2.gpt2 import config, hardware
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import Kernels

CPU = torch.device("cpu")
TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64)
NANOGPT_LIKE = """
import dataclasses
import fastgpt2

@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(fastgpt2.GPT):
    def __init__(self, config):
        super().__init__(fastgpt2.GPTConfig(**dataclasses.asdict(config)), kernels="torch")
        self.transformer.h[0].attn.flash = True
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A size that is fast, verify that is green, and compilation that does nothing."""
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    monkeypatch.setattr(gate, "verified", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: model)


@pytest.fixture
def nanogpt(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(NANOGPT_LIKE)
    return file


def run(folder, *more) -> int:
    options = "train --device cpu --size tiny --batch 2 --block 16 --seconds 0.01 --dtype float32".split()
    return bench.main([*options, "--out", str(folder), *more])


def read(folder) -> Results:
    (file,) = folder.iterdir()
    return Results.load(file)


# ------------------------------------------------------------------------------------------------------- variants


def test_labels_derive_from_what_is_active():
    attention = Kernels.parse("attention")
    assert variants.label(Kernels.all("torch")) == "PyTorch, SDPA"
    assert variants.label(Kernels.all("torch"), naive_attention=True) == "PyTorch, naive attention"
    assert variants.label(Kernels.all("triton"), COMPILE) == "Triton + compile"
    assert variants.label(Kernels.all("triton"), REDUCE_OVERHEAD) == "Triton + compile (reduce-overhead)"
    assert variants.label(Kernels.all("torch"), MAX_AUTOTUNE) == "PyTorch, SDPA + compile (max-autotune)"
    assert variants.label(attention) == "Triton: attention"
    setting = steps.Setting("tiny", 1, 8, "float32", CPU, 0.1)
    weights = GPT(setting.config)
    ours = Family(OURS, setting.config, weights, None, CPU)
    assert ours.label(Variant(OURS, attention)) == "Triton: attention"
    assert ours.label(Variant(OURS, Kernels.all("triton"), GRAPH)) == "Triton + CUDA graph"
    hf = Family(HUGGINGFACE, setting.config, weights, None, CPU)
    hf.model.config._attn_implementation = "eager"
    assert hf.label(Variant(HUGGINGFACE, road=COMPILE)) == "HuggingFace, eager + compile"


@pytest.mark.parametrize("road", [LAUNCHED, GRAPH])
def test_the_ladder_has_each_switch_alone(road):
    alone = [v.kernels for v in variants.all_variants(False) if v.road == road and v.one_switch]
    assert alone == [Kernels.parse(name) for name in Kernels.names()]


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


def test_every_variant_computes_the_same_gradient(nanogpt, device):
    """Triton's in the interpreter too."""
    setting = steps.Setting("tiny", 2, 16, "float32", device, 0.1)
    weights = GPT(setting.config)
    module = variants.nanogpt_module(nanogpt)
    gradients = {}
    without_gpu = (LAUNCHED, *variants.MODES)  # compilation does nothing here: once interpreted is enough
    possible = [
        v
        for v in variants.all_variants(True)
        if device.type == "cuda" or v.road == LAUNCHED or (v.road in without_gpu and not variants.on_triton(v))
    ]
    for variant in possible:
        family = Family(variant.family, setting.config, weights, module, device)
        backward = family.backward(variant, *setting.batch(), setting.autocast)
        gradients[family.label(variant)] = family.gradient(backward)
        held = backward.held_bytes()
        assert held is None if variant.road in CUDAGRAPH_TREES else (held > 0) is (variant.road == GRAPH)
    assert len(gradients) == len(possible)
    first = next(iter(gradients.values()))
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, first, rtol=1e-3, atol=1e-6)


def test_naive_attention_is_naive(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    model = GPT(config.GPTConfig(**TINY))
    with variants.naive_attention(True):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="not callable"):
        model(torch.zeros(1, 4, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------------- a run


def test_a_run_has_a_row_for_every_variant(tmp_path, capsys, nanogpt):
    assert run(tmp_path / "out", "--nanogpt", str(nanogpt)) == 0
    results = read(tmp_path / "out")
    labels = [row["label"] for row in results.rows]
    assert labels == [
        "PyTorch, naive attention", "PyTorch, SDPA", "HuggingFace, sdpa", "nanoGPT, SDPA",
        "PyTorch, SDPA + compile", "HuggingFace, sdpa + compile", "nanoGPT, SDPA + compile",
    ]  # fmt: skip
    for row in results.rows:
        per_s, ms = row["tokens_per_s"], row["time_ms"]
        assert per_s["median"] == pytest.approx(2 * 16 / ms["median"] * 1e3)
        assert per_s["p20"] <= per_s["median"] <= per_s["p80"] and ms["runs"] >= 3
        assert row["mfu"] is None and row["road"] == (COMPILE if row["compiled"] else LAUNCHED)
    sdpa, compiled = results.rows[1], results.rows[4]
    assert sdpa["speedup"] == sdpa["speedup_over_launched"] == dict(over="PyTorch, SDPA", median=1.0, p20=1.0, p80=1.0)
    assert (
        compiled["speedup"]["over"] == compiled["label"]
        and compiled["speedup_over_launched"]["over"] == "PyTorch, SDPA"
    )
    turns = [int(row["what"].split("; ")[1].split()[0]) for row in results.rows]
    assert turns == [4] * 4 + [2] + [4] * 2, "compiled ones beside PyTorch's, launched and compiled"
    assert ["GPU" in entry["why"] for entry in results.left_out if entry["name"].startswith("all")] == [True] * 4
    out = capsys.readouterr().out
    assert all(label in out for label in labels) and "left out: all variants with Triton" in out and "unknown" in out
    assert 'kernels="auto" is PyTorch here' in out
    line = json.loads(out.strip().splitlines()[-1])
    assert line["kind"] == "train" and len(line["tokens_per_s"]) == len(labels)


def test_what_was_measured_before_compiling_is_kept(tmp_path, monkeypatch):
    def interrupted(model, dynamic, mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [row["label"] for row in read(tmp_path).rows] == [
        "PyTorch, naive attention", "PyTorch, SDPA", "HuggingFace, sdpa",
    ]  # fmt: skip


@pytest.fixture
def on_every_road(monkeypatch):
    """A run of some variants on each road, as if there were a GPU: what happened, in order. Interpreting Triton's
    kernels here would take minutes, so PyTorch's compute."""
    happened, loss = [], Family.loss

    class Graph:
        pool_bytes = 1 << 20

        def __init__(self, compute, parameters):
            happened.append("captured")
            self.compute = compute

        def __call__(self):
            self.compute()

    def compiled(model, dynamic, mode):
        happened.append(mode)
        return lambda *args: model(*args)

    some = [Kernels.all("torch"), Kernels.parse("gelu"), Kernels.all("triton")]
    listed = [
        v for v in variants.all_variants(False) if v.family == OURS and v.kernels in some and not v.naive_attention
    ]
    monkeypatch.setattr(
        Family, "loss", lambda self, v, *batch: loss(self, dataclasses.replace(v, kernels=Kernels.all("torch")), *batch)
    )
    monkeypatch.setattr(variants, "GradientGraph", Graph)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: happened.append("step"))
    monkeypatch.setattr(bench_train, "select", lambda *args: listed)
    return happened


def test_every_road_has_its_own_base(tmp_path, on_every_road):
    assert run(tmp_path) == 0
    rows = read(tmp_path).rows
    assert [row["label"] for row in rows] == [
        "PyTorch, SDPA", "Triton: gelu", "Triton",
        "PyTorch, SDPA + CUDA graph", "Triton: gelu + CUDA graph", "Triton + CUDA graph",
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
    assert {v.road for v in asked} == {MAX_AUTOTUNE} and len(asked) == 2


def test_some_roads_are_a_file_of_their_own(tmp_path):
    assert run(tmp_path, "--road", "launched") == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("train-") and file.name.endswith("-launched.json")
    results = Results.load(file)
    assert {row["road"] for row in results.rows} == {LAUNCHED}
    assert "other roads than launched" in [entry["name"] for entry in results.left_out]


def test_quick_says_what_it_leaves_out(tmp_path):
    assert run(tmp_path, "--quick") == 0
    names = [entry["name"] for entry in read(tmp_path).left_out]
    assert f"{HUGGINGFACE} + compile" in names and NANOGPT in names


def test_a_wrong_variant_stops_everything(tmp_path, capsys, monkeypatch):
    """Attention that sees the future."""
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal: torch.zeros_like(self))
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert "red: PyTorch, naive attention" in err and "tokens/s" not in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("green", [True, False, "a kernel that does not compile"])
def test_on_a_gpu_verify_runs_in_this_process(green, capsys, monkeypatch):
    monkeypatch.undo()

    def main(arguments):
        print("a table")
        if isinstance(green, str):
            raise RuntimeError(green)
        print("the verdict")
        return 0 if green else 1

    monkeypatch.setattr(gate.verify, "main", main)
    gate.verified.cache_clear()
    assert gate.verified(torch.device("cuda")) is (green is True)
    gate.verified.cache_clear()
    out, err = capsys.readouterr()
    assert "verify: the verdict" in out if green is True else "a table" in err and "red" in err
    assert green not in ("a kernel that does not compile",) or green in err


def test_a_red_verify_prints_no_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    gate.verified.cache_clear()
    red = subprocess.CompletedProcess([], 1, "a table with 2.7 in red", "")
    monkeypatch.setattr(gate.subprocess, "run", lambda *args, **kwargs: red)
    assert bench.main(["train", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    gate.verified.cache_clear()
    out, err = capsys.readouterr()
    assert "red" in err and "2.7 in red" in err and "tokens" not in out and not list(tmp_path.iterdir())


def test_memory_that_ends_is_a_row(tmp_path, monkeypatch):
    gradient = Family.gradient

    def no_memory(self, backward):
        if self.name == HUGGINGFACE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient(self, backward)

    monkeypatch.setattr(Family, "gradient", no_memory)
    assert run(tmp_path) == 0
    rows = [row for row in read(tmp_path).rows if row["label"].startswith(HUGGINGFACE)]
    assert len(rows) == 2 and all(row["what"] == "out of memory" and row["time_ms"] is None for row in rows)
    (file,) = tmp_path.glob("train-*.json")
    assert bench.main(["report", str(file), "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_size_that_does_not_fit_leaves_the_others(tmp_path, monkeypatch, error):
    family = steps.TrainBench._family

    def no_memory(self, name, setting, weights):
        if setting.T == 8:
            raise error
        return family(self, name, setting, weights)

    monkeypatch.setattr(steps.TrainBench, "_family", no_memory)
    monkeypatch.setitem(config.PRESETS, "tiny2", TINY)
    settings = bench_train._settings
    monkeypatch.setattr(
        bench_train,
        "_settings",
        lambda *args: (s if s.size == "tiny" else dataclasses.replace(s, T=8) for s in settings(*args)),
    )
    assert run(tmp_path, "--size", "tiny2,tiny") == 0
    results = read(tmp_path)
    assert {row["size"] for row in results.rows} == {"tiny"}
    assert any(entry["name"].startswith("tiny2") and "out of memory" in entry["why"] for entry in results.left_out)


def test_memory_that_ends_with_all_variants_in_turns_is_told(tmp_path, monkeypatch):
    def no_memory(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps.timing, "measure", no_memory)
    assert run(tmp_path) == 0
    assert {row["what"] for row in read(tmp_path).rows} == {"out of memory"}


@pytest.mark.parametrize("stop, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=str)
def test_what_was_measured_is_kept_when_a_run_is_cut_short(tmp_path, monkeypatch, capsys, stop, error):
    compare, names, before = steps.TrainBench.compare, iter(("first", "second")), signal.getsignal(signal.SIGTERM)

    def cut_short(self, setting):
        if next(names) == "second":
            signal.raise_signal(stop)
        compare(self, setting)

    monkeypatch.setattr(steps.TrainBench, "compare", cut_short)
    monkeypatch.setitem(config.PRESETS, "tiny2", TINY)
    with pytest.raises(error):
        run(tmp_path, "--size", "tiny,tiny2")
    assert signal.getsignal(signal.SIGTERM) is before
    results = read(tmp_path)
    assert {row["size"] for row in results.rows} == {"tiny"}
    assert dict(name="the rest", why="the run was cut short") in results.left_out
    assert "cut short; what was measured is in" in capsys.readouterr().err


def test_a_sweep_doubles_the_batch_until_memory_ends(tmp_path, monkeypatch):
    measure, limit = steps.TrainBench._prepare, 4

    def limited(self, setting, family, variant, gradient):
        if setting.B > limit:
            monkeypatch.setattr(family, "gradient", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out")))
        return measure(self, setting, family, variant, gradient)

    monkeypatch.setattr(steps.TrainBench, "_prepare", limited)
    monkeypatch.setattr(variants, "all_variants", lambda *others: [Variant(OURS)])
    assert run(tmp_path, "--sweep") == 0
    alone = [row for row in read(tmp_path).rows if row["alone"]]
    assert [row["batch"] for row in alone] == [1, 2, 4, 8]
    assert [row["time_ms"] is None for row in alone] == [False, False, False, True]
    assert all(row["what"].endswith("; alone") and row["speedup"] is None for row in alone[:3])


def test_mfu_is_its_formula_and_unknown_hardware_unknown(monkeypatch):
    setting = steps.Setting("gpt2", 1, 1024, "bfloat16", CPU, 1.0)
    assert setting.mfu(1000.0) is None
    monkeypatch.setattr(hardware, "peak_flops", lambda device: 1e15)
    N = 124_475_904 - 1024 * 768  # with 50304 rows of tokens, without positions
    assert setting.mfu(1000.0) == pytest.approx(1000 * (6 * N + 12 * 12 * 768 * 1024) / 1e15)
    assert steps.Setting("gpt2", 1, 1024, "float32", CPU, 1.0).mfu(1000.0) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "gpt3"], "--size is 'gpt3'"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--batch", "0"], "--batch is 0"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--road", "graph,rail"], "--road is 'rail', allowed are launched, graph, compile"),
        (["--device", "warp"], "device is 'warp'"),
        (["--nanogpt", "/none/model.py"], "expected the path of nanoGPT's model.py"),
    ],
)
def test_mistakes_are_named(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *args)


def test_without_a_command_a_quick_set_and_a_report_run(monkeypatch):
    ran = []
    for module in bench.COMMANDS:
        monkeypatch.setattr(module, "main", lambda options: ran.append(options) or 0)
    assert bench.main([]) == 0
    assert len(ran) == len(bench.DEFAULT) and all(options.quick for options in ran[:-1])
    ran.clear()
    monkeypatch.setattr(bench.COMMANDS[0], "main", lambda options: ran.append(options) or 3)
    assert bench.main([]) == 3 and len(ran) == 1, "a red one stops the rest"
