"""hf.accelerate: transformers' GPT-2 with every op by `Kernels`, in place, and given back as it was."""

import copy
import io
import pickle

import pytest
import torch
from hf_models import DEVICE, hf_gpt2
from hf_parity import BATCHES, IDS, called_ops, labels_of, pair, results, same_as
from torch import nn
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2Model,
)

from fastgpt2 import hf
from fastgpt2.bench.timing.tune import overridden
from fastgpt2.gpt2 import ops
from fastgpt2.kernels._configurations import Key

KERNELS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_loss_and_gradients_are_eagers(kernels, batch):
    eager, ours = pair(kernels)
    same_as([ours], eager, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_16_bits_keep_the_rule(kernels, dtype):
    eager, ours = pair(kernels, dtype, training_logits=dtype == torch.float16)
    same_as([ours], eager, "left")


@pytest.mark.parametrize("n_embd, n_head", [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_widths(n_embd, n_head):
    eager = hf_gpt2(n_embd=n_embd, n_head=n_head, n_layer=1).to(DEVICE)
    ours = [hf.accelerate(copy.deepcopy(eager), kernels, training_logits=False) for kernels in KERNELS]
    same_as(ours, eager, ids=IDS[:1, :4])


@pytest.mark.parametrize("switch", ops.Kernels.names())
def test_each_switch_alone(switch):
    eager, ours = pair(switch, n_layer=1, n_inner=48, scale_attn_by_inverse_layer_idx=True, training_logits=False)
    same_as([ours], eager)


@pytest.mark.parametrize("kernels", KERNELS)
def test_another_activation_and_no_scale_are_computed_as_they_are(kernels):
    eager, ours = pair(kernels, activation_function="relu", scale_attn_weights=False)
    same_as([ours], eager)


def test_every_op_is_ours(monkeypatch):
    counts = called_ops(monkeypatch, "triton_mlp", "triton_embedding", "triton_causal_attention")
    norms = called_ops(monkeypatch, "triton_layer_norm", "triton_add_layer_norm")
    _, ours = pair("triton")
    ours(IDS)  # use_cache is True in transformers' config: a cache is filled, and the projection read as it lies
    assert counts == dict(triton_mlp=2, triton_embedding=1, triton_causal_attention=2)
    assert norms == dict(triton_layer_norm=1, triton_add_layer_norm=4)  # sums between blocks ride in LayerNorms


@pytest.mark.parametrize("kernels", KERNELS)
@torch.no_grad()
def test_dropout_drops_where_theirs_does_and_as_much(kernels):
    eager, ours = pair(kernels, n_layer=1)
    expected = eager(IDS).logits

    def drawn(seed):
        torch.manual_seed(seed)
        return ours(IDS).logits

    block = ours.transformer.h[0]
    for dropout in (ours.transformer.drop, block.attn.resid_dropout, block.mlp.dropout, block.attn.attn_dropout):
        dropout.p = 0.4
        assert torch.equal(drawn(2), drawn(2)) and not torch.allclose(drawn(2), drawn(3))
        assert not torch.allclose(drawn(2), expected)
        ours.eval()
        torch.testing.assert_close(drawn(2), expected)
        ours.train()
        dropout.p = 0.0
    # Into a branch of zeros goes the stream as dropout left it: what is dropped of x + bias is the residual alone.
    block.attn.resid_dropout.p, seen = 0.4, []
    block.attn.c_proj.weight.zero_(), block.attn.c_proj.bias.fill_(0.6)
    block.ln_2.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ours(IDS), eager.transformer.h[0].ln_1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    eager(IDS)
    added = seen[0] - seen[1]
    dropped = added.abs() < 1e-4
    torch.testing.assert_close(added, (~dropped).float(), atol=1e-5, rtol=0)  # 0.6 / (1 - 0.4)
    assert abs(dropped.float().mean() - 0.4) < 0.1


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradient_checkpointing_changes_nothing(kernels):
    _, ours = pair(kernels, attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1, n_layer=1)
    ours.enable_input_require_grads()  # a hook on the table, which is called from now on
    ours.transformer.h[0].mlp.dropout.p = 0.0  # PyTorch sums up what a checkpoint keeps, and would draw another mask
    torch.manual_seed(1)
    expected = results(ours, BATCHES["left"])
    for reentrant in (False, True):
        ours.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        torch.manual_seed(1)
        torch.testing.assert_close(results(ours, BATCHES["left"]), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_compiled_is_the_same(kernels):
    _, ours = pair(kernels, n_layer=1)
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


# ---------------------------------------------------------------------------------------------------- loss and logits


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_are_left_out_only_where_it_was_said_and_triton_makes_the_loss(kernels):
    eager, ours = pair(kernels, training_logits=False, n_layer=1)
    labels = labels_of(BATCHES["left"])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    ways = dict(num_items_in_batch=7), dict(num_items_in_batch=torch.tensor(5)), dict(shift_labels=shifted.flip(0))
    outputs = ours(IDS, labels=labels)
    assert (outputs.logits is None) == (kernels == "triton") and ("logits" in outputs) == (kernels == "torch")
    torch.testing.assert_close(outputs.loss, eager(IDS, labels=labels).loss)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    for more in ways:
        found, expected = ours(IDS, labels=labels, **more), eager(IDS, labels=labels, **more)
        torch.testing.assert_close(found.loss, expected.loss)
        assert (found.logits is None) == (kernels == "triton")
    odd = labels.masked_fill(labels == -100, 60)
    torch.testing.assert_close(
        ours(IDS, labels=odd, ignore_index=60).loss, eager(IDS, labels=odd, ignore_index=60).loss
    )
    with torch.no_grad():  # and everywhere else they are there
        torch.testing.assert_close(ours(IDS, labels=labels).logits, eager(IDS, labels=labels).logits)
    assert ours(IDS).logits is not None
    loss, logits = ours(IDS, labels=labels, use_cache=False, return_dict=False)
    assert logits.shape == (2, 9, 61)
    ours.loss_function = lambda logits, labels, vocab_size, **more: logits.sum()
    assert ours(IDS, labels=labels).logits is not None
    ours.eval()
    assert ours(IDS, labels=labels).logits is not None


def test_labels_mean_what_they_mean_to_transformers():
    """Of a loss without logits, which is ours."""
    eager, ours = pair("triton", training_logits=False, n_layer=1)
    none = torch.full_like(IDS, -100)
    assert ours(IDS, labels=none).loss.isnan() and eager(IDS, labels=none).loss.isnan()
    first = torch.cat((torch.full_like(IDS[:, :1], 99), IDS[:, 1:]), 1)  # a label that nothing predicts
    torch.testing.assert_close(ours(IDS, labels=first).loss, eager(IDS, labels=first).loss)
    with pytest.raises(ValueError, match=r"labels is of shape \(2, 5\), allowed is \(2, 9\)"):
        ours(IDS, labels=IDS[:, :5])
    if DEVICE.type == "cpu":  # on a GPU a device-side assertion, after which the device is lost
        for wrong in (61, -1, -50):
            labels = IDS.masked_fill(IDS == IDS[0, 4], wrong)
            with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
                eager(IDS, labels=labels)
            with pytest.raises(ValueError, match=f"labels holds token {wrong}, the vocabulary is 61"):
                ours(IDS, labels=labels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_to_keep_and_hidden_states(kernels):
    eager, ours = pair(kernels)
    for more in (dict(logits_to_keep=2), dict(logits_to_keep=torch.tensor([0, 3])), dict(output_hidden_states=True)):
        found, expected = ours(IDS, use_cache=False, **more), eager(IDS, use_cache=False, **more)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    found, expected = ours(IDS, output_attentions=True), eager(IDS, output_attentions=True)
    torch.testing.assert_close(found.attentions, expected.attentions)
    embeddings = eager.transformer.wte(IDS)
    torch.testing.assert_close(ours(inputs_embeds=embeddings).logits, eager(inputs_embeds=embeddings).logits)
    types = IDS.flip(0)
    torch.testing.assert_close(ours(IDS, token_type_ids=types).logits, eager(IDS, token_type_ids=types).logits)
    lengths = torch.tensor([0, 9, 18], dtype=torch.int32, device=DEVICE)
    torch.testing.assert_close(ours(IDS, cu_seq_lens_q=lengths, use_cache=False).logits, eager(IDS).logits)


def test_padding_between_tokens_is_refused_by_triton_and_computed_by_pytorch():
    hole = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [1] * 9]).to(DEVICE)
    eager, ours = pair("triton")
    with pytest.raises(ValueError, match=r"padding between real tokens.*Kernels\(attention='torch'"):
        ours(IDS, attention_mask=hole)
    hf.accelerate(ours, ops.Kernels(layer_norm="triton"))
    real = hole.bool()
    torch.testing.assert_close(
        ours(IDS, attention_mask=hole).logits[real], eager(IDS, attention_mask=hole).logits[real]
    )


# ------------------------------------------------------------------------------------------------- modules stay modules


@pytest.mark.parametrize("kernels", KERNELS)
def test_hooks_and_replaced_modules_are_called(kernels):
    def double(module, args, output):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    names = ["wte", "wpe", "drop", "ln_f", "h.0", "h.1.attn", "h.1.ln_1", "h.0.ln_2", "h.1.mlp", "h.0.mlp.act"]
    names += ["h.0.attn.c_attn", "h.1.attn.c_proj", "h.0.attn.resid_dropout", "h.0.mlp.c_fc", "h.1.mlp.dropout"]
    eager, ours = pair(kernels)
    for name in names:
        handles = [m.transformer.get_submodule(name).register_forward_hook(double) for m in (eager, ours)]
        with torch.no_grad():
            torch.testing.assert_close(
                ours(IDS).logits, eager(IDS).logits, msg=lambda text, name=name: f"{name}: {text}"
            )
        for handle in handles:
            handle.remove()
    handles = [m.lm_head.register_forward_hook(double) for m in (eager, ours)]
    hf.accelerate(ours, kernels, training_logits=False)
    torch.testing.assert_close(ours(IDS, labels=IDS).loss, eager(IDS, labels=IDS).loss)


def test_report_says_what_runs_where_and_why():
    eager, _ = pair("torch")
    assert [row.road for row in hf.report(eager)] == ["transformers"] * 2
    ours = hf.accelerate(eager, "attention,mlp,cross_entropy", training_logits=False)
    roads = {row.op: row.road for row in hf.report(ours)}
    assert roads == {
        "embedding": "torch",
        "attention": "triton",
        "add + layer norm": "torch",
        "mlp": "triton",
        "linear layers": "torch",
        "loss, training": "triton",
        "logits": "torch",
    }
    fused = {row.op: row for row in hf.report(hf.accelerate(pair("torch")[0], "mlp=fused"))}["mlp"]
    assert (fused.road, fused.why) == (
        "fused",
        "kernels.mlp='fused', GELU inside Triton's products forward and backward",
    )
    with overridden({Key("mlp_fwd", bits=32): {"FUSED": True}}):  # the table says that it is faster
        told = {row.op: row for row in hf.report(ours)}["mlp"]
    assert (told.road, told.why) == ("triton", "kernels.mlp='triton', GELU inside Triton's products forward")
    ours.transformer.h[1].mlp.act = nn.ReLU()
    ours.transformer.h[0].attn.c_attn.register_forward_hook(lambda *args: None)
    text = str(hf.report(ours))
    assert "called as modules: h.1.mlp.act" in text and "called as modules: h.0.attn.c_attn" in text
    ours.transformer.h[0].attn.register_forward_hook(lambda *args: None)
    assert "transformers' forward: h.0.attn is replaced or has hooks" in str(hf.report(ours))
    hf.register("torch")
    try:
        ours.set_attn_implementation("fastgpt2")
        row = {row.op: row for row in hf.report(hf.restore(ours))}["attention"]
    finally:
        hf.unregister()
    assert row.road == "torch" and "attn_implementation='fastgpt2'" in row.why
    with pytest.raises(TypeError, match="model is Linear, expected"):
        hf.report(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------ and back again


def test_files_state_and_config_are_byte_for_byte_theirs(tmp_path):
    model = hf_gpt2()
    expected, kinds = model(IDS.cpu()).logits, [type(m) for m in model.modules()]
    model.save_pretrained(tmp_path / "before")  # which notes the class in the config
    config, attributes = model.config.to_json_string(), [set(m.__dict__) for m in model.modules()]
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    assert hf.accelerate(model, "torch") is model
    assert [type(m) for m in model.modules()] != kinds
    model.save_pretrained(tmp_path / "accelerated")
    assert list(model.state_dict()) == keys and model.config.to_json_string() == config
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert hf.restore(model) is model and [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(model(IDS.cpu()).logits, expected)
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "model.safetensors" in files
    for folder in ("accelerated", "after"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == files
        for name in files:
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_copies_and_pickles_are_accelerated_too():
    _, ours = pair("torch")
    expected = ours(IDS).logits
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(other(IDS).logits, expected)
        hf.restore(other)
    assert type(ours) is not type(other)


@pytest.mark.parametrize(
    "kind", [GPT2Model, GPT2DoubleHeadsModel, GPT2ForTokenClassification], ids=lambda k: k.__name__
)
@torch.no_grad()
def test_other_models_of_transformers(kind):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=61, n_positions=24, num_labels=3)
    model = kind(config).eval().to(DEVICE)
    two_choices = kind is GPT2DoubleHeadsModel
    call = dict(input_ids=IDS[:, None].repeat(1, 2, 1)) if two_choices else dict(input_ids=IDS)
    call |= dict(mc_token_ids=torch.full((2, 2), 8, device=DEVICE)) if two_choices else {}
    expected = model(**call, use_cache=False).to_tuple()
    torch.testing.assert_close(hf.accelerate(model, "torch")(**call, use_cache=False).to_tuple(), expected)
    assert "hf.accelerate(model) was not called" not in str(hf.report(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_grow_or_part_after_accelerate(tied):
    """Everything is read from the modules anew at every call."""
    models = pair("triton", training_logits=False, n_layer=1)
    for model in models:
        model.resize_token_embeddings(64, mean_resizing=False)
        model.transformer.wte.weight.data[61:] = 0.01
        model.tie_weights()
        assert model.lm_head.weight is model.transformer.wte.weight
        if not tied:
            model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    eager, ours = models
    same_as([ours], eager, ids=IDS.clamp(min=30) + 8)  # rows of the new part too


def test_other_heads_other_models_and_wrong_arguments():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=61, n_positions=24, pad_token_id=0, num_labels=3)
    classifier = GPT2ForSequenceClassification(config).eval().to(DEVICE)
    expected = classifier(IDS).logits
    torch.testing.assert_close(hf.accelerate(classifier, "torch")(IDS).logits, expected)
    assert "loss" not in str(hf.report(classifier))
    with pytest.raises(TypeError, match="model is Linear, expected transformers' GPT2LMHeadModel or one"):
        hf.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="kernels names 'fast'"):
        hf.accelerate(classifier, "fast")
    block = classifier.transformer.h[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(TypeError, match="restore it before such a wrapper is put on"):
        hf.restore(classifier)
