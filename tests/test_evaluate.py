"""Losses on text: what is counted, in which windows, and that batches and padding change nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt2.gpt2.data.windows import Text, strided
from fastgpt2.gpt2.evaluation.evaluate import continuation_loss, mean_loss, text_loss, total_loss
from fastgpt2.gpt2.model import GPT

T, V = 16, 258
CPU = torch.device("cpu")
BPE = BPETokenizer({bytes([b]): b for b in range(256)} | {b"th": 256})


@pytest.fixture(scope="module")
def model():
    """Random and far from indifferent: every token and position moves its logits."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=32, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() >= 2 else None
    return model


def nats(model, tokens) -> list[float]:
    """The loss of each token after the first, from all those before it that the model can see: one at a time."""
    model.eval()
    losses = []
    with torch.no_grad():
        for i in range(1, len(tokens)):
            logits, _ = model(torch.tensor([tokens[max(0, i - T) : i]]))
            losses.append(-logits[0, -1].log_softmax(-1)[tokens[i]].item())
    model.train()
    return losses


# ------------------------------------------------------------------------------------------------------- windows


@given(st.integers(2, 80), st.integers(1, 20), st.data())
def test_strided_windows_predict_every_token_once(length, block_size, draw):
    stride, batch_size = draw.draw(st.integers(1, block_size)), draw.draw(st.integers(1, 4))
    found = []
    for idx, targets in strided(np.arange(length), block_size, stride, batch_size):
        assert len(idx) <= batch_size and idx.shape[1] == min(block_size, length - 1)
        kept = targets >= 0
        assert (targets[kept] == idx[kept] + 1).all() and kept.any(1).all()
        before = targets - idx[:, :1]  # tokens that a target is predicted from
        assert ((before > block_size - stride) | (targets <= block_size))[kept].all()
        found += targets[kept].tolist()
    assert found == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 9])
def test_strides_out_of_range_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}, allowed are 1..8"):
        list(strided(np.arange(100), 8, stride, 1))
    with pytest.raises(ValueError, match="has 1 tokens"):
        list(strided(np.arange(1), 8, 8, 1))


# -------------------------------------------------------------------------------------------------------- losses


def test_losses_are_weighed_by_their_tokens(model):
    idx = torch.randint(0, V, (3, T))
    targets = torch.randint(0, V, (3, T))
    targets[1, 3:], targets[2, 1:] = -1, -100
    losses = [total_loss(model, [(idx[i : i + 1], targets[i : i + 1])], CPU) for i in range(3)]
    assert [count for _, count in losses] == [T, 3, 1]
    together = mean_loss(model, [(idx[:1], targets[:1]), (idx[1:], targets[1:])], CPU)
    assert together == pytest.approx(sum(loss for loss, _ in losses) / (T + 4))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "byte"])
def test_the_loss_of_a_text_is_that_of_each_token_in_turn(model, tokenizer):
    text = Text("two", ["the theatre, then", "another thing: é"])
    tokens = [
        t
        for document in text.documents
        for t in ([257] if tokenizer is BPE else []) + tokenizer.encode(document).tolist()
    ]
    expected = nats(model, tokens)
    found = text_loss(model, tokenizer, text, stride=1, batch_size=3, device=CPU)
    assert found.tokens == len(expected) == len(tokens) - 1
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 34, rel=1e-5)
    # Without overlap the first token of each window sees only what its window holds.
    windows = [tokens[i : i + T + 1] for i in range(0, len(tokens) - 1 - T, T)]
    last = nats(model, tokens[-T - 1 :])[-((len(tokens) - 1) - len(windows) * T) :]
    expected = [loss for window in windows for loss in nats(model, window)] + last
    assert text_loss(model, tokenizer, text, device=CPU).loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_endings_in_batches_have_the_losses_of_each_alone(model):
    rng = np.random.default_rng(0)
    rows = []
    for length in (2, 5, 9, T, T + 1, T + 2, 3 * T):
        for n in {1, length // 2, min(length - 1, T + 3)}:
            rows.append((rng.integers(0, V, length).astype(np.uint16), n))
    expected = []
    for tokens, n in rows:
        seen = tokens[-T - 1 :].tolist()  # what is before is cut off, for all of the ending
        expected.append(sum(nats(model, seen)[-n:]))
    for batch_size in (1, 4, 100):
        found = continuation_loss(model, rows, batch_size=batch_size, device=CPU)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
