"""The residual stream in bf16 under autocast: on every road, and as far from the truth as a bf16 model's."""

import copy
import dataclasses
import warnings

import graph_stand_ins
import pytest
import torch
from tiny_run import run, settings_in
from torch import Tensor, nn

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.training.train import TrainConfig, train

SIZES = dict(block_size=8, vocab_size=31, n_layer=2, n_head=1, n_embd=16)
ROADS = ["torch", "triton", "layer_norm", "mlp", "embedding"]


def new_model(device, kernels="torch", residual="bfloat16", **settings) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SIZES | settings), kernels=kernels).to(device)
    model.residual = residual
    return model


@pytest.fixture
def pair(device) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(31, (2, 2, 8), device=device))


@pytest.fixture
def streams(monkeypatch) -> list[torch.dtype]:
    """The dtype of the stream at each LayerNorm."""
    seen = []
    original = ops.add_layer_norm

    def noted(stream, norm, kernels):
        x, h = original(stream, norm, kernels)
        seen.append(x.dtype)
        return x, h

    monkeypatch.setattr(ops, "add_layer_norm", noted)
    return seen


def passed(model: nn.Module, pair, dtype: torch.dtype | None = torch.bfloat16) -> list[Tensor]:
    """The loss of a pass and all gradients. dtype: of autocast, None: without it."""
    model.zero_grad()
    with torch.autocast(pair[0].device.type, dtype, enabled=dtype is not None):
        loss = model(*pair)[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kernels", ROADS)
def test_the_stream_and_its_gradient_are_bfloat16(kernels, device, pair, streams):
    model = new_model(device, kernels, dropout=0.1)
    gradients = []
    block = model.transformer.h[1]
    block.register_full_backward_hook(lambda module, below, above: gradients.extend((*below, *above)))
    found = passed(model, pair)
    assert streams == [torch.bfloat16] * 5
    assert {g.dtype for g in gradients if g is not None} == {torch.bfloat16}
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kernels", ROADS)
def test_by_default_it_is_autocasts(kernels, device, pair, streams):
    """And outside autocast the switch asks for nothing."""
    model = new_model(device, kernels, residual="float32")
    default = GPT(model.config, kernels).to(device)
    default.load_state_dict(model.state_dict())
    expected = passed(default, pair)
    assert all(map(torch.equal, passed(model, pair), expected)) and set(streams) == {torch.float32}
    plain = passed(model, pair, None)
    model.residual = "bfloat16"
    assert all(map(torch.equal, passed(model, pair, None), plain)) and set(streams) == {torch.float32}
    assert not torch.equal(passed(model, pair)[0], expected[0])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_at_most_twice_as_far_from_the_truth_as_a_bfloat16_model(kernels, device, pair):
    model = new_model(device, kernels)
    truth = passed(copy.deepcopy(model).double(), pair, None) if kernels == "torch" else None
    truth = truth or passed(new_model(device, "torch").double(), pair, None)
    low = passed(new_model(device, "torch").bfloat16(), pair, None)
    for ours, theirs, t in zip(passed(model, pair), low, truth, strict=True):
        largest = t.abs().max()
        assert (ours - t).abs().max() <= 2 * (theirs - t).abs().max() + 2.0**-8 * largest


class Wide(nn.Linear):
    """As layers of other packages do, it computes in fp32 whatever autocast says."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x.float()


@pytest.mark.parametrize("kernels", ["torch", "layer_norm,mlp"])
def test_modules_of_other_packages_do_not_widen_it(kernels, device, pair, streams):
    model = new_model(device, kernels, n_layer=3)
    model.transformer.h[0].attn.c_proj = Wide(16, 16).to(device)
    model.transformer.h[0].mlp = nn.Sequential(Wide(16, 16)).to(device)
    model.transformer.h[1] = Doubling()
    assert all(t is None or t.isfinite().all() for t in passed(model, pair))
    assert streams == [torch.bfloat16] * 5


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_generation_with_a_cache_is_generation_without(kernels, device, pair):
    model = new_model(device, kernels, n_embd=32).eval()
    idx = pair[0][:, :5]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        cache = KVCache(model, 2, 8)
        model(idx, cache=cache)
        token = pair[1][:, :1]
        cached = model(token, cache=cache)[0]
        whole = model(torch.cat([idx, token], 1))[0]
        assert model.generate(idx, 3, greedy=True).shape == (2, 8)
    torch.testing.assert_close(cached, whole, rtol=0.02, atol=0.02)


def test_recomputed_and_compiled(device, pair):
    model = new_model(device)
    expected = passed(model, pair)
    model.transformer.recompute = True
    assert all(map(torch.equal, passed(model, pair), expected))
    model.transformer.recompute = False
    assert all(map(torch.equal, passed(torch.compile(model, backend="eager"), pair), expected))


def test_graphs_replay_it_and_see_that_it_was_switched(device, pair, monkeypatch):
    replays = graph_stand_ins.count_replays(monkeypatch, device)
    model = new_model(device)
    expected = passed(model, pair)
    graphed(model, *pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(passed(model, pair), expected, rtol=0, atol=0)
    assert len(replays) == 2
    model.residual = "float32"
    with pytest.warns(UserWarning, match="a module's settings changed after the capture"):
        passed(model, pair)
    assert len(replays) == 2


def test_it_is_no_part_of_what_the_model_is(device, tmp_path):
    model = new_model(device)
    assert copy.deepcopy(model).residual == "bfloat16"
    model.save_pretrained(tmp_path / "saved")
    assert "residual" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert GPT.from_pretrained(tmp_path / "saved").residual == "float32"
    assert model.to_huggingface().config.to_dict().keys() == new_model(device).to_huggingface().config.to_dict().keys()


def test_a_run_with_it_and_its_end_resumed(tmp_path, quick_runs):
    settings = settings_in(tmp_path) | dict(steps=4, eval_interval=2, dtype="bfloat16", residual="bfloat16")
    result, log, *_ = run(settings)
    assert result.model.residual == "bfloat16"
    plain = run(settings, residual="float32", out=str(tmp_path / "plain"))[1]
    assert log[0]["loss"] != plain[0]["loss"] == pytest.approx(log[0]["loss"], rel=1e-2)
    longer = dataclasses.replace(TrainConfig(**settings), steps=6)
    assert train(longer, resume=result.folder).model.residual == "bfloat16"
    with pytest.raises(ValueError, match="residual is 'float32', the run .* was begun with 'bfloat16'"):
        train(dataclasses.replace(longer, residual="float32"), resume=result.folder)


def test_what_is_refused_is_named(device, pair):
    model = new_model(device)
    with pytest.raises(ValueError, match="residual is 'float16', allowed are 'float32' and 'bfloat16'"):
        model.residual = "float16"
    with pytest.raises(ValueError, match="model.residual is 'bfloat16' under autocast to torch.float16, allowed is"):
        passed(model, pair, torch.float16)
    with pytest.raises(ValueError, match="residual is 'bfloat16' and dtype 'float32', allowed is dtype 'bfloat16'"):
        TrainConfig(residual="bfloat16", dtype="float32")
    with pytest.raises(ValueError, match="residual is 'float64', allowed are float32, bfloat16"):
        TrainConfig(residual="float64")
