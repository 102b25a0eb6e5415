"""Other people's tools on our model, where they are installed: what they do to HuggingFace's GPT-2 they do to ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_models import DEVICE, hf_gpt2
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastgpt2 import GPT
from fastgpt2.gpt2.cache import KVCache

T = 5
KERNELS = ["torch", "triton"]
TARGETS = ["c_attn", "c_proj", "c_fc"]


def make(kernels: str = "torch", **settings) -> GPT:
    model = tiny(block_size=24, n_embd=32, **settings).to(DEVICE)
    model.kernels = kernels
    return model


def batch(B: int = 2) -> tuple[Tensor, Tensor]:
    idx, targets = torch.randint(50, (2, B, T), device=DEVICE)
    return idx, targets


# --------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_lora_trains_as_on_huggingfaces_model(kernels, bias):
    peft = pytest.importorskip("peft")
    hf = hf_gpt2(n_embd=32).to(DEVICE)
    model, (idx, targets) = GPT.from_huggingface(hf, kernels=kernels), batch()
    settings = dict(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, bias=bias)
    ours = peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**settings, fan_in_fan_out=True), hf)
    adapters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == adapters.keys() and any("lora_" in name for name in trained)
    assert any(name.endswith("bias") for name in trained) == (bias == "all")
    for name, p in trained.items():
        p.data.copy_(adapters[name].data)
    loss = model(idx, targets)[1]
    loss.backward()
    logits = hf(idx).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        {name: p.grad for name, p in trained.items()},
        {name: adapters[name].grad for name in trained},
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
def test_merging_lora_changes_no_logits(kernels):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False)
    wrapped = peft.get_peft_model(make(kernels), config).eval()
    idx, targets = batch()
    with torch.no_grad():
        before, loss = wrapped(idx, targets)
        written = wrapped.generate(idx, 4, greedy=True)
        merged = wrapped.merge_and_unload()
        after, same = merged(idx, targets)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(same, loss)
        assert torch.equal(merged.generate(idx, 4, greedy=True), written)


def test_saving_a_model_with_adapters_says_to_merge_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_fc"]), model)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc is a peft\.[\w.]*Linear.*merge"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ torchao


@pytest.mark.parametrize("kernels", KERNELS)
def test_quantised_weights_are_used(kernels):
    quantization = pytest.importorskip("torchao.quantization")
    model, (idx, targets) = make(kernels).eval(), batch()
    exact = model(idx, targets)[0]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        logits = model(idx, targets)[0]
        assert 0 < (logits - exact).abs().max() < 0.2 * exact.abs().max()
        weights = {name: m.weight.dequantize() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        plain = make(kernels).eval()
        for name, weight in weights.items():
            module = plain.get_submodule(name)
            module.weight = nn.Parameter(weight)
        torch.testing.assert_close(logits, plain(idx, targets)[0], rtol=1e-3, atol=1e-3)
        assert model.generate(idx, 18, greedy=True).shape == (2, T + 18)


def test_float8_training_converts_what_is_used():
    float8 = pytest.importorskip("torchao.float8")
    model, (idx, targets) = make(), batch()
    exact = model(idx, targets)[1]
    float8.convert_to_float8_training(
        model, config=float8.Float8LinearConfig(emulate=True), module_filter_fn=lambda m, name: name != "lm_head"
    )
    loss = model(idx, targets)[1]
    loss.backward()
    assert loss != exact and abs(loss - exact) < 0.3 * exact
    assert all(p.grad is not None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- PyTorch's


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation():
    model, (idx, targets) = make().eval(), batch()
    with torch.no_grad():
        exact = model(idx, targets)[0]
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        logits = small(idx, targets)[0]
        assert 0 < (logits - exact).abs().max() < 0.2 * exact.abs().max()
        assert small.generate(idx, 18, greedy=True).shape == (2, T + 18)


def test_a_head_that_was_replaced_stays_replaced():
    model, (idx, targets) = make().eval(), batch()
    model.lm_head = nn.Linear(32, 50, bias=False)
    before = model(idx, targets)[0]
    torch.testing.assert_close(model.to("cpu").double().float()(idx, targets)[0], before)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_a_tied_head_stays_tied():
    model = make()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    for assign in (False, True):
        with pytest.raises(ValueError, match="lm_head.weight that differs from transformer.wte.weight"):
            model.load_state_dict(state, assign=assign)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_parametrised_and_pruned_models_are_saved(tmp_path):
    model, (idx, targets) = make().eval(), batch()
    parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc)
    prune.l1_unstructured(model.transformer.h[1].attn.c_attn, "weight", 0.5)
    expected = model(idx, targets)[0]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path).eval()(idx, targets)[0], expected)
    torch.testing.assert_close(model.to_huggingface()(idx).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_compiled_models_write_text(kernels):
    model, (idx, _) = make(kernels).eval(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled.generate(idx, 3, greedy=True), model.generate(idx, 3, greedy=True))
    from fastgpt2.gpt2.generation.generate import generate

    assert torch.equal(generate(compiled, idx, 3, greedy=True), model.generate(idx, 3, greedy=True))


@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning", "ignore:.*torch.jit.*deprecated")
def test_traced_and_exported_models_are_the_model():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make().eval()

        def forward(self, idx):
            return self.model(idx)[0]

    module = Logits()
    first, second = torch.randint(50, (2, 2, 20), device=DEVICE)  # rows enough for oneDNN's road
    for made in (torch.jit.trace(module, first), torch.export.export(module, (first,)).module()):
        torch.testing.assert_close(made(second), module(second))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_of_single_samples(kernels):
    """vmap(grad(loss)) over the rows of a batch, as on HuggingFace's model."""
    model, (idx, targets) = make(kernels), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row, target):
        return torch.func.functional_call(model, parameters, (row[None], target[None]))[1]

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, idx, targets)
    for b in range(2):
        model.zero_grad()
        model(idx[b : b + 1], targets[b : b + 1])[1].backward()
        alone = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close({name: g[b] for name, g in together.items()}, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_flops_are_counted(kernels):
    """All matrix products of more rows than oneDNN's road begins at; attention's two (forward) and five (backward) as
    PyTorch counts its own on a GPU, which on a CPU it does not."""
    from torch.utils.flop_counter import FlopCounterMode

    B, C, V = 4, 32, 50
    model, (idx, targets) = make(kernels), batch(B)
    with FlopCounterMode(display=False) as counter:
        model(idx, targets)[1].backward()
    block, head = 2 * B * T * 12 * C * C, 2 * B * T * C * V
    attention = 4 * B * T * T * C * (kernels == "triton" or DEVICE.type == "cuda")
    assert counter.get_total_flops() == 2 * (3 * block + 3.5 * attention) + 3 * head
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = KVCache(model.eval(), 1, 24)
        model(idx[:1, :1], cache=cache)
    attention = 4 * 1 * C * (kernels == "triton" or DEVICE.type == "cuda")
    assert counter.get_total_flops() == 2 * (2 * 12 * C * C + attention) + 2 * C * V


# ------------------------------------------------------------------------------------------------------------- others


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kernels", KERNELS)
def test_opacus_gives_the_gradients_of_single_samples(kernels):
    opacus = pytest.importorskip("opacus")
    model, (idx, targets) = make(kernels), batch()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # opacus does not know tied weights
    watched = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    watched(idx, targets)[1].backward()
    samples = {name.removeprefix("_module."): p.grad_sample for name, p in watched.named_parameters()}
    for b in range(2):
        model.zero_grad()
        model(idx[b : b + 1], targets[b : b + 1])[1].backward()
        alone = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close({n: g[b] for n, g in samples.items()}, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_accelerate_dispatches(kernels):
    accelerate = pytest.importorskip("accelerate")
    model, (idx, targets) = make(kernels).eval(), batch()
    with torch.no_grad():
        expected = model(idx, targets)[0]
        accelerate.dispatch_model(model, {"": DEVICE}, force_hooks=True)
        torch.testing.assert_close(model(idx, targets)[0], expected)
        assert model.generate(idx, 18, greedy=True).shape == (2, T + 18)


def test_accelerate_offloads():
    accelerate = pytest.importorskip("accelerate")
    model, (idx, targets) = make().eval(), batch()
    with torch.no_grad():
        expected = model(idx, targets)[0]
        accelerate.cpu_offload(model, execution_device=DEVICE)
        torch.testing.assert_close(model(idx, targets)[0], expected)


def test_torchinfo_counts_all_layers():
    torchinfo = pytest.importorskip("torchinfo")
    model, (idx, targets) = make(), batch()
    found = torchinfo.summary(model, input_data=(idx, targets), verbose=0)
    layers = sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, nn.Linear))  # of two rows
    assert found.total_mult_adds >= layers


@pytest.mark.parametrize("kernels", KERNELS)
def test_noise_on_embeddings(kernels):
    """NEFTune's way: a forward hook on wte."""
    model, (idx, targets) = make(kernels), batch()
    before = model(idx, targets)[1]
    handle = model.transformer.wte.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    assert model(idx, targets)[1] != before
    handle.remove()
    torch.testing.assert_close(model(idx, targets)[1], before)
