"""Models that people rebuild: other parts, more blocks, other heads. They compute what they say, or are refused."""

import copy

import pytest
import torch
from hf_models import DEVICE
from tiny_models import tiny
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

from fastgpt2 import GPT, graphed
from fastgpt2.gpt2.model import MLP, CausalSelfAttention

T = 5
KERNELS = ["torch", "triton"]


def make(kernels: str = "torch", **settings) -> GPT:
    model = tiny(**{"block_size": 40, "n_embd": 32, **settings}).to(DEVICE)
    model.kernels = kernels
    return model


def batch() -> tuple[Tensor, Tensor]:
    idx, targets = torch.randint(50, (2, 2, T), device=DEVICE)
    return idx, targets


def by_whole_passes(model: GPT, idx: Tensor, n: int) -> Tensor:
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize("kernels", KERNELS)
def test_each_part_drops_by_its_own_mode(kernels):
    """The branch of a block, not of the one after it; a hook that does nothing changes nothing."""
    model, (idx, _) = make(kernels, dropout=0.5, n_layer=3).train(), batch()
    model.transformer.h.eval()
    x, seen = torch.randn(2, T, 32, device=DEVICE), []
    replace = model.transformer.h[0].register_forward_pre_hook(lambda module, args: (x, *args[1:]))
    model.transformer.ln_f.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(idx), model(idx)
    assert torch.equal(*seen)
    model.transformer.h[1].mlp.train()
    model(idx), model(idx)
    assert not torch.equal(*seen[2:])
    replace.remove()
    seen.clear()
    if kernels == "triton":  # where the same numbers are drawn for other masks
        return
    for hook in (False, True):
        if hook:
            model.transformer.h[1].register_forward_hook(lambda module, args, output: None)
        torch.manual_seed(3)
        model(idx)
    torch.testing.assert_close(*seen)


def test_whatever_is_in_the_model_is_in_eval_mode_while_it_writes():
    model, idx = make(), batch()[0]
    c_fc = model.transformer.h[0].mlp.c_fc
    model.transformer.h[0].mlp.c_fc = nn.Sequential(c_fc, nn.Dropout(0.9))
    expected = model.eval().generate(idx, 18, greedy=True)
    assert torch.equal(model.train().generate(idx, 18, greedy=True), expected) and model.training


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("n", [3, 18])
def test_a_block_twice_has_a_place_of_its_own_in_the_cache(kernels, n):
    model, idx = make(kernels).eval(), batch()[0]
    model.transformer.h[1] = model.transformer.h[0]
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    with torch.no_grad():
        assert torch.equal(model.generate(idx, n, greedy=True), by_whole_passes(model, idx, n))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_that_take_one_argument(kernels, compiled):
    model, (idx, targets) = make(kernels), batch()
    block, mlp = model.transformer.h
    own = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(DEVICE)
    block.mlp, mlp.attn = own, nn.Identity()
    model.transformer.h.insert(1, nn.Identity())
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run(idx, targets)[1].backward()
    assert all(p.grad is not None and p.grad.any() for p in own.parameters())
    model.kernels = "torch"
    torch.testing.assert_close(run(idx, targets)[1], model(idx, targets)[1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_heads_of_other_widths_are_left_whole(kernels):
    model, (idx, targets) = make(kernels, vocab_multiple=64).eval(), batch()
    assert model(idx)[0].shape == (2, 1, 50)
    for head, width in ((nn.Identity(), 32), (nn.Linear(32, 80), 80), (nn.Linear(32, 60, bias=False), 60)):
        model.lm_head = head.to(DEVICE)
        logits, loss = model.train()(idx, targets.clamp(max=31))
        assert logits.shape == (2, T, width)
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.mT, targets.clamp(max=31)))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_layer_norm_over_two_dimensions_is_called(kernels):
    model, (idx, targets) = make(kernels), batch()
    model.transformer.h[0].ln_2 = nn.LayerNorm((T, 32)).to(DEVICE)
    loss = model(idx, targets)[1]
    model.kernels = "torch"
    torch.testing.assert_close(loss, model(idx, targets)[1])


