"""`TritonAdamW` is torch.optim.AdamW in all but how a step is computed: beside it, step after step."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from interpreter import count_launches
from tiny_run import run, settings_in
from torch import nn

from fastgpt2 import GPT, GPTConfig
from fastgpt2.bench.audit.dispatch import count_traffic
from fastgpt2.gpt2.training.optim import adamw, cosine_schedule
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train
from fastgpt2.gpt2.training.triton_adamw import TritonAdamW
from fastgpt2.kernels._frozen import Launch

STEP = ["_adamw_begin_kernel", "_adamw_update_kernel"]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def parameters(device="cpu", dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in ((5, 7), (9,), (3, 1, 2))
    ]


def gradients(step: int, ps: list[nn.Parameter], scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def pair(device="cpu", max_norm: float | None = 1.0, **options):
    """The same parameters twice: (ours, its parameters, PyTorch's, its parameters)."""
    ours, theirs = parameters(device), parameters(device)
    options = OPTIONS | options
    return TritonAdamW(ours, max_norm=max_norm, **options), ours, torch.optim.AdamW(theirs, **options), theirs


def both_step(optimizer, ours, other, theirs, step: int, max_norm: float | None = 1.0) -> None:
    for ps in (ours, theirs):
        gradients(step, ps)
    if max_norm is not None:
        nn.utils.clip_grad_norm_([p for p in theirs if p.grad is not None], max_norm)
    optimizer.step()
    other.step()


def assert_close(ours, theirs, rtol=1e-5, atol=1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------------------ training


class Bigrams(nn.Module):
    """Few tensors, because the interpreter takes its time for each."""

    def __init__(self, vocab_size: int = 31, width: int = 8):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, idx, targets):
        return None, nn.functional.cross_entropy(self.head(self.table(idx)).flatten(0, 1), targets.flatten())


def gpt() -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=8, bias=False), kernels="torch")


@pytest.mark.parametrize("make", [Bigrams, pytest.param(gpt, marks=pytest.mark.slow)])
def test_200_steps_train_the_same(make, device):
    """Under a schedule, with clipping. How far right runs may lie apart is measured: ours may be twice as far from
    PyTorch's in float64 as PyTorch's in float32 is, and one rounding a step farther."""
    start = make().to(device)
    tokens = torch.arange(31, device=device).repeat(9)[:272].view(2, 136)

    def trained(optimizer: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model, losses = copy.deepcopy(start).to(dtype), []
        own = dict(optimizer="triton", max_norm=0.1) if optimizer == "triton" else {}
        opt = adamw(model, 0.1, 3e-3, (0.9, 0.95), device.type, **own)
        for step in range(200):
            for group in opt.param_groups:
                group["lr"] = cosine_schedule(step, peak=3e-2, floor=3e-3, warmup=10, steps=200)
            at = step % 128
            loss = model(tokens[:, at : at + 8], tokens[:, at + 1 : at + 9])[1]
            loss.backward()
            if not own:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
            losses.append(loss.detach().double())
        return losses, [p.detach().double() for p in model.parameters()]

    runs = ("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)
    truth, theirs, ours = (trained(*each) for each in runs)
    assert ours[0][-1] < 0.2 * ours[0][0], "it learns"
    for t, b, a in zip(truth[0] + truth[1], theirs[0] + theirs[1], ours[0] + ours[1], strict=True):
        largest = t.abs().max()
        allowed = 2 * (b - t).abs().max() + 200 * 2.0**-24 * largest
        assert (a - t).abs().max() <= allowed, (float((a - t).abs().max() / largest), float(allowed / largest))


def test_fastgpt2_train_with_it(tmp_path, monkeypatch):
    """The same losses and norms, and the run goes on by the other one."""
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
    settings = settings_in(tmp_path) | dict(steps=6, eval_interval=3, batch_size=2, n_embd=8, n_head=1, grad_clip=0.5)
    logs = {name: run(settings, optimizer=name, out=str(tmp_path / name))[1] for name in ("torch", "triton")}
    for key in ("loss", "grad_norm", "lr"):
        assert [r[key] for r in logs["triton"]] == pytest.approx([r[key] for r in logs["torch"]], rel=1e-4)
    assert logs["torch"][0]["grad_norm"] > 0.5, "it clips"
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, at: 1 / 0 if at == 5 else step(self, at))
    changed = TrainConfig(**settings | dict(optimizer="triton", out=str(tmp_path / "changed")))
    with pytest.raises(ZeroDivisionError):
        train(changed)
    monkeypatch.setattr(Trainer, "step", step)
    result = train(dataclasses.replace(changed, optimizer="torch"), resume=tmp_path / "changed")
    assert result.loss == pytest.approx(logs["torch"][-1]["loss"], rel=1e-4)


# --------------------------------------------------------------------------------------------------------- the loop's


def test_groups_schedules_and_missing_gradients(device):
    """What a loop changes between steps: rates, which parameters have gradients, and which there are."""
    ours, theirs = parameters(device), parameters(device)
    optimizers = [
        kind([dict(params=ps[:1], weight_decay=0.3), dict(params=ps[1:], lr=3e-3, betas=(0.8, 0.9), eps=1e-3)], lr=1e-2)
        for kind, ps in ((TritonAdamW, ours), (torch.optim.AdamW, theirs))
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    for step in range(8):
        for ps, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            if step == 5:
                generator = torch.Generator().manual_seed(9)
                new = nn.Parameter(torch.randn(2, 2, generator=generator).to(device))
                ps.append(new)
                optimizer.add_param_group(dict(params=[new], weight_decay=0.0))
            gradients(step, ps)
            if step in (2, 3):
                ps[1].grad = None
            if step == 4:
                optimizer.zero_grad()
            optimizer.step()
            scheduler.step()
    assert_close(ours, theirs)
    assert [float(optimizers[0].state[p]["step"]) for p in ours] == [7.0, 5.0, 7.0, 3.0]
    assert optimizers[0].grad_norm is None


def test_a_step_is_two_launches_without_waiting(device):
    optimizer, ours, *_ = pair(device)
    for step in range(3):
        gradients(step, ours)
        with count_traffic() as traffic:
            optimizer.step()
        if step:
            assert traffic.calls == dict.fromkeys(STEP, 1)
        assert traffic.syncs == 0
    assert optimizer.grad_norm.shape == () and optimizer.grad_norm.device == ours[0].device


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 32), (None, 28)])
def test_bytes_of_a_step(max_norm, expected):
    """Of an fp32 parameter: p, m and v are read and written, the gradient is read, and for clipping once more.
    PyTorch's clip_grad_norm_ moves 12, and its fused AdamW 28."""
    ours = [nn.Parameter(torch.randn(64, 512)), nn.Parameter(torch.randn(4096))]
    optimizer = TritonAdamW(ours, max_norm=max_norm)
    for step in range(2):
        gradients(step, ours)
        with count_traffic() as traffic:
            optimizer.step()
    assert expected <= traffic.bytes / sum(p.numel() for p in ours) < expected + 0.1


