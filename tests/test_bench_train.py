"""`bench train`: every variant computes the same model, rows say what was measured, a red check prints no number."""

import dataclasses
import json
import signal
import subprocess

import bench_runs
import pytest
import torch
from bench_runs import NANOGPT_LIKE, TINY, read, run

from fastgpt2.bench import __main__ as bench
from fastgpt2.bench.cases import variants
from fastgpt2.bench.cases.variants import (
    COMPILE,
    CUDAGRAPH_TREES,
    GRAPH,
    HUGGINGFACE,
    LAUNCHED,
    MAX_AUTOTUNE,
    NANOGPT,
    OURS,
    REDUCE_OVERHEAD,
    Family,
    Variant,
)
from fastgpt2.bench.timing import steps
from fastgpt2.bench.timing import train as bench_train
from fastgpt2.bench.verify import gate
from fastgpt2.gpt2 import config, hardware
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import Kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    bench_runs.make_small(monkeypatch)


@pytest.fixture
def nanogpt(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(NANOGPT_LIKE)
    return file


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


def test_naive_attention_is_naive_and_trains_the_same_parameters(monkeypatch):
    model = GPT(config.GPTConfig(**TINY))
    naive = variants.with_naive_attention(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    naive(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="not callable"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert {id(p) for p in naive.parameters()} == {id(p) for p in model.parameters()}


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


def test_quick_says_what_it_leaves_out(tmp_path):
    assert run(tmp_path, "--quick") == 0
    names = [entry["name"] for entry in read(tmp_path).left_out]
    assert f"{HUGGINGFACE} + compile" in names and NANOGPT in names


def test_a_wrong_variant_stops_everything(tmp_path, capsys, monkeypatch):
    """Attention that sees the future."""
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal: torch.zeros_like(self))
    assert run(tmp_path) == 1
    out, err = capsys.readouterr()
    assert "failed: PyTorch, naive attention" in err and "tokens/s" not in out and not list(tmp_path.iterdir())


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
    assert "verify: the verdict" in out if green is True else "a table" in err and "failed, so" in err
    assert green not in ("a kernel that does not compile",) or green in err


def test_a_red_verify_prints_no_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    gate.verified.cache_clear()
    red = subprocess.CompletedProcess([], 1, "a table with 2.7 in red", "")
    monkeypatch.setattr(gate.subprocess, "run", lambda *args, **kwargs: red)
    assert bench.main(["train", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    gate.verified.cache_clear()
    out, err = capsys.readouterr()
    assert (
        "failed, so nothing is measured" in err
        and "2.7 in red" in err
        and "tokens" not in out
        and not list(tmp_path.iterdir())
    )


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
    monkeypatch.setattr(bench.pace, "default_lines", lambda device: bench.pace.COMPLETE)
    for module in bench.COMMANDS:
        monkeypatch.setattr(module, "main", lambda options: ran.append(options) or 0)
    assert bench.main([]) == 0
    assert len(ran) == len(bench.pace.COMPLETE) and all(options.quick for options in ran[:-1])
    ran.clear()
    monkeypatch.setattr(bench.COMMANDS[0], "main", lambda options: ran.append(options) or 3)
    assert bench.main([]) == 3 and len(ran) == 1, "a red one stops the rest"
