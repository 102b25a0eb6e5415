"""The operator around decode attention: compiled and captured, the written cache, lost gradients, bad input."""

import functools
from unittest import mock

import pytest
import torch
from attention_inputs import lengths_of, token_and_cache

from fastgpt2.kernels import _device
from fastgpt2.kernels.decode_attention import decode_attention, decode_attention_fwd


@pytest.mark.parametrize("multiprocessors", (1, 100))
def test_opcheck(device, multiprocessors):
    qkv, cache = token_and_cache(2, 2, 270, 16, torch.float32, device)
    lengths = lengths_of(3, 69, device=device)
    with mock.patch.object(_device, "sm_count", lambda device: multiprocessors):
        for caches, starts in (((cache, None), None), (tuple(cache.clone()), lengths_of(0, 5, device=device))):
            keys, values = caches
            arguments = (qkv, keys, values, lengths, starts, 2, 0.25)
            torch.library.opcheck(torch.ops.fastgpt2.decode_attention_fwd.default, arguments)


def test_compiled_whole(device):
    """One graph for steps of a loop; the cache changes in place as in eager mode."""
    qkv, cache = token_and_cache(2, 2, 30, 16, torch.float32, device)
    lengths, graphs = lengths_of(3, 20, device=device), []

    def step(qkv, cache, lengths):
        out = decode_attention(2 * qkv, cache, lengths, 2)
        lengths += 1
        return out + 1

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    counted = torch.compile(step, backend=backend, fullgraph=True)
    results = []
    for function in (step, compiled, counted):
        state = cache.clone(), lengths.clone()
        outs = [function(qkv, *state) for _ in range(3)]
        results.append((*outs, *state))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    assert len(graphs) == 1 and (results[0][-1] == lengths + 3).all()


@pytest.mark.gpu
def test_one_graph_serves_every_length(device):
    """A captured CUDA graph of a step, which also advances the lengths, writes what eager steps do."""
    qkv, cache = token_and_cache(2, 12, 300, 64, torch.bfloat16, device)
    lengths, steps = lengths_of(0, 130, device=device), 150

    def step(state):
        out = decode_attention(qkv, *state, 12)
        state[1].add_(1)
        return out

    eager, graphed = ([cache.clone(), lengths.clone()] for _ in range(2))
    expected = [step(eager) for _ in range(steps)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(graphed)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out, wanted)
    assert torch.equal(eager[0], graphed[0])


