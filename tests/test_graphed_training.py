"""Runs train alike with and without graphs: `Trainer`, documents, recomputing, compiled models, several ranks."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import graph_stand_ins
import pytest
import torch
from tiny_run import settings_in

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.bench.cases.variants import GRAPH, LAUNCHED, Family, Variant
from fastgpt2.bench.timing.steps import Setting
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.data.corpus import load_corpus
from fastgpt2.gpt2.data.tokenizer import BPETokenizer
from fastgpt2.gpt2.data.windows import encode, split
from fastgpt2.gpt2.training import step_graphs
from fastgpt2.gpt2.training.graphed import graphs_of, release
from fastgpt2.gpt2.training.train import TrainConfig, Trainer


@pytest.fixture
def replays(monkeypatch, device):
    return graph_stand_ins.count_replays(monkeypatch, device)


def trainer(folder, device, **more) -> Trainer:
    settings = {**settings_in(folder), "device": str(device), "n_layer": 2, "dropout": 0.1, "dtype": "float32", **more}
    config = TrainConfig(**settings)
    if config.document_mask:  # of a tokenizer with an end of text
        tokenizer = BPETokenizer({bytes([b]): b for b in range(256)} | {b"th": 256})
        tokens = encode([(f"the {i}" * (i % 5), True) for i in range(300)], tokenizer)
        parts = tokenizer, *split(tokens, 0.1, config.block_size)
    else:
        corpus = load_corpus(config.data, config.tokenizer, config.val_fraction, config.block_size)
        parts = corpus.tokenizer, corpus.train, corpus.val
    torch.manual_seed(0)
    return Trainer(config, *parts)


def losses(folder, device, captures: bool, **more) -> list[float]:
    """Of four steps from the same seed, and on held-out text between them."""
    run = trainer(folder, device, cuda_graph="auto" if captures else "off", **more)
    run.captures = captures  # a CPU has none
    found = [run.step(1).loss, run.step(2).loss, run.validation_loss(), run.step(3).loss, run.step(4).loss]
    assert (graphs_of(run.parallel_model) is not None) is captures
    return found


RUNS = {
    "plain": {},
    "passes": dict(total_batch_tokens=192),
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16"),
    "documents": dict(document_mask=True, total_batch_tokens=128),
    "recompute": dict(recompute=True, dropout=0.0),
    "compile": dict(compile=True, dropout=0.0),
    "compile recompute": dict(compile=True, recompute=True, dropout=0.0, document_mask=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_alike(tmp_path, device, replays, name, monkeypatch):
    more = RUNS[name]
    if device.type == "cpu" and more.get("dtype") == "float16":
        pytest.skip("the scaler needs a GPU")
    if device.type == "cpu":  # where Inductor takes a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = losses(tmp_path, device, False, **more)
    assert not replays
    assert losses(tmp_path, device, True, **more) == pytest.approx(expected, rel=1e-2 if "dtype" in more else 1e-4)
    assert len(replays) == 4 * TrainConfig(**{**settings_in(tmp_path), **more}).grad_accum_steps(1)


@pytest.mark.parametrize("cuda_graph", ["auto", "on"])
def test_a_capture_that_fails(tmp_path, device, replays, monkeypatch, cuda_graph):
    """Training goes on without, unless a graph was asked for."""

    def fails(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_graphs.Recorder, "capture", fails)
    expected = trainer(tmp_path, device, cuda_graph="off").step(1).loss
    run = trainer(tmp_path, device)
    run.captures = True
    run.config = dataclasses.replace(run.config, cuda_graph=cuda_graph)
    if cuda_graph == "on":
        with pytest.raises(RuntimeError, match="not permitted"):
            run.step(1)
        return
    with pytest.warns(UserWarning, match="without CUDA graphs: nothing was captured: operation not permitted"):
        assert run.step(1).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("other", [{}, dict(compile=True), dict(recompute=True), dict(document_mask=True)], ids=str)
def test_who_captures(other):
    gpu = TrainConfig(device="cuda", dtype="float32", **other)
    assert gpu.as_cuda_graph(1) and gpu.as_cuda_graph(8)
    assert not TrainConfig(device="cuda", cuda_graph="off", **other).as_cuda_graph(1)
    assert not TrainConfig(device="cpu", **other).as_cuda_graph(1)
    sharded = TrainConfig(device="cuda", parallel="fsdp", **other)
    assert sharded.as_cuda_graph(1) and not sharded.as_cuda_graph(8)


def test_what_cannot_be_captured_is_refused_where_it_is_asked_for():
    with pytest.raises(ValueError, match="cuda_graph is 'on' and device is 'cpu', allowed is a CUDA device"):
        TrainConfig(device="cpu", cuda_graph="on").as_cuda_graph(1)
    with pytest.raises(ValueError, match="cuda_graph is 'on' and parallel is 'fsdp' on 8 ranks, allowed is 'ddp'"):
        TrainConfig(device="cuda", cuda_graph="on", parallel="fsdp").as_cuda_graph(8)


KERNELS = ["torch", *(["attention"] if ops.TRITON_INSTALLED else [])]


@pytest.mark.parametrize("kernels", KERNELS)
def test_any_number_of_documents_is_replayed(device, replays, kernels):
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=16), kernels=kernels).to(device)
    plain = copy.deepcopy(model)
    idx, targets = torch.randint(50, (2, 2, 8), device=device)
    starts = [[0, 3, 8, 9, 16], [0, 8, 16], list(range(17)), [0, 16]]
    starts = [torch.tensor(s, dtype=torch.int32, device=device) for s in starts]
    graphed(model, idx, targets, starts[0])
    found = []
    for m in (model, plain):
        for document_starts in starts:
            m.zero_grad()
            _, loss = m(idx, targets, document_starts=document_starts)
            loss.backward()
            found += [loss, m.transformer.wpe.weight.grad]
    torch.testing.assert_close(found[: len(found) // 2], found[len(found) // 2 :])
    assert len(replays) == len(starts) and len({loss.item() for loss in found[::2]}) > 2
    model(idx, targets)  # without documents another graph would be needed
    assert len(replays) == len(starts)
    with pytest.warns(DeprecationWarning, match="documents is now document_starts"):
        graphed(model, idx, targets, documents=starts[0])
    model(idx, targets, documents=starts[1])[1].backward()
    assert len(replays) == len(starts) + 1
    if device.type == "cpu":
        with pytest.raises(ValueError, match="expected to rise from 0 to 16"):
            model(idx, targets, document_starts=starts[0][:-1])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_captured(device, replays, in_place):
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=1, n_embd=16), kernels="torch").to(device)
    plain = copy.deepcopy(model)
    pairs = [tuple(torch.randint(50, (2, 2, 8), device=device)) for _ in range(3)]
    if in_place:
        model.compile(backend="aot_eager")
    called = graphed(model if in_place else torch.compile(model, backend="aot_eager"), *pairs[0], segments=2)
    for m in (called, plain):
        for pair in pairs:
            m(*pair)[1].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert len(replays) == 3 and len(graphs_of(called).segments) == 1
    compiled = model._compiled_call_impl.compiled if in_place else None
    release(called)
    assert called._compiled_call_impl is compiled and (compiled is not None) is in_place


def test_benches_replay_the_same_graphs(device, replays):
    setting = Setting("baby", 2, 16, "float32", device, budget_s=1.0)
    family = Family("fastgpt2", setting.config, GPT(setting.config, kernels="torch"), None, device)
    found = []
    for road in (LAUNCHED, GRAPH):
        backward = family.backward(Variant("fastgpt2", road=road), *setting.batch(), setting.autocast)
        found += [family.gradient(backward), family.gradient(backward)]
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])
    assert len(replays) == 2 and backward.held_bytes() >= 0


# --------------------------------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What two processes found: see graphed_worker.py."""
    if torch.cuda.is_available():
        pytest.skip("two ranks on the CPU")
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = [str(Path(__file__).with_name("graphed_worker.py")), str(folder)]
    done = subprocess.run([*torchrun, *worker], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", ["plain", "bucket views", "unused parameters", "static", "one segment", "compiled"])
def test_ddp_averages_the_same_gradients(found, name):
    """Steps of three passes, two of them under what no_sync sets, with dropout; another step has other gradients."""
    case = found[name]
    assert case["error"] < 1e-6 < case["apart"]
    assert case["segments"] == (1 if name in ("one segment", "compiled") else 4)
    assert case["replays"] == 9 * case["segments"]


def test_ddp_reduces_while_backward_runs(found):
    """Buckets of a segment's gradients go off before the next segment is replayed, and none in passes that only add."""
    assert found["plain"]["reduced_early"] == 0
    last = found["plain"]["last"]
    assert last.index("reduce") < len(last) - 1 - last[::-1].index("backward")
    runs = " ".join(last).split("backward")[1:]
    assert len(runs) == 4 and all("reduce" in run for run in runs)
    assert found["one segment"]["last"].count("backward") == 1


def test_ranks_train_alike(found):
    without, captured = found["training"]
    assert captured == pytest.approx(without, rel=1e-5) and captured[-1] < captured[0]
