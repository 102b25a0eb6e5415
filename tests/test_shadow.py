"""16-bit copies of weights, written by TritonAdamW and read by passes under autocast: the numbers of a cast."""

import copy
import gc

import pytest
import shadow_runs
import torch
from shadow_runs import (
    READ,
    READ_BY_TORCH,
    Casts,
    a_batch,
    a_trained_one,
    by_casts,
    casts_of_a_step,
    change_in_place,
    forward,
    new_model,
    optimizer_of,
    passed,
    same,
)
from tiny_run import run, settings_in
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import GPT
from fastgpt2.gpt2 import hardware, shadow
from fastgpt2.gpt2.training.train import Trainer, train
from fastgpt2.gpt2.training.triton_adamw import TritonAdamW


@pytest.fixture
def pair(device) -> tuple[Tensor, Tensor]:
    return a_batch(device)


@pytest.fixture
def trained(device, pair):
    return a_trained_one(device, pair)


# --------------------------------------------------------------------------------------------------------------- casts


@pytest.mark.parametrize(("kernels", "read"), [("torch", READ_BY_TORCH), ("triton", READ)])
def test_no_weight_is_cast_in_a_step(kernels, read, device, pair):
    """PyTorch's autocast casts each in each pass."""
    model = new_model(device, kernels)
    assert casts_of_a_step(model, torch.optim.AdamW(model.parameters()), pair, passes=2) == 2 * read
    optimizer = optimizer_of(model, device)
    assert casts_of_a_step(model, optimizer, pair, passes=2) == read, "the first step makes the copies"
    assert casts_of_a_step(model, optimizer, pair, passes=2) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton", "mlp", "layer_norm", "cross_entropy"])
def test_the_numbers_are_those_of_casts(kernels, dtype, device, pair):
    """Bit for bit: losses, gradients of two passes, weights of three steps."""
    ours = new_model(device, kernels)
    theirs = copy.deepcopy(ours)
    optimizers = [optimizer_of(m, device) for m in (ours, theirs)]
    for s in optimizers[1]._shadows.values():
        shadow.forget(s)
    for _ in range(3):
        for optimizer, model in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            for _ in range(2):
                forward(model, pair, dtype).backward()
        assert same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
        for optimizer in optimizers:
            optimizer.step()
        assert same(list(ours.parameters()), list(theirs.parameters()))
    assert any(s.copy is not None for s in optimizers[0]._shadows.values())
    assert all(s.copy is None for s in optimizers[1]._shadows.values())


# ------------------------------------------------------------------------------------------------------------- changes


CHANGES = [
    *("change_in_place", "load", "assign", "replace_data", "transpose_data", "exchange_data", "exchange_two"),
    *("to_and_fro", "another_optimizer", "average", "freeze", "untie"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_never_passed_over(change, trained, device, pair):
    model, optimizer = trained
    getattr(shadow_runs, change)(model, device)
    assert same(passed(model, pair), by_casts(model, pair))
    if change in ("assign", "untie"):
        return  # the optimizer has the former parameters
    optimizer.load_state_dict(optimizer.state_dict())  # moments lie as the parameters do now
    optimizer.step()
    assert same(passed(model, pair), by_casts(model, pair)), "after a step of what was changed"


def test_other_memory_at_the_same_address(trained, device, pair):
    """As an allocator may give it out when a parameter's `.data` is replaced twice."""
    model, optimizer = trained
    p = model.transformer.h[0].attn.c_proj.weight
    memory = torch.stack([p.detach(), p.detach()]).cpu().numpy()[0]
    p.data = torch.from_numpy(memory).to(device)
    for _ in range(2):
        assert same(passed(model, pair), by_casts(model, pair))
        optimizer.step()
    p.data = torch.ones(16, 16, device=device)
    p.data = torch.from_numpy(memory).mul_(2).to(device)
    assert same(passed(model, pair), by_casts(model, pair))


def test_an_average_put_in_for_an_evaluation(trained, device, pair):
    """As most libraries do it, through `.data`, which PyTorch's version counters do not see."""
    model, optimizer = trained
    expected = by_casts(model, pair)
    own = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.mul_(0.5)
    with torch.no_grad():
        assert torch.equal(forward(model, pair), forward(copy.deepcopy(model), pair))
    for p, before in zip(model.parameters(), own, strict=True):
        p.data.copy_(before)
    assert same(passed(model, pair), expected)
    assert casts_of_a_step(model, optimizer, pair) == 0


def test_a_change_is_seen_after_an_overflow(trained, device, pair):
    """A step that writes nothing leaves a copy as old as it was."""
    model, optimizer = trained
    loss = forward(model, pair)
    loss.backward()
    change_in_place(model, device)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((2, 1), device=device)
    optimizer.step()
    assert same(passed(model, pair), by_casts(model, pair))


def test_a_backward_after_a_change_is_refused(device, pair):
    """As without autocast: the copy is what the backward would multiply with."""
    model = new_model(device)
    optimizer = TritonAdamW([model.transformer.h[0].mlp.c_fc.weight])
    loss = forward(model, pair)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_in_another_dtype(trained, pair):
    model, optimizer = trained
    for dtype in (torch.float16, torch.bfloat16):
        assert same(passed(model, pair, dtype), by_casts(model, pair, dtype))
        optimizer.step()
        assert casts_of_a_step(model, optimizer, pair) == (READ_BY_TORCH if dtype == torch.float16 else 0)


# ----------------------------------------------------------------------------------------------------- who reads what


def test_only_training_passes_under_autocast_read_copies(trained, device, pair):
    """Each compared with the copies spoilt, without anybody saying so."""
    model, optimizer = trained
    for s in optimizer._shadows.values():
        if s.copy is not None:
            s.copy.fill_(float("nan"))
    assert forward(model, pair).isnan(), "it is the copies that are read"
    with torch.no_grad():
        assert forward(model, pair).isfinite()
    assert model(*pair)[1].isfinite()
    model.requires_grad_(False)
    assert forward(model, pair).isfinite()
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    with torch.autocast(device.type, torch.bfloat16):
        grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, pair)[1])(parameters)
        assert all(g.isfinite().all() for g in grads.values())
        with torch.autograd.forward_ad.dual_level():
            assert model(*pair)[1].isfinite()
    assert forward(torch.compile(model, backend="eager"), pair).isfinite()