def test_a_learning_rate_on_the_device_and_replays(device, monkeypatch):
    """What a CUDA graph would run again: the launches of one step, with tables, tensors and numbers as they were."""
    lr = torch.tensor(1e-2, device=device)
    optimizer, ours, other, theirs = pair(device, lr=lr)
    for ps in (ours, theirs):
        gradients(0, ps)
    optimizer.step()
    captured, call = [], Launch.__call__

    def note(self, *tensors):
        captured.append((self, tensors))
        return call(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "__call__", note)
        optimizer.step()
    assert len(captured) == 2
    for group in other.param_groups:
        group["lr"] = 1e-2
    for step in range(5):
        if step > 1:
            static = [p.grad for p in ours]
            gradients(step, ours)
            for p, g in zip(ours, static, strict=True):
                p.grad = g.copy_(p.grad)
            lr.fill_(1e-2 / step)
            for launch, tensors in captured:
                call(launch, *tensors)
            for group in other.param_groups:
                group["lr"] = 1e-2 / step
        gradients(step if step > 1 else 0, theirs)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        other.step()
    assert_close(ours, theirs)


def test_a_closure_and_hooks(device):
    optimizer, ours, *_ = pair(device)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in ours)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and seen == ["before", "after"] * 2


# ------------------------------------------------------------------------------------------------------- norm and scale


def test_measuring_the_norm_before_the_step(device):
    """The step takes what was measured; where something changed since then, it measures again."""
    optimizer, ours, other, theirs = pair(device)
    for step, change in enumerate((None, "gradient", "rate", None)):
        for ps in (ours, theirs):
            gradients(step, ps)
        with count_launches() as log:
            measured = optimizer.measure_grad_norm()
            if change == "gradient":
                for p in (*ours, *theirs):
                    p.grad.mul_(0.125)
            if change == "rate":
                for group in (*optimizer.param_groups, *other.param_groups):
                    group["lr"] = 5e-3
            optimizer.step()
        assert [launch.name for launch in log] == STEP[: 1 if change else 0] + STEP
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        torch.testing.assert_close(measured, norm * (8.0 if change == "gradient" else 1.0))
    assert_close(ours, theirs)


