"""How the next token is computed: weights laid out for a CPU, torch.compile, CUDA graphs. None changes the text."""

import contextlib
import copy

import pytest
import torch
import torch._dynamo.testing
from tiny_models import tiny

from fastgpt2.gpt2 import linear, packed
from fastgpt2.gpt2.generation import decoder
from fastgpt2.gpt2.generation.decoder import WORTH_PREPARING
from fastgpt2.gpt2.generation.generate import Generation, generate
from fastgpt2.gpt2.generation.sampling import Sampling
from fastgpt2.gpt2.packed import can_pack

NEW = WORTH_PREPARING + 8
cpu_only = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


def unprepared(model, idx, new=NEW, **settings):
    """Generated without any preparation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "can_pack", lambda model: False)
        patch.setattr(decoder, "_IDLE", {})
        return generate(model, idx, new, cuda_graph=False, **settings)


@pytest.fixture
def laid_out(monkeypatch):
    """The shapes of the weights that are laid out, in order."""
    shapes = []
    pack = packed._pack
    monkeypatch.setattr(packed, "_pack", lambda weight: shapes.append(tuple(weight.shape)) or pack(weight))
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", True)
    return shapes


# ---------------------------------------------------------------------------------------------------------- packed


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, dict(bias=False), dict(vocab_multiple=64)], ids=str)
def test_laid_out_weights_write_the_same(laid_out, dtype, settings):
    model, idx = tiny(block_size=64, **settings).to(dtype).eval(), torch.randint(50, (3, 4))
    expected = unprepared(model, idx, greedy=True)
    assert not laid_out
    ids = generate(model, idx, NEW, greedy=True)
    assert len(laid_out) == (2 * 4 + 1 if can_pack(model) else 0)
    if dtype == torch.float32:  # in bf16 logits that round alike may tie
        assert torch.equal(ids, expected)
    if can_pack(model):
        with torch.no_grad():
            torch.testing.assert_close(packed.packed(model)(idx)[0], model(idx)[0])


@cpu_only
def test_laid_out_weights_are_kept_until_they_change(laid_out):
    model, idx = tiny(block_size=64).eval(), torch.randint(50, (1, 4))
    generate(model, idx, NEW)
    laid_out.clear()
    generate(model, idx, NEW)
    assert laid_out == []
    weight = model.transformer.h[1].mlp.c_proj.weight
    changes = [
        lambda: weight.data.mul_(-1.0),  # counted by no version
        lambda: weight.data[0, :2].add_(1.0),
        lambda: weight.data.copy_(weight.data.roll(1, 0)),
        lambda: weight.data.copy_(weight.data.flip(1)),
        lambda: weight.data[:, 1::2].neg_(),
        lambda: weight.data[:, ::2].neg_(),
        lambda: weight.data[3:5, 7].neg_(),
        lambda: torch.nn.init.normal_(weight, std=0.3),
        lambda: setattr(model.transformer.h[1].mlp.c_proj, "weight", torch.nn.Parameter(weight * 2)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        assert torch.equal(generate(model, idx, NEW, greedy=True), unprepared(model, idx, greedy=True))
        assert laid_out == [(16, 64)]
        laid_out.clear()


@cpu_only
def test_inference_mode():
    expected = generate(tiny(block_size=64).eval(), torch.tensor([[1, 2]]), NEW, greedy=True)
    with torch.inference_mode():
        inside = tiny(block_size=64).eval()
        assert torch.equal(generate(inside, torch.tensor([[1, 2]]), NEW, greedy=True), expected)


@cpu_only
def test_a_model_in_training_keeps_nothing_more(laid_out):
    model, idx = tiny(block_size=64), torch.randint(50, (1, 4))
    generate(model.eval(), idx, NEW)
    assert model in packed._KEPT
    generate(model.train(), idx, NEW)
    assert model not in packed._KEPT and model.training


def test_few_tokens_and_other_kernels_are_not_prepared(laid_out):
    model, idx = tiny(block_size=64).eval(), torch.randint(50, (1, 4))
    generate(model, idx, WORTH_PREPARING - 1)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, idx, NEW)
    generate(copy.deepcopy(model).double(), idx, NEW)
    assert not laid_out


def test_a_weight_that_cannot_be_laid_out_is_not(laid_out):
    model, idx = tiny(block_size=64).eval(), torch.randint(50, (1, 4))
    weight = model.transformer.h[0].attn.c_proj.weight  # (16, 16)
    for odd, others in ((weight.detach().t(), 8), (torch.randn(257)[1:].view(16, 16), 0)):
        model.transformer.h[0].attn.c_proj.weight = torch.nn.Parameter(odd)
        assert torch.equal(generate(model, idx, NEW, greedy=True), unprepared(model, idx, greedy=True))
        assert len(laid_out) == others, "of the other eight, which the second time are there"
        laid_out.clear()


# ------------------------------------------------------------------------------------------- compiled and captured


def test_compiled_writes_the_same():
    model, idx = tiny(block_size=16), torch.randint(50, (2, 4))
    counter, compile = torch._dynamo.testing.CompileCounter(), torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **kw: compile(model, backend=counter, fullgraph=True, **kw))
        ids = generate(model, idx, 20, greedy=True, compile=True)
        for T, new in ((2, 20), (3, 9)):
            generate(model, idx[:, :T], new, compile=True)
    assert counter.frame_count == 1, "every token of every text is the same work"
    assert torch.equal(ids, unprepared(model, idx, 20, greedy=True))


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's capture as CPU tensors can have it; -> what was done."""
    done = []

    class Stream:
        wait_stream = staticmethod(lambda other: None)

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    return done


