"""The model: its initial weights, its names, tying, padding, optimizer groups, and what it refuses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hf_models import randomise
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt2 import GPT, GPTConfig


def tiny(kernels="torch", **settings) -> GPT:
    return GPT(GPTConfig(**{**dict(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=32), **settings}), kernels)


IDX = torch.arange(16).view(2, 8) % 61


# ------------------------------------------------------------------------------------------- weights at the start


def test_initial_weights_are_gpt2_s():
    """N(0, 0.02), projections onto the stream 0.02 / sqrt(2 L), biases 0, gains 1; bounds are 5 standard errors."""
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=4, n_embd=64)
    for name, p in GPT(config).named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        assert abs(p.mean()) < 5 * std / math.sqrt(p.numel()), name
        assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_initial_loss_is_that_of_a_guess():
    model = tiny(vocab_size=997)
    _, loss = model(IDX, IDX.roll(1))
    assert abs(loss.item() - math.log(997)) < 0.1


def test_one_seed_one_model():
    a, b = (tiny() for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium"])
def test_names_are_huggingface_s(preset):
    config = GPTConfig.preset(preset)
    with torch.device("meta"):
        ours = GPT(config)
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    modules = {n for n, _ in theirs.named_modules()}
    unlike = {n for n in modules if n.split(".")[-1] in ("drop", "attn_dropout", "resid_dropout", "dropout", "act")}
    assert {n for n, _ in ours.named_modules()} == modules - unlike, "all but those without weights"


# ----------------------------------------------------------------------------------------------------------- tying


def tied(model: GPT) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def test_the_head_stays_tied():
    model = tiny()
    assert tied(model) and len(list(model.parameters())) == len(model.state_dict()) - 1
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).double()):
        assert tied(other) and other.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    model.load_state_dict(tiny().state_dict())
    assert tied(model)
    meta = tiny().to("meta").to_empty(device="cpu")
    assert tied(meta)


def test_both_uses_of_the_tied_weight_reach_its_gradient():
    """Against fp64 finite differences, for a token that only the head sees and one that only the table does."""
    model = tiny(n_layer=1).double()
    x, y = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    model(x, y)[1].backward()
    weight = model.transformer.wte.weight
    for token in (1, 3, 60):
        with torch.no_grad():
            losses = []
            for step in (1e-5, -1e-5):
                weight[token, 5] += step
                losses.append(model(x, y)[1].item())
                weight[token, 5] -= step
        assert weight.grad[token, 5].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


# -------------------------------------------------------------------------------------------------------- contract


def test_the_contract_of_forward():
    model = tiny().eval()
    randomise(model)
    logits, loss = model(IDX, IDX.roll(1))
    assert logits.shape == (2, 8, 61) and loss.shape == ()
    last, none = model(IDX)
    assert last.shape == (2, 1, 61) and none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), IDX.roll(1).flatten()))


def test_negative_targets_are_ignored():
    model = tiny().eval()
    randomise(model)
    targets = IDX.roll(1).clone()
    targets[0, :5], targets[1, 3] = -1, -100
    logits, loss = model(IDX, targets)
    kept = targets >= 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))
    _, loss = model.train()(IDX, torch.full_like(IDX, -1))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())


def test_the_past_decides_and_the_future_does_not():
    model = tiny().eval()
    randomise(model)
    changed = IDX.clone()
    changed[:, 5] += 1
    a, b = model(IDX, IDX)[0], model(changed, changed)[0]
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    _, a = model(IDX, IDX)
    _, b = model(IDX, IDX)
    assert a != b
    model.eval()
    assert torch.equal(model(IDX, IDX)[0], model(IDX, IDX)[0])


def test_dropout_after_the_embedding():
    """After the embedding, at rate p, the rest scaled by 1 / (1 - p); to 5 standard errors."""
    model = tiny(dropout=0.3, n_layer=1).double()
    randomise(model)
    with torch.no_grad():
        embedded = model.transformer.wte.weight[IDX] + model.transformer.wpe.weight
        kept = []
        handle = model.transformer.h[0].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for _ in range(100):
            model(IDX)
        handle.remove()
    masks = torch.stack(kept) == 0
    assert abs(masks.double().mean() - 0.3) < 5 * math.sqrt(0.21 / masks.numel())
    torch.testing.assert_close(kept[0][~masks[0]], (embedded / 0.7)[~masks[0]])


# ---------------------------------------------------------------------------------------------- padded vocabulary


def test_padded_rows_take_no_part():
    """Even where they would win: rows that point along the stream, with logits above all others."""
    plain, padded = tiny(), tiny(vocab_multiple=16)
    randomise(plain)
    state = plain.state_dict()
    rows = torch.full((3, 32), 100.0)
    state["transformer.wte.weight"] = state["lm_head.weight"] = torch.cat([state["lm_head.weight"], rows])
    padded.load_state_dict(state)
    (a, loss), (b, padded_loss) = plain(IDX, IDX.roll(1)), padded(IDX, IDX.roll(1))
    assert b.shape == (2, 8, 61)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(loss, padded_loss)
    loss.backward(), padded_loss.backward()
    assert not padded.lm_head.weight.grad[61:].any()
    torch.testing.assert_close(plain.lm_head.weight.grad, padded.lm_head.weight.grad[:61])
    assert padded(IDX)[0].shape == (2, 1, 61)


def test_padded_rows_are_never_sampled():
    model = tiny(vocab_size=3, vocab_multiple=128)
    nn.init.constant_(model.lm_head.weight, 0.0)
    tokens = model.generate(torch.zeros(64, 1, dtype=torch.long), 8, temperature=5.0)
    assert tokens.max() <= 2 and set(tokens[:, 1:].flatten().tolist()) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------ optimizer


def test_only_matrices_and_tables_decay():
    model = tiny()
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
    names = {p: n for n, p in model.named_parameters()}
    decayed, kept = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert decayed == {n for n, p in model.named_parameters() if p.dim() >= 2} - {"transformer.wpe.weight"}
    assert kept == {n for n, p in model.named_parameters() if p.dim() < 2}
    assert (
        "transformer.wte.weight" in decayed and sum(len(g["params"]) for g in optimizer.param_groups) == len(names) - 1
    )
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["lr"] == 3e-4


def test_an_unknown_type_of_device_is_refused():
    with pytest.raises(ValueError, match="device_type is 'tpu', allowed are 'cuda', 'cpu'"):
        tiny().configure_optimizers(0.1, 1e-2, (0.9, 0.95), "tpu")


def test_a_few_steps_learn():
    model = tiny()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        _, loss = model(IDX, IDX.roll(-1, 1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_crop_block_size_keeps_the_first_positions():
    model = tiny()
    randomise(model)
    before = model(IDX[:, :5], IDX[:, :5])[0]
    model.crop_block_size(5)
    assert model.config.block_size == 5 and model.transformer.wpe.weight.shape == (5, 32)
    assert torch.equal(model(IDX[:, :5], IDX[:, :5])[0], before)
    with pytest.raises(ValueError, match="block_size is 5"):
        model(IDX[:, :6])
    for size in (0, 6):
        with pytest.raises(ValueError, match=rf"block_size is {size}, allowed are 1\.\.5"):
            model.crop_block_size(size)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "idx, targets, error, message",
    [
        (IDX + 60, None, ValueError, r"idx holds token 61, vocab_size is 61: allowed are 0\.\.60"),
        (-IDX, None, ValueError, r"idx holds token -1, vocab_size is 61"),
        (IDX, IDX + 50, ValueError, r"targets holds token 61, vocab_size is 61"),
        (torch.zeros(1, 9, dtype=torch.long), None, ValueError, "idx has 9 tokens a row, block_size is 8"),
        (IDX[0], None, ValueError, r"idx has shape \(8,\), expected \(B, T\)"),
        (IDX[None], None, ValueError, r"idx has shape \(1, 2, 8\)"),
        (IDX, IDX[:, :7], ValueError, r"targets has shape \(2, 7\), expected \(2, 8\)"),
        (IDX, IDX[:1], ValueError, r"targets has shape \(1, 8\)"),
        (IDX[:, :0], None, ValueError, "idx is empty"),
        (IDX.float(), None, TypeError, "idx is torch.float32, expected int64"),
        (IDX.to(torch.uint8), None, TypeError, "idx is torch.uint8"),
        (IDX, IDX.double(), TypeError, "targets is torch.float64"),
    ],
)
def test_bad_input_is_named(kernels, idx, targets, error, message):
    with pytest.raises(error, match=message):
        tiny(kernels)(idx, targets)


def test_an_empty_batch_is_no_error():
    logits, none = tiny()(IDX[:0])
    assert logits.shape == (0, 1, 61) and none is None
    logits, loss = tiny()(IDX[:0], IDX[:0])
    assert logits.shape == (0, 8, 61) and loss.item() == 0


@pytest.mark.parametrize("name, token", [("idx", 11), ("idx", -1), ("targets", 11)])
def test_tokens_are_checked_when_compiled(name, token):
    model = torch.compile(GPT(GPTConfig(8, 11, 1, 1, 8), "torch"), backend="eager", fullgraph=True)
    batch = dict(idx=torch.zeros(1, 4, dtype=torch.int64), targets=torch.zeros(1, 4, dtype=torch.int64))
    model(**batch)
    batch[name][0, 1] = token
    with pytest.raises(RuntimeError, match=f"{name} holds a token out of range, vocab_size is 11"):
        model(**batch)
