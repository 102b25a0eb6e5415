"""All kernels in the model: compiled, checkpointed, under autocast, copied, distributed, deterministic and causal."""

import copy
import dataclasses
import functools
import inspect
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastgpt2 import GPT, GPTConfig, Kernels

TINY = GPTConfig(block_size=64, vocab_size=37, n_layer=1, n_head=2, n_embd=32)


def make(device, kernels="triton", **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes), kernels=kernels)
    for p in model.parameters():  # biases and LayerNorms that matter
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model.to(device)


def tokens(B: int, T: int, device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + T)
    return tuple(torch.randint(TINY.vocab_size, (2, B, T), generator=generator).to(device))


def gradients(model, *batch) -> dict[str, Tensor]:
    """Of every parameter, and the loss beside them."""
    model.zero_grad()
    loss = model(*batch)[1]
    loss.backward()
    grads = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | grads


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"not bitwise equal: {different}"


# ------------------------------------------------------------------------------------------------------ each toggle

CONFIGS = [{}, dict(bias=False, n_embd=40), dict(vocab_multiple=64, scale_attn_by_inverse_layer_idx=True, n_layer=2)]


@pytest.mark.parametrize("changes", CONFIGS, ids=["gpt2", "no_bias", "padded_vocab"])
def test_each_toggle_alone_computes_the_same_model(changes, device):
    """In float64, where nothing but a mistake is larger than 1e-10."""
    model, batch = make(device, **changes).double(), tokens(2, 5, device)
    with model.use_kernels("torch"):
        truth = gradients(model, *batch)
        logits = model.eval()(*batch)[0]
    for toggle in (*Kernels.names(), "triton"):
        with model.use_kernels(toggle):
            torch.testing.assert_close(gradients(model.train(), *batch), truth, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(model.eval()(*batch)[0], logits, rtol=1e-10, atol=1e-10)


def test_both_uses_of_the_token_table_reach_its_gradient(device):
    model, batch = make(device), tokens(2, 5, device)
    tied = gradients(model, *batch)["transformer.wte.weight"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    apart = gradients(model, *batch)
    assert apart["transformer.wte.weight"].any() and apart["lm_head.weight"].any()
    assert torch.equal(tied, apart["transformer.wte.weight"] + apart["lm_head.weight"])


def test_logits_ignore_later_tokens(device):
    model, (idx, targets) = make(device).eval(), tokens(2, 5, device)
    before, _ = model(idx, targets)
    for t in (1, 4):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % TINY.vocab_size
        after, _ = model(changed, targets)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_runs_are_bitwise_equal(device):
    model, batch = make(device, dropout=0.2), tokens(2, 5, device)

    def run(seed):
        torch.manual_seed(seed)
        return gradients(model, *batch)

    first = run(1)
    assert_equal(run(1), first)
    assert run(2)["loss"] != first["loss"]


# ------------------------------------------------------------------------------------------------------------ compile


def test_compiled_model_is_the_eager_one(device):
    model, batch = make(device), tokens(2, 5, device)
    eager = gradients(model, *batch)
    compiled = gradients(torch.compile(model, fullgraph=True), *batch)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert compiled["loss"].requires_grad is False and len(compiled) == len(eager)


def test_inductor_knows_the_operators(device, monkeypatch):
    """What it has to find out by itself, PyTorch 2.11 describes in a text that grows exponentially in depth."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config, graph, lowering

    model, batch, said = make(device), tokens(2, 5, device), []
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", type(lowering.FALLBACK_ALLOW_LIST)())
    monkeypatch.setattr(graph, "FALLBACK_ALLOW_LIST", lowering.FALLBACK_ALLOW_LIST)
    for operator in [o for o in lowering.lowerings if str(o).startswith("fastgpt2")]:
        monkeypatch.delitem(lowering.lowerings, operator)
    monkeypatch.setattr(graph.log, "info", lambda message, *args: said.append(message % args if args else message))
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        gradients(torch.compile(model, fullgraph=True), *batch)
    assert any(str(o).startswith("fastgpt2") for o in lowering.lowerings), "nothing was compiled here"
    assert not [line for line in said if "fallback" in line and "fastgpt2" in line]


def test_compiled_evaluation_is_the_eager_one(device):
    model, batch = make(device).eval(), tokens(2, 5, device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*batch), model(*batch))


def test_other_batches_and_lengths_are_one_graph(device):
    model, backend = make(device), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for B, T in [(2, 5), (3, 4)]:
        batch = tokens(B, T, device)
        for t in batch:
            torch._dynamo.mark_dynamic(t, (0, 1))
        assert_equal(gradients(compiled, *batch), gradients(model, *batch))
    assert backend.frame_count == 1


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="watches the interpreter's launches")
def test_other_batches_and_lengths_compile_no_new_kernels(device):
    """Triton compiles anew for another constexpr or option, and for an integer that becomes 1 or a multiple of 16."""
    variants: dict[str, set] = defaultdict(set)
    run = triton.runtime.interpreter.InterpretedFunction.run

    def recorded(self, *args, grid, warmup, **kwargs):
        annotations = inspect.get_annotations(self.fn)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        plain = set(self.kwargs.get("do_not_specialize") or ())

        def key(name, value):
            if name not in annotations and isinstance(value, int) and not isinstance(value, bool):
                return "int" if name in plain else (value == 1, value % 16 == 0)
            return value.dtype if isinstance(value, Tensor) else value

        variants[self.__name__].add(tuple((name, key(name, value)) for name, value in given.items()))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    model = make(device)
    with mock.patch.object(triton.runtime.interpreter.InterpretedFunction, "run", recorded):

        def launched(B: int, T: int) -> dict[str, int]:
            gradients(model, *tokens(B, T, device))
            return {name: len(keys) for name, keys in variants.items()}

        first = launched(3, 16)
        assert len(first) >= 10
        assert launched(2, 32) == first
        odd = launched(4, 9)
        assert all(odd[name] <= 2 * n for name, n in first.items()), (odd, first)
        assert launched(5, 7) == odd


# --------------------------------------------------------------------------------------- checkpointing, mixed precision


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_nothing(dropout, device):
    model, batch = make(device, n_layer=2, dropout=dropout), tokens(2, 5, device)
    torch.manual_seed(1)
    plain = gradients(model, *batch)
    with mock.patch.object(
        type(model.transformer.h[0]),
        "__call__",
        lambda block, *args: checkpoint(block.forward, *args, use_reentrant=False),
    ):
        torch.manual_seed(1)
        assert_equal(gradients(model, *batch), plain)


@functools.cache
def training_losses(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Five steps under autocast to `dtype`, with a GradScaler where fp16 needs one; float32 is without autocast."""
    model, batch = make(device), tokens(2, 5, device)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scale = scaler.get_scale()
    losses = []
    for _ in range(5):
        with torch.autocast(device.type, torch.bfloat16 if dtype == torch.float32 else dtype, dtype != torch.float32):
            loss = model(*batch)[1]
        scaler.scale(loss).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert scaler.get_scale() == scale, "a step was skipped: its gradients were not finite"
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_learns_as_float32_does(dtype, device):
    exact = training_losses(torch.float32, device)
    assert exact[-1] < exact[0] - 1
    torch.testing.assert_close(training_losses(dtype, device), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


# -------------------------------------------------------------------------------------------------- copies and ranks


def test_a_copy_is_a_model_of_its_own(device):
    model, batch = make(device), tokens(2, 5, device)
    before = gradients(model, *batch)
    twin = copy.deepcopy(model)
    assert twin.kernels == model.kernels
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert_equal(gradients(twin, *batch), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert_equal(gradients(model, *batch), before)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="two ranks on the CPU")
def test_two_ranks_make_the_gradients_of_one(tmp_path):
    """DistributedDataParallel on gloo, half the batch a rank; to the rounding of sums in another order."""
    model, batch = make("cpu"), tokens(4, 5, "cpu")
    torch.save({"config": dataclasses.asdict(model.config), "weights": model.state_dict()}, tmp_path / "model.pt")
    torch.save(batch, tmp_path / "batch.pt")
    worker = Path(__file__).with_name("ddp_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), "2", tmp_path], stderr=subprocess.PIPE, env={**os.environ}, text=True
        )
        for rank in range(2)
    ]
    alone = gradients(model, *batch)
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"grads_{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    del alone["loss"]
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
