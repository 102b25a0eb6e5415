"""What a user does to a graphed model after it was captured: never passed over, and said once."""

import contextlib
import copy
import io
import pickle
import types
import warnings

import graph_stand_ins
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as every_module
from torch.utils.flop_counter import FlopCounterMode

from fastgpt2 import GPT, GPTConfig, graphed
from fastgpt2.gpt2.training import step_graphs
from fastgpt2.gpt2.training.graphed import graphs_of

SIZES = dict(block_size=8, vocab_size=50, n_layer=2, n_head=1, n_embd=16)


@pytest.fixture
def replays(monkeypatch, device):
    return graph_stand_ins.count_replays(monkeypatch, device)


@pytest.fixture
def model(device) -> GPT:
    return GPT(GPTConfig(**SIZES), kernels="torch").to(device)


@pytest.fixture
def pair(device):
    return tuple(torch.randint(50, (2, 2, 8), device=device))


def step(model: nn.Module, pair) -> list:
    """The loss and all gradients, by name."""
    model.zero_grad()
    _, loss = model(*pair)
    loss.backward()
    return [loss, {name: p.grad for name, p in model.named_parameters()}]


def as_before(model: nn.Module, pair, why: str | None) -> None:
    """A step is that of a plain copy, and says `why` it is not replayed, once."""
    with pytest.warns(UserWarning, match=why) if why else contextlib.nullcontext():
        found = step(model, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found_again = step(model, pair)
    expected = step(copy.deepcopy(model), pair)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_again, expected)


@contextlib.contextmanager
def global_hook():
    handle = every_module.register_module_forward_hook(lambda module, args, out: None)
    yield
    handle.remove()


@contextlib.contextmanager
def precision():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


PASSING = {  # what ends again: then the graphs serve again
    "kernels": (lambda m: m.use_kernels(mlp="torch", layer_norm="torch"), None),
    "kernels of others": (lambda m: m.use_kernels("cross_entropy"), "model.kernels changed after the capture"),
    "autocast": (lambda m: torch.autocast(m.lm_head.weight.device.type, torch.bfloat16), "autocast changed"),
    "a global hook": (lambda m: global_hook(), "a module has a hook"),
    "precision": (lambda m: precision(), "PyTorch's settings changed"),
    "attention": (lambda m: sdpa_kernel(SDPBackend.MATH), "PyTorch's settings changed"),
}


@pytest.mark.parametrize("what", PASSING)
def test_a_change_that_passes(model, pair, replays, what):
    enter, why = PASSING[what]
    graphed(model, *pair)
    step(model, pair)
    with enter(model):
        as_before(model, pair, why)
    assert len(replays) == (1 if why else 3)
    step(model, pair)
    assert len(replays) == (2 if why else 4)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    new = Doubled(16, 64).to(model.lm_head.weight.device)
    new.load_state_dict(model.transformer.h[1].mlp.c_fc.state_dict())
    model.transformer.h[1].mlp.c_fc = new


def patched(model):
    mlp = model.transformer.h[0].mlp
    mlp.forward = types.MethodType(lambda self, h, context: 2 * type(self).forward(self, h, context), mlp)


def moved(model):
    bias = model.transformer.ln_f.bias
    bias.data = bias.data + 1


def assigned(model):
    model.load_state_dict({name: t + 0.1 for name, t in model.state_dict().items()}, assign=True)
    model.tie_weights()


STAYING = {
    "a module replaced": (replaced, "its modules changed"),
    "a module's forward": (patched, "a module's settings changed"),
    "a parameter's data": (moved, "its parameters changed"),
    "weights assigned": (assigned, "its parameters changed"),
    "another dtype": (lambda m: m.double(), "its parameters changed"),
    "frozen": (lambda m: m.transformer.h[0].requires_grad_(False), "its parameters changed"),
    "kernels": (lambda m: setattr(m, "kernels", "cross_entropy"), "model.kernels changed"),
    "recompute": (lambda m: setattr(m.transformer, "recompute", True), "a module's settings changed"),
    "eps": (lambda m: setattr(m.transformer.ln_f, "eps", 0.5), "a module's settings changed"),
    "a block in eval mode": (lambda m: m.transformer.h[0].eval(), "a module's settings changed"),
    "LoRA": (
        lambda m: nn.utils.parametrizations.weight_norm(m.transformer.h[0].mlp.c_proj),
        "its modules changed",
    ),
}


