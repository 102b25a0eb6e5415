"""Writing tokens: what goes on from what, and what is refused."""

import math

import pytest
import torch
from tiny_models import tiny

from fastgpt2.gpt2.generation.generate import Generation, generate
from fastgpt2.gpt2.generation.sampling import Sampling


def test_the_prompt_goes_on():
    model, idx = tiny(), torch.randint(50, (3, 4))
    out = generate(model, idx, 6)
    assert out.shape == (3, 10) and out.dtype == torch.int64 and torch.equal(out[:, :4], idx)
    assert torch.equal(generate(model, idx, 0), idx)
    assert model.generate(idx, 2).shape == (3, 6)


def test_greedy_is_the_models_argmax_past_block_size():
    model, idx = tiny(), torch.randint(50, (2, 3))
    out = generate(model, idx, 20, greedy=True)
    model.eval()
    for T in range(3, 23):
        logits, _ = model(out[:, max(0, T - 8) : T])
        assert torch.equal(out[:, T], logits[:, -1].argmax(-1))
    assert torch.equal(generate(model, idx, 20, top_k=1), out)


def test_a_long_prompt_is_cropped():
    model, idx = tiny(), torch.randint(50, (1, 30))
    with pytest.warns(UserWarning, match="a prompt has 30 tokens, block_size is 8: the model sees the last 8"):
        out = generate(model, idx, 5, greedy=True)
    assert torch.equal(out[:, :30], idx)
    assert torch.equal(out[:, 22:], generate(model, idx[:, -8:], 5, greedy=True))