def test_a_capture_leaves_the_cache_as_it_was(fake_cuda):
    model = tiny(block_size=8).eval()
    cache = decoder.KVCache(model, 2, 8, whole=True)
    with torch.no_grad():
        model(torch.randint(50, (2, 3)), cache=cache)
        graph = decoder._Graph(model, torch.tensor([[1], [2]]), cache)
        # Nothing runs while a real capture records; here it ran once.
        assert cache.lengths.tolist() == [4, 4]
        graph(torch.tensor([[3], [4]]), cache=cache)
    assert fake_cuda == ["replay"] and graph.token.tolist() == [[3], [4]]


@pytest.fixture
def captures(monkeypatch):
    """Graphs that call what they would have captured, as if every device had them; -> (rows, room) of each."""
    made = []

    class Graph(decoder._Graph):
        def __init__(self, model, token, cache):
            self.read, self.cache = model, cache
            made.append((token.size(0), cache.keys_values.size(4)))

        def __call__(self, token, cache):
            assert cache is self.cache
            return self.read(token, cache=cache)

    monkeypatch.setattr(decoder, "_Graph", Graph)
    monkeypatch.setattr(decoder, "_has_graphs", lambda model: True)
    monkeypatch.setattr(decoder, "can_pack", lambda model: False)
    monkeypatch.setattr(decoder, "ROOM", 32)
    return made


def test_a_graph_serves_the_next_texts_of_its_model(captures):
    model, idx = tiny(block_size=64), torch.randint(50, (2, 4))
    for prompt, new in ((idx, NEW), (idx[:, :2], NEW), (idx, 20), (idx, 20)):
        assert torch.equal(generate(model, prompt, new, greedy=True), unprepared(model, prompt, new, greedy=True))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(-1.0)  # in place: the graph reads it
    assert torch.equal(generate(model, idx, NEW, greedy=True), unprepared(model, idx, greedy=True))
    assert captures == [(2, 32)]
    generate(model, idx[:1], NEW)
    generate(model, idx[:1], 2 * NEW)
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight * 2)
    assert torch.equal(generate(model, idx[:1], 2 * NEW, greedy=True), unprepared(model, idx[:1], 2 * NEW, greedy=True))
    assert captures == [(2, 32), (1, 32), (1, 64), (1, 64)]


def test_texts_in_turns_keep_their_graphs(captures):
    """As a bench has them, or a server with two sizes of batches."""
    model, idx = tiny(block_size=64), torch.randint(50, (2, 4))
    for _ in range(3):
        generate(model, idx, NEW)
        generate(model, idx[:1], NEW)
    assert captures == [(2, 32), (1, 32)]
    generate(torch.nn.Module.to(model, torch.float64), idx, NEW)
    assert len(decoder._IDLE[model]) == 1, "graphs of weights that are gone are forgotten"


def test_a_text_that_ends_early_leaves_its_graph_and_its_end_is_final(captures):
    model, idx = tiny(block_size=64), torch.randint(50, (1, 4))
    for _ in range(3):
        one = Generation(model, idx, NEW, Sampling(greedy=True))
        next(one), next(one)
        one.close()
        assert next(one, None) is None and one.ids.shape == (1, 6)
    two = Generation(model, idx, NEW, Sampling(greedy=True))
    next(two), next(two)
    one.close()  # once more, while another text has the graph
    three = Generation(model, idx, NEW, Sampling(greedy=True))
    next(three), next(three)
    assert len(captures) == 2
    assert [*two][-1] == [*three][-1]


def test_two_texts_at_once_do_not_share_a_graph(captures):
    model, idx = tiny(block_size=64), torch.randint(50, (2, 4))
    generate(model, idx, NEW)
    one, two = (Generation(model, idx.roll(n, 1), NEW, Sampling(greedy=True)) for n in (0, 1))
    for _ in zip(one, two, strict=True):
        pass
    assert len(captures) == 2
    for n, text in enumerate((one, two)):
        assert torch.equal(text.ids, unprepared(model, idx.roll(n, 1), greedy=True))


def test_what_cannot_be_captured_is_written_without(captures, monkeypatch):
    def fails(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, idx = tiny(block_size=64), torch.randint(50, (2, 4))
    monkeypatch.setattr(decoder._Graph, "__init__", fails)
    with pytest.warns(UserWarning, match="not captured as a CUDA graph: operation not permitted"):
        ids = generate(model, idx, NEW, greedy=True)
    assert torch.equal(ids, unprepared(model, idx, greedy=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_writes_the_same(device, dtype):
    model = tiny(block_size=64, n_embd=32).to(device, dtype)
    model.kernels = "triton"
    idx = torch.randint(50, (3, 4), device=device)
    expected = unprepared(model, idx, 80, greedy=True)
    assert torch.equal(generate(model, idx, 80, greedy=True), expected)
    drawn = [
        generate(model, idx, 80, top_k=10, generator=torch.Generator(device).manual_seed(0), cuda_graph=graph)
        for graph in (True, False)
    ]
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_graph_is_of_the_models_device():
    """Not of the current one, which stays the first."""
    model, idx = tiny(block_size=64, n_embd=32), torch.randint(50, (3, 4))
    first, second = (generate(model.to(d), idx.to(d), 80, greedy=True).cpu() for d in ("cuda:0", "cuda:1"))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_a_token_waits_for_no_gpu(device):
    model = tiny(block_size=64, n_embd=32).to(device)
    idx = torch.randint(50, (2, 4), device=device)
    generation = decoder.Decoder(model, torch.cat([idx, idx, idx], 1), torch.zeros(2, dtype=torch.int64, device=device))
    for end in (4, 5):
        generation.logits(end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for end in (6, 7, 8):
            generation.logits(end)
    finally:
        torch.cuda.set_sync_debug_mode("default")
