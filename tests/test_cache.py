"""The cache changes what writing costs, not what is written: ids equal those of whole passes, and HuggingFace's."""

import copy
import warnings

import pytest
import torch
from hf_models import DEVICE, hf_gpt2
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from fastgpt2 import GPT
from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.generation.decoder import Decoder
from fastgpt2.gpt2.generation.generate import generate
from fastgpt2.gpt2.generation.sampling import Sampling, next_token

S = 24  # block_size


GREEDY = Sampling(greedy=True)
DRAWN = Sampling(top_k=20)  # does not end in a loop, as greedy text of a random model does


def seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


def whole_passes(model: GPT, idx: torch.Tensor, n: int, sampling: Sampling = GREEDY) -> torch.Tensor:
    """idx (B, T) and n tokens more, each from a pass over the last block_size."""
    model.eval()
    generator = seeded()
    with torch.no_grad():
        for _ in range(n):
            logits, _ = model(idx[:, -model.config.block_size :])
            idx = torch.cat([idx, next_token(logits[:, -1], sampling, generator)], dim=1)
    return idx


@pytest.fixture(scope="module")
def hf():
    return hf_gpt2(n_positions=256, n_layer=2, n_embd=32, n_head=2).eval().to(DEVICE)


# ------------------------------------------------------------------------------------------------------ same text


@pytest.mark.parametrize("B", [1, 8])
def test_200_tokens_are_those_of_whole_passes_and_huggingfaces(hf, B):
    ours = GPT.from_huggingface(hf, kernels="torch")
    idx = torch.randint(61, (B, 9), device=DEVICE)
    ids = generate(ours, idx, 200, greedy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False)
    assert torch.equal(ids, theirs)
    assert torch.equal(ids, whole_passes(ours, idx, 200))
    drawn = generate(ours, idx, 200, top_k=20, generator=seeded())
    assert torch.equal(drawn, whole_passes(ours, idx, 200, DRAWN)) and len(drawn.unique()) > 20


@pytest.mark.filterwarnings("ignore:a prompt has")
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("T", [1, 2, S - 1, S, S + 5])
def test_every_boundary(T, B):
    model = tiny(block_size=S).to(DEVICE)
    idx = torch.randint(50, (B, T), device=DEVICE)
    assert torch.equal(generate(model, idx, 2 * S, greedy=True), whole_passes(model, idx, 2 * S))
    drawn = generate(model, idx, 2 * S, top_k=20, generator=seeded())
    assert torch.equal(drawn, whole_passes(model, idx, 2 * S, DRAWN))


@pytest.mark.parametrize(("B", "T"), [(1, 1), (8, 7), (2, 8)])
def test_triton_writes_the_same(B, T):
    model = tiny(block_size=8, n_embd=32).to(DEVICE)
    idx = torch.randint(50, (B, T), device=DEVICE)
    expected = generate(model, idx, 3, greedy=True)
    model.kernels = "triton"
    assert torch.equal(generate(model, idx, 3, greedy=True), expected)


@pytest.mark.filterwarnings("ignore:a prompt has")
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), n=st.integers(0, 12), as_list=st.booleans())
def test_prompts_of_different_lengths_do_not_meet(lengths, n, as_list):
    model, T = tiny(block_size=10), max(lengths)
    prompts = [torch.randint(50, (length,)) for length in lengths]
    if as_list:
        ids = generate(model, prompts, n, greedy=True)
    else:
        padding = [torch.randint(50, (T - length,)) for length in lengths]  # any tokens
        idx = torch.stack([torch.cat(pair) for pair in zip(padding, prompts, strict=True)])
        ids = generate(model, idx, n, greedy=True, prompt_lengths=lengths)
        assert torch.equal(ids[:, :T], idx)
    assert ids.shape == (len(lengths), T + n)
    for row, prompt in zip(ids, prompts, strict=True):
        assert torch.equal(row[T - len(prompt) :], whole_passes(model, prompt[None], n)[0])


