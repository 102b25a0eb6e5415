"""hf.accelerate on models that people changed: classes, settings and calls that mean something else than GPT-2's."""

import copy
import functools

import pytest
import torch
import transformers.models.gpt2.modeling_gpt2 as theirs
from hf_models import DEVICE, hf_gpt2
from hf_parity import IDS, PACKED, pair
from torch import Tensor, nn
from transformers import AttentionInterface

from fastgpt2 import hf
from fastgpt2.gpt2.hf import stand_in

KERNELS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("more", [{}, dict(use_cache=True), dict(use_cache=False)], ids=str)
def test_packed_rows_by_cu_seqlens_with_and_without_a_cache(kernels, more):
    model, ours = pair(kernels)
    starts = torch.tensor([0, 3, 9], dtype=torch.int32, device=DEVICE)
    truth = model(IDS[:1], position_ids=PACKED[:1], use_cache=False).logits
    same(ours(IDS[:1], position_ids=PACKED[:1], cu_seq_lens_q=starts, cu_seq_lens_k=starts, **more).logits, truth)


@pytest.mark.parametrize("kind", ["GPT2Attention", "GPT2MLP", "GPT2Block", "GPT2Model"])
@pytest.mark.parametrize("dressed", ["plain", "wraps", "by PyTorch"])
@pytest.mark.parametrize("when", ["after", "before", "before all"])
def test_a_class_of_transformers_that_somebody_patched_is_called(kind, dressed, when, monkeypatch):
    kind = getattr(theirs, kind)
    original = kind.forward
    if when == "before all":  # no class was met yet
        monkeypatch.setattr(stand_in, "_made", {})
        monkeypatch.setattr(stand_in, "_originals", {})
    else:
        hf.accelerate(hf_gpt2())

    def patched(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if isinstance(output, Tensor):
            return 2 * output
        output = output if isinstance(output, tuple) else output.to_tuple()
        first = 2 * output[0]
        if kind is theirs.GPT2Model:
            return theirs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=first)
        return (first, *output[1:])

    dress = {"plain": lambda f: f, "wraps": functools.wraps(original), "by PyTorch": torch.enable_grad()}
    changes = dress[dressed](patched)
    if when != "after":
        monkeypatch.setattr(kind, "forward", changes)
    model, ours = pair()
    unchanged = model(IDS, use_cache=False).logits
    monkeypatch.setattr(kind, "forward", changes)
    changed = model(IDS, use_cache=False).logits
    assert when != "after" or not torch.allclose(changed, unchanged)
    same(ours(IDS, use_cache=False).logits, changed)
    monkeypatch.undo()
    same(ours(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_attention_that_is_not_causal_is_transformers():
    model, ours = pair()
    for block in (*model.transformer.h, *ours.transformer.h):
        block.attn.is_causal = False
    same(ours(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    assert "is_causal is False" in str(hf.report(ours))


def test_an_attention_of_ones_own_is_called(monkeypatch):
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "mine",
        lambda module, q, k, v, mask, **more: ((2 * v).transpose(1, 2).contiguous(), None),
    )
    model, ours = pair()
    before = ours(IDS, use_cache=False).logits
    for each in (model, ours):
        each.set_attn_implementation("mine")
    after = ours(IDS, use_cache=False).logits
    same(after, model(IDS, use_cache=False).logits)
    assert not torch.allclose(after, before) and "'mine'" in str(hf.report(ours))


def test_what_the_tables_do_not_have_is_an_error():
    _, ours = pair("triton", n_positions=16)
    error = RuntimeError if DEVICE.type == "cuda" else ValueError
    if DEVICE.type == "cpu":  # on a GPU a device-side assertion, after which the device is lost
        for call, message in (
            (dict(input_ids=IDS + 61), "input_ids holds token"),
            (dict(input_ids=IDS, position_ids=PACKED + 16), "position_ids holds token 16"),
        ):
            with pytest.raises(error, match=message):
                ours(**call, use_cache=False)
    with pytest.raises(ValueError, match="18 tokens a row and the cache 0 before them, n_positions is 16"):
        ours(torch.cat((IDS, IDS), 1))
    with pytest.raises(ValueError, match="n_positions is 16"):
        ours.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


def test_a_new_model_of_an_accelerated_ones_class_is_transformers(tmp_path):
    model, ours = pair()
    ours.save_pretrained(tmp_path)
    for new in (type(ours)(ours.config), type(ours).from_pretrained(tmp_path)):
        new.load_state_dict(model.state_dict())
        same(new.to(DEVICE).eval()(IDS, labels=IDS).logits, model(IDS, labels=IDS).logits)
        assert "hf.accelerate(model) was not called" in str(hf.report(new))
        hf.restore(hf.accelerate(new))
        same(new(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("what", ["gpt2", None, nn.Linear])
@pytest.mark.parametrize("function", [hf.accelerate, hf.restore, hf.report])
def test_what_is_no_module_is_refused(function, what):
    with pytest.raises(TypeError, match="model is"):
        function(what)


MASKS = {
    "none hidden": torch.zeros(9, 9),
    "distances": torch.full((9, 9), float("-inf")).triu(1) + 0.3 * torch.arange(9),
    "a key hidden": torch.full((9, 9), float("-inf")).triu(1).index_fill(1, torch.tensor(3), -1e9).tril(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("accelerated", [False, True])
def test_masks_of_numbers_are_added_by_pytorch_and_refused_by_triton(mask, accelerated):
    theirs = hf_gpt2().to(DEVICE).eval()
    theirs.set_attn_implementation("sdpa")
    ours = copy.deepcopy(theirs)
    numbers = MASKS[mask].to(DEVICE)[None, None].expand(2, 1, 9, 9)
    expected = theirs(IDS, attention_mask=numbers).logits
    hf.register("torch")
    try:
        ours.set_attn_implementation("fastgpt2")
        found = (hf.accelerate(ours, "torch") if accelerated else ours)(IDS, attention_mask=numbers).logits
        torch.testing.assert_close(found, expected)
        hf.register("triton")
        with pytest.raises(ValueError, match=r"attention_mask is a mask \(2, 1, 9, 9\) of torch.float32"):
            ours(IDS, attention_mask=numbers)
    finally:
        hf.unregister()


def test_a_call_for_hidden_states_leaves_nothing_that_counts():
    """transformers leaves hooks on every block, which do nothing in other calls."""
    ours = hf.accelerate(hf_gpt2().to(DEVICE).eval(), "torch")
    before = str(hf.report(ours))
    assert len(ours(IDS, output_hidden_states=True).hidden_states) == 3
    assert ours.transformer.h[0]._forward_hooks, "this test is about them"
    assert str(hf.report(ours)) == before and "transformers' forward" not in before
    ours.transformer.h[0].register_forward_hook(lambda module, args, output: None)
    assert "h.0 is replaced or has hooks" in str(hf.report(ours))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_class_put_over_an_accelerated_module_is_called(kernels):
    model, ours = pair(kernels)
    truth = model(IDS, labels=IDS).loss
    block, calls = ours.transformer.h[0], []

    class Noted(type(block)):
        def forward(self, *args, **kwargs):
            calls.append(self)
            return super().forward(*args, **kwargs)

    block.__class__ = Noted
    same(ours(IDS, labels=IDS).loss, truth)
    assert calls == [block] and hf.report(ours)