def test_forward_mode_derivatives_on_pytorch():
    model, (idx, targets) = make(), torch.randint(50, (2, 4, T), device=DEVICE)  # rows enough for oneDNN's road
    weight = model.transformer.h[0].mlp.c_fc.weight
    tangent = torch.randn_like(weight)
    model(idx, targets)[1].backward()
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # PyTorch's others have no such derivative
        del model.transformer.h[0].mlp.c_fc.weight
        model.transformer.h[0].mlp.c_fc.weight = forward_ad.make_dual(weight, tangent)
        found = forward_ad.unpack_dual(model(idx, targets)[1]).tangent
    torch.testing.assert_close(found, (weight.grad * tangent).sum(), rtol=1e-3, atol=1e-5)


def longer(model: GPT):
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def own_head(model: GPT):
    model.lm_head = nn.Linear(32, 50, bias=False)


def parametrised_head(model: GPT):
    parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data.mul_(2)


def pruned_table(model: GPT):
    prune.random_unstructured(model.transformer.wte, "weight", 0.5)


def other_eps(model: GPT):
    model.transformer.h[0].ln_1.eps = 0.5


def narrow_mlp(model: GPT):
    model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj = nn.Linear(32, 64), nn.Linear(64, 32)


REFUSED = {
    longer: "transformer.h has 3 blocks, config.n_layer is 2",
    own_head: "lm_head is another one than the token table",
    parametrised_head: "lm_head is another one than the token table",
    pruned_table: "lm_head is another one than the token table",
    other_eps: "transformer.h.0.ln_1.eps is 0.5, a GPT-2's is 1e-05",
    narrow_mlp: r"transformer.h.0.mlp.c_fc.weight has shape \(64, 32\)",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_a_gpt2_has_no_place_for_is_not_saved(change, tmp_path):
    model = make()
    change(model)
    for save in (lambda: model.save_pretrained(tmp_path / "out"), model.to_huggingface):
        with pytest.raises(ValueError, match=REFUSED[change]):
            save()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["lm_head.weight", "transformer.wte.weight"])
@pytest.mark.parametrize("assign", [False, True])
def test_either_name_of_the_table_loads_it(missing, assign):
    """safetensors.torch.save_model keeps one of them."""
    model, other = make(), make()
    nn.init.normal_(other.lm_head.weight)
    state = {name: t for name, t in other.state_dict().items() if name != missing}
    model.load_state_dict(state, strict=False, assign=assign)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_graphed_says_what_it_cannot_take_on_any_machine():
    idx, targets = batch()
    with pytest.raises(TypeError, match="model is a Linear, whose forward takes no idx"):
        graphed(nn.Linear(2, 2), idx, targets)
    with pytest.raises(TypeError, match="targets is a list, expected a tensor"):
        graphed(make(), idx, [1])
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(TypeError, match=r"model is a PeftModel: give its get_base_model\(\)"):
        graphed(wrapped, idx, targets)


@pytest.mark.parametrize("part", ["mlp.c_fc", "mlp", "attn", "ln_1"])
def test_a_forward_that_somebody_replaces_after_compiling_is_called(part):
    model, (idx, _) = make(), batch()
    compiled = torch.compile(model, backend="eager")
    before = compiled(idx)[0]
    module = model.get_submodule(f"transformer.h.1.{part}")
    original = module.forward
    module.forward = lambda *args: 2 * original(*args)
    after = compiled(idx)[0]
    assert torch.equal(after, model(idx)[0]) and not torch.equal(after, before)
    del module.forward
    assert torch.equal(compiled(idx)[0], before)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Embedding, CausalSelfAttention, MLP])
def test_a_class_that_somebody_changes_is_called(kind, kernels, monkeypatch):
    model, (idx, _) = make(kernels), batch()
    before, calls, original = model(idx)[0], [], kind.forward

    def noted(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(kind, "forward", noted)
    torch.testing.assert_close(model(idx)[0], before)
    assert len(set(calls)) == sum(type(m) is kind for m in model.modules())


def test_positions_that_are_no_plain_table_are_not_cropped():
    model = make()
    model.transformer.wpe = nn.Sequential(model.transformer.wpe)
    with pytest.raises(TypeError, match="wpe is a Sequential"):
        model.crop_block_size(8)
    assert model.config.block_size == 40