def test_gradients_are_refused_where_they_would_be_lost(device):
    qkv, cache = token_and_cache(1, 1, 5, 16, torch.float32, device)
    lengths = lengths_of(2, device=device)
    expected = decode_attention(qkv, cache.clone(), lengths, 1)
    for inputs in ((qkv.clone().requires_grad_(), cache), (qkv, cache.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"requires grad, allowed is a call under torch.no_grad\(\)"):
            decode_attention(*inputs, lengths, 1)
        with torch.no_grad():
            assert torch.equal(decode_attention(*inputs, lengths, 1), expected)
    keys, values = cache.clone()
    with pytest.raises(ValueError, match="cache is a tensor that requires grad"):
        decode_attention(qkv, (keys, values.requires_grad_()), lengths, 1)
    with torch.inference_mode():
        for own in (cache, cache.clone()):
            assert torch.equal(decode_attention(qkv, own, lengths, 1), expected)


def test_autograd_notices_the_written_cache(device):
    qkv, cache = token_and_cache(1, 1, 5, 16, torch.float32, device)
    weight = torch.ones((), device=device, requires_grad=True)
    kept = (cache * weight).sum()
    decode_attention(qkv, cache, lengths_of(2, device=device), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    keys, values = cache.clone(), cache[1].clone()
    kept = (values * weight).sum()
    decode_attention(qkv, (keys[0], values), lengths_of(2, device=device), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(qkv=lambda zeros: zeros(2, 1, 97)),
            r"qkv is of shape \(2, 1, 97\) with n_head 2, allowed is \(B, T, 3 \* n_head",
        ),
        (dict(qkv=lambda zeros: zeros(2, 2, 96)), r"qkv is of shape \(2, 2, 96\), allowed is \(B, 1, 3 \* C\)"),
        (dict(qkv=lambda zeros: zeros(2, 1, 90)), "the head size is 15, allowed is 16 to 128"),
        (dict(scale=-1.0), "scale is -1.0, allowed is a positive number"),
        (
            dict(cache=lambda zeros: zeros(2, 2, 2, 5, 17)),
            r"cache is torch.float32 \(2, 2, 2, 5, 17\) on .*, allowed is torch.float32",
        ),
        (dict(cache=lambda zeros: zeros(2, 2, 2, 0, 16)), "cache is .*S at least 1"),
        (dict(cache=lambda zeros: zeros(2, 3, 2, 5, 16)), "cache is"),
        (dict(cache=lambda zeros: zeros(2, 2, 2, 5, 16).half()), "cache is torch.float16"),
        (
            dict(cache=lambda zeros: zeros(2, 1, 2, 5, 16).expand(2, 2, 2, 5, 16)),
            "cache is of strides .* no memory shared",
        ),
        (dict(cache=lambda zeros: zeros(2, 2, 2, 16, 5).mT), "cache is of strides .* contiguous last dimension"),
        (dict(lengths=lambda zeros: zeros(2).long()), r"lengths is torch.int64 \(2,\) on .*, allowed is torch.int32"),
        (dict(lengths=lambda zeros: zeros(1).int()), r"lengths is torch.int32 \(1,\)"),
        (dict(starts=lambda zeros: zeros(2).long()), r"starts is torch.int64 \(2,\) on .*, allowed is torch.int32"),
        (
            dict(cache=lambda zeros: (zeros(2, 2, 2, 5, 16), zeros(2, 2, 2, 5, 16))),
            r"cache is torch.float32 \(2, 2, 2, 5, 16\) on .*, allowed is torch.float32 \(2, 2, S, 16\)",
        ),
        (
            dict(cache=lambda zeros: (zeros(2, 2, 5, 16), zeros(2, 2, 6, 16))),
            r"cache is keys and values torch.float32 \(2, 2, 6, 16\) on .*, allowed is values as keys",
        ),
        (
            dict(cache=lambda zeros: (zeros(2, 2, 5, 16), zeros(2, 5, 2, 16).transpose(1, 2))),
            "cache is of strides .* and .*, allowed is the same strides for keys and values",
        ),
    ],
)
def test_refused(device, arguments, message):
    zeros = functools.partial(torch.zeros, device=device)
    good = dict(qkv=zeros(2, 1, 96), cache=zeros(2, 2, 2, 5, 16), lengths=zeros(2).int())
    arguments = good | {name: value(zeros) if callable(value) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=rf"decode_attention: {message}.*attention='torch'"):
        decode_attention(n_head=2, **arguments)


def test_refused_dtype(device):
    with pytest.raises(TypeError, match="decode_attention: qkv is torch.int32, allowed are .*attention='torch'"):
        zeros = torch.zeros(1, 1, 48, dtype=torch.int32, device=device)
        decode_attention(zeros, torch.zeros(2, 1, 1, 5, 16, device=device), lengths_of(0, device=device), 1)


def test_operator_is_the_launcher(device):
    """What `torch.ops` and an eager call give is one thing."""
    qkv, cache = token_and_cache(1, 2, 70, 16, torch.float32, device)
    lengths = lengths_of(50, device=device)
    eager = decode_attention(qkv, cache.clone(), lengths, 2, scale=0.25)
    assert torch.equal(torch.ops.fastgpt2.decode_attention_fwd(qkv, cache.clone(), None, lengths, None, 2, 0.25), eager)
    assert torch.equal(decode_attention_fwd(qkv, cache.clone(), None, lengths, None, 2, 0.25), eager)
