"""Ours against HuggingFace's GPT-2 with the same random weights: logits, loss, every gradient, greedy tokens."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_models import DEVICE
from hf_models import hf_gpt2 as hf_gpt2_on_cpu
from torch import Tensor

from fastgpt2 import GPT, Kernels
from fastgpt2.gpt2.config import PRESETS
from fastgpt2.gpt2.weights.huggingface import CONV1D

RELATIVE = 1e-4  # of the largest magnitude, in fp32
GREEDY_TOKENS = 50
GREEDY_TOKENS_A_TOGGLE = 10  # in the interpreter, where a token takes tenths of a second; all of them at once write 50
TOGGLES = [*Kernels.names(), "triton"]

# Widths and heads of the four sizes; the number of layers, the vocabulary and the length are cut for time.
SIZES = {
    name: dict(n_embd=p["n_embd"], n_head=p["n_head"], n_layer=2, vocab_size=2003, n_positions=64)
    for name, p in PRESETS.items()
    if name != "baby"
}


# Depths and heads of the larger three; the width is cut for time and memory.
DEEP = {
    name: dict(n_embd=4 * p["n_head"], n_head=p["n_head"], n_layer=p["n_layer"], vocab_size=503, n_positions=64)
    for name, p in PRESETS.items()
    if name in ("gpt2-medium", "gpt2-large", "gpt2-xl")
}
# Widths and depths whole, the vocabulary cut: gigabytes and minutes.
WHOLE = {
    name: dict(n_embd=p["n_embd"], n_head=p["n_head"], n_layer=p["n_layer"], vocab_size=2003, n_positions=64)
    for name, p in PRESETS.items()
    if name in ("gpt2-medium", "gpt2-large")
}


def hf_gpt2(**settings):
    return hf_gpt2_on_cpu(**settings).to(DEVICE)


def tokens(hf, B: int, T: int) -> Tensor:
    return torch.randint(hf.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1)).to(hf.device)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest magnitude."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def check_forward_and_backward(ours: GPT, hf, B: int, T: int, bound: float = RELATIVE) -> None:
    """Both in train mode, without dropout. Targets are the next tokens, as their loss shifts them."""
    idx = tokens(hf, B, T)
    with torch.no_grad():  # a training step with the kernel of the loss makes no logits
        logits, _ = ours(idx, idx)
    targets = F.pad(idx[:, 1:], (0, 1), value=-100)
    _, loss = ours(idx, targets)
    theirs = hf(idx, labels=idx)
    their_loss = theirs.loss
    if logits.dtype == torch.float64:  # theirs is computed in float32 whatever the logits are
        their_loss = F.cross_entropy(theirs.logits.flatten(0, 1), targets.flatten())
    assert distance(logits, theirs.logits) < bound
    assert theirs.logits.std() > 0.1, "logits without spread prove nothing"
    assert loss.item() == pytest.approx(their_loss.item(), rel=bound)

    ours.zero_grad(), hf.zero_grad()
    loss.backward(), their_loss.backward()
    theirs_by_name = dict(hf.named_parameters())
    checked = 0
    for name, parameter in ours.named_parameters():
        grad = parameter.grad[: hf.config.vocab_size] if name.endswith("wte.weight") else parameter.grad
        assert grad.dtype == parameter.dtype and grad.any(), name
        grad = grad.t() if name.endswith(CONV1D) else grad
        error = distance(grad, theirs_by_name[name].grad)
        assert error < bound, f"gradient of {name}: {error:.2e} of its scale"
        checked += 1
    assert checked == len(theirs_by_name)


def check_greedy(ours: GPT, hf, new: int = GREEDY_TOKENS) -> None:
    idx = tokens(hf, 1, 4)
    theirs = hf.eval().generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours.generate(idx, new, greedy=True), theirs)
    assert len(theirs[0].unique()) > 3, "one token again and again proves nothing"


# -------------------------------------------------------------------------------------------------- real sizes, fp32


@pytest.mark.parametrize("size", SIZES)
def test_every_width_agrees(size):
    hf = hf_gpt2(**SIZES[size])
    ours = GPT.from_huggingface(hf, kernels="torch")
    check_forward_and_backward(ours, hf, B=1, T=32)
    check_greedy(ours, hf)


@pytest.mark.parametrize("size", DEEP)
def test_every_depth_agrees(size):
    hf = hf_gpt2(**DEEP[size])
    ours = GPT.from_huggingface(hf, kernels="torch")
    check_forward_and_backward(ours, hf, B=1, T=16)
    check_greedy(ours, hf)


@pytest.mark.slow
@pytest.mark.parametrize("size", WHOLE)
def test_whole_sizes_agree(size):
    hf = hf_gpt2(**WHOLE[size])
    ours = GPT.from_huggingface(hf, kernels="torch")
    check_forward_and_backward(ours, hf, B=1, T=32)
    check_greedy(ours, hf)


def test_the_whole_124m_agrees():
    hf = hf_gpt2(n_embd=768, n_head=12, n_layer=12, vocab_size=50257, n_positions=1024)
    ours = GPT.from_huggingface(hf, kernels="torch")
    assert ours.get_num_params(non_embedding=False) == 124_439_808
    check_forward_and_backward(ours, hf, B=1, T=32)
    check_greedy(ours, hf)


# ----------------------------------------------------------------------------------------- settings, on the tiny one


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
        dict(scale_attn_weights=False),
        dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
        dict(activation_function="gelu_pytorch_tanh"),
    ],
    ids=str,
)
def test_settings_agree(settings, kernels):
    hf = hf_gpt2(**settings)
    check_forward_and_backward(GPT.from_huggingface(hf, kernels=kernels), hf, B=2, T=19)


@pytest.mark.parametrize("T", [1, 2, 24])
def test_every_length_agrees(T):
    hf = hf_gpt2()
    ours = GPT.from_huggingface(hf, kernels="torch").eval()
    idx = tokens(hf, 3, T)
    assert distance(ours(idx, idx)[0], hf.eval()(idx).logits) < RELATIVE


def test_float64_agrees_to_its_own_precision():
    """What is left in fp32 is rounding: in fp64 the same code is 8 digits closer."""
    hf = hf_gpt2(dtype=torch.float64)
    check_forward_and_backward(GPT.from_huggingface(hf, kernels="torch"), hf, B=2, T=24, bound=1e-12)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_padded_vocabulary_agrees(tmp_path, kernels):
    hf = hf_gpt2()
    hf.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs", dict(vocab_multiple=128), kernels=kernels).to(DEVICE)
    assert ours.lm_head.weight.shape[0] == 128
    check_forward_and_backward(ours, hf, B=2, T=16)
    assert not ours.lm_head.weight.grad[hf.config.vocab_size :].any()
    check_greedy(ours, hf, 16)
    ours.save_pretrained(tmp_path / "ours")
    again = type(hf).from_pretrained(tmp_path / "ours").to(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), hf.parameters(), strict=True))


def test_a_transposed_square_projection_would_be_seen():
    """c_proj is square: its shape says nothing about its layout, the logits do."""
    hf = hf_gpt2()
    spoilt = copy.deepcopy(hf)
    weight = spoilt.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.t().contiguous()
    ours = GPT.from_huggingface(spoilt, kernels="torch")
    idx = tokens(hf, 1, 8)
    assert distance(ours(idx, idx)[0], hf(idx).logits) > 100 * RELATIVE


def test_bfloat16_is_as_near_to_the_truth_as_theirs():
    hf = hf_gpt2(n_embd=64, n_head=2, n_layer=4)
    idx = tokens(hf, 4, 24)
    with torch.no_grad():
        truth = copy.deepcopy(hf).double()(idx).logits
        low = hf.to(torch.bfloat16)
        ours = GPT.from_huggingface(low, kernels="torch").eval()
        error, theirs = distance(ours(idx, idx)[0], truth), distance(low.eval()(idx).logits, truth)
    assert 1e-4 < error <= 2 * theirs, f"ours {error:.2e}, theirs {theirs:.2e}"


def test_dropout_acts_where_theirs_does(tmp_path, monkeypatch):
    """What goes into every dropout, in order, with the masks left out: embedding, then two branches and attention."""
    p = 0.3
    hf = hf_gpt2(embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dict(dropout=p), kernels="torch").to(DEVICE)
    idx = tokens(hf, 2, 10)
    seen: list[Tensor] = []
    in_attention: list[float] = []
    attention = F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        assert p == 0.3 and training
        seen.append(x)
        return x

    def attend(q, k, v, *, attn_mask, is_causal, scale, dropout_p):
        in_attention.append(dropout_p)
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    hf(idx)
    theirs = [x for x in seen if x.dim() == 3]
    seen.clear()
    ours(idx, idx)
    assert in_attention == [p, p], "theirs drops the probabilities (B, H, T, T), ours inside the fused call"
    assert len(seen) == len(theirs) == 1 + 2 * 2
    for a, b in zip(seen, theirs, strict=True):
        assert distance(a, b) < RELATIVE


# ----------------------------------------------------------------------------------------------- toggle by toggle


@pytest.fixture(scope="module")
def tiny_pair():
    hf = hf_gpt2(n_positions=GREEDY_TOKENS + 8)
    return hf, GPT.from_huggingface(hf, kernels="torch")


@pytest.mark.parametrize("toggle", TOGGLES)
def test_each_toggle_agrees(tiny_pair, toggle):
    hf, ours = tiny_pair
    hf.train(), ours.train()
    with ours.use_kernels(toggle):
        check_forward_and_backward(ours, hf, B=2, T=19)


@pytest.mark.parametrize("toggle", TOGGLES)
def test_each_toggle_writes_the_same_text(tiny_pair, toggle):
    hf, ours = tiny_pair
    with ours.use_kernels(toggle):
        check_greedy(ours, hf, GREEDY_TOKENS if toggle == "triton" else GREEDY_TOKENS_A_TOGGLE)