def test_a_cache_forgets_what_was_no_number():
    model, idx = tiny(block_size=S).to(DEVICE).eval(), torch.randint(50, (2, 9), device=DEVICE)
    cache, weights = KVCache(model, 2, S, whole=True), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(float("nan"))
        model(idx, cache=cache)
        model.load_state_dict(weights)
        cache.start()
        model(idx[:, :2], cache=cache)
        after, _ = model(idx[:, 2:3], cache=cache)
        expected, _ = model(idx[:, :3])
    torch.testing.assert_close(after, expected)


def test_left_padding_is_huggingfaces(hf):
    ours = GPT.from_huggingface(hf, kernels="torch")
    lengths = [3, 11, 7]
    idx = torch.randint(61, (3, 11), device=DEVICE)
    mask = (torch.arange(11) >= 11 - torch.tensor(lengths)[:, None]).long().to(DEVICE)
    theirs = hf.generate(idx, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(ours, idx, 20, greedy=True, prompt_lengths=lengths), theirs)


def test_autocast_and_bf16_weights():
    idx = torch.randint(50, (2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(tiny(), idx, 12, greedy=True).shape == (2, 16)
    assert generate(tiny().bfloat16(), idx, 30, greedy=True).shape == (2, 34)


# ------------------------------------------------------------------------------------------------------- same work


def test_a_token_costs_one_token_until_the_block_is_full(monkeypatch):
    model, read = tiny(block_size=8), []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, idx, **more: read.append(idx.size(1)) or forward(self, idx, **more)
    )
    generate(model, torch.randint(50, (2, 3)), 8, greedy=True)
    assert read == [3, 1, 1, 1, 1, 1, 8, 8]


def test_the_cache_is_taken_once():
    model = tiny(block_size=S)
    tokens = torch.randint(50, (2, S))
    decoder = Decoder(model, tokens, torch.tensor([0, 2]))
    memory = decoder.cache.keys_values.data_ptr()
    for end in range(4, S + 1):
        decoder.logits(end)
    assert decoder.cache.keys_values.data_ptr() == memory
    assert decoder.cache.keys_values.shape == (2, 2, 2, 2, S, 8)
    assert decoder.cache.lengths.tolist() == [S, S - 2]


# ------------------------------------------------------------------------------------------------- used by itself


def test_a_user_fills_and_continues_a_cache():
    model, idx = tiny().eval(), torch.randint(50, (3, 6))
    cache = KVCache(model, 3, 8)
    for _ in range(2):
        for past, T in ((0, 4), (4, 1), (5, 1)):
            logits, loss = model(idx[:, past : past + T], cache=cache)
            expected, _ = model(idx[:, : past + T])
            assert loss is None and logits.shape == (3, 1, 50)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        cache.start()


def test_what_a_cache_cannot_take_is_an_error():
    model, idx = tiny(), torch.randint(50, (2, 4))
    cache = KVCache(model.eval(), 2, 5)
    with pytest.raises(ValueError, match="leave out targets"):
        model(idx, idx, cache=cache)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        model.train()(idx, cache=cache)
    model.eval()
    with pytest.raises(ValueError, match="idx has 1 rows, the cache 2"):
        model(idx[:1], cache=cache)
    with pytest.raises(ValueError, match="rows of 6 tokens, the cache has room for 5"):
        model(torch.zeros(2, 6, dtype=torch.int64), cache=cache)
    model(idx, cache=cache)
    with pytest.raises(ValueError, match="the cache is not empty"):
        model(idx, cache=cache)
    model(idx[:, :1], cache=cache)
    with pytest.raises(ValueError, match="rows of 6 tokens"):
        model(idx[:, :1], cache=cache)
    for wrong, message in ((dict(B=0, S=4), "B is 0"), (dict(B=1, S=0), "S is 0"), (dict(B=1, S=9), "S is 9, .*1..8")):
        with pytest.raises(ValueError, match=message):
            KVCache(model, **wrong)
