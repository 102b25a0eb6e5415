"""attn_implementation="fastgpt2": transformers' GPT-2 with our attention and nothing else changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hf_models import DEVICE, hf_gpt2, write_folder
from hf_parity import BATCHES, IDS, LEFT, PACKED, WAYS, Copies, labels_of, results, same_as, written
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sliding_window_causal_mask_function

from fastgpt2 import hf
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.hf import attention, packed_qkv, visible

KERNELS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(autouse=True)
def unregistered():
    yield
    hf.unregister()


def pair(kernels: str, dtype=torch.float32, **settings):
    """(eager, the same model with our attention)."""
    hf.register(kernels)
    eager = hf_gpt2(dtype=dtype, **settings).to(DEVICE)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastgpt2")
    return eager, ours


def spied(monkeypatch, name: str) -> list[tuple]:
    """Arguments of every call of an op."""
    calls, op = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: calls.append(args) or op(*args))
    return calls


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_loss_and_gradients_are_eagers(kernels, batch):
    eager, ours = pair(kernels)
    same_as([ours], eager, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_16_bits_keep_the_rule(kernels, dtype):
    eager, ours = pair(kernels, dtype)
    same_as([ours], eager)


@pytest.mark.parametrize("kernels", KERNELS)
def test_scale_by_layer_and_upcast(kernels):
    settings = dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, n_layer=3)
    eager, ours = pair(kernels, **settings)
    same_as([ours], eager)


@pytest.mark.parametrize("kernels", KERNELS)
def test_cu_seq_lens_are_documents(kernels):
    eager, ours = pair(kernels)
    flat = IDS.view(1, -1)
    positions = PACKED.reshape(1, -1)
    starts = torch.cat([(positions[0] == 0).nonzero()[:, 0], torch.tensor([18], device=DEVICE)]).to(torch.int32)
    expected = eager(flat, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(flat, position_ids=positions, use_cache=False).logits, expected)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=6, max_length_k=6)
    torch.testing.assert_close(ours(flat, position_ids=positions, use_cache=False, **lengths).logits, expected)
    # They alone say where documents are, too: positions that do not restart, another embedding, the same attention.
    row = torch.arange(18, device=DEVICE)[None]
    documents = torch.searchsorted(starts, row.to(torch.int32), right=True)
    seen = (documents[..., None] == documents[:, None]) & torch.ones(18, 18, device=DEVICE).tril().bool()
    mask = torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    torch.testing.assert_close(
        ours(flat, use_cache=False, **lengths).logits, eager(flat, attention_mask=mask, use_cache=False).logits
    )


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_projection_reaches_the_kernel_without_a_copy(kernels, monkeypatch):
    _, ours = pair(kernels)
    projections = []
    for block in ours.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, out: projections.append(out.data_ptr()))
    given = spied(monkeypatch, "causal_attention")
    with Copies() as copies:
        ours(IDS, use_cache=False)
    assert copies.found == []
    assert [qkv.data_ptr() for qkv, *_ in given] == projections and len(projections) == 2
    with torch.inference_mode(), Copies() as copies:  # where views know no base
        ours(IDS, use_cache=False)
    assert copies.found == [] and [qkv.data_ptr() for qkv, *_ in given] == projections
    with Copies() as copies:  # and this is what is counted: a cache copies, and so q, k, v are packed anew
        ours(IDS, use_cache=True)
    assert copies.found.count("cat") == 4 and len(copies.found) >= 6


def test_what_is_no_projection_is_packed():
    qkv = torch.randn(2, 5, 96)
    q, k, v = (t.view(2, 5, 2, 16).transpose(1, 2) for t in qkv.split(32, dim=2))
    assert packed_qkv.projection(q, k, v).data_ptr() == qkv.data_ptr()
    for other in ((k, q, v), (q, k, v.clone()), (q, k.flip(0), v), (q[:, :1], k[:, :1], v[:, :1]), (q, k, k)):
        assert packed_qkv.projection(*other) is None
        packed = packed_qkv.pack(*other)
        assert torch.equal(packed, torch.cat([t.transpose(1, 2).flatten(2) for t in other], 2))
    half = torch.randn(4, 5, 96)[:2]  # a part of a larger tensor
    assert packed_qkv.projection(*(t.view(2, 5, 2, 16).transpose(1, 2) for t in half.split(32, dim=2))) is None


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradient_checkpointing_changes_nothing(kernels):
    _, ours = pair(kernels, attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1, n_layer=1)
    torch.manual_seed(1)
    expected = results(ours, BATCHES["left"])
    for reentrant in (False, True):
        ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        ours.enable_input_require_grads()
        torch.manual_seed(1)
        found = results(ours, BATCHES["left"])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_dropout_drops_what_the_op_drops_and_as_much_as_asked(kernels):
    hf.register(kernels)
    module = hf_gpt2().transformer.h[0].attn
    qkv = torch.randn(4, 24, 96, device=DEVICE)
    q, k, v = (t.view(4, 24, 2, 16).transpose(1, 2) for t in qkv.split(32, dim=2))
    v = torch.ones_like(v)
    torch.manual_seed(5)
    y = attention.attention_forward(module, q, k, v, None, dropout=0.4)[0]
    torch.manual_seed(5)
    packed = packed_qkv.pack(q, k, v)
    expected = ops.causal_attention(packed, 2, 0.25, 0.4, ops.Kernels.all(kernels))
    assert torch.equal(y.flatten(2), expected)
    # With values of one, a row gives the sum of its kept weights / 0.6: one in the mean; the first row is 0 or 1 / 0.6.
    assert abs(y[..., 0].mean() - 1) < 0.1
    first = y[:, 0, :, 0]
    torch.testing.assert_close(first, (first > 0) / 0.6)
    torch.testing.assert_close(attention.attention_forward(module, q, k, v, None)[0], torch.ones_like(y))


@pytest.mark.parametrize("kernels", KERNELS)
def test_compiled_is_the_same(kernels):
    _, ours = pair(kernels)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def run(model, batch):
        ours.zero_grad()
        logits = model(IDS, use_cache=False, **batch).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in ours.parameters()]

    for name, batch in BATCHES.items():
        torch.testing.assert_close(
            run(compiled, batch), run(ours, batch), msg=lambda text, name=name: f"{name}: {text}"
        )


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_text_is_eagers(kernels, way, monkeypatch):
    eager, ours = pair(kernels)
    expected = written(eager, **WAYS[way])
    decoded = spied(monkeypatch, "cached_attention")
    assert torch.equal(written(ours, **WAYS[way]), expected)
    assert len(decoded) == (2 * 3 if kernels == "triton" and way != "no-cache" else 0)  # layers, tokens after a prompt


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("gradients", [True, False])
def test_tokens_behind_a_cache(kernels, gradients):
    """Several at once, and one where gradients are recorded."""
    eager, ours = pair(kernels)
    with torch.set_grad_enabled(gradients):
        for mask in (None, LEFT):
            parts = []
            cache = None
            for first, last in ((0, 4), (4, 8), (8, 9)):
                seen = None if mask is None else mask[:, :last]
                out = ours(IDS[:, first:last], cache=cache, attention_mask=seen, use_cache=True)
                cache = out.cache
                parts.append(out.logits)
            real = slice(None) if mask is None else mask.bool()
            expected = eager(IDS, attention_mask=mask).logits
            torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real])


# ---------------------------------------------------------------------------------------------------- what it is not


def test_a_folder_is_loaded_with_it(tmp_path):
    hf.register()
    model = hf_gpt2()
    folder = write_folder(tmp_path / "model", model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastgpt2")
    assert loaded.config._attn_implementation == "fastgpt2"
    torch.testing.assert_close(loaded(IDS.cpu()).logits, model.eval()(IDS.cpu()).logits)


def test_registering_can_be_undone():
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    hf.register()
    assert attention.is_registered()
    hf.unregister()
    hf.unregister()
    assert before == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    with pytest.raises(ValueError, match="fallback is 'eager', allowed are None and 'sdpa'"):
        hf.register(fallback="eager")
    with pytest.raises(ValueError, match="kernels names 'fast'"):
        hf.register("fast")


HOLE = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [1] * 9]).to(DEVICE)
USERS = torch.ones(2, 1, 9, 9, dtype=torch.bool, device=DEVICE).tril().triu(-3)
REFUSED = {
    "the head size is 8": (dict(n_head=4), {}),
    "attention_mask has padding between real tokens": ({}, dict(attention_mask=HOLE)),
    r"attention_mask is a mask \(2, 1, 9, 9\) of torch.bool": ({}, dict(attention_mask=USERS)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernel_cannot_do_is_said_or_goes_to_sdpa_if_asked(message):
    settings, batch = REFUSED[message]
    eager, ours = pair("triton", **settings)
    with pytest.raises(ValueError, match=f"attn_implementation='fastgpt2': {message}.*fallback='sdpa'"):
        ours(IDS, use_cache=False, **batch)
    hf.register("triton", fallback="sdpa")
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours(IDS, use_cache=False, **batch).logits, sdpa(IDS, use_cache=False, **batch).logits)
    assert torch.equal(written(ours), written(eager))
    hf.register("torch")  # what PyTorch computes needs no fallback
    torch.testing.assert_close(ours(IDS, use_cache=False, **batch).logits, sdpa(IDS, use_cache=False, **batch).logits)


def test_windows_and_other_attention_are_refused():
    hf.register("triton")
    with pytest.raises(ValueError, match="lets tokens see something else"):
        attention.mask(1, 6, 6, 0, 0, sliding_window_causal_mask_function(3))
    module = hf_gpt2().transformer.h[0].attn
    q = torch.randn(1, 4, 6, 16, device=DEVICE)
    for change, message in (
        (dict(key=q[:, :2]), "key has 2 heads, query 4: grouped heads"),
        (dict(is_causal=False), "not causal self-attention"),
        (dict(softcap=30.0), "softcap is given"),
        (dict(key=q.double()), "query, key and value are torch.float32, torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.attention_forward(module, **(dict(query=q, key=q, value=q, attention_mask=None) | change))


def test_forms_of_who_sees_whom():
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    mask = LEFT.cpu().bool()
    for form in (visible.encode(2, 9, 9, 0, mask), visible.from_booleans(causal & mask[:, None, None], 0)):
        booleans = visible.as_booleans(form, 2, 9, 9)
        assert torch.equal(booleans & mask[:, None, :, None], causal & mask[:, None, :, None] & mask[:, None, None])
        assert booleans.any(-1).all()  # padding sees itself: nobody sees nothing
    assert visible.encode(2, 9, 9, 0, torch.ones_like(mask)) is None
    behind = visible.as_booleans(visible.encode(2, 3, 12, 6, F.pad(mask, (0, 3))), 2, 3, 12)
    assert torch.equal(behind, F.pad(causal[6:] & mask[:, None, None], (0, 3)))
    strict = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(-1)
    with pytest.raises(ValueError, match="something else"):
        visible.from_booleans(strict, 0)
    with pytest.raises(ValueError, match="padding between real tokens"):
        visible.encode(2, 9, 9, 0, HOLE.cpu().bool())
    assert labels_of(BATCHES["left"])[0, :4].tolist() == [-100] * 4