def test_a_capture_that_nobody_refreshes_casts(trained, pair, monkeypatch):
    model, optimizer = trained
    monkeypatch.setattr(hardware, "is_capturing", lambda: True)
    with Casts(model) as casts:
        forward(model, pair)
    assert casts.count == READ_BY_TORCH


def test_a_captured_step_keeps_what_it_writes(device, pair, monkeypatch):
    """Its replays change parameters without counting it: copies that they do not write may not be made later."""
    model = new_model(device)
    optimizer = optimizer_of(model, device)
    passed(model, pair)
    loss = model(*pair)[1]  # in fp32
    loss.backward()
    optimizer._shadows[model.transformer.h[0].mlp.c_fc.weight].copy = None
    monkeypatch.setattr(hardware, "is_capturing", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    forward(model, pair)
    with Casts(model) as casts:
        forward(model, pair)
    assert casts.count == 1
    optimizer.step()
    assert same(passed(model, pair), by_casts(model, pair))


def test_second_derivatives(trained, pair):
    model, _ = trained
    weight = model.transformer.h[0].mlp.c_fc.weight

    def penalty(of: GPT) -> Tensor:
        weight = of.transformer.h[0].mlp.c_fc.weight
        (grad,) = torch.autograd.grad(forward(of, pair), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    assert torch.equal(penalty(model), penalty(copy.deepcopy(model))) and penalty(model).shape == weight.shape


def test_activation_checkpointing(trained, pair):
    model, _ = trained
    model.transformer.recompute = True
    with Casts(model) as casts:
        found = passed(model, pair)
    assert casts.count == 0
    assert same(found, by_casts(model, pair))


# -------------------------------------------------------------------------------------------------------- how they live


def test_copies_end_with_their_optimizer(device, pair):
    model, optimizer = a_trained_one(device, pair)
    parameters = {id(p) for p in model.parameters()}
    assert parameters <= set(shadow._SHADOWS)
    del optimizer
    gc.collect()
    assert parameters.isdisjoint(set(shadow._SHADOWS))
    assert same(passed(model, pair), by_casts(model, pair))


def test_only_what_products_read_has_a_copy(trained):
    model, optimizer = trained
    copied = {id(s.parameter) for s in optimizer._shadows.values() if s.copy is not None}
    assert len(copied) == READ_BY_TORCH and id(model.transformer.wpe.weight) not in copied
    assert id(model.transformer.wte.weight) in copied, "it is the head's weight too"


def test_deepcopies_and_loaded_states_have_their_own(trained, device, pair):
    model, optimizer = trained
    twin, twins = copy.deepcopy((model, optimizer))
    twins.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        assert same(passed(twin, pair), by_casts(twin, pair))
        twins.step()
    assert casts_of_a_step(twin, twins, pair) == 0
    assert same(passed(model, pair), by_casts(model, pair))
    assert casts_of_a_step(model, optimizer, pair) == 0


def test_frozen_weights_and_parameters_added_later(device, pair):
    """As in fine-tuning with adapters, whose base stays as it is."""
    model = new_model(device)
    model.transformer.h.requires_grad_(False)
    optimizer = TritonAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    casts_of_a_step(model, optimizer, pair)
    assert casts_of_a_step(model, optimizer, pair) == READ_BY_TORCH - 1, "the head alone is trained"
    model.transformer.h.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.transformer.h.parameters())})
    casts_of_a_step(model, optimizer, pair)
    assert casts_of_a_step(model, optimizer, pair) == 0
    assert same(passed(model, pair), by_casts(model, pair))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, quick_runs, monkeypatch):
    settings = settings_in(tmp_path) | dict(steps=3, eval_interval=2, batch_size=2, n_embd=8, n_head=1, n_layer=1)
    settings |= dict(dtype="bfloat16", optimizer="triton")
    whole = run(settings, out=str(tmp_path / "whole"))[0]
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, at: 1 / 0 if at == 3 else step(self, at))
    with pytest.raises(ZeroDivisionError):
        run(settings, out=str(tmp_path / "killed"))
    monkeypatch.setattr(Trainer, "step", step)
    resumed = train(resume=tmp_path / "killed")
    assert same(list(resumed.model.parameters()), list(whole.model.parameters()))


def test_ddp(trained, device, pair):
    model, optimizer = trained
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    wrapped = None
    try:
        wrapped = DistributedDataParallel(model)  # writes all parameters in place, as rank 0 has them
        casts_of_a_step(wrapped, optimizer, pair)
        assert casts_of_a_step(wrapped, optimizer, pair) == 0
        optimizer.zero_grad()
        expected = by_casts(model, pair)
        assert same(passed(wrapped, pair), expected)
    finally:
        del wrapped  # before its process group is left: see ddp_worker.py
        torch.distributed.destroy_process_group()
