"""Losses and gradients that are no numbers, spikes, float16's overflows: stopped with a clear error, or left out."""

import math
import signal

import pytest
import torch
from tiny_run import finish, run, settings_in

from fastgpt2 import GPT
from fastgpt2.gpt2.training.loss_watch import MOST_IN_A_ROW, RECENT_STEPS, LossWatch
from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "plot", lambda self: None)
    monkeypatch.setattr(Trainer, "sample", lambda self, model, prompt: prompt)
    return {**settings_in(tmp_path), "steps": 30}


def worse(monkeypatch, steps, change):
    """The losses of these training steps go through `change` before their backward."""
    at = []
    monkeypatch.setattr(Trainer, "step", lambda self, step, f=Trainer.step: at.append(step) or f(self, step))
    forward = GPT.forward

    def changed(self, idx, targets=None, **more):
        logits, loss = forward(self, idx, targets, **more)
        return logits, change(loss) if self.training and at and at[-1] in steps else loss

    monkeypatch.setattr(GPT, "forward", changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss: loss * math.nan, "step 25: the loss is nan"),
        (lambda loss: loss * math.inf, "step 25: the loss is inf"),
        (lambda loss: loss + 50, r"step 25: the loss is \d+\.\d+, the 20 losses before it have mean \d\.\d+"),
    ],
    ids=["nan", "inf", "spike"],
)
def test_a_bad_step_stops_the_run_or_is_left_out(settings, monkeypatch, change, said):
    worse(monkeypatch, {25}, change)
    with pytest.raises(
        FloatingPointError,
        match=f"{said}.*a lower lr, or resume and leave out such steps: --resume RUN --bad-steps skip",
    ):
        run(settings)
    result, log, console = run(settings, out=settings["out"] + "-skip", bad_steps="skip")
    assert len(log) == 30 and [r["step"] for r in log if "left_out" in r] == [25]
    assert "step 25 left out: the loss is" in console
    assert all(p.isfinite().all() for p in result.model.parameters())
    if "nan" in said:
        assert log[24]["loss"] is None


def test_a_step_left_out_changes_nothing(settings, monkeypatch):
    worse(monkeypatch, {2, 3}, lambda loss: loss * math.nan)
    moved = []
    original = Trainer._update

    def noted(self, step, *args):
        before = torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])
        original(self, step, *args)
        moved.append(not torch.equal(before, torch.cat([p.detach().flatten() for p in self.model.parameters()])))
        assert all(p.grad is None for p in self.model.parameters())

    monkeypatch.setattr(Trainer, "_update", noted)
    run(settings, steps=4, bad_steps="skip")
    assert moved == [True, False, False, True]


def test_leaving_out_ends_where_it_is_the_rule(settings, monkeypatch):
    worse(monkeypatch, range(5, 100), lambda loss: loss * math.nan)
    with pytest.raises(FloatingPointError, match=f"step 25: .*the {MOST_IN_A_ROW + 1}th bad step in a row"):
        run(settings, bad_steps="skip")


def test_float16_trains_alike(settings):
    wide = dict(n_embd=64, lr=1e-3)
    exact = run(settings, **wide)[1]
    _, log, _ = run(settings, out=settings["out"] + "-half", dtype="float16", **wide)
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in exact], rel=0.02)
    assert [r["loss"] for r in log] != [r["loss"] for r in exact]


def test_an_overflow_in_float16_is_no_error(settings, monkeypatch):
    """A gradient of infinity beside a sound loss, with bad_steps='stop': left out, and the scale halved."""
    scales = []

    def broken(self, step, f=Trainer.step):
        if step == 3:
            hook = self.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
        record = f(self, step)
        if step == 3:
            hook.remove()
        scales.append(self.scaler.get_scale())
        return record

    monkeypatch.setattr(Trainer, "step", broken)
    _, log, _ = run(settings, steps=5, dtype="float16")
    assert [r["step"] for r in log if "left_out" in r] == [3]
    assert scales == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]


def test_a_spike_is_told_from_noise():
    """Losses of 5 and 6 have a deviation of 0.5, those around 3 one of 0.001, which counts as 0.01."""
    watch = LossWatch(spike=10.0)
    assert watch.problem(99.0, 1.0) is None
    for step in range(RECENT_STEPS):
        assert watch.problem(5.0 + step % 2, 1.0) is None
    assert watch.problem(10.4, 1.0) is None
    assert "and standard deviation" in watch.problem(30.0, 1.0)
    again = LossWatch(spike=10.0)
    again.load_state_dict(watch.state_dict())
    assert again.recent == watch.recent and again.problem(30.0, 1.0) is not None
    for step in range(RECENT_STEPS):
        watch.problem(3.0 + 0.001 * (step % 2), 1.0)
    assert watch.problem(3.09, 1.0) is None and watch.problem(3.5, 1.0) is not None


def test_a_resumed_run_knows_the_losses_before(settings, monkeypatch):
    def stopping(self, step, f=Trainer.step):
        if step == 22:
            signal.raise_signal(signal.SIGTERM)
        return f(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        result, *_ = run(settings)
    worse(monkeypatch, {25}, lambda loss: loss + 50)
    with pytest.raises(FloatingPointError, match="step 25: .*the 20 losses before it have mean"):
        finish(None, resume=result.folder)


def test_recomputed_activations_train_the_same(settings):
    _, log, _ = run(settings, steps=3, dropout=0.1, n_layer=2)
    _, other, _ = run(settings, steps=3, dropout=0.1, n_layer=2, recompute=True, out=settings["out"] + "-2")
    assert [r["loss"] for r in log] == [r["loss"] for r in other]


def test_recomputing_keeps_less(settings):
    def kept(recompute):
        sizes = []
        model = GPT(TrainConfig(**settings).model_config(256), "torch")
        model.transformer.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))
        return sum(sizes)

    assert kept(True) < 0.8 * kept(False)
