"""A loop over a graphed model is the loop over the model: on a GPU with real graphs, elsewhere with their stand-in."""

import copy

import graph_stand_ins
import pytest
import torch
from torch import Tensor, nn

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.stock import is_watched
from fastgpt2.gpt2.training.graphed import graphs_of, release

SIZES = dict(block_size=8, vocab_size=50, n_layer=3, n_head=1, n_embd=16)


@pytest.fixture
def replays(monkeypatch, device):
    return graph_stand_ins.count_replays(monkeypatch, device)


def pair_of_models(device, kernels="torch", **settings) -> tuple[GPT, GPT]:
    """A model, and one like it."""
    model = GPT(GPTConfig(**{**SIZES, **settings}), kernels=kernels).to(device)
    return model, copy.deepcopy(model)


def batches(device, count: int, rows: int = 2, T: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [tuple(torch.randint(SIZES["vocab_size"], (2, rows, T), device=device)) for _ in range(count)]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def loop(model: nn.Module, pairs, to_none: bool, passes: int = 3, n_steps: int = 3) -> list:
    """Losses and gradients of steps of several passes each, and the weights that they lead to."""
    torch.manual_seed(1)  # dropout's masks are the same, and go on from pass to pass
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(n_steps):
        for pair in pairs[step * passes : (step + 1) * passes]:
            _, loss = model(*pair)
            (loss / passes).backward()
            found.append(loss)
        found += gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    return [*found, *model.parameters()]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_three_passes_a_step_train_alike(device, replays, segments, dropout, to_none):
    model, plain = pair_of_models(device, dropout=dropout)
    pairs = batches(device, 9)
    expected = loop(plain, pairs, to_none)
    assert graphed(model, *pairs[0], segments=segments) is model
    torch.testing.assert_close(loop(model, pairs, to_none), expected)
    assert len(replays) == 9 and len(graphs_of(model).segments) == segments


@pytest.mark.skipif(not ops.TRITON_INSTALLED, reason="needs Triton")
def test_kernels_train_alike(device, replays):
    model, plain = pair_of_models(device, "triton", dropout=0.2, n_layer=2)
    pairs = batches(device, 4, rows=1)
    expected = loop(plain, pairs, True, passes=2, n_steps=2)
    graphed(model, *pairs[0], segments=2)
    torch.testing.assert_close(loop(model, pairs, True, passes=2, n_steps=2), expected)
    assert len(replays) == 4


@pytest.mark.parametrize("segments", [1, 3])
def test_what_a_user_keeps_stays(device, replays, segments):
    """Losses, logits, gradients of torch.autograd.grad, and what hooks on parameters got: the next replay writes into
    none of them."""
    model, plain = pair_of_models(device)
    pairs = batches(device, 4)
    graphed(model, *pairs[0], segments=segments)
    kept = {}
    for m in (model, plain):
        found = kept[m] = []
        wte, bias = m.transformer.wte.weight, m.transformer.h[1].ln_1.bias
        handles = [bias.register_hook(lambda g, found=found: found.append(g))]
        handles += [bias.register_post_accumulate_grad_hook(lambda p, found=found: found.append(p.grad.clone()))]
        for pair in pairs[:2]:
            logits, loss = m(*pair)
            loss.backward()
            found += [logits, loss, *m.parameters()]
        for handle in handles:
            handle.remove()
        found += torch.autograd.grad(m(*pairs[2])[1], [bias, wte])  # beside a p.grad that is there
        m.zero_grad()
        found += torch.autograd.grad(m(*pairs[3])[1], [bias, wte])
        m(*pairs[0])[1].backward()
        found += gradients(m)
    torch.testing.assert_close(kept[model], kept[plain])
    assert len(replays) == 5


def test_a_gradient_that_a_user_keeps_stays(device, replays):
    model, _ = pair_of_models(device)
    pairs = batches(device, 2)
    graphed(model, *pairs[0])
    model(*pairs[0])[1].backward()
    kept = [p.grad for p in model.parameters()]
    before = gradients(model)
    model.zero_grad(set_to_none=True)
    model(*pairs[1])[1].backward()
    torch.testing.assert_close(kept, before, rtol=0, atol=0)


@pytest.mark.parametrize("segments", [1, 3])
def test_a_scaler_and_backward_to_some_parameters(device, replays, segments):
    model, plain = pair_of_models(device)
    pairs = batches(device, 3)
    graphed(model, *pairs[0], segments=segments)
    for m in (model, plain):
        scaler = torch.amp.GradScaler(device.type, init_scale=512.0)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        scaler.scale(m(*pairs[0])[1]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        m(*pairs[1])[1].backward(inputs=[m.transformer.wpe.weight, m.transformer.ln_f.bias])
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert sum(g is not None for g in gradients(model)) == 2 and len(replays) == 2


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    "frozen", ["transformer.w", "transformer.h.1", "transformer.h.2.mlp.c_proj.bias", "transformer.h.0"]
)
def test_frozen_parameters_stay_without_gradients(device, replays, segments, frozen):
    model, plain = pair_of_models(device)
    (pair,) = batches(device, 1)
    for m in (model, plain):
        for name, p in m.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
    graphed(model, *pair, segments=segments)
    for m in (model, plain):
        m(*pair)[1].backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert replays and any(p.grad is None for p in model.parameters())


def test_an_own_head_and_a_loss_beside_the_model(device, replays):
    """Gradients that come from elsewhere in the same backward are added to the graphs'."""
    model, plain = pair_of_models(device)
    pairs = batches(device, 2)
    for m in (model, plain):
        m.lm_head.weight = nn.Parameter(m.lm_head.weight.detach() * 2)
    graphed(model, *pairs[0])
    for m in (model, plain):
        for pair in pairs:
            (m(*pair)[1] + sum(p.square().sum() for p in m.parameters())).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert len(replays) == 2


def test_forwards_before_their_backward(device, replays):
    """The second one would overwrite what the first one's backward needs: it runs without graphs."""
    model, plain = pair_of_models(device)
    pairs = batches(device, 3)
    graphed(model, *pairs[0])
    model(*pairs[0])[1].backward()
    model(*pairs[0])  # nobody keeps its loss: nothing is awaited
    model.zero_grad()
    first = model(*pairs[0])[1]
    with pytest.warns(UserWarning, match="the previous step still needs its backward"):
        second = model(*pairs[1])[1]
    (first + 2 * second).backward()
    (plain(*pairs[0])[1] + 2 * plain(*pairs[1])[1]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    model(*pairs[2])
    assert len(replays) == 4


@pytest.mark.parametrize("segments", [1, 3])
def test_what_graphs_cannot_give_is_refused(device, replays, segments):
    model, _ = pair_of_models(device)
    (pair,) = batches(device, 1)
    graphed(model, *pair, segments=segments)
    logits, loss = model(*pair)
    with pytest.raises(RuntimeError, match="a gradient comes through the logits of a graphed step"):
        (loss + logits.square().sum()).backward()
    del logits, loss
    loss = model(*pair)[1]
    loss.backward(retain_graph=True)
    before = gradients(model)
    with pytest.raises(RuntimeError, match="a graphed step a second time"):
        loss.backward()
    torch.testing.assert_close(gradients(model), before)
    loss = model(*pair)[1]
    torch.autograd.grad(loss, [model.transformer.ln_f.bias], retain_graph=True)
    with pytest.raises(RuntimeError, match="a graphed step a second time"):
        loss.backward()
    del loss
    loss = model(*pair)[1]
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between a graphed step's forward and its backward"):
        loss.backward()
    del loss
    with pytest.raises(RuntimeError, match="create_graph asks for the backward of a graphed step's backward"):
        torch.autograd.grad(model(*pair)[1], [model.transformer.ln_f.bias], create_graph=True)


def test_other_calls_run_as_before(device, replays):
    """Other shapes, eval mode, without gradients, without targets, with a cache, written text: silently, and right."""
    model, plain = pair_of_models(device, dropout=0.0)
    (pair,), (short,), (one,) = batches(device, 1), batches(device, 1, T=5), batches(device, 1, rows=1)
    graphed(model, *pair)
    model(*pair)[1].backward()

    def calls(m: GPT) -> list:
        found = [m(*short)[1], m(*one)[1], m(pair[0])[0]]
        with torch.no_grad():
            found += m(*pair)
        with torch.inference_mode():
            found.append(m(*pair)[1].clone())
        m.eval()
        loss = m(*pair)[1]
        m.zero_grad()
        loss.backward()
        found += [loss, *gradients(m), m.generate(pair[0][:, :3], 4, greedy=True)]
        with torch.no_grad():
            found.append(m(pair[0], cache=KVCache(m, 2, 8))[0])
        m.train()
        return found

    torch.testing.assert_close(calls(model), calls(plain))
    assert len(replays) == 1 and not is_watched(model), "decoding has graphs of its own"
    model(idx=pair[0], targets=pair[1])
    assert len(replays) == 2, "arguments have names, too"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call(device, replays, dtype):
    """Weights are cast anew in each replay, also where autocast stays on for the whole run."""
    model, plain = pair_of_models(device)
    pairs = batches(device, 9)
    with torch.autocast(device.type, dtype, cache_enabled=False):  # PyTorch's cache would keep the first step's weights
        expected = loop(plain, pairs, True)
    with torch.autocast(device.type, dtype):
        model(*pairs[0])  # fills that cache
        graphed(model, *pairs[0])
        found = loop(model, pairs, True)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    assert len(replays) == 9 and found[0].dtype == torch.float32


def test_memory_is_given_back(device, replays):
    model, _ = pair_of_models(device)
    (pair,) = batches(device, 1)
    assert graphs_of(model) is None
    graphed(model, *pair)
    assert graphs_of(model) is None, "the first step captures"
    model(*pair)[1].backward()
    assert graphs_of(model).pool_bytes >= 0
    release(model)
    model(*pair)[1].backward()
    assert len(replays) == 1 and graphs_of(model) is None
    release(model)


@pytest.mark.gpu
def test_real_graphs_hold_memory_and_launch_less(device):
    model, _ = pair_of_models(device, "triton")
    (pair,) = batches(device, 1)
    graphed(model, *pair)
    model(*pair)[1].backward()
    assert graphs_of(model).pool_bytes > 0
    with torch.profiler.profile() as profile:
        model(*pair)[1].backward()
    launches = [e.name for e in profile.events() if "LaunchKernel" in e.name or "cuLaunch" in e.name]
    graphs = [e.name for e in profile.events() if "GraphLaunch" in e.name]
    assert len(graphs) == 2 and len(launches) < 2 * len(list(model.parameters()))