@pytest.mark.parametrize("what", STAYING)
def test_a_change_that_stays(model, pair, replays, what):
    """Steps run without graphs until `graphed` is called again."""
    change, why = STAYING[what]
    graphed(model, *pair)
    step(model, pair)
    change(model)
    as_before(model, pair, why)
    assert len(replays) == 1
    graphed(model, *pair)
    torch.testing.assert_close(step(model, pair), step(copy.deepcopy(model), pair))
    assert len(replays) == 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the model's inputs are integers
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("name", ["", "transformer.h.1.mlp.c_fc"])
def test_hooks_on_modules_are_called(model, pair, replays, register, name):
    """Put there before the capture or after it: without graphs until they are removed."""
    calls = []
    for captured in (False, True):
        graphed(model, *pair)
        if captured:
            step(model, pair)
        handle = getattr(model.get_submodule(name), register)(lambda *args: calls.append(1))
        with pytest.warns(UserWarning, match="a module has a hook, which a replay does not call"):
            step(model, pair)
        assert calls
        calls.clear()
        handle.remove()
        step(model, pair)
    assert len(replays) == 3


def test_weights_changed_in_place_are_seen(model, pair, replays):
    graphed(model, *pair)
    step(model, pair)
    other = GPT(GPTConfig(**SIZES), kernels="torch").to(pair[0].device)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        for m in (model, other):
            m.transformer.wpe.weight += 1
    torch.testing.assert_close(step(model, pair), step(other, pair))
    assert len(replays) == 2


def test_copies_are_plain_and_saved_models_whole(model, pair, replays, tmp_path):
    expected = step(model, pair)
    graphed(model, *pair)
    step(model, pair)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    torch.save(model, tmp_path / "whole.pt")
    model.save_pretrained(tmp_path / "folder")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
        GPT.from_pretrained(tmp_path / "folder", kernels="torch").to(pair[0].device).train(),
    ]
    for twin in copies:
        assert graphs_of(twin) is None
        torch.testing.assert_close(step(twin, pair), expected)
    assert len(replays) == 1 and list(torch.load(io.BytesIO(saved.getvalue()))) == list(model.state_dict())


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.9 and later")
def test_the_newer_way_to_set_precision(model, pair, replays):
    """After it the older way to ask raises."""
    graphed(model, *pair)
    step(model, pair)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        as_before(model, pair, "PyTorch's settings changed")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    step(model, pair)
    assert len(replays) == 2


