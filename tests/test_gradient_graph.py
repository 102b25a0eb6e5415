"""A step as a CUDA graph trains as without one: on a GPU with real graphs, elsewhere with ones that compute again."""

import contextlib
import dataclasses

import pytest
import torch
from tiny_run import settings_in
from torch import Tensor

from fastgpt2.gpt2 import gradient_graph
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.corpus import load_corpus
from fastgpt2.gpt2.gradient_graph import GradientGraph
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.train import TrainConfig, Trainer

SIZES = dict(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


class Recorded:
    """What stands for a CUDA graph without a GPU: captured work changes no value, a replay writes where it wrote."""

    def __init__(self, work, device, pool=None):
        self.work, self.adds = work, pool is not None
        self.parameters = work.__self__.parameters
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        assert [grad is not None for grad in before] == [self.adds] * len(before)
        self.out = work()
        if self.adds:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad.copy_(grad)

    def pool(self):
        return "pool"

    def replay(self):
        static = [p.grad for p in self.parameters]
        if not self.adds:
            for p in self.parameters:
                p.grad = None
        self.out.copy_(self.work())
        for p, grad in zip(self.parameters, static, strict=True):
            if not self.adds:
                grad.copy_(p.grad)
            p.grad = grad


@pytest.fixture(autouse=True)
def graphs(monkeypatch, device):
    if device.type == "cuda":
        return

    def capture(work, device, pool=None):
        graph = Recorded(work, device, pool)
        return graph, graph.out

    class Stream:
        wait_stream = staticmethod(lambda other: None)

    monkeypatch.setattr(gradient_graph, "_capture", capture)
    for name, stand_in in dict(
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
        device=lambda device: contextlib.nullcontext(),
        stream=lambda stream: contextlib.nullcontext(),
        Stream=Stream,
        current_stream=Stream,
        empty_cache=lambda: None,
        memory_reserved=lambda device: 0,
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def gradients_of(model: GPT):
    def gradients(idx: Tensor, targets: Tensor) -> Tensor:
        loss = model(idx, targets)[1]
        loss.backward()
        return loss.detach()

    return gradients


def batches(model: GPT, device, count: int) -> list[tuple[Tensor, Tensor]]:
    V = model.config.vocab_size
    return [tuple(torch.randint(V, (2, 2, 8), device=device)) for _ in range(count)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_without_a_graph(device, dropout):
    model = GPT(GPTConfig(**{**SIZES, "dropout": dropout}), kernels="torch").to(device)
    gradients, pairs = gradients_of(model), batches(model, device, 5)
    graph = GradientGraph(gradients, model.parameters(), *pairs[0])
    assert all(p.grad is None for p in model.parameters())
    calls = [(pairs[1], False), (pairs[2], True), (pairs[3], True), (pairs[4], False)]

    def all_of(compute) -> list[tuple[Tensor, list[Tensor]]]:
        torch.manual_seed(1)  # dropout's masks are the same, and go on from call to call
        found = []
        for pair, add in calls:
            loss = compute(*pair, add=add)
            found.append((loss, [p.grad.clone() for p in model.parameters()]))
        return found

    def plain(idx: Tensor, targets: Tensor, add: bool) -> Tensor:
        if not add:
            model.zero_grad(set_to_none=True)
        return gradients(idx, targets)

    for (loss, grads), (expected, expected_grads) in zip(all_of(graph), all_of(plain), strict=True):
        torch.testing.assert_close(loss, expected)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_a_call_brings_gradients_that_were_given_up_back(device):
    model = GPT(GPTConfig(**SIZES), kernels="torch").to(device)
    first, second = batches(model, device, 2)
    graph = GradientGraph(gradients_of(model), model.parameters(), *first)
    losses = [graph(*first)]
    where = [p.grad.data_ptr() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    losses.append(graph(*second))
    assert [p.grad.data_ptr() for p in model.parameters()] == where
    assert losses[0] != losses[1], "a loss stays when the next is computed"


def trainer(folder, device, **more) -> Trainer:
    settings = {**settings_in(folder), "device": str(device), "dropout": 0.1, "dtype": "float32", **more}
    config = TrainConfig(**settings)
    corpus = load_corpus(config.data, config.tokenizer, config.val_fraction, config.block_size)
    torch.manual_seed(0)
    return Trainer(config, corpus.tokenizer, corpus.train, corpus.val)


def losses(folder, device, graph: bool, **more) -> list[float]:
    """Of four steps from the same seed."""
    run = trainer(folder, device, cuda_graph="auto" if graph else "off", **more)
    run.captures = graph  # a CPU has none
    found = [run.step(i).loss for i in (1, 2, 3, 4)]
    assert (run.graph is not None) is graph
    return found


RUNS = [{}, dict(total_batch_tokens=192), dict(dtype="bfloat16"), dict(dtype="float16")]


@pytest.mark.parametrize("more", RUNS, ids=str)
def test_a_run_trains_alike(tmp_path, device, more):
    if device.type == "cpu" and more.get("dtype") == "float16":
        pytest.skip("the scaler needs a GPU")
    expected = losses(tmp_path, device, False, **more)
    assert losses(tmp_path, device, True, **more) == pytest.approx(expected, rel=1e-2 if "dtype" in more else 1e-4)


@pytest.mark.parametrize("cuda_graph", ["auto", "on"])
def test_a_capture_that_fails(tmp_path, device, monkeypatch, cuda_graph):
    """Training goes on without, and as if nothing had been tried, unless a graph was asked for."""

    def fails(work, device, pool=None):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = losses(tmp_path, device, False)
    monkeypatch.setattr(gradient_graph, "_capture", fails)
    run = trainer(tmp_path, device)
    run.captures, run.config = True, dataclasses.replace(run.config, cuda_graph=cuda_graph)
    if cuda_graph == "on":
        with pytest.raises(RuntimeError, match="not permitted"):
            run.step(1)
        return
    with pytest.warns(UserWarning, match="no CUDA graph of forward and backward, training goes on without: operation"):
        found = [run.step(1).loss]
    found += [run.step(i).loss for i in (2, 3, 4)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("other", ["compile", "recompute", "document_mask"])
def test_what_cannot_be_captured_is_not(other):
    gpu = dict(device="cuda", dtype="float32")
    assert TrainConfig(**gpu).as_cuda_graph(1) and not TrainConfig(**gpu, cuda_graph="off").as_cuda_graph(1)
    assert not TrainConfig(**gpu, **{other: True}).as_cuda_graph(1)
    with pytest.raises(ValueError, match=f"cuda_graph is 'on' and {other} is set, allowed is one of them"):
        TrainConfig(**gpu, cuda_graph="on", **{other: True})


@pytest.mark.parametrize(("device_name", "ranks", "where"), [("cpu", 1, "cpu"), ("cuda", 8, "8 ranks")])
def test_one_gpu_has_graphs(device_name, ranks, where):
    assert not TrainConfig(device=device_name).as_cuda_graph(ranks)
    with pytest.raises(ValueError, match=f"cuda_graph is 'on' and the run is on {where}, allowed is one GPU"):
        TrainConfig(device=device_name, cuda_graph="on").as_cuda_graph(ranks)