def test_the_generator_decides():
    model, idx = tiny(), torch.randint(50, (2, 3))
    one, two, three = (generate(model, idx, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_dropout_is_off_and_modes_come_back():
    model, idx = tiny(dropout=0.5), torch.randint(50, (1, 3))
    model.transformer.h[0].eval()  # a module that is in eval mode while the rest trains
    before = [m.training for m in model.modules()]
    assert True in before and False in before
    assert torch.equal(generate(model, idx, 9, greedy=True), generate(model, idx, 9, greedy=True))
    assert [m.training for m in model.modules()] == before
    model.transformer.forward = None  # an error in the middle
    with pytest.raises(TypeError):
        generate(model, idx, 1)
    assert [m.training for m in model.modules()] == before


def test_no_graph_is_kept():
    model, idx = tiny(), torch.randint(50, (1, 3))
    model(idx)[0].sum().backward()
    grad = model.lm_head.weight.grad.clone()
    assert not generate(model, idx, 3).requires_grad
    assert torch.equal(model.lm_head.weight.grad, grad)


def test_padded_rows_are_never_drawn():
    model = tiny(vocab_size=50, vocab_multiple=64)
    with torch.no_grad():
        model.transformer.wte.weight[50:] = 100.0 * model.transformer.wte.weight[:14]
    idx = torch.randint(50, (8, 3))
    for settings in (dict(greedy=True), dict(top_k=60), dict(temperature=5.0)):
        assert generate(model, idx, 20, **settings).max() < 50


@pytest.mark.parametrize(
    ("idx", "settings", "error", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, ValueError, r"idx is an empty prompt.*\(1, 0\)"),
        (torch.zeros(3, dtype=torch.int64), {}, ValueError, r"idx has shape \(3,\), expected \(B, T\)"),
        (torch.zeros(1, 3), {}, TypeError, "idx is torch.float32"),
        (torch.tensor([[1, 50]]), {}, ValueError, r"idx holds token 50, vocab_size is 50: allowed are 0\.\.49"),
        (torch.tensor([[1, -1]]), {}, ValueError, r"idx holds token -1"),
        (torch.tensor([[1]]), dict(max_new_tokens=-1), ValueError, "max_new_tokens is -1, allowed are whole numbers"),
        (torch.tensor([[1]]), dict(max_new_tokens=2.5), ValueError, "max_new_tokens is 2.5, allowed are whole numbers"),
        (torch.tensor([[1]]), dict(top_k=2.5), TypeError, "top_k is 2.5, expected a whole number"),
        (torch.tensor([[1]]), dict(temperature=None), TypeError, "temperature is None, expected a number"),
        (torch.tensor([[1]]), dict(temperature=0.0), ValueError, "temperature is 0.0, allowed are numbers above 0"),
        (torch.tensor([[1]]), dict(temperature=0.0, top_k=1), ValueError, "temperature is 0.0"),
        (torch.tensor([[1]]), dict(temperature=-1.0), ValueError, "temperature is -1.0"),
        (torch.tensor([[1]]), dict(temperature=math.nan), ValueError, "temperature is nan"),
        (torch.tensor([[1]]), dict(temperature=math.inf), ValueError, "temperature is inf"),
        (torch.tensor([[1]]), dict(top_k=0), ValueError, "top_k is 0, allowed are None and 1"),
        (torch.tensor([[1]]), dict(top_p=0.0), ValueError, "top_p is 0.0, allowed are None and 0 < top_p <= 1"),
        (torch.tensor([[1]]), dict(top_p=1.5), ValueError, "top_p is 1.5"),
        (torch.tensor([[1]]), dict(top_p=math.nan), ValueError, "top_p is nan"),
    ],
)
def test_what_is_not_allowed_is_named(idx, settings, error, message):
    with pytest.raises(error, match=message):
        generate(tiny(), idx, **{"max_new_tokens": 1, **settings})


def test_greedy_needs_no_temperature():
    assert generate(tiny(), torch.tensor([[1]]), 2, temperature=0.0, greedy=True).shape == (1, 3)


# ---------------------------------------------------------------------------------- stops, penalties, probabilities


def test_a_row_repeats_its_stop_token():
    model, idx = tiny(), torch.randint(50, (3, 3))
    whole = generate(model, idx, 12, greedy=True)
    stops = [int(whole[0, 6]), int(whole[1, 9])]
    ids = generate(model, idx, 12, greedy=True, stop_tokens=stops)
    ends = []
    for row, expected in zip(ids[:, 3:].tolist(), whole[:, 3:].tolist(), strict=True):
        at = min([i for i, token in enumerate(expected) if token in stops], default=len(expected))
        assert row == (expected[:at] + expected[at : at + 1] * 12)[: len(row)]
        ends.append(at + 1)
    assert ids.size(1) == min(3 + max(ends), 15)


def test_how_often_it_is_asked_changes_no_ids():
    model, idx = tiny(block_size=16), torch.randint(50, (3, 3))
    stops = generate(model, idx, 4, greedy=True)[:, -1].tolist()
    found = []
    for interval in (1, 5, 100):
        generation = Generation(model, idx, 12, Sampling(greedy=True), stop_tokens=stops, with_logprobs=True)
        generation.stop_interval = interval
        found.append((len(list(generation)), generation.ids, generation.logprobs))
    n = found[0][0]
    assert n <= 4 and [steps for steps, _, _ in found] == [n, 5, 12]
    for _, ids, logprobs in found:
        assert ids.shape == (3, 3 + n) and torch.equal(ids, found[0][1]) and torch.equal(logprobs, found[0][2])


def test_all_rows_stopped_ends_it():
    model, idx = tiny(), torch.randint(50, (3, 3))
    assert generate(model, idx, 40, stop_tokens=range(50)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"stop_tokens holds 50, vocab_size is 50: allowed are 0\.\.49"):
        generate(model, idx, 4, stop_tokens=[50])
    with pytest.raises(TypeError, match="stop_tokens is 5, expected a list of tokens"):
        generate(model, idx, 4, stop_tokens=5)


def test_the_penalty_counts_prompts_and_new_tokens_but_no_padding():
    model = tiny(block_size=64)
    ids = generate(model, [[1, 2, 3], [4]], 10, greedy=True, repetition_penalty=1e9)
    for row, T in zip(ids.tolist(), (3, 1), strict=True):
        assert len(set(row[3 - T :])) == 10 + T
    # The padding is token 0: it would be banned if it counted.
    idx = torch.tensor([[0, 0, 4], [1, 2, 3]])
    allowed = [Generation(model, idx, 1, Sampling(repetition_penalty=2.0), prompt_lengths=n) for n in ([1, 3], [3, 3])]
    assert [g.seen[0].nonzero().flatten().tolist() for g in allowed] == [[4], [0, 4]]


def test_logprobs_are_the_models():
    model, idx = tiny(block_size=16), torch.randint(50, (2, 3))
    settings = Sampling(temperature=0.5, top_k=3)
    generation = Generation(model, idx, 20, settings, torch.Generator().manual_seed(0), with_logprobs=True)
    drawn = torch.stack(list(generation), dim=1)
    ids = generation.ids
    assert torch.equal(ids[:, 3:], drawn) and generation.logprobs.shape == (2, 20)
    model.eval()
    for n in range(20):
        logits, _ = model(ids[:, max(0, n + 3 - 16) : n + 3])
        expected = logits[:, -1].log_softmax(-1).gather(1, drawn[:, n : n + 1]).squeeze(1)
        torch.testing.assert_close(generation.logprobs[:, n], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="with_logprobs is False"):
        _ = Generation(model, idx, 1).logprobs


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(idx=[]), ValueError, "idx is empty"),
        (dict(idx=[[1], []]), ValueError, r"idx\[1\] has shape \(0,\)"),
        (dict(idx=[[1.5]]), TypeError, r"idx\[0\] is torch.float32"),
        (dict(idx=[[1], [50]]), ValueError, "idx holds token 50"),
        (dict(idx=[[1]], prompt_lengths=[1]), ValueError, "prompt_lengths is for idx of shape"),
        (dict(prompt_lengths=[3, 0]), ValueError, r"prompt_lengths is \[3, 0\], expected 2 numbers in 1..3"),
        (dict(prompt_lengths=[3, 4]), ValueError, r"prompt_lengths is \[3, 4\]"),
        (dict(prompt_lengths=[3]), ValueError, r"prompt_lengths is \[3\]"),
        (dict(idx=[[1] * 9], crop=False), ValueError, "a prompt has 9 tokens, block_size is 8, and crop is False"),
        (dict(min_p=2.0), ValueError, "min_p is 2.0"),
        (dict(repetition_penalty=-1.0), ValueError, "repetition_penalty is -1.0"),
    ],
)
def test_what_is_not_allowed_in_batches_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        generate(tiny(), **{"idx": torch.ones(2, 3, dtype=torch.int64), "max_new_tokens": 1, **settings})