def test_the_older_way_to_set_precision(model, pair, replays, monkeypatch):
    """Before PyTorch 2.9 there is no other."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace())
    graphed(model, *pair)
    step(model, pair)
    with precision():
        as_before(model, pair, "PyTorch's settings changed")
    assert len(replays) == 1


def test_who_looks_at_operators_sees_them(model, pair, replays):
    graphed(model, *pair)
    step(model, pair)
    with FlopCounterMode(display=False) as counter:
        step(model, pair)
    assert counter.get_total_flops() > 0 and len(replays) == 1
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*pair)[1], model(*pair)[1])
    assert len(replays) == 2


def test_functional_calls_have_their_own_parameters(model, pair, replays):
    graphed(model, *pair)
    step(model, pair)
    weights = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="its parameters changed"):
        _, loss = torch.func.functional_call(model, weights, pair)
    expected = torch.func.functional_call(copy.deepcopy(model), weights, pair)[1]
    torch.testing.assert_close(loss, expected)
    grad = torch.func.grad(lambda w: torch.func.functional_call(model, w, pair)[1])(weights)
    assert grad.keys() == weights.keys() and len(replays) == 1


# ------------------------------------------------------------------------------------------- what cannot be captured


def test_no_cuda_device_is_said_once():
    model = GPT(GPTConfig(**SIZES), kernels="torch")
    pair = tuple(torch.randint(50, (2, 2, 8)))
    with pytest.warns(
        UserWarning, match="without CUDA graphs: the model is on cpu, CUDA graphs need a CUDA device"
    ) as said:
        assert graphed(model, *pair) is model
        step(model, pair)
    assert len(said) == 1 and said[0].filename == __file__
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        graphed(model, *pair, required=True)


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_a_capture_that_fails(model, pair, replays, monkeypatch, at):
    """Said once; steps are as if nothing had been tried."""
    model.transformer.dropout = 0.3
    capture, tried = step_graphs.Recorder.capture, []

    def fails(self, work):
        tried.append(work)
        if at == "forward" or len(tried) == 2:
            work()
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(self, work)

    monkeypatch.setattr(step_graphs.Recorder, "capture", fails)
    torch.manual_seed(1)
    expected = [step(copy.deepcopy(model), pair) for _ in range(2)]
    graphed(model, *pair)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="nothing was captured: operation not permitted") as said:
        found = [step(model, pair) for _ in range(2)]
    torch.testing.assert_close(found, expected)
    assert len(said) == 1 and said[0].filename == __file__ and not replays and len(tried) <= 2
    graphed(model, *pair, required=True)
    tried.clear()
    with pytest.raises(RuntimeError, match="operation not permitted"):
        step(model, pair)


def test_recomputed_dropout_is_not_captured(model, pair, replays):
    """No graph draws the forward's numbers again. Without dropout recomputing is captured."""
    model.transformer.recompute = True
    plain = copy.deepcopy(model)
    graphed(model, *pair, segments=2)
    torch.testing.assert_close(step(model, pair), step(plain, pair))
    assert len(replays) == 1
    model.transformer.h[1].dropout = 0.2
    graphed(model, *pair)
    with pytest.warns(UserWarning, match="recompute repeats dropout in backward"):
        step(model, pair)
    assert len(replays) == 1


def test_wrong_use_is_said(model, pair, replays):
    with pytest.raises(TypeError, match="model is a Linear, whose forward takes no idx"):
        graphed(nn.Linear(2, 2, device=pair[0].device), *pair)
    with pytest.raises(ValueError, match="segments is 0, allowed are whole numbers of at least 1"):
        graphed(model, *pair, segments=0)
    with pytest.warns(UserWarning, match="no parameter requires a gradient"):
        graphed(model.requires_grad_(False), *pair)(*pair)
    with pytest.warns(UserWarning, match="DataParallel copies the model in each step"):
        graphed(nn.DataParallel(model), *pair)
    model.lm_head.weight = type("Packed", (nn.Parameter,), {})(model.lm_head.weight.data)
    with pytest.warns(UserWarning, match="parameter lm_head.weight is a Packed, allowed are plain nn.Parameters"):
        graphed(model, *pair)
    assert not replays


def test_bad_tokens_are_refused_as_before(model, pair, replays):
    if pair[0].device.type == "cuda":
        pytest.skip("a device-side assertion ends the process's CUDA")
    graphed(model, *pair)
    with pytest.raises(ValueError, match="idx holds token 50, vocab_size is 50"):
        model(torch.full_like(pair[0], 50), pair[1])
    step(model, pair)
    assert len(replays) == 1


def test_without_an_internal_of_pytorch_gradients_are_copies(model, pair, replays, monkeypatch):
    """`_will_engine_execute_node` may go: then no gradient is given out as it lies."""
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    plain = copy.deepcopy(model)
    graphed(model, *pair)
    for m in (model, plain):
        m(*pair)[1].backward()
        m(*pair)[1].backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert len(replays) == 2