def test_what_was_measured_with_a_scale_is_not_used(device):
    optimizer, ours, other, theirs = pair(device)
    gradients(0, ours, 8.0)
    gradients(0, theirs)
    optimizer.measure_grad_norm()
    optimizer.grad_scale = torch.tensor(8.0, device=device)  # as GradScaler does
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, nn.utils.clip_grad_norm_(theirs, 1.0))
    other.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler(unscaled, device):
    """An overflow leaves parameters, moments and steps as they were, and the scale falls."""
    optimizer, ours, other, theirs = pair(device)
    scalers = [torch.amp.GradScaler(device.type, init_scale=64.0) for _ in range(2)]
    for step in range(4):
        for scaler, opt, ps in zip(scalers, (optimizer, other), (ours, theirs), strict=True):
            scaler.scale(torch.ones((), device=device))  # what a loop does to its loss
            gradients(step, ps, scaler.get_scale())
            if step == 2:
                ps[1].grad[3] = float("inf")
            if opt is other or unscaled:
                scaler.unscale_(opt)
            if opt is other:
                nn.utils.clip_grad_norm_(ps, 1.0)
            scaler.step(opt)
            scaler.update()
    assert_close(ours, theirs)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 32.0
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3.0] * 3


def test_no_gradient_no_step(device):
    optimizer, ours, *_ = pair(device)
    with count_launches() as log:
        optimizer.step()
    assert not log and optimizer.measure_grad_norm() == 0.0 and not optimizer.state


# ------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("fused", [True, False])
def test_either_optimizer_loads_the_others_state(fused, device):
    """Also one whose steps are as PyTorch's that is not fused may have them: on the CPU, in the default dtype."""
    optimizer, ours, other, theirs = pair(device)
    other = torch.optim.AdamW(theirs, **OPTIONS, fused=fused)
    for step in range(3):
        both_step(optimizer, ours, other, theirs, step)
    states = copy.deepcopy((optimizer.state_dict(), other.state_dict()))
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert states[0]["param_groups"][0].keys() == states[1]["param_groups"][0].keys()
    if not fused:
        for own in states[1]["state"].values():
            own["step"] = own["step"].cpu().double()
    optimizer, other = TritonAdamW(ours, max_norm=1.0), torch.optim.AdamW(theirs)
    optimizer.load_state_dict(states[1])
    other.load_state_dict(states[0])
    for step in range(3, 6):
        both_step(optimizer, ours, other, theirs, step)
    assert_close(ours, theirs)
    assert float(optimizer.state[ours[0]]["step"]) == 6.0 == float(other.state[theirs[0]]["step"])


def test_pickled_and_copied(device):
    optimizer, ours, *_ = pair(device, max_norm=0.5)
    gradients(0, ours)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.max_norm == 0.5
        gradients(1, twin.param_groups[0]["params"])
        twin.step()
        assert twin.grad_norm > 0


def test_states_that_lie_otherwise_are_laid_out(device):
    """Parameters of any dense layout, and a state that comes contiguous."""
    ours, theirs = ([nn.Parameter(torch.randn(5, 7, device=device).t())] for _ in range(2))
    with torch.no_grad():
        theirs[0].copy_(ours[0])
    optimizer, other = TritonAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(4):
        both_step(optimizer, ours, other, theirs, step, max_norm=None)  # contiguous gradients
        state = optimizer.state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].contiguous()
        optimizer.load_state_dict(state)
    assert_close(ours, theirs)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_cpu_without_the_interpreter_is_refused_before_a_run(tmp_path):
    settings = settings_in(tmp_path) | dict(optimizer="triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "fastgpt2.gpt2", "train", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "optimizer='torch'" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_what_is_refused_is_named(device):
    model = GPT(GPTConfig(8, 11, 1, 1, 8), kernels="torch").to(device)
    with pytest.raises(ValueError, match="optimizer is 'fused', allowed are 'torch' and 'triton'"):
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type, optimizer="fused")
    with pytest.raises(ValueError, match="max_norm is 1.0 and optimizer 'torch'.*clip_grad_norm_.*optimizer='triton'"):
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type, max_norm=1.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"max_norm is {wrong}, allowed are numbers above 0, and None"):
            TritonAdamW(model.parameters(), max_norm=wrong)
    optimizer = TritonAdamW(model.parameters())
    with pytest.raises(ValueError, match="max_norm is None, allowed are numbers above 0"):
        optimizer.measure_grad_norm()
    with pytest.raises(ValueError, match="group 0 of the state_dict has amsgrad=True, allowed is False"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict())
    ours = parameters(device)
    gradients(0, ours)
    with pytest.raises(TypeError, match="lr is a tensor of torch.float64"):
        TritonAdamW(ours, lr=torch.tensor(1e-3, dtype=torch.float64, device=device)).step()
    optimizer = TritonAdamW([dict(params=ours, maximize=True)])
    with pytest.raises(ValueError, match="maximize is True, allowed is False"):
        optimizer.step()
