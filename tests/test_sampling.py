"""Which token comes next: what is drawn, from what, and what is refused."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastgpt2.gpt2.generation.sampling import Sampling, next_token

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 20_000


def frequencies(**settings) -> torch.Tensor:
    """How often each token is drawn from PROBABILITIES."""
    logits = PROBABILITIES.log().expand(DRAWS, -1)
    tokens = next_token(logits, Sampling(**settings), generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens.flatten(), minlength=5) / DRAWS


def close(observed, expected):
    """Within 5 standard deviations of the binomial; exactly 0 where nothing may be drawn."""
    expected = expected / expected.sum()
    return bool(((observed - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), PROBABILITIES),
        (dict(temperature=0.5), PROBABILITIES**2),
        (dict(temperature=2.0), PROBABILITIES**0.5),
        (dict(top_k=2), torch.tensor([0, 0.4, 0, 0.25, 0])),
        (dict(top_k=5), PROBABILITIES),
        (dict(top_k=999), PROBABILITIES),
        (dict(top_p=0.3), torch.tensor([0, 1.0, 0, 0, 0])),
        (dict(top_p=0.5), torch.tensor([0, 0.4, 0, 0.25, 0])),
        (dict(top_p=0.66), torch.tensor([0, 0.4, 0, 0.25, 0.2])),
        (dict(top_p=1.0), PROBABILITIES),
        # Of the three likeliest (0.85 of all), 0.4 / 0.85 = 0.47 and 0.65 / 0.85 = 0.76.
        (dict(top_k=3, top_p=0.7), torch.tensor([0, 0.4, 0, 0.25, 0])),
        (dict(top_k=3, top_p=0.8, temperature=0.5), torch.tensor([0, 0.16, 0, 0.0625, 0])),
        (dict(min_p=0.49), torch.tensor([0, 0.4, 0, 0.25, 0.2])),
        (dict(min_p=0.3, temperature=2.0), PROBABILITIES**0.5),
        (dict(min_p=0.6, top_k=3), torch.tensor([0, 0.4, 0, 0.25, 0])),
        (dict(min_p=0.0), PROBABILITIES),
        (dict(min_p=1.0), torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=str,
)
def test_tokens_are_drawn_in_proportion(settings, expected):
    assert close(frequencies(**settings), expected)


def test_ties_do_not_widen_top_k():
    tokens = next_token(torch.zeros(2000, 50), Sampling(top_k=3), generator=torch.Generator().manual_seed(0))
    assert len(tokens.unique()) == 3


def test_greedy_and_top_1_are_argmax():
    logits = torch.randn(100, 50).round()  # with ties
    for settings in (dict(greedy=True), dict(top_k=1), dict(top_k=1, temperature=50.0)):
        assert torch.equal(next_token(logits, Sampling(**settings)), logits.argmax(-1, keepdim=True))


def test_half_precision_logits_are_widened():
    # The 901 likeliest of 1000 equal tokens hold 0.9005; a sum kept in half precision is off by several tokens.
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.zeros(DRAWS, 1000, dtype=dtype)
        tokens = next_token(logits, Sampling(top_p=0.9005), generator=torch.Generator().manual_seed(0))
        assert len(tokens.unique()) == 901


@example(temperature=1e-300, top_k=None, top_p=None, min_p=None, scale=1e30)
@given(
    temperature=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
    scale=st.sampled_from([0.0, 1.0, 1e30]),
)
def test_any_settings_give_a_token(temperature, top_k, top_p, min_p, scale):
    logits = torch.randn(3, 50) * scale
    tokens = next_token(logits, Sampling(temperature, top_k, top_p, min_p), torch.Generator().manual_seed(0))
    assert tokens.shape == (3, 1) and 0 <= tokens.min() and tokens.max() < 50
    if temperature < 1e-20 and scale:
        assert torch.equal(tokens, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize(
    "settings", [dict(top_k=40), dict(top_p=0.8), dict(top_k=60, top_p=0.9), dict(min_p=0.05)], ids=str
)
def test_chi_square(settings):
    logits, draws = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 1.5, 200_000
    p = logits.double().softmax(0)
    order = p.argsort(descending=True)
    if "top_k" in settings:
        p[order[settings["top_k"] :]] = 0
        p /= p.sum()
    if "top_p" in settings:
        p[order[1:][p[order].cumsum(0)[:-1] >= settings["top_p"]]] = 0
    if "min_p" in settings:
        p[p < settings["min_p"] * p.max()] = 0
    p /= p.sum()
    tokens = next_token(logits.expand(draws, -1), Sampling(**settings), torch.Generator().manual_seed(1))
    counts = torch.bincount(tokens.flatten(), minlength=100)
    kept = p > 0
    assert 5 < kept.sum() < 100 and counts[~kept].sum() == 0
    expected = draws * p[kept]
    chi_square, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), kept.sum() - 1
    # Wilson and Hilferty's normal approximation; 4 standard deviations are passed once in 30,000 seeds.
    assert ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)).sqrt() < 4


def test_settings_are_huggingfaces():
    from transformers.generation import logits_process as theirs

    logits = torch.randn(4, 50)
    ids = torch.randint(50, (4, 7))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    warped = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    for warper in (
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.03),
    ):
        warped = warper(ids, warped)
    settings = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.03, repetition_penalty=1.3)
    rows = logits.repeat_interleave(DRAWS, 0)
    tokens = next_token(rows, settings, torch.Generator().manual_seed(0), seen.repeat_interleave(DRAWS, 0))
    for row, drawn in zip(warped.softmax(-1), tokens.view(4, DRAWS), strict=True):
        assert 2 < (row > 0).sum() < 20 and close(torch.bincount(drawn, minlength=50) / DRAWS, row)


def test_the_penalty_is_on_tokens_that_are_there():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seen = torch.tensor([[True, False, True, False]])
    for penalty, expected in ((1.0, 0), (1.2, 1), (0.5, 0)):
        settings = Sampling(greedy=True, repetition_penalty=penalty)
        assert next_token(logits, settings, seen=seen).item() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(min_p=-0.1), "min_p is -0.1, allowed are None and 0 <= min_p <= 1"),
        (dict(min_p=1.1), "min_p is 1.1"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0, allowed are numbers above 0"),
        (dict(repetition_penalty=math.inf), "repetition_penalty is inf"),
    ],
)
def test_what_is_not_allowed_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
